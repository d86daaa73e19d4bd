//! Names: a server of our own, silence, rebinding, racing.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{Setup, TestProxy, echo, is_soak, named, pause, ping, rounds, target};

type Zone = Box<dyn Fn(&str, usize) -> Vec<IpAddr> + Send>;

/// A name server: answers A and AAAA with what the zone gives for a name and the number of the
/// question; counts questions.
fn name_server(zone: Zone) -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((len, client)) = socket.recv_from(&mut packet) {
            let number = count.fetch_add(1, Relaxed);
            if let Some(answer) = answer(&packet[..len], &zone, number) {
                let _ = socket.send_to(&answer, client);
            }
        }
    });
    (address, asked)
}

/// RFC 1035: the question back, and an address record with TTL 0 for each address of its family.
fn answer(question: &[u8], zone: &Zone, number: usize) -> Option<Vec<u8>> {
    let (mut at, mut name) = (12, String::new());
    while question[at] != 0 {
        let len = usize::from(question[at]);
        name.push_str(std::str::from_utf8(&question[at + 1..at + 1 + len]).ok()?);
        name.push('.');
        at += 1 + len;
    }
    let kind = question[at + 2];
    let addresses: Vec<IpAddr> = zone(name.trim_end_matches('.'), number)
        .into_iter()
        .filter(|ip| (kind == 1 && ip.is_ipv4()) || (kind == 28 && ip.is_ipv6()))
        .collect();
    let mut answer = question[..at + 5].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[6..12].copy_from_slice(&[0, addresses.len() as u8, 0, 0, 0, 0]);
    for ip in addresses {
        answer.extend_from_slice(&[0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0]);
        match ip {
            IpAddr::V4(ip) => answer.extend([&[4][..], &ip.octets()].concat()),
            IpAddr::V6(ip) => answer.extend([&[16][..], &ip.octets()].concat()),
        }
    }
    Some(answer)
}

fn with_server(server: SocketAddr, policy: &str) -> TestProxy {
    Setup::new()
        .with(&format!("[dns]\nservers = ['{server}']\ntimeout = '2s'"))
        .policy(policy)
        .start()
}

#[test]
fn names_are_asked_for_once_and_kept() {
    let (server, asked) = name_server(Box::new(|_, _| vec![[127, 0, 0, 1].into()]));
    let proxy = with_server(server, "allow_internal = ['127.0.0.0/8']");
    let port = echo().port();
    for _ in 0..50 {
        ping(&mut proxy.socks5(None, &named("kept.example", port)).unwrap()).unwrap();
    }
    // TTL 0 is kept for a second, by each worker; each question is two (A and AAAA).
    assert!(asked.load(Relaxed) <= 12, "{}", asked.load(Relaxed));
    assert!(proxy.metric("culvert_dns_lookups_total{from=\"cache\"}") >= 44.0);
}

/// What is asked at once is asked for once by each worker; what is old is asked for again, what is missing
/// is remembered too.
#[test]
fn answers_are_shared_kept_and_forgotten() {
    let (server, asked) = name_server(Box::new(|name, _| {
        // So that all who ask at once wait for the first one's answer.
        pause(Duration::from_millis(if name == "slow.example" { 100 } else { 0 }));
        if name == "missing.example" { vec![] } else { vec![[127, 0, 0, 1].into()] }
    }));
    let proxy = Setup::new()
        .with(&format!("[node]\nworkers = 2\n[dns]\nservers = ['{server}']\ntimeout = '2s'"))
        .policy("allow_internal = ['127.0.0.0/8']")
        .start();
    let port = echo().port();
    thread::scope(|scope| {
        for _ in 0..60 {
            scope.spawn(|| {
                let stream = proxy.socks5(None, &named("slow.example", port));
                ping(&mut stream.unwrap()).unwrap();
            });
        }
    });
    let mut before = asked.load(Relaxed);
    // Two workers, two families.
    assert!(before <= 4, "{before}");
    // TTL 0 is kept for a second.
    pause(Duration::from_millis(1100));
    ping(&mut proxy.socks5(None, &named("slow.example", port)).unwrap()).unwrap();
    assert!(asked.load(Relaxed) > before);
    before = asked.load(Relaxed);
    for _ in 0..40 {
        assert_eq!(proxy.socks5(None, &named("missing.example", port)).err(), Some(4));
    }
    let more = asked.load(Relaxed) - before;
    assert!(more <= 4, "{more}");
}

