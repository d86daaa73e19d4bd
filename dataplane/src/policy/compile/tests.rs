use culvert_api::config::{Format, Tree};
use culvert_proto::{Name, Target};

use super::{super::*, *};

const HASH: &str = "$2b$10$C6UzMDM.H6dfI/f/IKcEeO7oc6YF/OQjL5cV6LJMVP8h3YLyYyEBe";
const NOW: i64 = 1_800_000_000;

fn policy(text: &str) -> Policy {
    let text = text.replace("$HASH", HASH);
    Tree::parse(&text, Format::Toml).unwrap().read().unwrap()
}

fn compiled(text: &str, previous: Option<&Snapshot>) -> Result<Snapshot, Vec<Problem>> {
    let own = OwnAddresses {
        listeners: vec!["0.0.0.0:1082".parse().unwrap(), "127.0.0.1:9182".parse().unwrap()],
        local: vec!["203.0.114.5".parse().unwrap()],
    };
    let generation = previous.map_or(1, |previous| previous.generation + 1);
    compile(Draft::Whole(&policy(text)), Settings::default(), own, generation, previous)
}

/// Judges a target with all names resolving to `addresses`; says what came out.
fn judge(snapshot: &Snapshot, user: Option<&str>, target: &str, addresses: &[&str]) -> String {
    judge_at(NOW, snapshot, user, target, addresses)
}

/// The same of a request that was made then.
fn judge_at(
    at: i64,
    snapshot: &Snapshot,
    user: Option<&str>,
    target: &str,
    addresses: &[&str],
) -> String {
    let target = Target::parse(target.as_bytes()).unwrap();
    let user = user.map(|name| snapshot.directory.find(name.as_bytes()).unwrap());
    let client = [198, 51, 100, 7].into();
    let query = Query { user, client, protocol: Protocol::Socks5, target: &target, at };
    let addresses: Arc<[std::net::IpAddr]> = addresses.iter().map(|a| a.parse().unwrap()).collect();
    let mut resolved: Vec<(Name, _)> = Vec::new();
    loop {
        match snapshot.authorize(query, &resolved, NOW) {
            Decision::NeedsAddresses(name) => resolved.push((name, addresses.clone())),
            Decision::Denied(denial) => return format!("denied by {}", denial.name()),
            Decision::Permit(permit) => {
                let rule = permit.rule().map_or("default", |rule| rule);
                let dialled: Vec<_> = permit.addresses().iter().map(ToString::to_string).collect();
                let waited = if resolved.is_empty() { "" } else { " after resolving" };
                return format!("{rule}: {}{waited}", dialled.join(" "));
            }
        }
    }
}

/// RELIABILITY F2, F4 and F5: by whatever way through IPv6.
#[test]
fn an_ipv4_address_is_itself_behind_a_translator() {
    let snapshot = compiled(
        r#"
        [[filter]]
        cidr = ["8.8.8.0/24"]
        [[rule]]
        name = "no"
        when = { cidr = ["9.9.9.9/32"] }
        action = "deny"
        "#,
        None,
    )
    .unwrap();
    for (target, outcome) in [
        ("8.8.8.8:53", "denied by filter"),
        ("[64:ff9b::808:808]:53", "denied by filter"),
        ("[2002:808:808::1]:53", "denied by filter"),
        ("[64:ff9b::909:909]:53", "denied by rule"),
        ("[64:ff9b::101:101]:53", "default: [64:ff9b::101:101]:53"),
        // Our own listener, and what else is here.
        ("203.0.114.5:1082", "denied by own_listener"),
        ("[64:ff9b::cb00:7205]:1082", "denied by own_listener"),
        ("203.0.114.5:3306", "denied by internal"),
        ("[64:ff9b::cb00:7205]:3306", "denied by internal"),
        ("168.63.129.16:80", "denied by internal"),
    ] {
        assert_eq!(judge(&snapshot, None, target, &[]), outcome, "{target}");
    }
    // A rule that denies all denies what nothing before it allows.
    let only = compiled(
        r#"
        [[rule]]
        when = { cidr = ["64:ff9b::/96"] }
        action = "allow"
        [[rule]]
        action = "deny"
        "#,
        None,
    )
    .unwrap();
    assert_eq!(judge(&only, None, "[64:ff9b::808:808]:53", &[]), "#1: [64:ff9b::808:808]:53");
    assert_eq!(judge(&only, None, "8.8.8.8:53", &[]), "denied by rule");
    // Of a name's addresses only the others are left.
    let both = judge(&snapshot, None, "dns.example:53", &["64:ff9b::808:808", "1.1.1.1"]);
    assert_eq!(both, "default: 1.1.1.1:53 after resolving");
    let allowed = compiled("allow_internal = ['203.0.114.5/32']", None).unwrap();
    let mine = judge(&allowed, None, "203.0.114.5:3306", &[]);
    assert_eq!(mine, "default: 203.0.114.5:3306");
}

