//! Faults of the link, the disk and the database: nothing is lost, nothing counted twice.

use std::{
    fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use culvert_api::link::{self, Decoder, Down, Up, down, encode, up};
use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{Node, Over, Planes, await_some, echo, on_each, on_server, pause, ping},
};

/// A way between a node and the control plane on which acknowledgements are lost (with the connection, as
/// a stream loses them), repeated and late.
fn mangler(socket: PathBuf, path: &Path) -> Arc<[AtomicU64; 3]> {
    let counts = Arc::<[AtomicU64; 3]>::default();
    let counted = counts.clone();
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let mut seed = 1;
        for node in listener.incoming().flatten() {
            let Ok(plane) = UnixStream::connect(&socket) else { continue };
            seed += 1;
            let (mut from, mut to) = (node.try_clone().unwrap(), plane.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let counts = counts.clone();
            thread::spawn(move || mangle(plane, node, seed, &counts));
        }
    });
    counted
}

fn mangle(mut from: UnixStream, mut to: UnixStream, seed: u64, counts: &[AtomicU64; 3]) {
    let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut decoder = Decoder::default();
    let mut bytes = vec![0; 64 * 1024];
    let mut late: Option<Down> = None;
    while let Ok(received @ 1..) = from.read(&mut bytes) {
        decoder.push(&bytes[..received]);
        while let Some(message) = decoder.take::<Down>().unwrap() {
            let is_ack =
                matches!(message.body, Some(down::Body::ReportAck(_) | down::Body::RecordAck(_)));
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut frames = vec![message];
            match (dice >> 33) % 10 {
                0..3 if is_ack => {
                    counts[0].fetch_add(1, Relaxed);
                    let _ = to.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
                3..6 if is_ack => {
                    counts[1].fetch_add(1, Relaxed);
                    frames.push(frames[0].clone());
                }
                6..8 if is_ack && late.is_none() => {
                    counts[2].fetch_add(1, Relaxed);
                    late = frames.pop();
                    continue;
                }
                _ => frames.extend(late.take()),
            }
            let mut out = Vec::new();
            frames.iter().for_each(|frame| encode(frame, &mut out));
            if to.write_all(&out).is_err() {
                return;
            }
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

/// RELIABILITY D2.
#[test]
fn acknowledgements_may_be_lost_repeated_and_late() {
    on_each(|planes| {
        let way = planes.folder.path().join("mangled");
        let mangled = mangler(planes.folder.path().join("control/control.sock"), &way);
        let node = planes.node_by("edge", &format!("connect = 'unix:{}'", way.display()));
        let target = echo();
        // A quota, so that leases are asked for and granted too.
        let limits = json!({ "quota_bytes": 1_000_000_000, "quota_period": "total" });
        let id = planes.user("ann", json!({ "limits": limits }));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let (mut moved, mut sessions) = (0, 1);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(8) {
            moved += transfer(&node, "ann", target, 1000 + sessions);
            sessions += 1;
            pause(Duration::from_millis(20));
        }
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        let logs = || {
            planes.must("GET", &format!("/logs/access?user_id={id}"), Value::Null)["total"].as_u64()
        };
        await_some("records", || (logs() >= Some(sessions as u64)).then_some(()));
        pause(Duration::from_millis(3000));
        assert_eq!((planes.used(&id), logs()), (moved, Some(sessions as u64)));
        let mangled = mangled.each_ref().map(|count| count.load(Relaxed));
        assert!(mangled.iter().all(|count| *count > 0), "{mangled:?}");
    });
}

/// A node that says what a test has it say.
struct Peer {
    stream: UnixStream,
    decoder: Decoder,
}

impl Peer {
    fn connect(planes: &Planes) -> Self {
        let stream = UnixStream::connect(planes.state().join("control.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream, decoder: Decoder::default() }
    }

    fn say(&mut self, body: up::Body) {
        let mut bytes = Vec::new();
        encode(&Up { body: Some(body) }, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    fn hello(&mut self, [min, max]: [u32; 2], generation: u64) -> link::Welcome {
        self.say(up::Body::Hello(link::Hello {
            node: "other".into(),
            boot: 7,
            version_min: min,
            version: max,
            generation,
            program: "another".into(),
            ..Default::default()
        }));
        match self.hear() {
            Some(down::Body::Welcome(welcome)) => welcome,
            other => panic!("{other:?}"),
        }
    }

    /// What comes next; `None` is the end.
    fn hear(&mut self) -> Option<down::Body> {
        let mut part = [0; 4096];
        loop {
            if let Some(Down { body: Some(body) }) = self.decoder.take::<Down>().unwrap() {
                return Some(body);
            }
            match self.stream.read(&mut part) {
                Ok(0) => return None,
                Ok(read) => self.decoder.push(&part[..read]),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// What changed is what is sent, many changes at once; who was away gets what it missed, and the whole only if
/// its generation is not known.
#[test]
fn changes_are_sent_as_such() {
    on_each(|planes| {
        let version = [link::VERSION; 2];
        let connect = |generation: u64| {
            let mut peer = Peer::connect(&planes);
            assert_eq!(peer.hello(version, generation).refusal, "");
            peer
        };
        let snapshot = |peer: &mut Peer| match peer.hear() {
            Some(down::Body::Snapshot(snapshot)) => snapshot,
            other => panic!("{other:?}"),
        };
        let delta = |peer: &mut Peer| match peer.hear() {
            Some(down::Body::Delta(delta)) => delta,
            other => panic!("{other:?}"),
        };
        let ann = planes.user("ann", json!({}));
        let id = ann.parse::<u64>().unwrap();
        let mut peer = connect(0);
        let whole = snapshot(&mut peer);
        assert!(whole.users.iter().any(|user| user.id == id && user.groups.is_empty()));
        // A user, without the policy; then the policy, without users.
        planes.must("PATCH", &format!("/users/{ann}"), json!({ "groups": ["staff"] }));
        let changed = delta(&mut peer);
        assert_eq!((changed.base, changed.generation), (whole.generation, whole.generation + 1));
        assert_eq!((changed.policy.len(), &*changed.upserts[0].groups[0]), (0, "staff"));
        let mut newest = changed.generation;
        const EDITS: u64 = 60;
        let began = Instant::now();
        for n in 0..EDITS {
            planes.must("POST", "/whitelist", json!({ "cidr": format!("10.0.{n}.0/24") }));
        }
        // Those of 100 ms go together.
        let most = (began.elapsed().as_millis() / 100 + 2) as u64;
        let (end, mut deltas) = (newest + EDITS, 0);
        while newest < end {
            let changed = delta(&mut peer);
            assert_eq!((changed.base, changed.upserts.len()), (newest, 0));
            assert!(!changed.policy.is_empty());
            newest = changed.generation;
            deltas += 1;
        }
        assert!(deltas <= most, "{deltas}, more than {most}");
        drop(peer);

        planes.must("DELETE", &format!("/users/{ann}"), Value::Null);
        let mut peer = connect(newest);
        let missed = delta(&mut peer);
        assert_eq!((missed.base, missed.deletes, missed.upserts), (newest, vec![id], vec![]));
        newest = missed.generation;
        drop(peer);
        // One that missed nothing gets the next, one of a lineage that is not ours the whole.
        let (mut same, mut other) = (connect(newest), connect(newest + 1_000_000));
        assert_eq!(snapshot(&mut other).generation, newest);
        planes.must("PATCH", "/settings", json!({ "default_policy": "deny" }));
        assert_eq!((delta(&mut same).base, delta(&mut other).base), (newest, newest));
    });
}

/// A policy that was mended while a node was about to refuse it reaches the node, whole, by itself; one that is
/// refused whole is not sent again and again.
#[test]
fn a_refused_change_is_followed_by_the_whole() {
    on_each(|planes| {
        let mut peer = Peer::connect(&planes);
        assert_eq!(peer.hello([link::VERSION; 2], 0).refusal, "");
        let Some(down::Body::Snapshot(_)) = peer.hear() else { panic!("no snapshot") };
        planes.must("PATCH", "/settings", json!({ "default_policy": "deny" }));
        let Some(down::Body::Delta(delta)) = peer.hear() else { panic!("no delta") };
        let refused = |generation: u64| {
            up::Body::Refused(link::Refused { generation, reasons: vec!["of a test".into()] })
        };
        peer.say(refused(delta.generation));
        let Some(down::Body::Snapshot(whole)) = peer.hear() else { panic!("no snapshot") };
        assert_eq!(whole.generation, delta.generation);
        peer.say(refused(whole.generation));
        peer.stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let silent = peer.stream.read(&mut [0]).unwrap_err();
        assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock);
        // Not even by what else happens there.
        peer.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        planes.must("PATCH", "/settings", json!({ "default_policy": "allow" }));
        let Some(down::Body::Snapshot(mended)) = peer.hear() else { panic!("no snapshot") };
        assert_eq!(mended.generation, whole.generation + 1);
    });
}

/// Nodes of other versions are taken if there is one in common, and told why if not; a node that cannot
/// follow says so, and an operator sees it.
#[test]
fn versions_are_agreed_on_and_refusals_are_shown() {
    on_each(|planes| {
        let version = link::VERSION;
        // One of the next version, which still speaks this one.
        let mut next = Peer::connect(&planes);
        let welcome = next.hello([version, version + 1], 0);
        assert_eq!((welcome.version, &*welcome.refusal), (version, ""));
        let generation = loop {
            match next.hear() {
                Some(down::Body::Snapshot(snapshot)) => break snapshot.generation,
                Some(_) => {}
                None => panic!("no policy"),
            }
        };
        let reasons = vec!["rule.7: `moon` is not known".to_owned()];
        next.say(up::Body::Refused(link::Refused { generation, reasons }));
        let shown = || {
            let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
            let node =
                nodes["items"].as_array().unwrap().iter().find(|node| node["name"] == "other");
            node.cloned()
        };
        let node = await_some("the refusal", || {
            shown().filter(|node| node["refusal"].as_str().is_some_and(|text| !text.is_empty()))
        });
        assert!(node["refusal"].as_str().unwrap().contains("`moon` is not known"), "{node}");
        assert_eq!((&node["version"], &node["online"]), (&json!("another"), &json!(true)));
        // Once it follows, there is nothing to be shown.
        next.say(up::Body::Applied(link::Applied { generation }));
        await_some("no refusal", || shown().filter(|node| node["refusal"] == ""));
        drop(next);
        await_some("its end", || shown().filter(|node| node["online"] == false));

        // One that has given this version up.
        let mut later = Peer::connect(&planes);
        let welcome = later.hello([version + 1, version + 2], 0);
        assert!(welcome.refusal.contains("upgrade the older one"), "{}", welcome.refusal);
        assert!(later.hear().is_none());
    });
}

/// A connection that is dead, and not yet seen to be, does not take the boot away that is back on another.
#[test]
fn a_stale_connection_ends_alone() {
    on_each(|planes| {
        let connect = || {
            let mut peer = Peer::connect(&planes);
            assert_eq!(peer.hello([link::VERSION; 2], 0).refusal, "");
            let Some(down::Body::Snapshot(_)) = peer.hear() else { panic!("no snapshot") };
            peer
        };
        let online =
            || planes.must("GET", "/proxy/nodes", Value::Null)["items"][0]["online"].clone();
        let sessions = || planes.must("GET", "/online", Value::Null)["total"].clone();
        let stale = connect();
        let mut present = connect();
        let live = link::LiveSession { id: 1, user: 0, json: b"{}".to_vec() };
        present.say(up::Body::Live(link::Live { sessions: vec![live] }));
        await_some("its session", || (sessions() == 1).then_some(()));
        drop(stale);
        planes.control.await_line("node disconnected");
        pause(Duration::from_millis(500));
        assert_eq!((online(), sessions()), (json!(true), json!(1)));
        drop(present);
        await_some("its end", || (online() == false && sessions() == 0).then_some(()));
    });
}

/// A node that does not understand a policy says why, stays with the one it has, over a restart too, and takes
/// the next.
#[test]
fn a_node_refuses_what_it_does_not_understand() {
    on_each(|planes| {
        let (way, socket) = (planes.folder.path().join("way"), planes.state().join("control.sock"));
        let spoils = Arc::new(AtomicBool::new(false));
        let (spoilt, listener) = (spoils.clone(), UnixListener::bind(&way).unwrap());
        thread::spawn(move || {
            for node in listener.incoming().flatten() {
                let Ok(plane) = UnixStream::connect(&socket) else { continue };
                let (mut from, mut to) = (node.try_clone().unwrap(), plane.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                let spoilt = spoilt.clone();
                thread::spawn(move || spoil(plane, node, &spoilt));
            }
        });
        let node = planes.node_by("edge", &format!("connect = 'unix:{}'", way.display()));
        let target = echo();
        planes.user("ann", json!({}));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        spoils.store(true, Relaxed);
        planes.must("PATCH", "/settings", json!({ "default_policy": "deny" }));
        let told = || planes.must("GET", "/proxy/nodes", Value::Null)["items"][0].clone();
        let refused = || told()["refusal"].as_str().is_some_and(|text| text.contains("moon"));
        await_some("a refusal", || refused().then_some(()));
        assert!(node.metric("culvert_config_rejected_total") >= 1.0);
        ping(&mut stream).unwrap();
        ping(&mut node.tunnel("ann", target).unwrap()).unwrap();
        // What lies on its disk is what it follows.
        let Node { mut program, .. } = node;
        program.kill();
        let node = planes.node_by("edge", &format!("connect = 'unix:{}'", way.display()));
        ping(&mut await_some("tunnel", || node.tunnel("ann", target).ok())).unwrap();
        node.program.await_line("the control plane's policy is refused");
        spoils.store(false, Relaxed);
        planes.must("PATCH", "/settings", json!({ "deny_ports": [25] }));
        await_some("the default", || node.tunnel("ann", target).err());
        await_some("no refusal", || (told()["refusal"] == "").then_some(()));
    });
}

/// Passes messages to a node; policies with a key that it does not know, if it is to be so.
fn spoil(mut from: UnixStream, mut to: UnixStream, spoils: &AtomicBool) {
    let (mut decoder, mut bytes) = (Decoder::default(), vec![0; 64 * 1024]);
    while let Ok(received @ 1..) = from.read(&mut bytes) {
        decoder.push(&bytes[..received]);
        while let Some(mut message) = decoder.take::<Down>().unwrap() {
            let policy = match &mut message.body {
                Some(down::Body::Snapshot(snapshot)) => Some(&mut snapshot.policy),
                Some(down::Body::Delta(delta)) => Some(&mut delta.policy),
                _ => None,
            };
            if let Some(policy) = policy.filter(|policy| !policy.is_empty() && spoils.load(Relaxed))
            {
                let mut json: Value = serde_json::from_slice(policy).unwrap();
                json["moon"] = json!(1);
                *policy = serde_json::to_vec(&json).unwrap();
            }
            let mut out = Vec::new();
            encode(&message, &mut out);
            if to.write_all(&out).is_err() {
                return;
            }
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

/// RELIABILITY C4 and D1, under load: whenever the control plane is killed, no session notices, and in the
/// end every byte is there once.
#[test]
fn the_control_plane_is_killed_under_load() {
    on_each(|mut planes| {
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        let mut lasting = await_some("tunnel", || node.tunnel("ann", target).ok());
        let (over, moved, sessions) =
            (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(1));
        thread::scope(|scope| {
            let until = Over(&over);
            for size in [1, 700, 40_000, 300_000] {
                let (node, over, moved, sessions) = (&node, &over, &moved, &sessions);
                scope.spawn(move || {
                    while !over.load(Relaxed) {
                        moved.fetch_add(transfer(node, "ann", target, size), Relaxed);
                        sessions.fetch_add(1, Relaxed);
                    }
                });
            }
            for wait in [130, 710, 390, 1570] {
                pause(Duration::from_millis(wait));
                planes.control.kill();
                pause(Duration::from_millis(wait / 2));
                planes.restart_control();
                let began = Instant::now();
                await_some("the node", || {
                    (node.metric("culvert_control_connected") == 1.0).then_some(())
                });
                assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
            }
            drop(until);
        });
        ping(&mut lasting).unwrap();
        let moved = moved.load(Relaxed) + 8;
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        drop(lasting);
        let (path, count) = (format!("/logs/access?user_id={id}"), sessions.load(Relaxed));
        let logs = || planes.must("GET", &path, Value::Null)["total"].as_u64().unwrap();
        await_some(&format!("{count} records"), || (logs() >= count).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes.used(&id), logs()), (moved, count));
    });
}

/// RELIABILITY D8: the control plane's disk is full. Sessions go on, the API says so, nothing is lost, and
/// when there is room again it goes on by itself.
#[test]
fn a_full_disk_is_told_and_survived() {
    let planes = Planes::start_on_disk(16 << 20);
    let socket = planes.on_disk("control.sock");
    let node = planes.node_by("edge", &format!("connect = 'unix:{}'", socket.display()));
    node.program.await_line("policy followed");
    let target = echo();
    let id = planes.user("ann", json!({}));
    let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
    let mut moved = transfer(&node, "ann", target, 5000);
    await_some("bytes", || (planes.used(&id) >= moved).then_some(()));

    let filler = planes.on_disk("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    drop(file);
    let status = |n: usize| {
        let user = json!({ "name": format!("user {n}"), "password": "a long password", "comment": "x".repeat(900) });
        planes.ask("POST", "/users", Some(&user)).0
    };
    let refused = (0..200).map(status).find(|status| *status != 201).unwrap();
    assert_eq!(refused, 503);
    for round in 0..50 {
        moved += transfer(&node, "ann", target, 1000 + round);
        ping(&mut stream).unwrap();
        moved += 8;
    }
    let wal = fs::metadata(planes.on_disk("culvert.db-wal")).unwrap().len();
    assert!(wal <= 64 << 20, "{wal}");
    fs::remove_file(&filler).unwrap();
    let began = Instant::now();
    await_some("room", || {
        (status(1000 + began.elapsed().as_millis() as usize) == 201).then_some(())
    });
    assert!(began.elapsed() < Duration::from_secs(5));
    await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
    pause(Duration::from_millis(1500));
    assert_eq!(planes.used(&id), moved);
    let check = Command::new("sqlite3")
        .args(["-cmd", ".timeout 20000"])
        .arg(planes.on_disk("culvert.db"))
        .arg("PRAGMA integrity_check")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&check.stdout).trim(), "ok");
}

/// RELIABILITY D8, the node's disk: sessions go on, edits are in force, sums stay exact, records that find no
/// room are counted, and with room again all of it is kept again.
#[test]
fn a_nodes_full_disk_is_told_and_survived() {
    let planes = Planes::start(None);
    let mut node = planes.node_on_disk("edge", 32 << 20);
    let target = echo();
    let id = planes.user("ann", json!({}));
    let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
    let mut moved = transfer(&node, "ann", target, 5000);
    let written = |node: &Node| {
        let of = |what: &str| node.metric(&format!("culvert_records_{what}_total")) as u64;
        (of("written"), of("lost"))
    };
    await_some("a record", || (written(&node).0 > 0).then_some(()));
    let filler = node.dir.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    drop(file);

    const ROUNDS: u64 = 300;
    for round in 0..ROUNDS {
        moved += transfer(&node, "ann", target, 1000 + round as usize);
        ping(&mut stream).unwrap();
        moved += 8;
    }
    let (kept, lost) = await_some("records", || {
        let (kept, lost) = written(&node);
        (kept + lost > ROUNDS).then_some((kept, lost))
    });
    assert!(lost > 0 && kept > 0, "{kept} {lost}");
    planes.user("bob", json!({}));
    // More than the last page of the copy has room for.
    let networks = (0..500).map(|n| format!("10.{}.{}.0/24", n / 250, n % 250));
    let networks: Vec<String> = networks.chain(["127.0.0.0/8".into()]).collect();
    planes.must("PATCH", "/settings", json!({ "allow_internal": networks }));
    node.program.await_line("its copy could not be written");
    await_some("an edit in force", || node.tunnel("bob", target).ok());
    await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));

    fs::remove_file(&filler).unwrap();
    let began = Instant::now();
    await_some("records that are written", || {
        moved += transfer(&node, "ann", target, 700);
        (written(&node).0 > kept).then_some(())
    });
    assert!(began.elapsed() < Duration::from_secs(5));
    planes.user("cid", json!({}));
    await_some("tunnel", || node.tunnel("cid", target).ok());
    drop(stream);
    let (records, sessions) = await_some("all records", || {
        let sessions = node.metric("culvert_records_total") as u64;
        let (kept, lost) = written(&node);
        (kept + lost == sessions && node.metric("culvert_sessions_active") == 0.0)
            .then_some((kept, sessions))
    });
    // What was written is in the log of the control plane; what was said to be lost may be.
    let logs = || planes.must("GET", "/logs/access", Value::Null)["total"].as_u64().unwrap();
    await_some("records", || (records..=sessions).contains(&logs()).then_some(()));
    await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
    pause(Duration::from_millis(1500));
    assert_eq!(planes.used(&id), moved);
    // The copy on its disk has the last edit.
    assert!(fs::read(node.dir.join("snapshot")).unwrap().windows(3).any(|part| part == b"cid"));
    node.program.terminate();
}

/// Two control planes of one database, each with a node under load: each dies and returns, edits go on
/// by the other, and nothing is lost.
#[test]
fn each_of_two_control_planes_dies_and_returns_under_load() {
    on_server(|url, _| {
        let first = Planes::start(Some(url));
        let mut planes = [first.second(), first];
        let nodes = [planes[0].node("one"), planes[1].node("two")];
        let target = echo();
        let id = planes[0].user("ann", json!({}));
        for node in &nodes {
            await_some("tunnel", || node.tunnel("ann", target).ok());
        }
        let (over, moved) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let until = Over(&over);
            for (node, size) in [(0, 900), (0, 150_000), (1, 70), (1, 60_000)] {
                let (node, over, moved) = (&nodes[node], &over, &moved);
                scope.spawn(move || {
                    while !over.load(Relaxed) {
                        moved.fetch_add(transfer(node, "ann", target, size), Relaxed);
                    }
                });
            }
            for round in 0..4 {
                let (dies, stays) = (round % 2, 1 - round % 2);
                pause(Duration::from_millis(300));
                planes[dies].control.kill();
                let name = format!("user {round}");
                planes[stays].user(&name, json!({}));
                await_some("edit", || nodes[stays].tunnel(&name, target).ok());
                planes[dies].restart_control();
                // Its node comes back, and follows what was done meanwhile; so do kicks by the other.
                if dies == 0 {
                    nodes[0].program.await_line("control plane connected");
                }
                let id = planes[dies].must("GET", &format!("/users?q=user%20{round}"), Value::Null);
                let id = id["items"][0]["id"].as_str().unwrap().to_owned();
                let mut stream = await_some("edit", || nodes[dies].tunnel(&name, target).ok());
                planes[stays].must("DELETE", &format!("/online/users/{id}"), Value::Null);
                assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
            }
            drop(until);
        });
        let moved = moved.load(Relaxed);
        await_some(&format!("{moved} bytes"), || (planes[1].used(&id) >= moved).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes[0].used(&id), planes[1].used(&id)), (moved, moved));
    });
}