/// A record says how long each stage took, how far the session came, and who ended it.
#[test]
fn a_record_tells_the_stages() {
    let late = Duration::from_millis(120);
    let (server, _) = name_server(Box::new(move |name, _| {
        pause(if name == "slow.example" { late } else { Duration::ZERO });
        vec![[127, 0, 0, 1].into()]
    }));
    let proxy = Setup::new()
        .with(&format!("[dns]\nservers = ['{server}']\ntimeout = '2s'"))
        .policy("allow_internal = ['127.0.0.0/8']\ndeny_ports = [25]")
        .start();
    let mut stream = proxy.connect();
    proxy.await_metric("culvert_sessions_active", 1.0);
    pause(late);
    write!(stream, "CONNECT slow.example:{} HTTP/1.1\r\nHost: x\r\n\r\n", echo().port()).unwrap();
    stream.read_exact(&mut [0; 39]).unwrap();
    pause(late);
    ping(&mut stream).unwrap();
    drop(stream);
    let number = |record: &serde_json::Value, key: &str| record[key].as_f64().unwrap();
    let late = late.as_secs_f64() * 1000.0;
    let record = &proxy.await_records(1)[0];
    let [handshake, dial, duration] =
        ["handshake_ms", "dial_ms", "duration_ms"].map(|key| number(record, key));
    assert!(handshake >= late && dial >= late, "{record}");
    assert!(duration >= handshake + dial + late, "{record}");
    let came = |record: &serde_json::Value| {
        ["stage", "side", "end"].map(|key| record[key].as_str().unwrap().to_owned())
    };
    assert_eq!(came(record), ["relay", "client", "finished"], "{record}");
    // Refused by the target, and by the policy.
    let closed = crate::support::closed_port().port();
    assert_eq!(proxy.socks5(None, &named("a.example", closed)).err(), Some(5));
    // Workers' records may come in another order.
    proxy.await_records(2);
    assert_eq!(proxy.socks5(None, &named("a.example", 25)).err(), Some(2));
    let records = proxy.await_records(3);
    assert_eq!(came(&records[1]), ["dial", "upstream", "refused"], "{}", records[1]);
    assert_eq!(came(&records[2]), ["policy", "proxy", "denied"], "{}", records[2]);
}

/// RFC 7766: an answer that does not fit is asked for by TCP.
#[test]
fn a_long_answer_comes_by_tcp() {
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
            break (udp, tcp);
        }
    };
    let server = udp.local_addr().unwrap();
    thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((len, client)) = udp.recv_from(&mut packet) {
            let none: Zone = Box::new(|_, _| Vec::new());
            let mut answer = answer(&packet[..len], &none, 0).unwrap();
            // TC.
            answer[2] |= 2;
            let _ = udp.send_to(&answer, client);
        }
    });
    thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            thread::spawn(move || {
                let zone: Zone = Box::new(|_, _| vec![[127, 0, 0, 1].into()]);
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                    stream.read_exact(&mut question).unwrap();
                    let answer = answer(&question, &zone, 0).unwrap();
                    let length = (answer.len() as u16).to_be_bytes();
                    stream.write_all(&[&length[..], &answer].concat()).unwrap();
                }
            });
        }
    });
    let proxy = with_server(server, "allow_internal = ['127.0.0.0/8']");
    ping(&mut proxy.socks5(None, &named("long.example", echo().port())).unwrap()).unwrap();
}

/// The C library's resolver does as well.
#[test]
fn the_systems_resolver_knows_its_host() {
    let proxy = Setup::new().with("[dns]\nmode = 'getaddrinfo'").start();
    ping(&mut proxy.socks5(None, &named("localhost", echo().port())).unwrap()).unwrap();
    assert_eq!(proxy.socks5(None, &named("missing.invalid", 80)).err(), Some(4));
}