#[test]
fn the_first_rule_that_matches_decides() {
    let snapshot = compiled(
        r#"
        default = "deny"
        [[user]]
        name = "ann"
        password_hash = "$HASH"
        groups = ["staff"]
        [[user]]
        name = "bob"
        password_hash = "$HASH"
        [[rule]]
        name = "staff-web"
        when = { group = ["staff"], port = [443, "8000-8100"] }
        [[rule]]
        name = "no-mail"
        when = { domain_suffix = ["mail.example"] }
        action = "deny"
        [[rule]]
        name = "old-host"
        when = { domain = ["old.example"] }
        action = "redirect"
        to = "10.0.0.9:80"
        [[rule]]
        name = "net"
        when = { cidr = ["9.9.9.0/24"], user = ["bob"] }
        "#,
        None,
    )
    .unwrap();
    let judge = |user, target, addresses: &[&str]| judge(&snapshot, user, target, addresses);
    assert_eq!(
        judge(Some("ann"), "x.example:443", &["8.8.8.8"]),
        "staff-web: 8.8.8.8:443 after resolving"
    );
    assert_eq!(judge(Some("ann"), "8.8.8.8:8050", &[]), "staff-web: 8.8.8.8:8050");
    assert_eq!(judge(Some("ann"), "8.8.8.8:80", &[]), "denied by default");
    assert_eq!(judge(Some("bob"), "a.mail.example:443", &["8.8.8.8"]), "denied by rule");
    assert_eq!(judge(None, "old.example:1", &[]), "old-host: 10.0.0.9:80");
    assert_eq!(judge(Some("bob"), "x.example:80", &["9.9.9.9"]), "net: 9.9.9.9:80 after resolving");
    assert_eq!(judge(Some("bob"), "x.example:80", &["8.8.8.8"]), "denied by default");
    assert_eq!(judge(None, "9.9.9.9:80", &[]), "denied by default");
}

#[test]
fn white_exempts_from_black_and_rules_still_decide() {
    let snapshot = compiled(
        r#"
        deny_ports = [25]
        [[filter]]
        domain_suffix = ["ads.example"]
        cidr = ["9.0.0.0/8"]
        [[filter]]
        action = "allow"
        domain = ["good.ads.example"]
        cidr = ["9.9.9.9/32"]
        [[filter]]
        port = [6667]
        [[rule]]
        name = "stop"
        when = { domain = ["good.ads.example"], port = [444] }
        action = "deny"
        "#,
        None,
    )
    .unwrap();
    let judge = |target, addresses: &[&str]| judge(&snapshot, None, target, addresses);
    assert_eq!(judge("x.ads.example:80", &["8.8.8.8"]), "denied by filter");
    assert_eq!(judge("x.ads.example:80", &["9.9.9.9"]), "default: 9.9.9.9:80 after resolving");
    assert_eq!(judge("good.ads.example:80", &["8.8.8.8"]), "default: 8.8.8.8:80 after resolving");
    assert_eq!(judge("good.ads.example:444", &["8.8.8.8"]), "denied by rule");
    assert_eq!(judge("9.1.1.1:80", &[]), "denied by filter");
    assert_eq!(judge("named.example:80", &["9.1.1.1"]), "denied by filter");
    assert_eq!(
        judge("named.example:80", &["9.1.1.1", "8.8.8.8"]),
        "default: 8.8.8.8:80 after resolving"
    );
    assert_eq!(judge("8.8.8.8:25", &[]), "denied by port");
    assert_eq!(judge("8.8.8.8:6667", &[]), "denied by filter");
}

