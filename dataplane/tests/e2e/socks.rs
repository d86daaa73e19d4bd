//! SOCKS5 and SOCKS4 as clients speak them.

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use culvert_proto::Target;

use crate::support::{Setup, closed_port, echo, named, ping, target, target_on};

#[test]
fn logs_in_over_ipv4_ipv6_and_a_name() {
    let proxy = Setup::new().user("ann", "").start();
    let v6 = target_on("[::1]:0", |mut stream| {
        let mut other = stream.try_clone().unwrap();
        let _ = std::io::copy(&mut stream, &mut other);
    });
    let v4 = echo();
    for target in [Target::from(v4), Target::from(v6), named("localhost", v4.port())] {
        let mut stream = proxy.socks5(Some(("ann", "secret")), &target).unwrap();
        ping(&mut stream).unwrap();
    }
    let records = proxy.await_records(2);
    assert_eq!(records[0]["user"], "ann");
    assert_eq!((&records[0]["bytes_up"], &records[0]["bytes_down"]), (&4.into(), &4.into()));
}

#[test]
fn wrong_credentials_are_rejected_and_never_match_a_prefix() {
    let proxy = Setup::new()
        .with("[auth]\nfailures_per_address = 0\nfailures_per_user = 0")
        .listener("auth = ['password']")
        .user("ann", "")
        .start();
    let target = Target::from(echo());
    for (user, password) in [
        ("ann", "Secret"),
        ("ann", "secret\0"),
        ("ann", "secre"),
        ("ann\0", "secret"),
        ("ann\0x", "secret"),
        ("an", "secret"),
        ("bob", "secret"),
        ("ann", "secret\n"),
    ] {
        assert_eq!(
            proxy.socks5(Some((user, password)), &target).err(),
            Some(255),
            "{user:?} {password:?}"
        );
    }
    assert_eq!(proxy.metric("culvert_auth_total{result=\"rejected\"}"), 8.0);
    assert!(proxy.socks5(Some(("ann", "secret")), &target).is_ok());
    // Without credentials there is no method in common.
    let mut stream = proxy.connect();
    stream.write_all(&[5, 1, 0]).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, [5, 0xff]);
}

#[test]
fn the_reply_names_the_failure() {
    let proxy = Setup::new()
        .policy("allow_internal = ['127.0.0.0/8']\ndeny_ports = [25]")
        .with("[dns]\nservers = ['127.0.0.1:1']\ntimeout = '500ms'")
        .start();
    let ask = |target: Target| proxy.socks5(None, &target).err();
    assert_eq!(ask(Target::from(closed_port())), Some(5), "refused");
    assert_eq!(ask(Target::from("127.0.0.1:25".parse::<SocketAddr>().unwrap())), Some(2), "denied");
    assert_eq!(
        ask(Target::from("10.0.0.1:80".parse::<SocketAddr>().unwrap())),
        Some(2),
        "internal"
    );
    assert_eq!(ask(named("nobody.example", 80)), Some(4), "unresolved");
    for (request, code) in [
        (&[5, 2, 0, 1, 127, 0, 0, 1, 0, 80][..], 7),
        (&[5, 3, 0, 1, 127, 0, 0, 1, 0, 80], 7),
        (&[5, 9, 0, 1, 127, 0, 0, 1, 0, 80], 7),
        (&[5, 1, 0, 9], 8),
    ] {
        let mut stream = proxy.connect();
        stream.write_all(&[5, 1, 0]).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[3], code, "{request:?}");
    }
}

#[test]
fn names_with_control_bytes_go_nowhere() {
    let proxy = Setup::new().start();
    let port = echo().port().to_be_bytes();
    for name in
        [&b"localhost\0.invalid"[..], b"localhost\0", b"local\x01host", b"localhost\r\n", b"a b"]
    {
        let mut stream = proxy.connect();
        let request = [&[5, 1, 0, 5, 1, 0, 3, name.len() as u8][..], name, &port].concat();
        stream.write_all(&request).unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_ne!(answer[3], 0, "{name:?}");
    }
}

/// RELIABILITY E3.
#[test]
fn payload_in_the_same_segment_as_the_handshake_arrives() {
    let proxy = Setup::new().user("ann", "").start();
    let target = echo();
    let payload = crate::support::pattern(10 * 1024);
    for _ in 0..crate::support::rounds(50, 1000) {
        let mut stream = proxy.connect();
        let port = target.port().to_be_bytes();
        let handshake = [
            &[5, 1, 2, 1, 3][..],
            b"ann",
            &[6],
            b"secret",
            &[5, 1, 0, 1, 127, 0, 0, 1],
            &port,
            &payload,
        ]
        .concat();
        stream.write_all(&handshake).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer[..4], [5, 2, 1, 0]);
        assert_eq!(answer[14..], payload);
    }
}

#[test]
fn socks4_and_4a_connect() {
    let proxy = Setup::new().start();
    let port = echo().port().to_be_bytes();
    for request in [
        [&[4, 1][..], &port, &[127, 0, 0, 1], b"me\0"].concat(),
        [&[4, 1][..], &port, &[0, 0, 0, 7], b"me\0localhost\0"].concat(),
    ] {
        let mut stream = proxy.connect();
        stream.write_all(&request).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..2], [0, 90]);
        ping(&mut stream).unwrap();
    }
}

#[test]
fn protocols_that_are_off_are_closed() {
    let proxy = Setup::new().listener("protocols = ['http']\nauth = ['none']").start();
    for first in [&[5, 1, 0][..], &[4, 1, 0, 80, 127, 0, 0, 1, 0], &[0x16, 3, 1], &[0]] {
        let mut stream = proxy.connect();
        stream.write_all(first).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{first:?}: {answer:?}");
    }
}

#[test]
fn the_bound_address_is_real() {
    let proxy = Setup::new().start();
    let (sender, peers) = std::sync::mpsc::channel();
    let target = target(move |stream| sender.send(stream.peer_addr().unwrap()).unwrap());
    let mut stream = proxy.connect();
    let port = target.port().to_be_bytes();
    stream.write_all(&[&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1][..], &port].concat()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    let peer = peers.recv_timeout(crate::support::PATIENCE).unwrap();
    assert_eq!(answer[6..10], [127, 0, 0, 1]);
    assert_eq!(answer[10..], peer.port().to_be_bytes());
}
