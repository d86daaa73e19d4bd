//! Judging a request, finding a user, limiting; and compiling the snapshot.

#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use culvert::{
    policy::{Bucket, Draft, OwnAddresses, Query, Snapshot, clock, compile},
    settings::Settings,
};
use culvert_api::policy::{Access, Filter, Policy, PortRange, Rule, RuleAction, User, When};
use culvert_proto::{Protocol, Target};

const HASH: &str = "$2b$10$C6UzMDM.H6dfI/f/IKcEeO7oc6YF/OQjL5cV6LJMVP8h3YLyYyEBe";

fn users(count: usize) -> Vec<User> {
    (0..count)
        .map(|i| User {
            id: None,
            name: format!("user{i}"),
            password_hash: HASH.to_owned(),
            status: Default::default(),
            groups: vec![format!("group{}", i % 10)],
            expires: None,
            limits: Default::default(),
        })
        .collect()
}

fn snapshot(policy: &Policy) -> Snapshot {
    let own = OwnAddresses::default();
    compile(Draft::Whole(policy), Settings::default(), own, 1, None).expect("a valid policy")
}

fn judge(snapshot: &Snapshot, user: &str, target: &Target) {
    let query = Query {
        user: snapshot.directory.find(user.as_bytes()),
        client: [198, 51, 100, 1].into(),
        protocol: Protocol::Socks5,
        target,
        at: 1_800_000_000,
    };
    black_box(snapshot.authorize(black_box(query), &[], 1_800_000_000));
}

fn filters(c: &mut Criterion) {
    for count in [10, 1_000, 100_000] {
        let third = count / 3;
        let filter = Filter {
            domain: (0..third).map(|i| format!("host{i}.exact.example")).collect(),
            domain_suffix: (0..third).map(|i| format!("zone{i}.suffix.example")).collect(),
            cidr: (0..third)
                .map(|i| format!("11.{}.{}.0/24", i >> 8 & 255, i & 255).parse().expect("a net"))
                .collect(),
            ..Filter::default()
        };
        let policy = Policy { filter: vec![filter], user: users(count), ..Policy::default() };
        let snapshot = snapshot(&policy);
        let address = Target::parse(b"93.184.216.34:443").expect("a target");
        let name = Target::parse(b"www.not-listed.example:443").expect("a target");
        c.bench_function(
            &format!("look-up of an address, {count} filter entries and users"),
            |b| {
                b.iter(|| judge(&snapshot, "user7", &address));
            },
        );
        c.bench_function(&format!("look-up of a name, {count} filter entries and users"), |b| {
            b.iter(|| judge(&snapshot, "user7", &name));
        });
    }
}

fn rules(c: &mut Criterion) {
    for count in [10, 1_000, 10_000] {
        let rule = (0..count)
            .map(|i| Rule {
                name: format!("rule{i}"),
                when: When {
                    group: vec![format!("group{}", i % 7)],
                    domain_suffix: vec![format!("zone{i}.example")],
                    ..When::default()
                },
                action: RuleAction::Deny,
                ..Rule::default()
            })
            .collect();
        let policy = Policy { rule, user: users(100), default: Access::Allow, ..Policy::default() };
        let snapshot = snapshot(&policy);
        let target = Target::parse(b"93.184.216.34:443").expect("a target");
        let name = Target::parse(b"www.not-listed.example:443").expect("a target");
        c.bench_function(&format!("{count} ordered rules, none matches an address"), |b| {
            b.iter(|| judge(&snapshot, "user7", &target));
        });
        c.bench_function(&format!("{count} ordered rules, none matches a name"), |b| {
            b.iter(|| judge(&snapshot, "user7", &name));
        });
    }
}