#[test]
fn forty_spellings_of_a_blocked_name_are_blocked() {
    let snapshot =
        compiled("[[filter]]\ndomain_suffix = ['bücher.example', 'blocked.example']\n", None)
            .unwrap();
    let mut spellings: Vec<String> = Vec::new();
    for name in ["blocked.example", "BLOCKED.example", "bLoCkEd.ExAmPlE", "blocked.EXAMPLE"] {
        for prefix in ["", "www.", "a.b.c.", "WWW.", "_srv."] {
            for dot in ["", "."] {
                spellings.push(format!("{prefix}{name}{dot}:80"));
            }
        }
    }
    spellings.extend(
        [
            "bücher.example:80",
            "BÜCHER.example:80",
            "xn--bcher-kva.example:80",
            "a.xn--BCHER-kva.EXAMPLE.:80",
        ]
        .map(String::from),
    );
    assert!(spellings.len() >= 40);
    for spelling in spellings {
        assert_eq!(
            judge(&snapshot, None, &spelling, &["8.8.8.8"]),
            "denied by filter",
            "{spelling}"
        );
    }
}

#[test]
fn the_inside_is_refused_by_address_and_by_name() {
    let snapshot = compiled("allow_internal = ['192.168.7.0/24', 'fd00:7::/32']\n", None).unwrap();
    let judge = |target: &str, addresses: &[&str]| judge(&snapshot, None, target, addresses);
    for inside in [
        "127.0.0.1:80",
        "10.1.1.1:80",
        "[::1]:80",
        "169.254.169.254:80",
        "[fd00:ec2::254]:80",
        "[::ffff:127.0.0.1]:80",
        "0x7f000001:80",
        "127.1:80",
        "0:80",
        "0.0.0.0:80",
        "192.168.8.1:80",
    ] {
        assert_eq!(judge(inside, &[]), "denied by internal", "{inside}");
    }
    assert_eq!(judge("rebind.example:80", &["127.0.0.1"]), "denied by internal");
    assert_eq!(
        judge("both.example:80", &["127.0.0.1", "8.8.8.8"]),
        "default: 8.8.8.8:80 after resolving"
    );
    assert_eq!(judge("192.168.7.9:80", &[]), "default: 192.168.7.9:80");
    assert_eq!(judge("[fd00:7::1]:80", &[]), "default: [fd00:7::1]:80");
}

#[test]
fn the_nodes_own_listeners_are_always_refused() {
    let snapshot = compiled(
        "allow_internal = ['0.0.0.0/0', '::/0']\n[[rule]]\nwhen = { domain = ['loop.example'] }\n\
         action = 'redirect'\nto = '127.0.0.1:1082'\n",
        None,
    )
    .unwrap();
    let judge = |target: &str, addresses: &[&str]| judge(&snapshot, None, target, addresses);
    for own in [
        "127.0.0.1:1082",
        "127.9.9.9:1082",
        "203.0.114.5:1082",
        "0.0.0.0:1082",
        "[::1]:1082",
        "[::ffff:127.0.0.1]:1082",
        "127.0.0.1:9182",
        "0.0.0.0:9182",
    ] {
        assert_eq!(judge(own, &[]), "denied by own_listener", "{own}");
    }
    assert_eq!(judge("loop.example:80", &[]), "denied by own_listener");
    assert_eq!(judge("127.0.0.1:1083", &[]), "default: 127.0.0.1:1083");
}