/// RELIABILITY F1.
#[test]
fn a_silent_server_fails_lookups_in_time_and_nothing_else() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let proxy = Setup::new()
        .with(&format!("[dns]\nservers = ['{}']", silent.local_addr().unwrap()))
        .policy("allow_internal = ['127.0.0.0/8']")
        .start();
    let target = echo();
    let mut running = proxy.tunnel(None, target);
    let (proxy, count, before) = (&proxy, rounds(700, 1000), proxy.memory());
    let mut wave = |number: usize| {
        thread::scope(|scope| {
            let lookups: Vec<_> = (0..count)
                .map(|i| {
                    scope.spawn(move || {
                        let started = Instant::now();
                        let name = named(&format!("n{i}.w{number}.example"), 80);
                        (proxy.socks5(None, &name).err(), started.elapsed())
                    })
                })
                .collect();
            let deadline = Instant::now() + Duration::from_secs(1);
            let mut times = Vec::new();
            while Instant::now() < deadline {
                let began = Instant::now();
                ping(&mut running).unwrap();
                times.push(began.elapsed());
                ping(&mut proxy.tunnel(None, target)).unwrap();
            }
            times.sort();
            if is_soak() {
                let slowest = times[times.len() * 99 / 100];
                assert!(slowest <= Duration::from_millis(5), "{slowest:?}");
            }
            for lookup in lookups {
                let (reply, time) = lookup.join().unwrap();
                assert_eq!(reply, Some(4));
                assert!(time < Duration::from_secs(5), "{time:?}");
            }
            proxy.most_memory()
        })
    };
    // The first makes room, not much; what comes after it needs no more.
    let (first, second) = (wave(0), wave(1));
    let each = first.saturating_sub(before) / count as u64;
    assert!(each <= 48 * 1024, "{each} bytes a lookup");
    assert!(second <= first + 1024 * 1024, "{first}, then {second} bytes");
}

/// RELIABILITY F3: the address that was judged is the one that is dialled.
#[test]
fn a_name_that_changes_its_address_never_leads_inside() {
    let (server, _) = name_server(Box::new(|_, number| {
        // Public, then loopback, and so on; each question comes twice.
        if number / 2 % 2 == 0 {
            vec![[203, 0, 114, 1].into()]
        } else {
            vec![[127, 0, 0, 1].into()]
        }
    }));
    let (sender, reached) = std::sync::mpsc::channel();
    let inside = target(move |_| sender.send(()).unwrap());
    let proxy = Setup::new()
        .with(&format!("[dns]\nservers = ['{server}']\n[timeouts]\nconnect = '100ms'"))
        .policy("")
        .start();
    for i in 0..rounds(200, 10_000) {
        let reply = proxy.socks5(None, &named(&format!("r{i}.example"), inside.port())).err();
        assert!(reply.is_some());
    }
    assert!(reached.try_recv().is_err(), "a dial reached loopback");
}

/// RELIABILITY E10.
#[test]
fn a_dead_family_does_not_hold_up_the_other() {
    // 100::/64 is the discard-only prefix; here it has no route or no answer.
    let zone: HashMap<&str, Vec<IpAddr>> =
        HashMap::from([("both.example", vec!["::1".parse().unwrap(), [127, 0, 0, 1].into()])]);
    let (server, _) =
        name_server(Box::new(move |name, _| zone.get(name).cloned().unwrap_or_default()));
    let proxy = with_server(server, "allow_internal = ['127.0.0.0/8', '::1/128']");
    let port = echo().port();
    let before = proxy.descriptors();
    // Nothing listens on ::1; IPv4 answers.
    let mut times = Vec::new();
    for _ in 0..20 {
        let started = Instant::now();
        ping(&mut proxy.socks5(None, &named("both.example", port)).unwrap()).unwrap();
        times.push(started.elapsed());
    }
    times.sort();
    let slowest = times[if is_soak() { 19 } else { 10 }];
    assert!(slowest < Duration::from_millis(400), "{times:?}");
    proxy.await_metric("culvert_sessions_active", 0.0);
    crate::support::await_some("descriptors back", || {
        (proxy.descriptors() <= before).then_some(())
    });
}

#[test]
fn a_missing_name_is_told_and_a_forward_says_502() {
    let (server, _) = name_server(Box::new(|_, _| Vec::new()));
    let proxy = with_server(server, "");
    assert_eq!(proxy.socks5(None, &named("missing.example", 80)).err(), Some(4));
    let mut stream = proxy.connect();
    stream
        .write_all(b"GET http://missing.example/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 502 "), "{text}");
    assert!(proxy.await_records(2).iter().all(|record| record["end"] == "unresolved"));
}
