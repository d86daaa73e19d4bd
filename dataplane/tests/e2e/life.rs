//! Start, health, drain, commands.

use std::{
    collections::{HashMap, HashSet},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use culvert_proto::Target;
use serde_json::json;

use crate::support::{
    Over, PASSWORD, PATIENCE, Setup, TestProxy, await_some, closed_port, echo, is_soak, pause,
    ping, rounds, target,
};

fn culvert(arguments: &[&str], input: &str) -> (bool, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_culvert"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn health_and_sessions_are_served() {
    let proxy = Setup::new().user("ann", "").start();
    assert_eq!(proxy.admin("/livez").0, 200);
    assert_eq!(proxy.admin("/readyz").0, 200);
    let target = echo();
    let mut stream = proxy.tunnel(Some("ann"), target);
    ping(&mut stream).unwrap();
    let sessions: serde_json::Value = serde_json::from_str(&proxy.admin("/sessions").1).unwrap();
    assert_eq!(sessions[0]["user"], "ann");
    assert_eq!(sessions[0]["target"], target.to_string());
    let (_, config) = proxy.admin("/debug/config");
    assert!(!config.contains("$2"), "no hash is shown: {config}");
    assert_eq!(proxy.admin("/drain").0, 404, "commands are not for TCP");
    let text = proxy.admin("/metrics").1;
    for name in [
        "culvert_sessions_active",
        "culvert_bytes_total",
        "culvert_dial_seconds_bucket",
        "culvert_build_info",
    ] {
        assert!(text.contains(name), "{name}");
    }
}

/// RELIABILITY C3.
#[test]
fn a_drain_lets_sessions_end_and_cuts_them_at_the_deadline() {
    let mut proxy = Setup::new().with("[timeouts]\ndrain = '2s'").start();
    let target = echo();
    let (mut short, mut long) = (proxy.tunnel(None, target), proxy.tunnel(None, target));
    let started = Instant::now();
    proxy.signal("-TERM");
    proxy.await_line("draining");
    assert_eq!(proxy.admin("/readyz").0, 503);
    ping(&mut short).unwrap();
    drop(short);
    ping(&mut long).unwrap();
    let error = long.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(started.elapsed() >= Duration::from_millis(1900));
    assert!(proxy.await_end().success());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let mut ends: Vec<String> =
        proxy.records().iter().map(|record| record["end"].as_str().unwrap().to_owned()).collect();
    ends.sort();
    assert_eq!(ends, ["drained", "finished"]);
}

/// RELIABILITY C3, with clients in every state, and more that come all the time.
#[test]
fn a_drain_finds_clients_in_every_state() {
    let mut proxy = Setup::new().with("[timeouts]\ndrain = '20s'").start();
    let target = echo();
    let mut relays: Vec<TcpStream> = (0..20).map(|_| proxy.tunnel(None, target)).collect();
    relays.iter_mut().for_each(|stream| ping(stream).unwrap());
    // Nothing said; half a greeting; greeted; between two requests.
    let mut early: Vec<TcpStream> = (0..4).map(|_| proxy.connect()).collect();
    early[1].write_all(&[5, 2]).unwrap();
    early[2].write_all(&[5, 1, 0]).unwrap();
    early[2].read_exact(&mut [0; 2]).unwrap();
    let closed = closed_port();
    write!(early[3], "GET http://{closed}/ HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = [0; 512];
    let read = early[3].read(&mut answer).unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 502 "));
    let over = AtomicBool::new(false);
    let address = proxy.address;
    let (served, last) = thread::scope(|scope| {
        let until = Over(&over);
        let comers = scope.spawn(|| {
            let (mut served, mut last) = (0, None);
            while !over.load(Relaxed) {
                let Ok(mut stream) = TcpStream::connect(address) else { continue };
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let request =
                    [&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1][..], &target.port().to_be_bytes()];
                let mut reply = [0; 12];
                let done = stream
                    .write_all(&request.concat())
                    .and_then(|()| stream.read_exact(&mut reply));
                // Whoever is told yes is served.
                if done.is_ok() && reply[3] == 0 {
                    ping(&mut stream).unwrap();
                    (served, last) = (served + 1, Some(Instant::now()));
                }
            }
            (served, last)
        });
        await_some("comers", || {
            (proxy.metric("culvert_bytes_total{direction=\"up\"}") > 200.0).then_some(())
        });
        let began = Instant::now();
        proxy.signal("-TERM");
        await_some("readiness to go", || (proxy.admin("/readyz").0 == 503).then_some(()));
        let bound = Duration::from_millis(if is_soak() { 100 } else { 1000 });
        assert!(began.elapsed() < bound, "{:?}", began.elapsed());
        for mut stream in early {
            // Ended, whether in order or by a reset.
            assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        }
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        await_some("closed doors", || TcpStream::connect(address).err());
        let closed = Instant::now();
        relays.iter_mut().for_each(|stream| ping(stream).unwrap());
        drop(until);
        let (served, last) = comers.join().unwrap();
        assert!(last.is_none_or(|last| last < closed + Duration::from_millis(100)));
        (served, last)
    });
    assert!(served > 0 && last.is_some());
    drop(relays);
    let began = Instant::now();
    assert!(proxy.await_end().success());
    // It waits for nobody who is gone.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let records = proxy.records();
    let finished = records.iter().filter(|of| of["end"] == "finished");
    let bytes: Vec<u64> = finished.map(|of| of["bytes_up"].as_u64().unwrap()).collect();
    assert_eq!(bytes.iter().filter(|bytes| **bytes == 8).count(), 20, "{bytes:?}");
    assert_eq!(bytes.iter().filter(|bytes| **bytes == 4).count(), served, "{bytes:?}");
}

/// What is served as metrics is what Prometheus reads.
#[test]
fn metrics_are_well_formed() {
    let proxy = Setup::new().user("ann", "").start();
    let target = echo();
    ping(&mut proxy.tunnel(Some("ann"), target)).unwrap();
    assert!(proxy.socks5(Some(("ann", "wrong")), &Target::from(target)).is_err());
    assert!(proxy.socks5(None, &Target::from(closed_port())).is_err());
    let text = proxy.admin("/metrics").1;
    let (mut kinds, mut seen) = (HashMap::new(), HashSet::new());
    let mut family = "";
    let is_name = |name: &str| {
        name.starts_with("culvert_")
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && kinds.insert(name, kind).is_none(), "{line}");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            family = name;
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(rest.split_once(' ').is_some_and(|(_, help)| !help.is_empty()), "{line}");
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let value: f64 = value.parse().unwrap();
            assert!(value >= 0.0 && seen.insert(sample), "{line}");
            let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
            assert!(labels.ends_with('}'), "{line}");
            let of = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            // Samples stand with their family.
            let is_of = name == family || (of == Some(family) && kinds[family] == "histogram");
            assert!(is_of && is_name(name), "{line} in {family}");
        }
    }
    for histogram in kinds.iter().filter(|(_, kind)| **kind == "histogram").map(|(name, _)| name) {
        let buckets =
            text.lines().filter(|line| line.starts_with(&format!("{histogram}_bucket{{")));
        let counts: Vec<f64> =
            buckets.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
        assert!(counts.len() > 3, "{histogram}");
    }
    assert!(kinds.len() > 20, "{kinds:?}");
}

