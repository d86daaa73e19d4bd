//! Databases that are missing, slow, full, locked, restarted or only read: nothing is lost.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{
        Gate, Over, Planes, Program, address_of, await_some, echo, on_own_server, on_server, pause,
        ping, rounds,
    },
};

/// What says something to a server, as root.
pub(crate) fn client(socket: &str, text: &str) -> Command {
    let mut command = Command::new("mariadb");
    command.args(["--no-defaults", "-u", "root", "-N", "-S", socket, "-e", text]);
    command
}

/// Kills a server; gives the words it was started with.
fn kill_server(socket: &str) -> Vec<String> {
    let file = Path::new(socket).with_file_name("pid");
    let pid = fs::read_to_string(&file).unwrap();
    let command = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap();
    let words = String::from_utf8(command).unwrap();
    assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    let _ = fs::remove_file(&file);
    words.trim_end_matches('\0').split('\0').map(str::to_owned).collect()
}

fn start_server(socket: &str, words: &[String]) -> Program {
    let server = Program::spawn(Command::new(&words[0]).args(&words[1..]));
    let file = Path::new(socket).with_file_name("pid");
    await_some("server", || file.exists().then_some(()));
    server
}

/// Has a server do something.
pub(crate) fn sql(socket: &str, text: &str) {
    assert!(client(socket, text).status().unwrap().success(), "{text}");
}

/// RELIABILITY D9: while the database is away the proxy serves, the API says so, and nothing is lost.
#[test]
fn a_database_that_is_away_is_waited_for() {
    on_server(|url, socket| {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::before(socket, folder.path());
        let planes = Planes::start(Some(url.replace(socket, gate.path.to_str().unwrap())));
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        await_some("tunnel", || node.tunnel("ann", target).ok());
        let mut moved = transfer(&node, "ann", target, 1000);
        for round in 0..3 {
            gate.close();
            let (status, answer) = planes.ask("GET", "/users", None);
            assert_eq!(status, 503, "{answer}");
            moved += transfer(&node, "ann", target, 200_000 + round);
            let new = json!({ "name": format!("u{round}"), "password": "a long password" });
            assert_eq!(planes.ask("POST", "/users", Some(&new)).0, 503);
            moved += transfer(&node, "ann", target, 300_000);
            gate.open();
            await_some("answer", || (planes.ask("GET", "/users", None).0 == 200).then_some(()));
            planes.must("POST", "/users", new);
        }
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        let sessions = || planes.all(&format!("/logs/access?user_id={id}")).len();
        await_some("all records", || (sessions() >= 1 + 1 + 6).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes.used(&id), sessions()), (moved, 1 + 1 + 6));
    });
}

