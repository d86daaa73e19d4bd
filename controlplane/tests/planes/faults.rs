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

use culvert_api::link::{self, Decoder, Down, down, encode};
use culvert_control::{store::Store, usage};
use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{Gate, Planes, await_some, echo, on_each, on_own_server, on_server, pause, ping},
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
            }
            over.store(true, Relaxed);
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
        .arg(planes.on_disk("culvert.db"))
        .arg("PRAGMA integrity_check")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&check.stdout).trim(), "ok");
}

/// Has a server do something, as root.
fn sql(socket: &str, text: &str) {
    let done = Command::new("mariadb")
        .args(["--no-defaults", "-u", "root", "-S", socket, "-e", text])
        .status();
    assert!(done.unwrap().success(), "{text}");
}

/// RELIABILITY D9: the database takes no changes for a while, as after a failover to a replica.
#[test]
fn a_database_that_only_reads_is_waited_for() {
    on_own_server(|url, socket| {
        let sql = |text: &str| sql(socket, text);
        // read_only does not bind root.
        sql(
            "CREATE USER plain@localhost IDENTIFIED BY 'plain'; GRANT ALL ON culvert.* TO plain@localhost",
        );
        let planes = Planes::start(Some(url.replace("root@", "plain:plain@")));
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let mut moved = transfer(&node, "ann", target, 1000);
        sql("SET GLOBAL read_only = 1");
        let new = json!({ "name": "bob", "password": "a long password" });
        let refused = planes.ask("POST", "/users", Some(&new));
        assert_eq!((refused.0, planes.ask("GET", "/users", None).0), (503, 200), "{}", refused.1);
        for round in 0..20 {
            moved += transfer(&node, "ann", target, 10_000 + round);
        }
        sql("SET GLOBAL read_only = 0");
        let began = Instant::now();
        await_some("change", || (planes.ask("POST", "/users", Some(&new)).0 == 201).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(5));
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!(planes.used(&id), moved);
    });
}

/// RELIABILITY D9: connections that were made to a server that has become a replica are not kept.
#[test]
fn connections_to_what_was_the_primary_are_not_kept() {
    on_own_server(|url, socket| {
        let sql = |text: &str| sql(socket, text);
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::before(socket, folder.path());
        let planes = Planes::start(Some(url.replace(socket, gate.path.to_str().unwrap())));
        // Connections made now only read, for as long as they last.
        sql("SET GLOBAL tx_read_only = 1");
        gate.close();
        gate.open();
        let new = json!({ "name": "bob", "password": "a long password" });
        await_some("refusal", || {
            let (status, said) = planes.ask("POST", "/users", Some(&new));
            assert_eq!(status, 503, "{said}");
            said["detail"].as_str().unwrap().contains("takes no changes").then_some(())
        });
        sql("SET GLOBAL tx_read_only = 0");
        let began = Instant::now();
        await_some("change", || (planes.ask("POST", "/users", Some(&new)).0 == 201).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

/// RELIABILITY D10: writers that meet in the same rows, as nodes of several control planes do.
#[test]
fn reports_that_meet_are_all_applied_once() {
    const WRITERS: u64 = 8;
    const REPORTS: u64 = 60;
    const USERS: u64 = 41;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite://{}?mode=rwc", folder.path().join("culvert.db").display());
    let mut urls = vec![sqlite];
    on_server(|url, _| urls.push(url));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for url in urls {
        runtime.block_on(async {
            // Two control planes of one database.
            let stores =
                [Store::connect(&url, 8).await.unwrap(), Store::connect(&url, 8).await.unwrap()];
            stores[0].migrate().await.unwrap();
            let write = |writer: u64| {
                let store = stores[writer as usize % 2].clone();
                tokio::spawn(async move {
                    for sequence in 1..=REPORTS {
                        // Each writer has its own order, and says everything twice.
                        let usage = |n: u64| link::Usage {
                            user: (n * (2 * writer + 1) + writer) % USERS + 1,
                            up: sequence * 10,
                            down: sequence,
                            held: None,
                        };
                        let users = (0..USERS).map(usage).collect();
                        let report = link::Report {
                            boot: writer + 1,
                            sequence,
                            users,
                            ..Default::default()
                        };
                        for _ in 0..2 {
                            // What the database could not do, the node asks for again.
                            while usage::apply(&store, writer as i64 + 1, &report).await.is_err() {}
                        }
                    }
                })
            };
            let writers: Vec<_> = (0..WRITERS).map(write).collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let [up, down] =
                usage::sums(stores[0].db(), "user_usage WHERE period = 0").await.unwrap();
            let of_each = (WRITERS * USERS * REPORTS) as i64;
            assert_eq!((up, down), (10 * of_each, of_each));
            let minutes = usage::sums(stores[1].db(), "traffic_logs").await.unwrap();
            assert_eq!(minutes, [up, down]);
        });
    }
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
            over.store(true, Relaxed);
        });
        let moved = moved.load(Relaxed);
        await_some(&format!("{moved} bytes"), || (planes[1].used(&id) >= moved).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes[0].used(&id), planes[1].used(&id)), (moved, moved));
    });
}

/// A database that hangs: requests are told in time, sessions go on, and all is there when it wakes.
#[test]
fn a_database_that_hangs_is_told_in_time() {
    on_own_server(|url, socket| {
        let planes = Planes::start(Some(url.to_owned()));
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let mut moved = transfer(&node, "ann", target, 1000);
        let pid = fs::read_to_string(Path::new(socket).with_file_name("pid")).unwrap();
        let signal = |signal: &str| {
            assert!(Command::new("kill").args([signal, pid.trim()]).status().unwrap().success());
        };
        signal("-STOP");
        let began = Instant::now();
        let (status, said) = planes.ask("GET", "/users", None);
        let waited = began.elapsed();
        moved += transfer(&node, "ann", target, 300_000);
        signal("-CONT");
        assert_eq!(status, 503, "{said}");
        assert!(waited < Duration::from_secs(12), "{waited:?}");
        // One that answers, but not this.
        let mut locks = Command::new("mariadb")
            .args(["--no-defaults", "-u", "root", "-S", socket, "-e"])
            .arg("LOCK TABLES culvert.users WRITE; DO SLEEP(60)")
            .spawn()
            .unwrap();
        let refused = || {
            let began = Instant::now();
            (planes.ask("GET", "/users", None).0 == 503).then(|| began.elapsed())
        };
        let waited = await_some("refusal", refused);
        assert!(waited < Duration::from_secs(12), "{waited:?}");
        locks.kill().unwrap();
        locks.wait().unwrap();
        // The server notices only when the lock's holder would have said something.
        let holders = "SELECT CONCAT('KILL ', id) FROM information_schema.processlist WHERE info LIKE '%SLEEP(60)%'";
        let ends = format!(
            "mariadb --no-defaults -u root -S {socket} -N -e \"{holders} AND id <> CONNECTION_ID()\" | mariadb --no-defaults -u root -S {socket}"
        );
        assert!(Command::new("sh").args(["-c", &ends]).status().unwrap().success());
        await_some("answer", || (planes.ask("GET", "/users", None).0 == 200).then_some(()));
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!(planes.used(&id), moved);
    });
}
