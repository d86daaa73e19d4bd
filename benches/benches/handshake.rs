//! Parsing a client's handshake.

#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use culvert_proto::{Handshake, Login, Next, Outcome, Verdict, http, socks5};

fn run(handshake: &mut dyn Handshake, input: &[u8]) {
    let mut used = 0;
    loop {
        match handshake.poll() {
            Next::Read => {
                used += handshake.handle_input(&input[used..]).expect("well-formed input")
            }
            Next::Write(bytes) => {
                let len = bytes.len();
                handshake.sent(len);
            }
            Next::Authenticate(_) => handshake.authenticated(Verdict::Accepted),
            Next::Request(_) => {
                handshake.reply(Outcome::Connected { bound: ([127, 0, 0, 1], 1).into() });
            }
            Next::Done | Next::Refused(_) => return,
        }
    }
}

fn handshakes(c: &mut Criterion) {
    let login = b"\x05\x02\x00\x02\x01\x05alice\x06secret\x05\x01\x00\x03\x0bexample.com\x01\xbb";
    c.bench_function("socks5 with login", |b| {
        b.iter(|| run(&mut socks5::Server::new(Login::Password), login));
    });
    let connect =
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nProxy-Authorization: \
        Basic YWxpY2U6c2VjcmV0\r\nUser-Agent: bench\r\n\r\n";
    c.bench_function("http connect with login", |b| {
        b.iter(|| run(&mut http::Server::new(Login::Password), connect));
    });
    let forward =
        b"GET http://example.com/some/path?query HTTP/1.1\r\nHost: example.com\r\nAccept: */*\r\n\
        Accept-Encoding: gzip\r\nUser-Agent: bench\r\nConnection: close\r\n\r\n";
    c.bench_function("http forward", |b| {
        b.iter(|| run(&mut http::Server::new(Login::None), forward));
    });
}

criterion_group!(benches, handshakes);
criterion_main!(benches);
