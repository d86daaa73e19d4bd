//! What the API says is what nodes do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use culvert_api::link::{self, encode};
use serde_json::{Value, json};

use crate::support::{
    Node, Over, PASSWORD, Planes, await_cut, await_some, echo, is_soak, on_each, on_server, pause,
    ping, rounds,
};

fn ends_within_a_second(stream: &mut TcpStream, began: Instant) {
    let end = stream.read(&mut [0]);
    assert!(end.as_ref().is_err() || matches!(end, Ok(0)), "{end:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// RELIABILITY C7: within a second, and nobody else's.
#[test]
fn edits_reach_live_sessions_within_a_second() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let bob = planes.user("bob", json!({}));
        let mut bobs = None;
        type Edit = fn(&Planes, &str);
        let edits: [(&str, Edit); 6] = [
            ("disabled", |planes, id| {
                planes.must("PATCH", &format!("/users/{id}"), json!({ "status": "disabled" }));
            }),
            ("deleted", |planes, id| {
                planes.must("DELETE", &format!("/users/{id}"), Value::Null);
            }),
            ("renewed", |planes, id| {
                let body = json!({ "password": "another secret" });
                planes.must("POST", &format!("/users/{id}/password"), body);
            }),
            ("expired", |planes, id| {
                let body = json!({ "expires_at": "2020-01-01T00:00:00Z" });
                planes.must("PATCH", &format!("/users/{id}"), body);
            }),
            ("kicked", |planes, id| {
                planes.must("DELETE", &format!("/online/users/{id}"), Value::Null);
            }),
            ("elsewhere", |planes, id| {
                let body = json!({ "limits": { "source_addresses": ["10.0.0.0/8"] } });
                planes.must("PATCH", &format!("/users/{id}"), body);
            }),
        ];
        for (name, edit) in edits {
            let began = Instant::now();
            let id = planes.user(name, json!({}));
            let mut stream = await_some("tunnel", || node.tunnel(name, target).ok());
            assert!(began.elapsed() < Duration::from_secs(1), "{name}: {:?}", began.elapsed());
            ping(&mut stream).unwrap();
            let bobs = bobs.get_or_insert_with(|| node.tunnel("bob", target).unwrap());
            let began = Instant::now();
            edit(&planes, &id);
            ends_within_a_second(&mut stream, began);
            ping(bobs).unwrap();
        }
        planes.must("DELETE", &format!("/users/{bob}"), Value::Null);
    });
}

#[test]
fn filters_rules_and_the_whitelist_are_followed() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        planes.user("ann", json!({ "groups": ["staff"] }));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let refused = || await_some("refusal", || node.tunnel("ann", target).err());
        let allowed = || await_some("tunnel", || node.tunnel("ann", target).ok());

        let body = json!({ "action": "deny", "kind": "cidr", "value": "127.0.0.0/8" });
        let filter = planes.must("POST", "/filters", body);
        assert_eq!(refused(), 2);
        planes.must("DELETE", &format!("/filters/{}", filter["id"].as_str().unwrap()), Value::Null);
        allowed();

        let body = json!({ "name": "staff", "when": { "group": ["staff"] }, "action": "deny" });
        let rule = planes.must("POST", "/rules", body);
        assert_eq!(refused(), 2);
        let open = planes.must("POST", "/rules", json!({ "name": "open", "action": "allow" }));
        let ids = [open["id"].clone(), rule["id"].clone()];
        planes.must("POST", "/rules/reorder", json!({ "ids": ids }));
        allowed();

        let entry = planes.must("POST", "/whitelist", json!({ "cidr": "10.0.0.0/8" }));
        // A client that was accepted just before is still answered, with 2; later ones are closed.
        await_some("closed door", || node.tunnel("ann", target).err().filter(|code| *code == 254));
        planes.must(
            "DELETE",
            &format!("/whitelist/{}", entry["id"].as_str().unwrap()),
            Value::Null,
        );
        allowed();
    });
}

/// RELIABILITY C7: a thousand sessions of a user end within a second, and none of another's.
#[test]
fn a_user_of_a_thousand_sessions_is_disabled() {
    const SESSIONS: usize = 1000;
    on_each(|planes| {
        // Its connections stay, and nothing is said.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        thread::spawn(move || listener.incoming().collect::<Vec<_>>());
        let node = planes.node("edge");
        let ids = ["ann", "bob"].map(|name| planes.user(name, json!({})));
        let tunnel = |name: &str| await_some("tunnel", || node.tunnel(name, target).ok());
        let anns: Vec<TcpStream> = (0..SESSIONS).map(|_| tunnel("ann")).collect();
        let bobs: Vec<TcpStream> = (0..50).map(|_| tunnel("bob")).collect();
        let began = Instant::now();
        planes.must("PATCH", &format!("/users/{}", ids[0]), json!({ "status": "disabled" }));
        for mut stream in anns {
            await_cut(&mut stream);
        }
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        for mut stream in &bobs {
            stream.set_nonblocking(true).unwrap();
            let there = stream.read(&mut [0]).unwrap_err();
            assert_eq!(there.kind(), ErrorKind::WouldBlock);
        }
        assert_eq!(node.metric("culvert_sessions_active"), 50.0);
        let logs = format!("/logs/access?user_id={}&end=revoked", ids[0]);
        await_some("their records", || {
            let total = &planes.must("GET", &logs, Value::Null)["total"];
            (*total == SESSIONS).then_some(())
        });
    });
}