#[test]
fn disabled_expired_and_misplaced_users_are_refused() {
    let snapshot = compiled(
        r#"
        whitelist = ["198.51.100.0/24"]
        [[user]]
        name = "off"
        password_hash = "$HASH"
        status = "disabled"
        [[user]]
        name = "old"
        password_hash = "$HASH"
        expires = "2020-01-01T00:00:00Z"
        [[user]]
        name = "far"
        password_hash = "$HASH"
        limits = { source_addresses = ["10.0.0.0/8"] }
        "#,
        None,
    )
    .unwrap();
    for (user, reason) in [("off", "user"), ("old", "user"), ("far", "source")] {
        assert_eq!(judge(&snapshot, Some(user), "8.8.8.8:80", &[]), format!("denied by {reason}"));
    }
    assert!(!snapshot.admits([198, 51, 101, 1].into()));
}

#[test]
fn unchanged_users_are_shared_and_their_use_survives() {
    let text = |password: &str, rate: &str| {
        let mut users: String = (0..1000)
            .map(|i| format!("[[user]]\nname = 'user{i}'\npassword_hash = '$HASH'\n"))
            .collect();
        users.push_str(&format!(
            "[[user]]\nname = 'ann'\npassword_hash = '{password}'\nlimits = {{ up = '{rate}' }}\n"
        ));
        users
    };
    let first = compiled(&text("$HASH", "1MB/s"), None).unwrap();
    let ann = first.directory.find(b"ann").unwrap().clone();
    let key = RememberKey::random();
    let password = culvert_proto::Secret::new(b"p");
    ann.credential.remember(&key, &password);

    let second = compiled(&text("$HASH", "2MB/s"), Some(&first)).unwrap();
    let shared = first
        .directory
        .shards
        .iter()
        .zip(&second.directory.shards)
        .filter(|(a, b)| Arc::ptr_eq(a, b));
    assert_eq!(shared.count(), SHARDS - 1);
    let again = second.directory.find(b"ann").unwrap();
    assert!(Arc::ptr_eq(&ann.shared, &again.shared) && again.credential.remembers(&key, &password));
    assert_eq!(again.id, ann.id);

    let third = compiled(&text(&HASH.replace("$10$", "$11$"), "2MB/s"), Some(&second)).unwrap();
    assert!(!third.directory.find(b"ann").unwrap().credential.remembers(&key, &password));
    assert!(third.directory.find(b"ann\0").is_none() && third.directory.find(b"an").is_none());
}

#[test]
fn every_problem_is_named_and_nothing_changes() {
    let first = compiled(
        "[[user]]\nname = 'ann'\npassword_hash = '$HASH'\nlimits = { up = '1MB/s' }\n",
        None,
    )
    .unwrap();
    let problems = compiled(
        r#"
        [[user]]
        name = "ann"
        password_hash = "plain"
        limits = { up = "9MB/s" }
        [[user]]
        name = "a:b"
        password_hash = "$HASH"
        [[user]]
        name = "a:b"
        password_hash = "$HASH"
        [[filter]]
        domain = ["no way"]
        domain_regex = ["("]
        [[filter]]
        [[rule]]
        action = "redirect"
        [[rule]]
        upstream = "nowhere"
        when = { protocol = ["gopher"] }
        [[upstream]]
        name = "x"
        type = "socks5"
        "#,
        Some(&first),
    )
    .unwrap_err();
    let mut keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "filter[0].domain[0]",
            "filter[0].domain_regex[0]",
            "filter[1]",
            "rule[0].to",
            "rule[1].upstream",
            "rule[1].when.protocol",
            "upstream[0].type",
            "user[0].password_hash",
            "user[1].name",
            "user[2].name",
            "user[2].name"
        ]
    );
    let rate = first
        .directory
        .find(b"ann")
        .unwrap()
        .shared
        .bucket(crate::ledger::Direction::Up)
        .reserve(1 << 30, clock())
        .units;
    assert_eq!(rate, 1_000_000 / 50, "the old rate still holds");
}