/// Rules by what else they may need; of these only ports are found by no index.
fn rules_of_kinds(c: &mut Criterion) {
    let target = Target::parse(b"www.not-listed.example:443").expect("a target");
    let long = format!("{}.example:443", [&*"a".repeat(60); 4].join("."));
    let long = Target::parse(long.as_bytes()).expect("a target");
    // As different as names are: 5,000 of up to 40 letters.
    let mut dice = 1u64;
    let mut roll = |below: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (dice >> 33) % below
    };
    let mut name = || {
        let letters: String = (0..8 + roll(32)).map(|_| (b'a' + roll(26) as u8) as char).collect();
        Target::parse(format!("{letters}.example:443").as_bytes()).expect("a target")
    };
    let names: Vec<Target> = (0..5_000).map(|_| name()).collect();
    type Condition = fn(usize) -> When;
    let kinds: [(&str, Condition); 4] = [
        ("ports", |i| {
            let port = 10_000 + i as u16;
            When { port: vec![PortRange { first: port, last: port }], ..When::default() }
        }),
        ("clients", |i| When {
            client: vec![format!("198.51.{}.{}/32", i / 250, i % 250).parse().expect("a network")],
            ..When::default()
        }),
        ("keywords", |i| When { domain_keyword: vec![format!("word{i}")], ..When::default() }),
        ("expressions", |i| When {
            domain_regex: vec![format!("^ad[sv]?{i}[a-z]*\\.")],
            ..When::default()
        }),
    ];
    for (kind, when) in kinds {
        let rule = (0..1_000).map(|i| Rule {
            name: format!("rule{i}"),
            when: when(i),
            action: RuleAction::Deny,
            ..Rule::default()
        });
        let (rule, user) = (rule.collect(), users(100));
        let snapshot =
            snapshot(&Policy { rule, user, default: Access::Allow, ..Policy::default() });
        c.bench_function(&format!("1,000 ordered rules by {kind}, none matches"), |b| {
            b.iter(|| judge(&snapshot, "user7", &target));
        });
        c.bench_function(&format!("1,000 ordered rules by {kind}, a long name"), |b| {
            b.iter(|| judge(&snapshot, "user7", &long));
        });
        if kind == "keywords" {
            // Which the first of all matches, if it is for this port.
            let all = (0..1_000).map(|_| format!("word{}", 999)).collect::<Vec<_>>();
            let rule = all.iter().map(|word| Rule {
                when: When {
                    domain_keyword: vec![word.clone()],
                    port: vec![PortRange { first: 1, last: 1 }],
                    ..When::default()
                },
                action: RuleAction::Deny,
                ..Rule::default()
            });
            let policy =
                Policy { rule: rule.collect(), default: Access::Allow, ..Policy::default() };
            let snapshot = self::snapshot(&Policy { user: users(100), ..policy });
            let target =
                Target::parse([&*"word999.".repeat(30), "example:443"].concat().as_bytes());
            let target = target.expect("a target");
            c.bench_function("1,000 ordered rules by one keyword, in a name 30 times", |b| {
                b.iter(|| judge(&snapshot, "user7", &target));
            });
        }
        let mut next = names.iter().cycle();
        c.bench_function(&format!("1,000 ordered rules by {kind}, names in turn"), |b| {
            b.iter(|| judge(&snapshot, "user7", next.next().unwrap_or(&target)));
        });
    }
}

fn limiter(c: &mut Criterion) {
    let bucket = Bucket::new(1 << 40, 1 << 30);
    c.bench_function("limiter: reserve", |b| b.iter(|| black_box(bucket.reserve(16_384, clock()))));
    let open = Bucket::default();
    c.bench_function("limiter: nothing limited", |b| b.iter(|| black_box(open.is_open())));
}

fn compiling(c: &mut Criterion) {
    let policy = Policy { user: users(100_000), ..Policy::default() };
    let mut group = c.benchmark_group("compile");
    group.sample_size(10);
    group.bench_function("100,000 users from nothing", |b| b.iter(|| black_box(snapshot(&policy))));
    let first = snapshot(&policy);
    let mut edited = policy.clone();
    edited.user[5].groups.clear();
    let changed = std::slice::from_ref(&edited.user[5]);
    for (name, draft) in [
        ("100,000 users, one changed", Draft::Whole(&edited)),
        (
            "one changed user among 100,000",
            Draft::Change { policy: None, gone: &[], users: changed },
        ),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (settings, own) = (Settings::default(), OwnAddresses::default());
                black_box(compile(draft, settings, own, 2, Some(&first)).is_ok())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, filters, rules, rules_of_kinds, limiter, compiling);
criterion_main!(benches);