/// RELIABILITY C9.
#[test]
fn a_node_serves_from_its_copy_without_the_control_plane() {
    on_each(|mut planes| {
        let target = echo();
        let mut node = planes.node("edge");
        planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        planes.control.kill();
        node.program.kill();
        let began = Instant::now();
        planes.again(&mut node);
        ping(&mut node.tunnel("ann", target).unwrap()).unwrap();
        let bound = Duration::from_secs(if is_soak() { 1 } else { 5 });
        assert!(began.elapsed() < bound, "{:?}", began.elapsed());

        // One that never saw a policy opens to nobody.
        let fresh = planes.node_alone("fresh");
        assert_eq!(fresh.tunnel("ann", target).err(), Some(255));
        planes.restart_control();
        let began = Instant::now();
        for node in [&node, &fresh] {
            let connected = || (node.metric("culvert_control_connected") == 1.0).then_some(());
            await_some("the control plane", connected);
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        await_some("tunnel", || fresh.tunnel("ann", target).ok());
        planes.user("bob", json!({}));
        for node in [&node, &fresh] {
            await_some("tunnel", || node.tunnel("bob", target).ok());
        }
    });
}

/// RELIABILITY C7: what was revoked while a control plane was away is, within two seconds of its return; how
/// old the policy is meanwhile is told.
#[test]
fn what_was_revoked_meanwhile_ends_with_the_return() {
    on_server(|url, _| {
        let mut first = Planes::start(Some(url));
        let second = first.second();
        let (node, target) = (first.node("edge"), echo());
        let ids = ["ann", "bob", "cid"].map(|name| second.user(name, json!({})));
        let mut streams = ["ann", "bob", "cid"]
            .map(|name| await_some("tunnel", || node.tunnel(name, target).ok()));
        assert_eq!(node.metric("culvert_snapshot_age_seconds"), 0.0);
        first.control.kill();
        second.must("PATCH", &format!("/users/{}", ids[0]), json!({ "status": "disabled" }));
        second.must("DELETE", &format!("/users/{}", ids[1]), Value::Null);
        await_some("age", || (node.metric("culvert_snapshot_age_seconds") > 0.5).then_some(()));
        streams.iter_mut().for_each(|stream| ping(stream).unwrap());
        first.restart_control();
        let began = Instant::now();
        let [ann, bob, cid] = &mut streams;
        await_cut(ann);
        await_cut(bob);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        ping(cid).unwrap();
        assert_eq!(node.metric("culvert_snapshot_age_seconds"), 0.0);
        // The same by the other control plane, while both are there.
        let began = Instant::now();
        second.must("PATCH", &format!("/users/{}", ids[2]), json!({ "status": "disabled" }));
        await_cut(cid);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    });
}

/// Every key of a policy that the API has means at a node what it says.
#[test]
fn what_the_api_says_nodes_do() {
    on_each(|planes| {
        let _node = planes.node("edge");
        planes.user("ann", json!({ "groups": ["staff"] }));
        planes.user("root", json!({ "role": "admin" }));
        let question = |user: &str, client: &str, protocol: &str, target: &str| {
            let mut body = json!({ "client": client, "protocol": protocol, "target": target });
            if !user.is_empty() {
                body["user"] = json!(user);
            }
            let said = planes.must("POST", "/rules/test", body);
            (said["allowed"] == true, said["reason"].as_str().unwrap_or_default().to_owned())
        };
        let ask = |target: &str| question("ann", "192.0.2.7", "socks5", target);
        let decides = |target: &str, allowed: bool, reason: &str| {
            await_some(&format!("{target}: {allowed} {reason}"), || {
                (ask(target) == (allowed, reason.to_owned())).then_some(())
            });
        };
        let make = |path: &str, body: Value| {
            planes.must("POST", path, body)["id"].as_str().unwrap().to_owned()
        };
        decides("9.9.9.9:443", true, "");
        planes.must("PATCH", "/settings", json!({ "default_policy": "deny", "deny_ports": [26] }));
        decides("9.9.9.9:443", false, "default");
        decides("9.9.9.9:26", false, "port");
        planes.must("PATCH", "/settings", json!({ "default_policy": "allow" }));
        decides("9.9.9.9:443", true, "");

        for (kind, value, hit, miss) in [
            ("domain", "one.example", "one.example:1", "x.one.example:1"),
            ("domain_suffix", "two.example", "x.two.example:1", "xtwo.example:1"),
            ("domain_keyword", "three", "x3three3.example:1", "x3.example:1"),
            ("domain_regex", "^four[0-9]+\\.example$", "four44.example:1", "fourx.example:1"),
            ("cidr", "8.8.4.0/24", "8.8.4.4:1", "8.8.8.8:1"),
        ] {
            let body = json!({ "action": "deny", "kind": kind, "value": value });
            let id = make("/filters", body.clone());
            decides(hit, false, "filter");
            assert_ne!(ask(miss).1, "filter", "{kind}");
            let path = format!("/filters/{id}");
            let with = |key: &str, to: Value| {
                let mut body = body.clone();
                body[key] = to;
                planes.must("PUT", &path, body);
            };
            with("enabled", json!(false));
            await_some(kind, || (ask(hit).1 != "filter").then_some(()));
            with("ports", json!(["1", "7-9"]));
            decides(hit, false, "filter");
            assert_ne!(ask(&hit.replace(":1", ":2")).1, "filter", "{kind}");
            // The white list exempts.
            let white =
                make("/filters", json!({ "action": "allow", "kind": kind, "value": value }));
            await_some(kind, || (ask(hit).1 != "filter").then_some(()));
            planes.must("DELETE", &format!("/filters/{white}"), Value::Null);
            planes.must("DELETE", &path, Value::Null);
        }

        let deciding = |when: Value, hit: [&str; 4], miss: [&str; 4]| {
            let name = when.to_string();
            let rule = json!({ "name": "r", "action": "deny", "when": when });
            let path = format!("/rules/{}", make("/rules", rule.clone()));
            let of = |asked: [&str; 4]| question(asked[0], asked[1], asked[2], asked[3]).1;
            await_some(&name, || (of(hit) == "rule").then_some(()));
            assert_ne!(of(miss), "rule", "{name}");
            let mut rule = rule;
            rule["enabled"] = json!(false);
            planes.must("PUT", &path, rule);
            await_some(&name, || (of(hit) != "rule").then_some(()));
            planes.must("DELETE", &path, Value::Null);
        };
        let asked = ["ann", "192.0.2.7", "socks5", "9.9.9.9:443"];
        let by = |at: usize, value: &'static str| {
            let mut other = asked;
            other[at] = value;
            other
        };
        deciding(json!({ "user": ["ann"] }), asked, by(0, ""));
        deciding(json!({ "group": ["staff"] }), asked, by(0, ""));
        deciding(json!({ "client": ["192.0.2.0/24"] }), asked, by(1, "192.0.3.7"));
        deciding(json!({ "protocol": ["socks5"] }), asked, by(2, "http"));
        deciding(json!({ "port": ["440-450"] }), asked, by(3, "9.9.9.9:451"));
        deciding(json!({ "cidr": ["9.9.9.0/24"] }), asked, by(3, "9.9.8.9:443"));
        deciding(json!({ "domain": ["a.example"] }), by(3, "a.example:1"), by(3, "b.a.example:1"));

        // Who runs the place does not use it, unless told so.
        let said = |user: &str| question(user, "192.0.2.7", "socks5", "9.9.9.9:443");
        assert_eq!(said("root"), (false, "user".into()));
    });
}

