//! The edges: slow clients, no descriptors, full nodes, forbidden rings, unreachable networks, mutated
//! files.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use culvert_proto::Target;

use crate::support::{Setup, echo, pause, ping, rounds};

/// RELIABILITY B1.
#[test]
fn slow_handshakes_end_at_the_deadline_and_hold_up_nobody() {
    let proxy = Setup::new().start();
    let target = echo();
    // A first crowd, so that what the workers keep anyway is not counted.
    let crowd: Vec<TcpStream> = (0..200).map(|_| proxy.tunnel(None, target)).collect();
    drop(crowd);
    proxy.await_metric("culvert_sessions_active", 0.0);
    let before = proxy.memory();
    let started = Instant::now();
    let mut slow: Vec<TcpStream> = (0..rounds(2000, 5000)).map(|_| proxy.connect()).collect();
    for stream in &mut slow {
        stream.write_all(&[5]).unwrap();
    }
    proxy.await_metric("culvert_sessions_active", slow.len() as f64);
    let each = proxy.memory().saturating_sub(before) / slow.len() as u64;
    assert!(each <= 8 * 1024, "{each} bytes a silent client");
    ping(&mut proxy.tunnel(None, target)).unwrap();
    pause(Duration::from_secs(5));
    for stream in &mut slow {
        stream.write_all(&[3]).unwrap();
    }
    for stream in &mut slow {
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
        let age = started.elapsed();
        assert!(age > Duration::from_secs(9), "{age:?}");
    }
    assert!(started.elapsed() < Duration::from_millis(11_500), "{:?}", started.elapsed());
    let ended = "culvert_sessions_total{protocol=\"socks5\",end=\"handshake_timeout\"}";
    assert_eq!(proxy.metric(ended), slow.len() as f64);
}