/// Changes one after the other come to what the whole would be, and cost only what they change.
#[test]
fn changes_come_to_the_same_as_the_whole() {
    use std::collections::BTreeMap;
    let mut dice = 1u64;
    let mut below = |bound: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (dice >> 33) % bound
    };
    let template = policy("[[user]]\nname = 'x'\npassword_hash = '$HASH'\n").user.remove(0);
    let compile = |draft: Draft<'_>, previous: Option<&Snapshot>| {
        compile(draft, Settings::default(), OwnAddresses::default(), 1, previous).unwrap()
    };
    // By number, as a control plane has them; names wander between numbers.
    let mut users: BTreeMap<u64, api::User> = BTreeMap::new();
    let mut snapshot = compile(Draft::Whole(&policy("[[filter]]\ndomain = ['a.example']\n")), None);
    for _ in 0..300 {
        let (mut gone, mut new) = (Vec::new(), BTreeMap::new());
        for _ in 0..=below(4) {
            let id = below(60);
            let expires = time::OffsetDateTime::from_unix_timestamp(NOW + below(50) as i64);
            let user = api::User {
                id: Some(id),
                name: format!("user {}", below(40)),
                expires: expires.ok().filter(|_| id % 3 == 0),
                groups: vec![format!("{}", below(5))],
                ..template.clone()
            };
            let taken = users.values().chain(new.values()).any(|known: &api::User| {
                known.name == user.name && known.id != user.id && !gone.contains(&known.name)
            });
            if below(4) == 0 {
                gone.extend(users.get(&id).map(|user| user.name.clone()));
                new.remove(&id);
            } else if !taken {
                gone.extend(users.get(&id).map(|known| known.name.clone()));
                new.insert(id, user);
            }
        }
        users.retain(|_, user| !gone.contains(&user.name));
        users.extend(new.clone());
        let changed: Vec<api::User> = new.into_values().collect();
        let draft = Draft::Change { policy: None, gone: &gone, users: &changed };
        let next = compile(draft, Some(&snapshot));
        assert!(Arc::ptr_eq(&next.matchers, &snapshot.matchers));
        let shards = next.directory.shards.iter().zip(&snapshot.directory.shards);
        let touched = shards.filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert!(touched <= gone.len() + changed.len());
        let whole = Policy { user: users.values().cloned().collect(), ..Policy::default() };
        let whole = compile(Draft::Whole(&whole), None);
        let list = |of: &Snapshot| -> BTreeMap<Arc<str>, u64> {
            of.directory.users().map(|user| (user.name.clone(), user.fingerprint)).collect()
        };
        assert_eq!(list(&next), list(&whole));
        let at = NOW + below(50) as i64;
        let first = users.values().filter_map(|user| Some(user.expires?.unix_timestamp()));
        assert_eq!(next.directory.next_expiry(at), first.filter(|first| *first > at).min());
        // Whoever stays keeps what is in use.
        for user in changed {
            let name = user.name.as_bytes();
            let (before, after) = (snapshot.directory.find(name), next.directory.find(name));
            let before = before.filter(|before| Some(before.id.0) == user.id);
            assert!(
                before.is_none_or(|before| Arc::ptr_eq(&before.shared, &after.unwrap().shared))
            );
        }
        snapshot = next;
    }
}

/// Times are those of the policy's zone, also when its clocks change.
#[test]
fn rules_hold_at_their_times() {
    let policy = "default = 'deny'\ntimezone = 'Europe/Berlin'\n\
        [[rule]]\nname = 'office'\nwhen = { time = ['08:00-18:00'], weekday = ['mon', 'fri'] }\n\
        [[rule]]\nname = 'night'\nwhen = { time = ['22:00-02:00'], weekday = ['mon', 'tue'] }\n";
    let snapshot = compiled(policy, None).unwrap();
    let at = |time: &str| {
        let at = time.parse::<jiff::Timestamp>().unwrap().as_second();
        judge_at(at, &snapshot, None, "203.0.114.1:80", &[])
    };
    // 2026-07-06 is a Monday; Berlin is two hours ahead then, one in winter.
    for (time, said) in [
        ("2026-07-06T05:59:59Z", "denied by default"),
        ("2026-07-06T06:00:00Z", "office: 203.0.114.1:80"),
        ("2026-07-06T15:59:59Z", "office: 203.0.114.1:80"),
        ("2026-07-06T16:00:00Z", "denied by default"),
        ("2026-07-07T09:00:00Z", "denied by default"),
        ("2026-12-04T07:00:00Z", "office: 203.0.114.1:80"),
        ("2026-12-04T06:59:59Z", "denied by default"),
        ("2026-07-06T20:00:00Z", "night: 203.0.114.1:80"),
        ("2026-07-06T23:59:59Z", "night: 203.0.114.1:80"),
        ("2026-07-07T00:00:00Z", "denied by default"),
        // What began on Tuesday goes on into Wednesday, what would begin on Wednesday does not.
        ("2026-07-07T23:00:00Z", "night: 203.0.114.1:80"),
        ("2026-07-08T21:00:00Z", "denied by default"),
        ("2026-07-05T23:00:00Z", "denied by default"),
    ] {
        assert_eq!(at(time), said, "{time}");
    }
    let problems = compiled("timezone = 'Moon/Crater'\n", None).unwrap_err();
    assert!(problems[0].to_string().contains("no zone `Moon/Crater`"), "{problems:?}");
}