#[test]
fn two_control_planes_of_one_database_are_one() {
    on_server(|url, _| {
        let mut first = Planes::start(Some(url));
        let second = first.second();
        let (edge, target) = (first.node("edge"), echo());
        let other = second.node("other");
        let id = second.user("ann", json!({}));
        let began = Instant::now();
        let tunnel = |node: &Node| await_some("tunnel", || node.tunnel("ann", target).ok());
        let mut streams = [tunnel(&edge), tunnel(&other)];
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        let online = |planes: &Planes| {
            let list = planes.must("GET", &format!("/online?user_id={id}"), Value::Null);
            (list["total"] == 2).then_some(())
        };
        await_some("both sessions in both lists", || online(&first).and(online(&second)));
        let began = Instant::now();
        first.must("DELETE", &format!("/online/users/{id}"), Value::Null);
        for stream in &mut streams {
            await_cut(stream);
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        // One dies; the other goes on, and its edits are there when the first is back.
        first.control.kill();
        second.must("PATCH", &format!("/users/{id}"), json!({ "status": "disabled" }));
        await_some("refusal", || other.tunnel("ann", target).err());
        first.restart_control();
        await_some("refusal", || edge.tunnel("ann", target).err());
    });
}

/// Limits that are set by the API hold at the node, and change for who is there.
#[test]
fn limits_of_sessions_and_devices_are_followed() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({ "limits": { "sessions": 2 } }));
        let patch = |limits: Value| {
            planes.must("PATCH", &format!("/users/{id}"), json!({ "limits": limits }))
        };
        let mut held = vec![await_some("tunnel", || node.tunnel("ann", target).ok())];
        held.push(node.tunnel("ann", target).unwrap());
        assert!(node.tunnel("ann", target).is_err());
        patch(json!({ "sessions": 3 }));
        held.push(await_some("tunnel", || node.tunnel("ann", target).ok()));
        assert!(node.tunnel("ann", target).is_err());
        let online = await_some("sessions", || {
            let list = planes.must("GET", &format!("/online?user_id={id}"), Value::Null);
            (list["total"] == 3).then_some(list)
        });
        assert!(online["items"][0]["session"]["bytes_up"].is_u64(), "{online}");

        patch(json!({ "devices": 1 }));
        let from = |client: &str| {
            let output = Command::new("curl")
                .args(["-s", "-o", "/dev/null", "--max-time", "20", "--interface", client, "-x"])
                .arg(format!("socks5h://ann:{}@{}", PASSWORD.replace(' ', "%20"), node.proxy))
                .arg(format!("http://{}/livez", planes.api))
                .status();
            output.unwrap().success()
        };
        // One address is there with a session that stays.
        await_some("the limit", || {
            held = vec![node.tunnel("ann", target).ok()?];
            (!from("127.0.0.2")).then_some(())
        });
        assert!(from("127.0.0.1"));
        held.clear();
        await_some("the other address", || from("127.0.0.2").then_some(()));

        // Who came first gives way, and nobody else.
        planes.user("bob", json!({ "limits": { "devices": 1 } }));
        let mut bob = await_some("tunnel", || node.tunnel("bob", target).ok());
        patch(json!({ "devices": 1, "evict_oldest": true }));
        let mut ann = await_some("another address in its place", || {
            let stream = node.tunnel("ann", target).ok()?;
            from("127.0.0.2").then_some(stream)
        });
        let began = Instant::now();
        ann.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let ended = ann.read(&mut [0]).unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        bob.write_all(b"?").unwrap();
        bob.read_exact(&mut [0]).unwrap();
        await_some("the record", || {
            let path = format!("/logs/access?user_id={id}&end=evicted");
            (planes.must("GET", &path, Value::Null)["total"] == 1).then_some(())
        });

        patch(json!({ "new_sessions_per_second": 1 }));
        await_some("the limit", || {
            let tries: Vec<_> = (0..3).map(|_| node.tunnel("ann", target)).collect();
            tries.iter().any(Result::is_err).then_some(())
        });
    });
}