/// Connections that the database server ends under a request are no fault of the control plane's.
#[test]
fn killed_connections_are_told_as_such() {
    on_server(|url, socket| {
        let planes = Planes::start(Some(url.clone()));
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
        let (over, told) = (AtomicBool::new(false), Mutex::new(BTreeMap::new()));
        thread::scope(|scope| {
            let until = Over(&over);
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
            drop(until);
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
            let words = kill_server(socket);
            drop(server.take());
            for size in [10_000, 300_000] {
                moved += transfer(&node, "ann", target, size + round);
                sessions += 1;
            }
            await_some("refusal", || (planes.ask("GET", "/users", None).0 == 503).then_some(()));
            server = Some(start_server(socket, &words));
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
        let since = Instant::now();
        let time = Duration::from_secs(rounds(2, 30) as u64);
        while since.elapsed() < time {
            moved += transfer(&node, "ann", target, 10_000);
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

/// RELIABILITY C9: a control plane that starts before its database says so to whoever asks, can be ended, and
/// goes on by itself. A node serves from its copy meanwhile, and without one opens to nobody.
#[test]
fn a_control_plane_waits_for_its_database() {
    on_server(|url, socket| {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::before(socket, folder.path());
        let mut planes = Planes::start(Some(url.replace(socket, gate.path.to_str().unwrap())));
        let id = planes.user("ann", json!({}));
        let (mut node, target) = (planes.node("edge"), echo());
        await_some("tunnel", || node.tunnel("ann", target).ok());
        node.program.terminate();
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
        planes.again(&mut node);
        let fresh = planes.node_alone("fresh");
        let moved = transfer(&node, "ann", target, 10_000);
        assert_eq!(fresh.tunnel("ann", target).err(), Some(255));
        gate.open();
        planes.await_listening();
        await_some("tunnel", || fresh.tunnel("ann", target).ok());
        await_some("bytes", || (planes.used(&id) == moved).then_some(()));
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

/// RELIABILITY D8: a database server whose disk is full. What it has no room for is told as such, sessions go
/// on, and nothing is lost when there is room again.
#[test]
fn a_database_without_room_is_told_and_survived() {
    // All tables in one file that ends at 24 MiB.
    let options =
        "--innodb-file-per-table=0 --innodb-data-file-path=ibdata1:12M:autoextend:max:24M";
    on_own_server(options, |url, socket| {
        let planes = Planes::start(Some(url.to_owned()));
        let (node, target) = (planes.node("edge"), echo());
        let id = planes.user("ann", json!({}));
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        let mut moved = transfer(&node, "ann", target, 5000);
        // By rows that lie in one page each: a server that must take back half of a larger one, and has no room for
        // that, ends itself now and then.
        sql(socket, "CREATE TABLE culvert.filler (text VARCHAR(8000))");
        sql(socket, "SET GLOBAL innodb_flush_log_at_trx_commit = 0");
        for bytes in [7000, 500] {
            let insert = format!("INSERT INTO culvert.filler VALUES (REPEAT('x', {bytes}))");
            let fill = format!("BEGIN NOT ATOMIC LOOP {insert}; END LOOP; END");
            assert!(!client(socket, &fill).status().unwrap().success());
        }
        sql(socket, "SET GLOBAL innodb_flush_log_at_trx_commit = 1");
        let status = |number: usize| {
            let filter = json!({ "action": "deny", "kind": "domain_suffix", "value": format!("{number}.{}", "x".repeat(60)) });
            planes.ask("POST", "/filters", Some(&filter))
        };
        let (refused, said) =
            (0..20_000).map(status).find(|(status, _)| *status != 201).expect("no end of room");
        assert_eq!(refused, 503, "{said}");
        for round in 0..50 {
            moved += transfer(&node, "ann", target, 20_000 + round);
            ping(&mut stream).unwrap();
            moved += 8;
        }
        // There is nothing that can be deleted without room: it is given some.
        let mut words = kill_server(socket);
        words.iter_mut().for_each(|word| *word = word.replace("max:24M", "max:100M"));
        let _server = start_server(socket, &words);
        let began = Instant::now();
        await_some("change", || (status(30_000).0 == 201).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        drop(stream);
        await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
        let sessions = || planes.all(&format!("/logs/access?user_id={id}")).len();
        await_some("all records", || (sessions() >= 52).then_some(()));
        pause(Duration::from_millis(1500));
        assert_eq!((planes.used(&id), sessions()), (moved, 52));
    });
}

/// What somebody else does in SQLite's file, until it is dropped.
struct Transaction(Child);

impl Transaction {
    /// Begins one whose statements give a line.
    fn begin(planes: &Planes, sql: &str) -> Self {
        let mut other = Command::new("sqlite3")
            .args(["-cmd", ".timeout 20000"])
            .arg(planes.state().join("culvert.db"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(other.stdin.as_mut().unwrap(), "{sql};").unwrap();
        let mut said = String::new();
        BufReader::new(other.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said.ends_with('\n'), "{sql}: {said}");
        Self(other)
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// RELIABILITY D8: SQLite's log grows while somebody reads for long, and is cut again afterwards.
#[test]
fn a_log_that_has_grown_is_cut() {
    let planes = Planes::start(None);
    let wal = || fs::metadata(planes.state().join("culvert.db-wal")).unwrap().len();
    let reader = Transaction::begin(&planes, "BEGIN; SELECT count(*) FROM users");
    for number in 0..90 {
        planes.sql(&format!("INSERT INTO settings VALUES ('{number}', '{}')", "1".repeat(1 << 20)));
    }
    assert!(wal() > 80 << 20, "{}", wal());
    planes.sql("DELETE FROM settings WHERE length(value) > 1000");
    drop(reader);
    let mut number = 0;
    await_some("a short log", || {
        number += 1;
        planes.must("POST", "/whitelist", json!({ "cidr": format!("10.0.{number}.0/24") }));
        (wal() <= 64 << 20).then_some(())
    });
}

/// Somebody works in SQLite's file and keeps everybody else out.
#[test]
fn a_database_file_that_is_locked_is_waited_for() {
    let planes = Planes::start(None);
    let (node, target) = (planes.node("edge"), echo());
    let id = planes.user("ann", json!({}));
    await_some("tunnel", || node.tunnel("ann", target).ok());
    let mut moved = transfer(&node, "ann", target, 1000);
    let other = Transaction::begin(&planes, "BEGIN EXCLUSIVE; SELECT 'locked'");
    let new = json!({ "cidr": "192.0.2.0/24" });
    let began = Instant::now();
    let (status, told) = planes.ask("POST", "/whitelist", Some(&new));
    assert_eq!(status, 503, "{told}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    for round in 0..20 {
        moved += transfer(&node, "ann", target, 30_000 + round);
    }
    // What is there can be read meanwhile.
    assert_eq!(planes.ask("GET", "/users", None).0, 200);
    drop(other);
    let began = Instant::now();
    await_some("change", || (planes.ask("POST", "/whitelist", Some(&new)).0 == 201).then_some(()));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    await_some(&format!("{moved} bytes"), || (planes.used(&id) >= moved).then_some(()));
    pause(Duration::from_millis(1500));
    assert_eq!(planes.used(&id), moved);
}