proptest::proptest! {
    /// Whatever the rules, an index leaves out none that matches.
    #[test]
    fn an_index_decides_as_the_rules_do(seed: u64) {
        let mut state = seed;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let names = ["a.example", "b.a.example", "example", "c.b.a.example", "other.test"];
        let nets = ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "2001:db8::/32", "10.1.2.3/32"];
        let mut text = String::new();
        for user in 0..3 {
            text += &format!("[[user]]\nname = 'u{user}'\npassword_hash = '$HASH'\ngroups = ['g{}']\n", random(3));
        }
        for rule in 0..60 {
            let mut when = Vec::new();
            for (key, choices) in [
                ("domain", &names), ("domain_suffix", &names), ("cidr", &nets),
                ("domain_keyword", &["ex", "oth", "b.a", "zzz", "test"]),
                ("domain_regex", &["^a[.]", "t$", "(b|c)[.]", "^zzz", "EXAMPLE"]),
                ("client", &["198.51.0.0/16", "198.51.100.7/32", "192.0.2.0/24", "::/0", "::ffff:198.51.100.0/120"]),
                ("user", &["u0", "u1", "u2", "u3", "u0"]), ("group", &["g0", "g1", "g2", "g3", "g0"]),
                ("port", &["1", "2", "1-3", "4", "5"]),
            ] {
                if random(4) == 0 {
                    let (one, two) = (choices[random(5)], choices[random(5)]);
                    when.push(format!("{key} = ['{one}', '{two}']"));
                }
            }
            text += &format!("[[rule]]\nname = 'r{rule}'\naction = 'deny'\nwhen = {{ {} }}\n", when.join(", "));
        }
        let snapshot = compiled(&text, None).unwrap();
        let (rules, index) = (&snapshot.matchers.rules, snapshot.matchers.index.as_ref().unwrap());
        let addresses = [None, Some("10.1.2.3"), Some("10.9.9.9"), Some("2001:db8::1"), Some("8.8.8.8")];
        for target in ["b.a.example:1", "a.example:2", "x.example:4", "other.test:5", "far.far:1", "10.1.2.3:1"] {
            let target = Target::parse(target.as_bytes()).unwrap();
            for address in addresses {
                for user in [None, Some("u0"), Some("u1"), Some("u2")] {
                    let user = user.and_then(|name| snapshot.directory.find(name.as_bytes()));
                    let client = if user.is_some() { [198, 51, 100, 7] } else { [192, 0, 2, 1] }.into();
                    let query = Query { user, client, protocol: Protocol::Socks5, target: &target, at: NOW };
                    let address = address.map(|address| address.parse().unwrap());
                    let judged = |rule: usize| rules[rule].matches(query, address, &|| unreachable!());
                    let first = (0..rules.len()).find(|rule| judged(*rule) != Match::No);
                    let found = index.candidates(query, address).find(|rule| judged(*rule) != Match::No);
                    proptest::prop_assert_eq!(first, found);
                }
            }
        }
    }
}