/// How nodes are is told, and which generation decided is what records say, whatever boot it was.
#[test]
fn nodes_tell_how_they_are_and_by_which_generation() {
    on_each(|planes| {
        let (mut node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let of_node = || planes.must("GET", "/proxy/nodes", Value::Null)["items"][0].clone();
        let health = || planes.must("GET", "/proxy/health", Value::Null);
        await_some("the present generation", || (health()["current"] == 1).then_some(()));
        let present = of_node()["generation"].clone();
        assert_eq!(
            health(),
            json!({ "nodes": 1, "online": 1, "current": 1, "generation": present })
        );
        let deciding = |count: usize| {
            await_some("records", || {
                let path = format!("/logs/access?user_id={id}&sort=id&page_size=500");
                let logs = planes.must("GET", &path, Value::Null);
                let logs = logs["items"].as_array().unwrap().clone();
                (logs.len() >= count).then(|| logs.last().unwrap()["record"]["generation"].clone())
            })
        };
        let before = planes.must("GET", &format!("/logs/access?user_id={id}"), Value::Null);
        let before = before["total"].as_u64().unwrap() as usize;
        drop(node.tunnel("ann", target).unwrap());
        await_some("records", || (deciding(before + 1) == present).then_some(()));
        // The next boot counts its own snapshots from one.
        node.program.terminate();
        planes.again(&mut node);
        drop(await_some("tunnel", || node.tunnel("ann", target).ok()));
        assert_eq!(deciding(before + 2), present);
        let beats = await_some("heartbeats", || {
            let beats = planes.must("GET", "/proxy/heartbeats?sort=-at", Value::Null);
            (beats["total"].as_u64() >= Some(2)).then_some(beats)
        });
        // Every 5 s.
        let apart = await_some("heartbeats of one boot", || {
            let beats = planes.must("GET", "/proxy/heartbeats?sort=-at", Value::Null);
            let of = |beat: usize, key: &str| beats["items"][beat][key].as_i64();
            let next = of(0, "uptime")? > of(1, "uptime")? + 1;
            let at = |beat: usize| {
                let format = &time::format_description::well_known::Rfc3339;
                let text = beats["items"][beat]["at"].as_str()?;
                time::OffsetDateTime::parse(text, format).ok()
            };
            if next { Some(at(0)? - at(1)?) } else { None }
        });
        assert!((4.0..6.0).contains(&apart.as_seconds_f64()), "{apart}");
        let beat = &beats["items"][0];
        assert_eq!((&beat["ready"], &beat["node_id"]), (&json!(true), &of_node()["id"]));
        assert!(beat["memory"].as_i64() > Some(1 << 20) && beat["uptime"].is_i64(), "{beat}");
        assert_eq!(planes.must("GET", "/proxy/heartbeats?node_id=999", Value::Null)["total"], 0);
    });
}

/// A node that says nothing is gone after 20 s, and so are its sessions; it comes back when it can.
#[test]
fn a_silent_node_is_let_go() {
    let planes = Planes::start(None);
    let (node, target) = (planes.node("edge"), echo());
    planes.user("ann", json!({}));
    let mut tunnel = await_some("tunnel", || node.tunnel("ann", target).ok());
    let online = || planes.must("GET", "/proxy/health", Value::Null)["online"] == 1;
    let listed = || planes.must("GET", "/online", Value::Null)["total"].as_u64().unwrap();
    await_some("the session in the list", || (listed() == 1).then_some(()));
    node.program.signal("STOP");
    let stopped = Instant::now();
    await_some("the node's absence", || (!online()).then_some(()));
    // It may have spoken just before.
    let time = stopped.elapsed().as_secs_f64();
    assert!((14.0..23.0).contains(&time), "{time} s");
    await_some("an empty list", || (listed() == 0).then_some(()));
    node.program.signal("CONT");
    await_some("the node's return", || (online() && listed() == 1).then_some(()));
    ping(&mut tunnel).unwrap();
}

/// A rule holds at its times; what is no time is told.
#[test]
fn rules_have_times() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        planes.user("ann", json!({}));
        planes.must("PATCH", "/settings", json!({ "time_zone": "Asia/Kathmandu" }));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let rule = |when: Value| json!({ "name": "closed", "action": "deny", "when": when });
        let (status, told) =
            planes.ask("POST", "/rules", Some(&rule(json!({ "time": ["25:00-26:00"] }))));
        assert_eq!(status, 422);
        assert!(told["detail"].as_str().unwrap().contains("08:00-18:30"), "{told}");
        let days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
        let when = json!({ "time": ["12:00-00:00", "00:00-12:00"], "weekday": days });
        planes.must("POST", "/rules", rule(when));
        assert_eq!(await_some("refusal", || node.tunnel("ann", target).err()), 2);
    });
}

