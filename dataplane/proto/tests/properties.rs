//! Properties over generated input: nothing panics, bounds hold, pieces give what the whole gives. The
//! number of inputs is `PROPTEST_CASES`; the fuzz targets check the same with coverage.

#![allow(missing_docs, clippy::unwrap_used)]

use culvert_proto::{
    Framing, Handshake, Host, Login, Next, Outcome, Payload, Target, Verdict,
    http::{self, Body, Chunks, Exchange, Response},
    limits::HTTP_HEAD_MAX,
    socks4, socks5,
};
use proptest::prelude::*;

/// What a handshake does with input in pieces; every login is rejected unless `accept`.
fn drive(
    handshake: &mut dyn Handshake,
    input: &[u8],
    step: usize,
    accept: bool,
) -> (Vec<u8>, Vec<String>, usize) {
    let (mut written, mut requests, mut used, mut until) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..10_000 {
        match handshake.poll() {
            Next::Read if until > used => match handshake.handle_input(&input[used..until]) {
                Ok(n) => used += n,
                Err(_) => break,
            },
            Next::Read if until == input.len() => break,
            Next::Read => until = (until + step).min(input.len()),
            Next::Write(bytes) => {
                let len = bytes.len();
                written.extend_from_slice(bytes);
                handshake.sent(len);
            }
            Next::Authenticate(_) => {
                handshake.authenticated(if accept { Verdict::Accepted } else { Verdict::Rejected });
            }
            Next::Request(request) => {
                requests.push(format!("{} {}", request.command.name(), request.target));
                handshake.reply(Outcome::Refused);
            }
            Next::Done => {
                if !handshake.resume() {
                    break;
                }
            }
            Next::Refused(_) => break,
        }
    }
    (written, requests, used)
}

/// Bytes that look like a protocol more often than noise does.
fn socks_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(vec![5, 1, 0]),
        Just(vec![5, 2, 0, 2]),
        Just(vec![1, 1, b'a', 1, b'b']),
        Just(vec![5, 1, 0, 1, 127, 0, 0, 1, 0, 80]),
        Just(vec![5, 1, 0, 3, 3, b'a', b'.', b'b', 0, 80]),
        Just(vec![4, 1, 0, 80, 0, 0, 0, 1, 0, b'x', 0]),
        proptest::collection::vec(any::<u8>(), 0..8),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

fn http_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(b"GET http://a.b/ HTTP/1.1\r\n".to_vec()),
        Just(b"CONNECT a.b:443 HTTP/1.1\r\n".to_vec()),
        Just(b"POST http://[::1]:8/x HTTP/1.0\r\n".to_vec()),
        Just(b"HTTP/1.1 200 OK\r\n".to_vec()),
        Just(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec()),
        Just(b"Host: a.b\r\n".to_vec()),
        Just(b"Content-Length: 5\r\n".to_vec()),
        Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
        Just(b"Connection: close, x\r\n".to_vec()),
        Just(b"Proxy-Authorization: Basic YTpi\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"5\r\nhello\r\n0\r\n\r\n".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..6),
    ];
    proptest::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn socks5_is_the_same_in_pieces(input in socks_bytes(), step in 1usize..20, accept: bool) {
        let whole = drive(&mut socks5::Server::new(Login::Either), &input, input.len().max(1), accept);
        let pieces = drive(&mut socks5::Server::new(Login::Either), &input, step, accept);
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn socks5_never_asks_for_anything_before_a_verified_login(input in socks_bytes()) {
        let (_, requests, _) = drive(&mut socks5::Server::new(Login::Password), &input, 7, false);
        prop_assert_eq!(requests, Vec::<String>::new());
    }

    #[test]
    fn socks4_is_the_same_in_pieces(input in socks_bytes(), step in 1usize..20) {
        let whole = drive(&mut socks4::Server::new(), &input, input.len().max(1), true);
        prop_assert_eq!(whole, drive(&mut socks4::Server::new(), &input, step, true));
    }

    #[test]
    fn http_never_asks_for_anything_before_a_verified_login(input in http_bytes(), step in 1usize..40) {
        let (_, requests, _) = drive(&mut http::Server::new(Login::Password), &input, step, false);
        prop_assert_eq!(requests, Vec::<String>::new());
    }

    #[test]
    fn http_requests_are_the_same_in_pieces(input in http_bytes(), step in 1usize..40) {
        let (_, whole, _) = drive(&mut http::Server::new(Login::Either), &input, input.len().max(1), true);
        let (_, pieces, _) = drive(&mut http::Server::new(Login::Either), &input, step, true);
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn responses_take_at_least_a_byte_and_stay_in_bounds(mut input in http_bytes(), step in 1usize..40) {
        let exchange = Exchange { head_only: false, version: 1, upgrade: true, keep_alive: true };
        let mut response = Response::new(exchange);
        let mut at = 0;
        while at < input.len() {
            let until = (at + step).min(input.len());
            match response.decode(&mut input[at..until]) {
                Ok(decoded) => {
                    prop_assert!(decoded.used <= until - at);
                    prop_assert!(decoded.used > 0 || decoded.end);
                    match decoded.payload {
                        Payload::Input(range) => prop_assert!(range.end <= until - at),
                        Payload::Own(head) => prop_assert!(head.len() <= HTTP_HEAD_MAX + 1024),
                        Payload::None => {}
                    }
                    at += decoded.used;
                    if decoded.end { break }
                }
                Err(_) => break,
            }
        }
    }

    #[test]
    fn chunks_end_where_they_end(parts in proptest::collection::vec(1usize..300, 0..6), step in 1usize..64, tail in proptest::collection::vec(any::<u8>(), 0..20)) {
        let mut body = Vec::new();
        for len in parts {
            body.extend_from_slice(format!("{len:X}\r\n").as_bytes());
            body.extend(std::iter::repeat_n(b'\r', len));
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"0\r\n\r\n");
        let end = body.len();
        body.extend(tail);
        let mut scanner = Body::Chunked(Chunks::new());
        let mut at = 0;
        while !scanner.is_over() {
            let until = (at + step).min(body.len());
            at += scanner.advance(&body[at..until]).unwrap();
        }
        prop_assert_eq!(at, end);
    }

    #[test]
    fn chunks_never_panic(input in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Body::Chunked(Chunks::new()).advance(&input);
    }

    #[test]
    fn hosts_are_normal_once_parsed(text in "\\PC{0,40}") {
        if let Ok(host) = Host::parse(text.as_bytes()) {
            let again = host.to_string();
            prop_assert_eq!(Host::parse(again.as_bytes()), Ok(host));
        }
    }

    #[test]
    fn targets_survive_being_written(text in "[a-zA-Z0-9.:\\[\\]-]{0,30}") {
        if let Ok(target) = Target::parse(text.as_bytes()) {
            prop_assert_eq!(Target::parse(target.to_string().as_bytes()), Ok(target));
        }
    }

    #[test]
    fn datagram_headers_round_trip(input in proptest::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(header) = socks5::UdpHeader::parse(&input) {
            let mut again = Vec::new();
            socks5::UdpHeader::encode(&header.target, &mut again);
            let parsed = socks5::UdpHeader::parse(&again).unwrap();
            prop_assert_eq!(parsed.target, header.target);
        }
    }
}
