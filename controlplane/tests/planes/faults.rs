//! Faults of the link, the disk and the database: nothing is lost, nothing counted twice.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use culvert_api::link::{self, Decoder, Down, Up, down, encode, up};
use culvert_control::{store::Store, usage};
use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{
        Gate, Node, Planes, Program, address_of, await_some, echo, on_each, on_own_server,
        on_server, pause, ping, rounds,
    },
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

    fn hello(&mut self, [min, max]: [u32; 2]) -> link::Welcome {
        self.say(up::Body::Hello(link::Hello {
            node: "other".into(),
            boot: 7,
            version_min: min,
            version: max,
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

/// Nodes of other versions are taken if there is one in common, and told why if not; a node that cannot
/// follow says so, and an operator sees it.
#[test]
fn versions_are_agreed_on_and_refusals_are_shown() {
    on_each(|planes| {
        let version = link::VERSION;
        // One of the next version, which still speaks this one.
        let mut next = Peer::connect(&planes);
        let welcome = next.hello([version, version + 1]);
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
        let welcome = later.hello([version + 1, version + 2]);
        assert!(welcome.refusal.contains("upgrade the older one"), "{}", welcome.refusal);
        assert!(later.hear().is_none());
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

/// What says something to a server, as root.
fn client(socket: &str, text: &str) -> Command {
    let mut command = Command::new("mariadb");
    command.args(["--no-defaults", "-u", "root", "-N", "-S", socket, "-e", text]);
    command
}

/// Has a server do something.
fn sql(socket: &str, text: &str) {
    assert!(client(socket, text).status().unwrap().success(), "{text}");
}

/// Connections that the database server ends under a request are no fault of the control plane's.
#[test]
fn killed_connections_are_told_as_such() {
    on_server(|url, socket| {
        let planes = Planes::start(Some(url.clone()));
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
        let (over, told) = (AtomicBool::new(false), Mutex::new(BTreeMap::new()));
        thread::scope(|scope| {
            for worker in 0..3 {
                let (planes, over, told) = (&planes, &over, &told);
                scope.spawn(move || {
                    for number in 0.. {
                        if over.load(Relaxed) {
                            return;
                        }
                        let entry = json!({ "cidr": format!("10.{worker}.{}.{}", number / 256, number % 256) });
                        let (status, _) = planes.ask("POST", "/whitelist", Some(&entry));
                        *told.lock().unwrap().entry(status).or_insert(0) += 1;
                    }
                });
            }
            let mut killed = 0;
            for _ in 0..rounds(30, 1000) {
                let list =
                    format!("SELECT id FROM information_schema.processlist WHERE db = '{name}'");
                let list = client(socket, &list).output().unwrap().stdout;
                let list = String::from_utf8(list).unwrap();
                for id in list.split_whitespace() {
                    // One may have gone by itself.
                    let kill = client(socket, &format!("KILL {id}")).output().unwrap();
                    killed += u32::from(kill.status.success());
                }
            }
            assert!(killed > 0);
            over.store(true, Relaxed);
        });
        let told = told.into_inner().unwrap();
        // 409: it was made, and the answer of the commit was lost.
        assert!(told.keys().all(|status| [201, 409, 503].contains(status)), "{told:?}");
        assert!(told.contains_key(&201), "{told:?}");
        // At the very statement, which waits for a lock.
        for kill in ["KILL QUERY", "KILL"] {
            let lock = format!("LOCK TABLES {name}.ip_whitelist WRITE; DO SLEEP(60)");
            let mut locks = client(socket, &lock).spawn().unwrap();
            let waits = |what: &str| {
                let list = format!("SELECT id FROM information_schema.processlist WHERE {what}");
                let list = client(socket, &list).output().unwrap().stdout;
                let id = String::from_utf8(list).unwrap().trim().to_owned();
                (!id.is_empty()).then_some(id)
            };
            let holder = await_some("the lock", || waits("info = 'DO SLEEP(60)'"));
            thread::scope(|scope| {
                let asked = scope.spawn(|| planes.ask("GET", "/whitelist", None).0);
                let which = format!("db = '{name}' AND state LIKE 'Waiting for table%'");
                let waiting = await_some("a statement that waits", || waits(&which));
                sql(socket, &format!("{kill} {waiting}"));
                assert_eq!(asked.join().unwrap(), 503, "{kill}");
            });
            sql(socket, &format!("KILL {holder}"));
            locks.wait().unwrap();
        }
    });
}

/// RELIABILITY D9: the database server is killed under load and comes back, again and again.
#[test]
fn a_database_that_is_killed_loses_nothing() {
    on_own_server("", |url, socket| {
        let planes = Planes::start(Some(url.to_owned()));
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let (mut moved, mut sessions) = (0, 1);
        let mut server = None;
        for round in 0..rounds(3, 20) {
            let pid = fs::read_to_string(Path::new(socket).with_file_name("pid")).unwrap();
            let command = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap();
            let words = String::from_utf8(command).unwrap();
            let words: Vec<&str> = words.trim_end_matches('\0').split('\0').collect();
            assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
            drop(server.take());
            let _ = fs::remove_file(Path::new(socket).with_file_name("pid"));
            for size in [10_000, 300_000] {
                moved += transfer(&node, "ann", target, size + round);
                sessions += 1;
            }
            await_some("refusal", || (planes.ask("GET", "/users", None).0 == 503).then_some(()));
            server = Some(Program::spawn(Command::new(words[0]).args(&words[1..])));
            await_some("server", || Path::new(socket).with_file_name("pid").exists().then_some(()));
            let began = Instant::now();
            let new = json!({ "name": format!("user {round}"), "password": "a long password" });
            await_some("change", || {
                (planes.ask("POST", "/users", Some(&new)).0 == 201).then_some(())
            });
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        }
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        let path = format!("/logs/access?user_id={id}");
        let logs = || planes.must("GET", &path, Value::Null)["total"].as_u64().unwrap();
        await_some(&format!("{sessions} records"), || (logs() >= sessions).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes.used(&id), logs()), (moved, sessions));
    });
}

/// RELIABILITY D9: the database takes no changes for a while, as after a failover to a replica.
#[test]
fn a_database_that_only_reads_is_waited_for() {
    on_own_server("", |url, socket| {
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
    on_own_server("", |url, socket| {
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

/// A control plane that starts before its database says so to whoever asks, can be ended, and goes on by itself.
#[test]
fn a_control_plane_waits_for_its_database() {
    on_server(|url, socket| {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::before(socket, folder.path());
        let mut planes = Planes::start(Some(url.replace(socket, gate.path.to_str().unwrap())));
        let id = planes.user("ann", json!({}));
        planes.control.terminate();
        gate.close();
        for ends in [true, false] {
            planes.restart_unready();
            planes.api = address_of(&planes.control.await_line("waiting for it"), "address=");
            // It is asked to listen before it says where.
            let told = await_some("answer", || Some(planes.ask("GET", "/users", None)));
            assert_eq!(told.0, 503);
            assert!(told.1["detail"].as_str().unwrap().contains("database is away"), "{}", told.1);
            assert_eq!(planes.raw("", "GET", "/livez", None).0, 200);
            if ends {
                planes.control.terminate();
            }
        }
        let (done, said) = planes.command(&["user", "list"], "");
        assert!(!done && said.contains("see database.url"), "{said}");
        gate.open();
        planes.await_listening();
        assert_eq!(planes.used(&id), 0);
    });
}

/// Over TCP the database is to prove who it is, if the address says so.
#[test]
fn a_database_over_tls_shows_its_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let authority = |name: &str| {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertifiedIssuer::self_signed(params, key).unwrap()
    };
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &ours).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = format!(
        "--skip-networking=0 --bind-address=127.0.0.1 --port={port} --ssl-cert={} --ssl-key={}",
        write("server.pem", &certificate.pem()),
        write("server.key", &key.serialize_pem()),
    );
    let (ours, theirs) = (write("ours.pem", &ours.pem()), write("theirs.pem", &theirs.pem()));
    on_own_server(&options, |_, socket| {
        sql(
            socket,
            "CREATE USER far@localhost IDENTIFIED BY 'away' REQUIRE SSL; GRANT ALL ON culvert.* TO far@localhost",
        );
        let url = |host: &str, authority: &str| {
            format!(
                "mysql://far:away@{host}:{port}/culvert?ssl-mode=VERIFY_IDENTITY&ssl-ca={authority}"
            )
        };
        let planes = Planes::start(Some(url("localhost", &ours)));
        let id = planes.user("ann", json!({}));
        assert_eq!(planes.used(&id), 0);
        let failed = |url: &str| {
            let config = folder.path().join("control.toml");
            let dir = folder.path().join("control");
            let text = format!(
                "[server]\nbind = '127.0.0.1:0'\n[database]\nurl = '{url}'\n[state]\ndir = '{}'\n",
                dir.display()
            );
            fs::write(&config, text).unwrap();
            let config = config.to_str().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-control"));
            let mut program = Program::spawn(command.args(["serve", "-c", config]));
            let said = program.await_line("database");
            program.await_failure();
            said
        };
        // Another's word for it, another name, and no TLS at all.
        for (url, reason) in [
            (url("localhost", &theirs), "certificate"),
            (url("127.0.0.1", &ours), "certificate"),
            (url("localhost", "/nowhere.pem"), "certificate"),
            (format!("mysql://far:away@localhost:{port}/culvert?ssl-mode=DISABLED"), "denied"),
            (url("localhost", &ours).replace("/culvert?", "/nothing?"), "nothing"),
        ] {
            let said = failed(&url);
            assert!(said.contains(reason) && !said.contains("away@"), "{url}: {said}");
        }
    });
}

/// RELIABILITY D2: reports of many boots that are lost, repeated, late and cut short in any order add up to
/// what was moved. A soak applies a million.
#[test]
fn reports_in_any_order_add_up() {
    const BOOTS: usize = 6;
    const USERS: usize = 5;
    type Sums = [[u64; 2]; USERS];
    #[derive(Default)]
    struct Boot {
        sums: Sums,
        acknowledged: Sums,
        sequence: u64,
        /// On their way, each with the sums it was made of.
        up: Vec<(link::Report, Sums)>,
    }
    impl Boot {
        /// What is not acknowledged.
        fn report(&mut self, boot: usize) -> link::Report {
            self.sequence += 1;
            let told = |user: &usize| self.sums[*user] != self.acknowledged[*user];
            let usage = |user: usize| {
                let [up, down] = self.sums[user];
                link::Usage { user: user as u64 + 1, up, down, held: None }
            };
            link::Report {
                boot: boot as u64 + 1,
                sequence: self.sequence,
                users: (0..USERS).filter(told).map(usage).collect(),
                ..link::Report::default()
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite://{}?mode=rwc", folder.path().join("culvert.db").display());
    let mut urls = vec![sqlite];
    on_server(|url, _| urls.push(url));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let play = async |url: &str| {
        let store = Store::connect(url, 1).await.unwrap();
        store.migrate().await.unwrap();
        let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |bound: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (dice >> 33) as usize % bound
        };
        let mut boots: Vec<Boot> = (0..BOOTS).map(|_| Boot::default()).collect();
        // Two boots a node.
        let node = |boot: usize| boot as i64 / 2 + 1;
        let mut applied = 0;
        while applied < rounds(2_000, 500_000) {
            let number = below(BOOTS);
            let boot = &mut boots[number];
            match below(4) {
                0 => boot.sums[below(USERS)][below(2)] += below(1_000_000) as u64,
                1 => {
                    let report = boot.report(number);
                    boot.up.push((report, boot.sums));
                }
                // One of those on their way comes: in no order, and perhaps again.
                _ if !boot.up.is_empty() => {
                    let which = below(boot.up.len());
                    let (report, sums) = boot.up[which].clone();
                    usage::apply(&store, node(number), &report).await.unwrap();
                    applied += 1;
                    if below(10) >= 3 {
                        boot.up.swap_remove(which);
                    }
                    // Its acknowledgement may be lost.
                    if report.sequence == boot.sequence && below(10) >= 3 {
                        boot.acknowledged = sums;
                    }
                    // A new connection: what is on its way is lost, and what was acknowledged is told anew.
                    if below(20) == 0 {
                        boot.up.clear();
                        boot.acknowledged = Sums::default();
                    }
                }
                _ => {}
            }
        }
        for (number, boot) in boots.iter_mut().enumerate() {
            boot.acknowledged = Sums::default();
            let last = link::Report { last: true, ..boot.report(number) };
            usage::apply(&store, node(number), &last).await.unwrap();
        }
        let truth = [0, 1].map(|way| {
            let sums = boots.iter().flat_map(|boot| boot.sums.iter().map(move |sum| sum[way]));
            sums.sum::<u64>().cast_signed()
        });
        for rows in ["user_usage WHERE period = 0", "node_usage", "traffic_logs"] {
            assert_eq!(usage::sums(store.db(), rows).await.unwrap(), truth, "{rows}");
        }
    };
    for url in urls {
        runtime.block_on(play(&url));
    }
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

/// RELIABILITY D10 with deadlocks of the server's own: somebody takes the same rows' locks in the other order
/// and has so much at stake that the reports are given up.
#[test]
fn reports_that_the_server_gives_up_are_applied_once() {
    const USERS: u64 = 41;
    on_server(|url, socket| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = runtime.block_on(async {
            let store = Store::connect(&url, 8).await.unwrap();
            store.migrate().await.unwrap();
            store
        });
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap();
        let report = |writer: u64, sequence: u64| link::Report {
            boot: writer + 1,
            sequence,
            users: (1..=USERS)
                .map(|user| link::Usage { user, up: sequence * 10, down: sequence, held: None })
                .collect(),
            ..Default::default()
        };
        runtime.block_on(usage::apply(&store, 1, &report(0, 1))).unwrap();
        let deadlocks = || -> u64 {
            let status = "SELECT variable_value FROM information_schema.global_status \
                 WHERE variable_name = 'INNODB_DEADLOCKS'";
            let said = client(socket, status).output().unwrap().stdout;
            String::from_utf8(said).unwrap().trim().parse().unwrap()
        };
        let (before, reports) = (deadlocks(), rounds(40, 1250) as u64);
        let over = AtomicBool::new(false);
        let own = thread::scope(|scope| {
            let rival = scope.spawn(|| {
                let weight = "CREATE TABLE weight (n INT)";
                sql(socket, &format!("USE {name}; {weight}"));
                let contend = format!(
                    "USE {name}; BEGIN; INSERT INTO weight SELECT seq FROM seq_1_to_5000; \
                     UPDATE user_usage SET up = up WHERE user_id = {USERS} AND period = 0; \
                     DO SLEEP(0.02); \
                     UPDATE user_usage SET up = up WHERE user_id = 1 AND period = 0; ROLLBACK"
                );
                let mut lost = 0;
                while !over.load(Relaxed) {
                    lost += u64::from(!client(socket, &contend).status().unwrap().success());
                }
                lost
            });
            let writers: Vec<_> = (0..8)
                .map(|writer| {
                    let store = store.clone();
                    runtime.spawn(async move {
                        for sequence in 2..=reports {
                            let report = report(writer, sequence);
                            while usage::apply(&store, writer as i64 + 1, &report).await.is_err() {}
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| runtime.block_on(writer).unwrap());
            over.store(true, Relaxed);
            rival.join().unwrap()
        });
        let met = deadlocks() - before;
        assert!(met > own, "of {met} deadlocks the rival lost {own}");
        let sums = usage::sums(store.db(), "user_usage WHERE period = 0");
        let [up, down] = runtime.block_on(sums).unwrap();
        let of_each = (8 * USERS * reports) as i64;
        assert_eq!((up, down), (10 * of_each, of_each));
    });
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
    on_own_server("", |url, socket| {
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
        // Each of its threads, which may have been answering.
        await_some("a server that stands still", || {
            let threads = fs::read_dir(format!("/proc/{}/task", pid.trim())).unwrap();
            let stands = |thread: std::io::Result<fs::DirEntry>| {
                let stat = fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
                stat.rsplit_once(") ")?.1.starts_with('T').then_some(())
            };
            threads.into_iter().map(stands).collect::<Option<()>>()
        });
        let began = Instant::now();
        let (status, said) = planes.ask("GET", "/users", None);
        let waited = began.elapsed();
        moved += transfer(&node, "ann", target, 300_000);
        signal("-CONT");
        assert_eq!(status, 503, "{said}");
        assert!(waited < Duration::from_secs(12), "{waited:?}");
        // One that answers, but not this.
        let mut locks =
            client(socket, "LOCK TABLES culvert.users WRITE; DO SLEEP(60)").spawn().unwrap();
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