/// What is asked of a node that is away for a moment reaches it when it is back.
#[test]
fn a_kick_waits_for_a_node_that_reconnects() {
    on_each(|mut planes| {
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        let list = |planes: &Planes| {
            let list = planes.must("GET", &format!("/online?user_id={id}"), Value::Null);
            (list["total"] == 1).then_some(())
        };
        await_some("session", || list(&planes));
        node.program.signal("STOP");
        planes.control.kill();
        planes.restart_control();
        planes.must("DELETE", &format!("/online/users/{id}"), Value::Null);
        node.program.signal("CONT");
        await_cut(&mut stream);
        // It is told once: what begins later stays.
        let mut later = await_some("tunnel", || node.tunnel("ann", target).ok());
        planes.control.kill();
        planes.restart_control();
        await_some("node", || {
            let health = planes.must("GET", "/proxy/health", Value::Null);
            (health["online"] == 1).then_some(())
        });
        planes.must("PATCH", &format!("/users/{id}"), json!({ "comment": "followed" }));
        await_some("node", || {
            let health = planes.must("GET", "/proxy/health", Value::Null);
            (health["current"] == 1).then_some(())
        });
        ping(&mut later).unwrap();
    });
}

#[test]
fn one_address_is_a_network_too() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let limits = json!({ "source_addresses": ["127.0.0.1"] });
        let id = planes.user("ann", json!({ "limits": limits }));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let user = planes.must("GET", &format!("/users/{id}"), Value::Null);
        assert_eq!(user["limits"]["source_addresses"], json!(["127.0.0.1/32"]));
    });
}