/// RELIABILITY B2.
#[test]
fn without_descriptors_the_node_neither_spins_nor_dies() {
    let proxy = Setup::new().through(&["prlimit", "--nofile=128:128"]).start();
    let target = echo();
    let mut running = proxy.tunnel(None, target);
    // More than the node has descriptors for.
    let crowd: Vec<TcpStream> = (0..400).map(|_| proxy.connect()).collect();
    let (before, started) = (proxy.cpu(), Instant::now());
    while started.elapsed() < Duration::from_secs(2) {
        ping(&mut running).unwrap();
        pause(Duration::from_millis(20));
    }
    let share = (proxy.cpu() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    assert!(share <= 0.5, "{share} of a core");
    assert!(proxy.log().lines().count() < 20, "{}", proxy.log());
    drop(crowd);
    crate::support::await_some("service again", || {
        proxy.socks5(None, &Target::from(target)).is_ok().then_some(())
    });
}

/// RELIABILITY B3.
#[test]
fn a_full_node_says_so_in_the_clients_protocol() {
    let proxy = Setup::new()
        .with("[limits]\nsessions = 2\nsessions_per_address = 1000\nnew_sessions_per_second_per_address = 0")
        .start();
    let target = echo();
    let before = proxy.descriptors();
    let full = [proxy.tunnel(None, target), proxy.tunnel(None, target)];
    // More than the node has places for telling so: none is kept for a further request.
    for _ in 0..rounds(150, 1000) {
        let started = Instant::now();
        assert_eq!(proxy.socks5(None, &Target::from(target)).err(), Some(1));
        assert!(started.elapsed() < Duration::from_secs(1));
        let mut stream = proxy.connect();
        write!(stream, "CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    drop(full);
    proxy.await_metric("culvert_sessions_active", 0.0);
    crate::support::await_some("descriptors back", || {
        (proxy.descriptors() <= before).then_some(())
    });
}

/// RELIABILITY B8. Real kernels refuse rings in these ways; strace makes this one do so.
#[test]
fn without_a_ring_the_node_runs_on_epoll_and_says_why() {
    if std::env::var("TEST_DRIVER").is_ok_and(|driver| driver == "epoll") {
        return;
    }
    for (inject, remedy) in [
        ("io_uring_setup:error=EPERM", "kernel.io_uring_disabled=0"),
        ("io_uring_setup:error=ENOSYS", "Linux 5.15"),
        ("io_uring_setup:error=ENOMEM", "LimitMEMLOCK"),
    ] {
        let started = Instant::now();
        let inject = format!("inject={inject}");
        let mut proxy = Setup::new()
            .through(&[
                "strace",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                "trace=io_uring_setup",
                "-e",
                &inject,
            ])
            .start();
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        let log = proxy.log();
        assert_eq!(log.matches("WARN").count(), 1, "{log}");
        assert!(log.contains(remedy), "{log}");
        assert_eq!(proxy.metric("culvert_io_driver{worker=\"0\",driver=\"epoll\"}"), 1.0);
        ping(&mut proxy.tunnel(None, echo())).unwrap();
        proxy.signal("-TERM");
        proxy.await_end();
    }
}

/// RELIABILITY B8: where rings are only smaller, or memory may hardly be locked, the node starts all the same.
#[test]
fn a_host_that_is_tight_with_rings_gets_what_it_gives() {
    let inject = "inject=io_uring_setup:error=ENOMEM:when=1";
    let trace = "trace=io_uring_setup";
    let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", trace, "-e", inject];
    let tight = ["prlimit", "--memlock=65536:65536", "setpriv", "--bounding-set=-all"];
    for wrapper in [&strace[..], &tight[..]] {
        let proxy = Setup::new().through(wrapper).start();
        ping(&mut proxy.tunnel(None, echo())).unwrap();
        assert!(proxy.log().matches("WARN").count() <= 1, "{}", proxy.log());
    }
}

/// RELIABILITY B7: a busy ring is waited for, not panicked at.
#[test]
fn a_busy_ring_loses_nothing() {
    if std::env::var("TEST_DRIVER").is_ok_and(|driver| driver == "epoll") {
        return;
    }
    let proxy = Setup::new()
        .through(&[
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=io_uring_enter",
            "-e",
            "inject=io_uring_enter:error=EBUSY:when=50+50",
        ])
        .start();
    let target = echo();
    let mut streams: Vec<_> = (0..100).map(|_| proxy.tunnel(None, target)).collect();
    for _ in 0..10 {
        for stream in &mut streams {
            ping(stream).unwrap();
        }
    }
    assert_eq!(proxy.metric("culvert_panics_total"), 0.0);
}

/// A network of its own, in which 10.99.0.0/24 is local.
struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Self {
        let namespace = Self(format!("culvert-{name}-{}", std::process::id()));
        let run = |words: &[&str]| {
            assert!(Command::new("ip").args(words).status().unwrap().success(), "{words:?}");
        };
        let name = &namespace.0;
        run(&["netns", "add", name]);
        run(&["-n", name, "link", "set", "lo", "up"]);
        run(&["-n", name, "addr", "add", "10.99.0.1/32", "dev", "lo"]);
        let net = "10.99.0.0/24";
        run(&["-n", name, "route", "add", "local", net, "dev", "lo", "src", "10.99.0.1"]);
        namespace
    }

    /// What runs a program inside.
    fn wrapper(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.0]
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(&self.wrapper()[1..]).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// RELIABILITY B4.
#[test]
fn a_target_without_free_local_ports_fails_at_once_and_alone() {
    let namespace = Namespace::new("ports");
    let proxy = Setup::new()
        .listener("auth = ['none']")
        .policy("allow_internal = ['10.99.0.0/24']")
        .through(&namespace.wrapper())
        .start();
    // After the listeners have theirs.
    let range = "net.ipv4.ip_local_port_range=20000 20019";
    assert!(namespace.command("sysctl").args(["-qw", range]).status().unwrap().success());
    // Each client comes from an address of its own, for clients need local ports too, and binds only
    // the address (IP_BIND_ADDRESS_NO_PORT): a port that was bound is given to no connect.
    let script = r"
import socket, sys, time
for port in (7001, 7002):
    socket.create_server(('10.99.0.9', port), backlog=100).detach()
kept = []
def ask(port):
    stream = socket.socket()
    stream.setsockopt(socket.IPPROTO_IP, 24, 1)
    stream.bind(('127.0.1.%d' % (len(kept) + 1), 0))
    stream.connect(('127.0.0.1', int(sys.argv[1])))
    kept.append(stream)
    stream.sendall(b'\5\1\0')
    assert stream.recv(2) == b'\5\0'
    began = time.monotonic()
    stream.sendall(b'\5\1\0\1' + bytes([10, 99, 0, 9]) + port.to_bytes(2, 'big'))
    reply = stream.recv(10)
    return reply[1], time.monotonic() - began
first = [ask(7001)[0] for _ in range(20)]
none, seconds = ask(7001)
other = [ask(7002)[0] for _ in range(20)]
print(sum(first), none, seconds <= 0.05, sum(other))
";
    let port = proxy.address.port().to_string();
    let output = namespace.command("python3").args(["-c", script, &port]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.trim(), "0 1 True 0", "{}", String::from_utf8_lossy(&output.stderr));
    let records = proxy.await_records(41);
    assert_eq!(records.iter().filter(|record| record["end"] == "no_ports").count(), 1);
}

/// RELIABILITY E9: what the network says is what the client is told.
#[test]
fn replies_tell_how_the_network_failed() {
    let namespace = Namespace::new("replies");
    let rules = "table ip t {
        chain out {
            type filter hook output priority 0; policy accept;
            ip daddr 10.99.0.2 meta l4proto tcp reject with icmp type net-unreachable
            ip daddr 10.99.0.3 meta l4proto tcp reject with icmp type host-unreachable
            ip daddr 10.99.0.4 meta l4proto tcp reject with tcp reset
            ip daddr 10.99.0.5 meta l4proto tcp drop
        }
    }
";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules");
    fs::write(&file, rules).unwrap();
    assert!(namespace.command("nft").arg("-f").arg(&file).status().unwrap().success());

    // The proxy and its client both live in the namespace; curl reports the reply's code.
    let config = folder.path().join("c.toml");
    let driver = std::env::var("TEST_DRIVER").unwrap_or_else(|_| "auto".into());
    let text = format!(
        "[node]\nstate_dir = '{}'\ndriver = '{driver}'\n[timeouts]\nconnect = '2s'\n[[listener]]\n\
         bind = '127.0.0.1:1082'\nauth = ['none']\n[policy]\nallow_internal = ['10.99.0.0/24']\n",
        folder.path().display()
    );
    fs::write(&config, text).unwrap();
    let mut node = namespace
        .command(env!("CARGO_BIN_EXE_culvert"))
        .args(["run", "-c"])
        .arg(&config)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ask = |host: &str| {
        let started = Instant::now();
        let output = namespace
            .command("curl")
            .args(["-sS", "-m", "10", "-x", "socks5h://127.0.0.1:1082"])
            .arg(format!("http://{host}/"))
            .output()
            .unwrap();
        (String::from_utf8_lossy(&output.stderr).into_owned(), started.elapsed())
    };
    crate::support::await_some("the node", || ask("10.99.0.4").0.contains("(5)").then_some(()));
    for (host, code) in
        [("10.99.0.2", "(3)"), ("10.99.0.3", "(4)"), ("10.99.0.4", "(5)"), ("10.98.0.1", "(2)")]
    {
        let (error, _) = ask(host);
        assert!(error.contains(code), "{host}: {error}");
    }
    let (error, time) = ask("10.99.0.5");
    node.kill().unwrap();
    node.wait().unwrap();
    assert!(error.contains("(4)"), "{error}");
    assert!((1.0..3.2).contains(&time.as_secs_f64()), "{time:?}");
}

/// RELIABILITY C5.
#[test]
fn no_mutation_of_a_file_brings_the_program_down() {
    let whole = include_str!("../../culvert.example.toml");
    let mut state = 7u64;
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..1000 {
        let mut bytes = whole.as_bytes().to_vec();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = random(256) as u8,
                2 => bytes.extend_from_within(at..),
                _ => drop(bytes.drain(at..(at + random(40)).min(bytes.len()))),
            }
            if bytes.is_empty() {
                bytes.push(b'\n');
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        for format in [culvert_api::config::Format::Toml, culvert_api::config::Format::Yaml] {
            let none: [(String, String); 0] = [];
            let _ = culvert::config::Config::parse(&text, format, none, &[]);
        }
    }
}
