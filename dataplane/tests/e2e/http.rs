//! HTTP proxying: CONNECT, forwarding with keep-alive, login, what must not pass.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::support::{Setup, TestProxy, closed_port, echo, ping, target};

/// `ann:secret`
const LOGIN: &str = "Proxy-Authorization: Basic YW5uOnNlY3JldA==\r\n";

/// A target that answers each request with its number on the connection, and keeps the requests.
fn server(requests: Arc<Mutex<Vec<String>>>) -> SocketAddr {
    target(move |stream| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut stream = stream;
        for number in 1.. {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if reader.read_line(&mut head).unwrap_or(0) == 0 {
                    return;
                }
            }
            let lower = head.to_ascii_lowercase();
            let length = lower.split("content-length: ").nth(1);
            let length =
                length.map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            requests.lock().unwrap().push(head.clone() + &String::from_utf8_lossy(&body));
            let text = format!("answer {number}");
            let answer = if head.contains("/chunked") {
                format!(
                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{text}\r\n0\r\n\r\n",
                    text.len()
                )
            } else if head.contains("/close") {
                format!("HTTP/1.1 200 OK\r\n\r\n{text}")
            } else {
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len())
            };
            stream.write_all(answer.as_bytes()).unwrap();
            if head.contains("/close") {
                return;
            }
        }
    })
}

/// Reads one answer: head and body by Content-Length, or to the chunked end.
fn answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&text).to_ascii_lowercase();
    if let Some(rest) = head.split("content-length: ").nth(1) {
        let mut body = vec![0; rest.split("\r\n").next().unwrap().parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
        text.extend(body);
    } else if head.contains("transfer-encoding: chunked") {
        while !text.ends_with(b"0\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
    }
    String::from_utf8(text).unwrap()
}

fn get(stream: &mut TcpStream, target: SocketAddr, path: &str, more: &str) -> String {
    write!(stream, "GET http://{target}{path} HTTP/1.1\r\nHost: x\r\n{more}\r\n").unwrap();
    answer(stream)
}

fn with_ann() -> TestProxy {
    Setup::new().listener("auth = ['password']\nprotocols = ['http']").user("ann", "").start()
}

#[test]
fn connect_is_a_tunnel() {
    let proxy = with_ann();
    let target = echo();
    let mut stream = proxy.connect();
    // Bytes right behind the head belong to the tunnel.
    write!(stream, "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{LOGIN}\r\nearly").unwrap();
    let mut reply = [0; 39 + 5];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"HTTP/1.1 200 Connection established\r\n\r\nearly");
    ping(&mut stream).unwrap();
}

#[test]
fn a_login_is_asked_for_and_the_connection_kept() {
    let proxy = with_ann();
    let requests = Arc::default();
    let target = server(Arc::clone(&requests));
    let mut stream = proxy.connect();
    let refused = get(&mut stream, target, "/", "");
    assert!(refused.starts_with("HTTP/1.1 407 "), "{refused}");
    assert!(refused.contains("Proxy-Authenticate: Basic "));
    let wrong = get(&mut stream, target, "/", "Proxy-Authorization: Basic YW5uOndyb25n\r\n");
    assert!(wrong.starts_with("HTTP/1.1 407 "));
    assert!(get(&mut stream, target, "/", LOGIN).ends_with("answer 1"));
    // Each request of the connection needs the login.
    assert!(get(&mut stream, target, "/", "").starts_with("HTTP/1.1 407 "));
    let requests = requests.lock().unwrap();
    assert_eq!(requests.len(), 1);
    assert!(!requests[0].to_ascii_lowercase().contains("proxy-"), "{}", requests[0]);
}