/// Both sides have more to say than their sockets hold.
#[test]
fn a_large_policy_and_many_records_pass_each_other() {
    on_each(|mut planes| {
        let (mut node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        planes.control.terminate();
        for _ in 0..1500 {
            drop(node.tunnel("ann", target).unwrap());
        }
        let logged = || node.access_log().matches("\"user\":\"ann\"").count();
        await_some("records in the log", || (logged() >= 1501).then_some(()));
        node.program.kill();
        std::fs::remove_file(node.dir.join("snapshot")).unwrap();
        planes.restart_control();
        let value = |number: u32| {
            let value = format!("{}{number}.example", "a".repeat(60).as_str());
            [value.as_str(); 8].join("|")
        };
        let values: Vec<String> = (0..500).map(value).collect();
        let body = json!({ "action": "deny", "kind": "domain_regex", "values": values });
        planes.must("POST", "/filters/import", body);
        // Each by itself fits, but no node would take so many of them.
        let large = |number: u32| format!("{number}(abcdefghij){{200}}");
        let values: Vec<String> = (0..2000).map(large).collect();
        let body = json!({ "action": "deny", "kind": "domain_regex", "values": values });
        let (status, said) = planes.ask("POST", "/filters/import", Some(&body));
        assert!(status == 422 && said["detail"].as_str().unwrap().contains("together"), "{said}");
        planes.again(&mut node);
        node.program.await_line("policy followed");
        await_some("records in the database", || {
            let logs = planes.must("GET", &format!("/logs/access?user_id={id}"), Value::Null);
            (logs["total"] == 1501).then_some(())
        });
    });
}

/// However much a node has to tell of boots before, what it is told meanwhile is in force at once.
#[test]
fn a_node_that_catches_up_follows_meanwhile() {
    on_each(|planes| {
        let count = rounds(40_000, 400_000) as u64;
        let (boot, dir) = (0xb007, planes.folder.path().join("edge"));
        fs::create_dir_all(&dir).unwrap();
        let mut spool = Vec::new();
        for sequence in 1..=count {
            let record = json!({ "time": "2026-11-01T00:00:00Z", "client": "192.0.2.1:7", "end": "finished",
                "target": "left.example:80", "bytes_up": 1, "bytes_down": 2, "padding": "x".repeat(200) });
            let json = record.to_string().into_bytes();
            encode(&link::Record { sequence, json, user: 0 }, &mut spool);
        }
        fs::write(dir.join(format!("records-{boot:016x}")), spool).unwrap();
        let logs = || {
            let log =
                planes.must("GET", "/logs/access?target=left.example&page_size=1", Value::Null);
            log["total"].as_u64().unwrap()
        };
        let (node, target) = (planes.node("edge"), echo());
        let began = Instant::now();
        planes.user("ann", json!({}));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        let time = began.elapsed();
        ping(&mut stream).unwrap();
        assert!(logs() < count, "it had caught up before");
        assert!(!is_soak() || time < Duration::from_secs(1), "{time:?}");
        await_some("all that was left", || (logs() == count).then_some(()));
        await_some("an empty folder", || {
            (!dir.join(format!("records-{boot:016x}")).exists()).then_some(())
        });
    });
}

/// Who may be a node on this host: whom the socket's mode lets in and, if they are listed, the list too.
#[test]
fn the_links_socket_knows_who_comes() {
    let mut planes = Planes::start(None);
    let socket = planes.state().join("control.sock");
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    // The way to it, for others than its owner.
    for folder in [planes.folder.path(), &planes.state()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    // Says what is no hello, and waits for what comes of it.
    let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(1)
try: s.connect(sys.argv[1])
except PermissionError: print('forbidden'); sys.exit()
try: print('closed' if s.recv(1) == b'' else 'said')
except TimeoutError: print('heard')";
    let come = |uid: &str, gid: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            uid,
            "--regid",
            gid,
            "--clear-groups",
            "/usr/bin/python3",
            "-c",
            script,
        ]);
        let output = command.arg(&socket).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let (nobody, root) = ("65534", "0");
    assert_eq!((&*come(nobody, nobody), &*come(nobody, root)), ("forbidden", "heard"));
    let config = planes.folder.path().join("control.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("[link]\n", "[link]\nallow_uids = [65533]\n")).unwrap();
    planes.control.terminate();
    planes.restart_control();
    fs::set_permissions(planes.state(), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!((&*come(nobody, root), &*come("65533", root)), ("closed", "heard"));
    planes.control.await_line("not in link.allow_uids");
}

#[test]
fn a_revoked_node_gets_nothing_more() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
        assert_eq!(nodes["items"][0]["name"], "edge");
        let id = nodes["items"][0]["id"].as_str().unwrap().to_owned();
        planes.must("DELETE", &format!("/proxy/nodes/{id}"), Value::Null);
        node.program.await_line("was revoked");
        planes.user("ann", json!({}));
        assert_eq!(node.tunnel_with("ann", PASSWORD, target).err(), Some(255));
    });
}