#[test]
fn the_drain_command_ends_an_idle_node_at_once() {
    let mut proxy = Setup::new().start();
    let socket = proxy.folder.path().join("admin.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let config = proxy.folder.path().join("culvert.toml");
    let (ok, out, error) = culvert(&["drain", "-c", config.to_str().unwrap()], "");
    assert!(ok, "{error}");
    assert!(out.contains("draining"));
    assert!(proxy.await_end().success());
}

#[test]
fn verified_logins_survive_a_restart() {
    let mut proxy = Setup::new().user("ann", "").start();
    let target = Target::from(echo());
    assert!(proxy.socks5(Some(("ann", PASSWORD)), &target).is_ok());
    proxy.signal("-TERM");
    proxy.await_end();
    let kept = std::fs::read(proxy.folder.path().join("remembered-logins")).unwrap();
    assert_eq!(kept.len(), 64);
    let key = proxy.folder.path().join("credential.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
}

/// What was kept of an old password must not stand in the way of the new one: only the first login of a
/// restarted node is hashed.
#[test]
fn a_password_changed_while_the_node_was_down_is_remembered_anew() {
    let mut proxy = Setup::new().user("ann", "").start();
    let target = Target::from(echo());
    assert!(proxy.socks5(Some(("ann", PASSWORD)), &target).is_ok());
    proxy.signal("-TERM");
    proxy.await_end();
    let kept = std::fs::read(proxy.folder.path().join("remembered-logins")).unwrap();
    let key = std::fs::read(proxy.folder.path().join("credential.key")).unwrap();
    let again = Setup::new()
        .with("[auth]\nfailures_per_address = '1/1h'")
        .state("remembered-logins", &kept)
        .state("credential.key", &key)
        .rehashed_user("ann")
        .start();
    for _ in 0..5 {
        assert!(again.socks5(Some(("ann", PASSWORD)), &target).is_ok());
    }
    // A guess uses up the throttle; whoever is remembered is not held up by it.
    assert_eq!(again.socks5(Some(("ann", "guess")), &target).err(), Some(255));
    assert!(again.socks5(Some(("ann", PASSWORD)), &target).is_ok());
}

#[test]
fn check_says_everything_that_is_wrong_in_all_formats() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text, lines) in [
        (
            "a.toml",
            "[node]\nworkres = 1\n[[listener]]\nbind = 'x'\n",
            ["line 2: node.workres", "line 4: listener[0].bind"],
        ),
        (
            "a.yaml",
            "node:\n  workres: 1\nlistener:\n- bind: x\n",
            ["line 2: node.workres", "line 4: listener[0].bind"],
        ),
        (
            "a.json",
            "{\"node\": {\n\"workres\": 1},\n\"listener\": [{\n\"bind\": \"x\"}]}",
            ["line 2: node.workres", "line 4: listener[0].bind"],
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let (ok, _, error) = culvert(&["check", "-c", path.to_str().unwrap()], "");
        assert!(!ok);
        for line in lines {
            assert!(error.contains(line), "{name}: {error}");
        }
    }
    let path = folder.path().join("b.toml");
    std::fs::write(&path, "[[listener]]\nbind = '127.0.0.1:1082'\n").unwrap();
    let (ok, out, error) = culvert(&["check", "-c", path.to_str().unwrap()], "");
    assert!(ok && out.contains("ok: 1 listeners"), "{out}{error}");
}

#[test]
fn flags_lie_over_the_environment_and_that_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let check = |file: &str, environment: &str, flags: &[&str]| {
        let text = format!("[[listener]]\nbind = '127.0.0.1:1082'\n[node]\nworkers = {file}\n");
        std::fs::write(&path, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
        command.args(["check", "-c"]).arg(&path).env("CULVERT_NODE_WORKERS", environment);
        for flag in flags {
            command.args(["--set", flag]);
        }
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert!(check("'x'", "1", &[]).0);
    assert!(check("'x'", "y", &["node.workers=1"]).0);
    for (flag, part) in [
        ("node.workers=z", "--set node.workers=z: node.workers"),
        ("node.workres=1", "workers"),
        ("listener.bind=127.0.0.1:1", "lists are set in the file only"),
        ("node", "write --set section.key=value"),
    ] {
        let (ok, error) = check("1", "1", &[flag]);
        assert!(!ok && error.contains(part), "{flag}: {error}");
    }
}

#[test]
fn a_password_is_hashed_from_standard_input() {
    let (ok, hash, _) = culvert(&["hash-password"], "secret\n");
    assert!(ok && hash.starts_with("$2b$10$") && hash.trim().len() == 60, "{hash}");
    let (ok, _, error) = culvert(&["hash-password"], &"x".repeat(73));
    assert!(!ok && error.contains("72 bytes"), "{error}");
}

#[test]
fn the_client_command_goes_through_the_proxy() {
    let proxy = Setup::new().listener("auth = ['password']").user("ann", "").start();
    let target = echo();
    for protocol in ["socks5", "http"] {
        let (host, port) = (target.ip().to_string(), target.port().to_string());
        let address = format!("tcp://{}/", proxy.address);
        let user = format!("ann:{PASSWORD}");
        let arguments = [
            "client",
            "--protocol",
            protocol,
            "--addr",
            &address,
            "--host",
            &host,
            "--port",
            &port,
            "--user",
            &user,
        ];
        let (ok, out, error) = culvert(&arguments, "through and back");
        assert!(ok, "{error}");
        assert_eq!(out, "through and back");
        let wrong = [&arguments[..10], &["ann:wrong"]].concat();
        let (ok, _, error) = culvert(&wrong, "");
        assert!(!ok && error.contains("rejected the user name or the password"), "{error}");
    }
}

/// A program that is ended when dropped, and a line it said.
struct Running(std::process::Child, BufReader<std::process::ChildStderr>);

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_culvert"))
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        Self(child, said)
    }

    /// The first address behind a word.
    fn address(&mut self, word: &str) -> SocketAddr {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.1.read_line(&mut line).unwrap() > 0, "no line with {word}");
            if let Some((_, rest)) = line.split_once(word) {
                return rest.split_whitespace().next().unwrap().parse().unwrap();
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_without_a_file_is_reached_by_a_forwarded_port() {
    let target = echo();
    for protocol in ["socks5", "http"] {
        let any = "127.0.0.1:0";
        let user = ["--user", "ann:secret word"];
        let server =
            ["server", "--protocol", protocol, "--addr", any, "--allow-internal", "127.0.0.0/8"];
        let mut server = Running::start(&[&server[..], &user].concat());
        let proxy = server.address("address=").to_string();
        let (host, port) = (target.ip().to_string(), target.port().to_string());
        let client =
            ["client", "--protocol", protocol, "--addr", &proxy, "--host", &host, "--port", &port];
        let mut client = Running::start(&[&client[..], &user, &["--listen", any]].concat());
        let forwarded = client.address("culvert: ");
        for _ in 0..3 {
            ping(&mut TcpStream::connect(forwarded).unwrap()).unwrap();
        }
        let wrong =
            ["client", "--protocol", protocol, "--addr", &proxy, "--host", &host, "--port", &port];
        let (ok, _, error) = culvert(&wrong, "");
        assert!(!ok && error.contains("wants a user"), "{error}");
    }
}

/// Lines of the log as JSON, and files that are named by their day.
#[test]
fn logs_are_structured_and_rotated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let text = format!(
        "[node]\nstate_dir = '{}'\n[log]\nformat = 'json'\nfile = 'culvert.log'\nrotate = 'hourly'\n\
         [[listener]]\nname = 'main'\nbind = '127.0.0.1:0'\nauth = ['none']\n",
        folder.path().display(),
    );
    std::fs::write(&path, text).unwrap();
    let node = Running::start(&["run", "-c", path.to_str().unwrap()]);
    let named = |start: &str| {
        let entries = std::fs::read_dir(folder.path()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.into_iter().find(|name| name.starts_with(start))
    };
    let line = await_some("a line that says where it listens", || {
        let text = std::fs::read_to_string(folder.path().join(named("culvert.log.")?)).ok()?;
        let mut lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        lines.find(|line: &serde_json::Value| line["fields"]["message"] == "listening")
    });
    assert_eq!((&line["level"], &line["fields"]["listener"]), (&json!("INFO"), &json!("main")));
    let address: SocketAddr = line["fields"]["address"].as_str().unwrap().parse().unwrap();
    drop(TcpStream::connect(address).unwrap());
    let name = await_some("a record", || {
        let name = named("access.log.")?;
        let text = std::fs::read_to_string(folder.path().join(&name)).unwrap();
        text.ends_with('\n').then_some(name)
    });
    // access.log.2027-01-31-23
    assert_eq!(name.len(), "access.log.".len() + 13, "{name}");
    drop(node);
}

#[test]
fn a_taken_port_says_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let text = format!(
        "[node]\nstate_dir = '{}'\n[[listener]]\nbind = '{}'\n",
        folder.path().display(),
        taken.local_addr().unwrap()
    );
    std::fs::write(&path, text).unwrap();
    let (ok, _, error) = culvert(&["run", "-c", path.to_str().unwrap()], "");
    assert!(!ok && error.contains("another program listens there"), "{error}");
}

/// RELIABILITY D7: an access log that takes nothing holds nobody up; what is not written is counted.
#[test]
fn a_log_that_stalls_holds_nobody_up() {
    const CLIENTS: usize = 4;
    let requests = rounds(8_000, 60_000);
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("access.log");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Open both ways, so that the node's end opens at once.
    let mut reader = std::fs::File::options();
    let mut reader =
        reader.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
    let log = format!("[log]\naccess_file = '{}'\nrotate = 'never'", pipe.display());
    let setup = |log: &str| Setup::new().with("[node]\nworkers = 1").with(log);
    let mut proxy = setup(&log).with("[timeouts]\ndrain = '1s'").start();
    // One beside it, whose log is written.
    let other = setup("").start();
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let server = target(move |mut stream| {
        let mut request = [0; 4096];
        while matches!(stream.read(&mut request), Ok(1..)) && stream.write_all(answer).is_ok() {}
    });
    let exchange = |proxy: &TestProxy, count: usize| {
        let started = Instant::now();
        let failed = thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| -> std::io::Result<()> {
                        let mut stream = proxy.connect();
                        let request =
                            format!("GET http://{server}/ HTTP/1.1\r\nHost: {server}\r\n\r\n");
                        for _ in 0..count {
                            stream.write_all(request.as_bytes())?;
                            let mut got = Vec::new();
                            while !got.ends_with(b"\r\n\r\nok") {
                                let mut part = [0; 1024];
                                let read = stream.read(&mut part)?;
                                if read == 0 {
                                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                                }
                                got.extend_from_slice(&part[..read]);
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            clients.into_iter().filter_map(|client| client.join().unwrap().err()).next()
        });
        assert!(failed.is_none(), "{failed:?}");
        count as f64 / started.elapsed().as_secs_f64()
    };
    let cpu_of = |proxy: &TestProxy| {
        let began = proxy.cpu();
        let rate = exchange(proxy, requests);
        (rate, (proxy.cpu() - began).as_secs_f64())
    };
    // A reader that reads while it is to, and says how many lines it has read.
    let (reads, lines) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (asked, counted) = (reads.clone(), lines.clone());
    let drinker = thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while Arc::strong_count(&asked) > 1 {
            match asked.load(Relaxed).then(|| reader.read(&mut buffer)) {
                Some(Ok(read)) => {
                    let lines = buffer[..read].iter().filter(|byte| **byte == b'\n').count();
                    counted.fetch_add(lines, Relaxed);
                }
                _ => pause(Duration::from_millis(1)),
            }
        }
    });
    let total = CLIENTS * (requests / 8 + requests);
    exchange(&other, requests / 8);
    exchange(&proxy, requests / 8);
    reads.store(false, Relaxed);
    let ((stalled, cpu_stalled), (written, cpu_written)) = thread::scope(|scope| {
        let beside = scope.spawn(|| cpu_of(&other));
        (cpu_of(&proxy), beside.join().unwrap())
    });
    assert!(proxy.metric("culvert_records_dropped_total") > 0.0, "nothing was dropped");
    // Beside other tests the time that passes says little; less than half would be the log's.
    let bound = if is_soak() { 0.9 } else { 0.5 };
    assert!(stalled / written > bound, "{stalled} of {written} requests a second");
    // Nor does it cost the node more than clocks that tick a hundred times a second can tell.
    let ratio = cpu_stalled / cpu_written;
    assert!(ratio < if is_soak() { 1.01 } else { 1.5 }, "{ratio} of the CPU time a request");

    // The log goes on: all that was not dropped is written.
    reads.store(true, Relaxed);
    await_some("all records", || {
        let written = proxy.metric("culvert_records_written_total");
        let dropped = proxy.metric("culvert_records_dropped_total");
        let all = written + dropped == total as f64 && lines.load(Relaxed) as f64 == written;
        all.then_some(())
    });
    assert_eq!(proxy.metric("culvert_records_lost_total"), 0.0);

    // It stalls again while the node ends, and does not keep it.
    reads.store(false, Relaxed);
    exchange(&proxy, requests / 8);
    let started = Instant::now();
    proxy.signal("-TERM");
    assert!(proxy.await_end().success());
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    drop(reads);
    drinker.join().unwrap();
}