/// Between two requests the idle deadline holds, within a head the handshake's, however it drips.
#[test]
fn deadlines_hold_for_connections_that_are_kept() {
    let target = server(Arc::default());
    let proxy =
        Setup::new().with("[timeouts]\nidle = '2s'\nhandshake = '1s'").user("ann", "").start();
    let ended = |mut stream: TcpStream, drips: bool| {
        let began = Instant::now();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        loop {
            if drips && stream.write_all(b"G").is_err() {
                return began.elapsed();
            }
            match stream.read(&mut [0]) {
                Ok(0) => return began.elapsed(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return began.elapsed(),
                Ok(_) => panic!("an answer to nothing"),
            }
        }
    };
    let kept = || {
        let mut stream = proxy.connect();
        assert!(get(&mut stream, target, "/", LOGIN).contains("answer"));
        stream
    };
    let about = |time: Duration, seconds: f64| {
        let seconds = seconds - 0.1..seconds + 0.9;
        assert!(seconds.contains(&time.as_secs_f64()), "{time:?}, not {seconds:?}");
    };
    about(ended(kept(), false), 2.0);
    about(ended(kept(), true), 1.0);
    // The first head has no more time.
    about(ended(proxy.connect(), true), 1.0);
    let records = proxy.await_records(4);
    let count = |end: &str| records.iter().filter(|record| record["end"] == end).count();
    assert_eq!(count("handshake_timeout"), 2, "{records:?}");
}

#[test]
fn requests_of_one_connection_are_exchanges_of_their_own() {
    let proxy = with_ann();
    let requests = Arc::default();
    let (one, two) = (server(Arc::clone(&requests)), server(Arc::clone(&requests)));
    let mut stream = proxy.connect();
    assert!(get(&mut stream, one, "/a", LOGIN).ends_with("answer 1"));
    assert!(get(&mut stream, one, "/chunked", LOGIN).ends_with("8\r\nanswer 2\r\n0\r\n\r\n"));
    assert!(get(&mut stream, two, "/b", LOGIN).ends_with("answer 1"));
    write!(
        stream,
        "POST http://{two}/c HTTP/1.1\r\nHost: x\r\n{LOGIN}Content-Length: 5\r\n\r\nhello"
    )
    .unwrap();
    assert!(answer(&mut stream).ends_with("answer 2"));
    let failed = get(&mut stream, closed_port(), "/", LOGIN);
    assert!(failed.starts_with("HTTP/1.1 502 "), "{failed}");
    write!(stream, "GET http://{one}/close HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n").unwrap();
    let mut last = String::new();
    stream.read_to_string(&mut last).unwrap();
    assert!(last.contains("Connection: close\r\n") && last.ends_with("answer 1"), "{last}");

    assert!(requests.lock().unwrap()[3].ends_with("\r\n\r\nhello"));
    let records = proxy.await_records(6);
    assert_eq!(records.len(), 6);
    let session = &records[0]["session"];
    assert!(records.iter().all(|record| record["session"] == *session));
    assert_eq!(records[4]["end"], "refused");
    assert_eq!(proxy.metric("culvert_exchanges_total"), 5.0);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let proxy = with_ann();
    let target = server(Arc::default());
    let mut stream = proxy.connect();
    for path in ["/1", "/2", "/3"] {
        write!(stream, "GET http://{target}{path} HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n").unwrap();
    }
    for number in 1..=3 {
        assert!(answer(&mut stream).ends_with(&format!("answer {number}")));
    }
}

#[test]
fn nothing_is_smuggled_past_the_proxy() {
    let proxy = with_ann();
    let requests: Arc<Mutex<Vec<String>>> = Arc::default();
    let target = server(Arc::clone(&requests));
    let canary = format!("GET http://{target}/canary HTTP/1.1\r\nHost: x\r\n\r\n");
    for fields in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Content-Length: 0\r\nContent-Length: 44\r\n",
        "Content-Length: +5\r\n",
        "X: a\n\nGET /canary HTTP/1.1\r\n",
        "Connection: content-length\r\nContent-Length: 5\r\n",
    ] {
        let mut stream = proxy.connect();
        let request = format!(
            "POST http://{target}/ HTTP/1.1\r\nHost: x\r\n{LOGIN}{fields}\r\n0\r\n\r\n{canary}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 400 "), "{fields:?}: {text}");
    }
    assert_eq!(*requests.lock().unwrap(), Vec::<String>::new());
}

#[test]
fn an_upgrade_passes_and_nothing_before_it() {
    let proxy = with_ann();
    let target = target(|mut stream| {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(String::from_utf8(head).unwrap().contains("Upgrade: chat\r\n"));
        let answer =
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: chat\r\nConnection: upgrade\r\n\r\n";
        stream.write_all(answer).unwrap();
        let mut other = stream.try_clone().unwrap();
        let _ = std::io::copy(&mut stream, &mut other);
    });
    let mut stream = proxy.connect();
    write!(
        stream,
        "GET http://{target}/ HTTP/1.1\r\nHost: x\r\n{LOGIN}Connection: upgrade\r\nUpgrade: chat\r\n\r\n"
    )
    .unwrap();
    let head = answer(&mut stream);
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("Upgrade: chat\r\n"), "{head}");
    ping(&mut stream).unwrap();
}

#[test]
fn a_cut_answer_does_not_look_finished() {
    let proxy = with_ann();
    let target = target(|mut stream| {
        let mut head = [0; 512];
        let _ = stream.read(&mut head).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").unwrap();
    });
    let mut stream = proxy.connect();
    write!(stream, "GET http://{target}/ HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n").unwrap();
    let mut text = Vec::new();
    let error = stream.read_to_end(&mut text).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.await_records(1)[0]["end"], "upstream_closed");
}

#[test]
fn a_dripped_head_is_closed_at_its_bound() {
    let proxy = with_ann();
    let mut stream = proxy.connect();
    stream.write_all(b"GET http://a/ HTTP/1.1\r\n").unwrap();
    let line = [&b"X: "[..], &[b'x'; 1019], b"\r\n"].concat();
    let before = proxy.cpu();
    while stream.write_all(&line).is_ok() {}
    assert!(proxy.cpu() - before < std::time::Duration::from_millis(200));
    assert_eq!(proxy.await_records(1)[0]["end"], "client_malformed");
}

#[test]
fn a_client_that_leaves_while_it_waits_ends_its_session() {
    let (sender, gone) = std::sync::mpsc::channel();
    let silent = target(move |mut stream| {
        let mut request = Vec::new();
        let _ = stream.read_to_end(&mut request);
        sender.send(request.len()).unwrap();
    });
    let proxy = with_ann();
    let mut client = proxy.connect();
    let request = format!("GET http://{silent}/ HTTP/1.1\r\nHost: a\r\n{LOGIN}\r\n");
    client.write_all(request.as_bytes()).unwrap();
    proxy.await_metric("culvert_exchanges_total", 1.0);
    drop(client);
    assert!(gone.recv_timeout(crate::support::PATIENCE).unwrap() > 0);
    let records = proxy.await_records(1);
    assert_eq!(records[0]["end"], "client_closed");
}