/// Nodes of other hosts are known by the certificate they were enrolled with.
#[test]
fn a_node_of_another_host_shows_its_identity() {
    on_each(|planes| {
        let target = echo();
        let ann = planes.user("ann", json!({}));
        let enrolled = planes.must("POST", "/proxy/nodes", json!({ "name": "afar" }));
        let identity = enrolled["identity"].as_str().unwrap();
        let node = planes.node_afar("afar", identity);
        node.program.await_line("policy followed");
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        ping(&mut stream).unwrap();
        await_some("bytes", || (planes.used(&ann) > 0).then_some(()));

        // Another's identity is not its own, nor is one of another authority.
        let (ok, other) = planes.command(&["node", "add", "other"], "");
        assert!(ok, "{other}");
        let stranger = planes.node_afar("stranger", &other);
        assert!(
            stranger
                .program
                .await_line("no control plane")
                .contains("not the identity of node stranger")
        );
        drop(stranger);
        assert_eq!(planes.ask("POST", "/proxy/nodes", Some(&json!({ "name": "other" }))).0, 409);

        // The one before is worthless once there is another.
        let id = enrolled["node"]["id"].as_str().unwrap();
        let renewed = planes.must("POST", &format!("/proxy/nodes/{id}/identity"), Value::Null);
        assert!(node.program.await_line("no control plane").contains("closed"));
        assert!(node.program.await_line("no control plane").contains("was replaced"));
        ping(&mut stream).unwrap();
        drop((stream, node));
        let node = planes.node_afar("afar", renewed["identity"].as_str().unwrap());
        await_some("tunnel", || node.tunnel("ann", target).ok());
        node.program.await_line("control plane connected");
        planes.must("DELETE", &format!("/proxy/nodes/{id}"), Value::Null);
        node.program.await_line("no control plane");

        // Bytes that are no handshake, and one that is silent, are let go.
        let mut silent = TcpStream::connect(planes.link).unwrap();
        let mut noise = TcpStream::connect(planes.link).unwrap();
        let _ = noise.write_all(&[0x55; 3000]);
        assert!(!matches!(noise.read_to_end(&mut Vec::new()), Ok(1000..)));
        assert!(matches!(silent.read(&mut [0]), Ok(0) | Err(_)));
    });
}

#[test]
fn a_node_says_what_it_would_decide() {
    on_each(|planes| {
        let question =
            |target: &str| json!({ "user": "ann", "client": "192.0.2.7", "target": target });
        let test = |target: &str| planes.must("POST", "/rules/test", question(target));
        assert_eq!(planes.ask("POST", "/rules/test", Some(&question("a.example:1"))).0, 409);
        let node = planes.node("edge");
        planes.user("ann", json!({ "groups": ["staff"] }));
        let when = json!({ "group": ["staff"], "domain_suffix": ["work.example"] });
        planes.must("POST", "/rules", json!({ "name": "work", "when": when, "action": "deny" }));
        let when = json!({ "domain": ["old.example"] });
        let rule =
            json!({ "name": "moved", "when": when, "action": "redirect", "to": "192.0.2.9:81" });
        planes.must("POST", "/rules", rule);
        let list = json!({ "action": "deny", "kind": "domain_suffix", "values": ["ads.example", "spam.example", "ads.example"] });
        let imported = planes.must("POST", "/filters/import", list.clone());
        assert_eq!(imported, json!({ "created": 2, "skipped": 1 }));
        let imported = planes.must("POST", "/filters/import", list);
        assert_eq!(imported, json!({ "created": 0, "skipped": 3 }));
        let bad = json!({ "action": "deny", "kind": "cidr", "values": ["10.0.0.0/8", "nonsense"] });
        let (status, said) = planes.ask("POST", "/filters/import", Some(&bad));
        assert!(
            status == 422 && said["detail"].as_str().unwrap().starts_with("values[1]:"),
            "{said}"
        );
        assert_eq!(planes.must("GET", "/filters", Value::Null)["total"], 2);

        let said = await_some("rule", || {
            let said = test("git.work.example:443");
            (said["rule"] == "work").then_some(said)
        });
        assert_eq!((&said["allowed"], &said["reason"]), (&json!(false), &json!("rule")));
        let said = test("old.example:80");
        assert_eq!(
            (&said["rule"], &said["addresses"]),
            (&json!("moved"), &json!(["192.0.2.9:81"]))
        );
        assert_eq!(test("9.9.9.9:443")["allowed"], true);
        assert_eq!(test("10.0.0.1:22")["reason"], "internal");
        assert_eq!(test(&node.proxy.to_string())["reason"], "own_listener");
        await_some("filter", || (test("x.ads.example:80")["reason"] == "filter").then_some(()));
        let filtered = |target: &str| {
            planes.must("POST", "/filters/test", json!({ "target": target }))["denied"].clone()
        };
        assert_eq!(
            (filtered("x.spam.example:1"), filtered("work.example:1")),
            (json!(true), json!(false))
        );
        let nobody = json!({ "user": "nobody", "target": "192.0.2.1:443" });
        assert_eq!(planes.must("POST", "/rules/test", nobody)["reason"], "user");
        assert_eq!(planes.ask("POST", "/rules/test", Some(&question("no port"))).0, 422);
    });
}

/// Days begin in the zone of the settings.
#[test]
fn quotas_begin_at_midnight_of_the_zone() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let limits = json!({ "quota_bytes": 1_000_000, "quota_period": "day" });
        let id = planes.user("ann", json!({ "limits": limits }));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        ping(&mut stream).unwrap();
        await_some("bytes", || (planes.used(&id) > 0).then_some(()));
        let usage = || planes.must("GET", &format!("/users/{id}/usage"), Value::Null);
        assert!(usage()["period_started"].as_str().unwrap().contains("T00:00:00"));
        let zone =
            |name: &str| planes.ask("PATCH", "/settings", Some(&json!({ "time_zone": name }))).0;
        assert_eq!((zone("Mars/Olympus"), zone("Asia/Kolkata")), (422, 200));
        let used = usage();
        assert!(used["period_started"].as_str().unwrap().contains("T18:30:00"), "{used}");
        // What was moved since that midnight still counts.
        assert!(used["used"].as_u64().unwrap() > 0, "{used}");
        assert!(!used["history"].as_array().unwrap().is_empty());
        ping(&mut stream).unwrap();
        await_some("more bytes", || {
            (planes.used(&id) > used["used"].as_u64().unwrap()).then_some(())
        });
        // But for what a reset has forgiven.
        planes.must("POST", &format!("/users/{id}/usage/reset"), Value::Null);
        assert_eq!(zone("Asia/Kathmandu"), 200);
        let used = usage();
        assert!(used["period_started"].as_str().unwrap().contains("T18:15:00"), "{used}");
        assert_eq!(used["used"], 0, "{used}");
        let counts = |period: &str| {
            let limits = json!({ "quota_bytes": 1_000_000, "quota_period": period });
            planes.must("PATCH", &format!("/users/{id}"), json!({ "limits": limits }));
            usage()["used"].as_u64().unwrap()
        };
        assert!(counts("total") > 0);
        planes.must("POST", &format!("/users/{id}/usage/reset"), Value::Null);
        assert_eq!((counts("month"), counts("total")), (0, 0));
    });
}

/// RELIABILITY C6: a hundred edits a second, while sessions come and go. Each session has one policy, whole, and
/// no worker stays behind.
#[test]
fn sessions_have_one_policy_while_it_changes() {
    on_each(|planes| {
        let (node, targets) = (planes.node("edge"), [echo(), echo()]);
        planes.user("ann", json!({}));
        let rule = |n: usize| {
            let to = targets[n % 2].to_string();
            json!({ "name": format!("rule {n}"), "action": "redirect", "to": to })
        };
        let id = planes.must("POST", "/rules", rule(0))["id"].as_str().unwrap().to_owned();
        await_some("tunnel", || node.tunnel("ann", targets[1]).ok());
        let (over, failed) = (AtomicBool::new(false), AtomicUsize::new(0));
        let edits = rounds(400, 3000);
        thread::scope(|scope| {
            let until = Over(&over);
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Relaxed) {
                        let served = node.tunnel("ann", targets[0]);
                        let served = served.map(|mut stream| ping(&mut stream));
                        if !matches!(served, Ok(Ok(()))) {
                            failed.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
            let began = Instant::now();
            for n in 1..=edits {
                planes.must("PUT", &format!("/rules/{id}"), rule(n));
                pause(Duration::from_millis(10 * n as u64).saturating_sub(began.elapsed()));
            }
            drop(until);
        });
        assert_eq!(failed.load(Relaxed), 0);
        // When each was decided, on which worker, by which generation, and by which rule of it.
        let records = node.access_log();
        let records = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut decided: Vec<(f64, u64, u64, usize)> = Vec::new();
        for record in records.filter(|record| record["rule"].is_string()) {
            let format = &time::format_description::well_known::Rfc3339;
            let time = time::OffsetDateTime::parse(record["time"].as_str().unwrap(), format);
            let n: usize = record["rule"].as_str().unwrap()["rule ".len()..].parse().unwrap();
            assert_eq!(record["address"], targets[n % 2].to_string(), "{record}");
            let at = time.unwrap().unix_timestamp_nanos() as f64 / 1e6;
            let at = at + record["handshake_ms"].as_f64().unwrap();
            let worker = record["session"].as_u64().unwrap() >> 48;
            decided.push((at, worker, record["generation"].as_u64().unwrap(), n));
        }
        decided.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut rules = BTreeMap::new();
        for (_, _, generation, n) in &decided {
            assert_eq!(rules.insert(*generation, *n).unwrap_or(*n), *n, "of {generation}");
        }
        assert!(rules.values().is_sorted() && rules.len() > 15, "{rules:?}");
        let workers: BTreeSet<u64> = decided.iter().map(|of| of.1).collect();
        assert!(workers.len() > 1 || thread::available_parallelism().unwrap().get() == 1);
        let mut before = decided.iter().peekable();
        let mut newest = 0;
        for (at, _, generation, _) in &decided {
            while let Some(earlier) = before.next_if(|earlier| earlier.0 < at - 200.0) {
                newest = newest.max(earlier.2);
            }
            assert!(*generation >= newest, "{generation} when {newest} was in force");
        }
    });
}
