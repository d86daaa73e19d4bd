//! HTTP proxying: CONNECT, forwarding with keep-alive, login, what must not pass.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use crate::support::{PATIENCE, Setup, TestProxy, closed_port, echo, is_soak, ping, reset, target};

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
    // Nor does an answer to HEAD leave a text that would begin the next.
    let head = format!("HEAD http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut refused = [0; 1024];
    let length = stream.read(&mut refused).unwrap();
    assert!(refused.starts_with(b"HTTP/1.1 407 ") && refused[..length].ends_with(b"\r\n\r\n"));
    assert!(get(&mut stream, target, "/", LOGIN).ends_with("answer 1"));
    // Each request of the connection needs the login.
    assert!(get(&mut stream, target, "/", "").starts_with("HTTP/1.1 407 "));
    let requests = requests.lock().unwrap();
    assert_eq!(requests.len(), 1);
    assert!(!requests[0].to_ascii_lowercase().contains("proxy-"), "{}", requests[0]);
}

/// A target's first answer, after which it could give more.
fn answer_ok(stream: &mut TcpStream) {
    assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
}

/// RELIABILITY A2: a target that ends a kept connection is not left waiting for the client's next request.
#[test]
fn a_kept_connection_that_its_target_ends_is_closed() {
    let proxy = Setup::new().start();
    let (sender, closed) = mpsc::channel();
    let target = target(move |mut stream| {
        answer_ok(&mut stream);
        stream.shutdown(Shutdown::Write).unwrap();
        let began = Instant::now();
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        let _ = sender.send((end, began.elapsed()));
    });
    let mut client = proxy.connect();
    for _ in 0..2 {
        assert!(get(&mut client, target, "/", "").ends_with("ok"));
        let (end, after) = closed.recv_timeout(PATIENCE).unwrap();
        assert_eq!(end, Ok(0));
        assert!(after < Duration::from_secs(5), "{after:?}");
    }
}

/// One that its target leaves open is closed after 30 s.
#[test]
fn a_kept_connection_is_closed_in_the_end() {
    if !is_soak() {
        return;
    }
    let proxy = Setup::new().start();
    let (sender, closed) = mpsc::channel();
    let target = target(move |mut stream| {
        answer_ok(&mut stream);
        stream.set_read_timeout(Some(2 * PATIENCE)).unwrap();
        let began = Instant::now();
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        let _ = sender.send((end, began.elapsed().as_secs()));
    });
    let mut client = proxy.connect();
    assert!(get(&mut client, target, "/", "").ends_with("ok"));
    let (end, after) = closed.recv_timeout(2 * PATIENCE).unwrap();
    assert!(end == Ok(0) && (29..35).contains(&after), "{end:?} {after}");
}

/// On a connection that several clients share, a wrong login makes nobody the one before.
#[test]
fn a_request_without_a_login_is_nobodys() {
    let proxy = Setup::new()
        .listener("auth = ['password', 'none']\nprotocols = ['http']")
        .user("ann", "")
        .start();
    let target = server(Arc::default());
    let mut stream = proxy.connect();
    assert!(get(&mut stream, target, "/", LOGIN).ends_with("answer 1"));
    let wrong = get(&mut stream, target, "/", "Proxy-Authorization: Basic YW5uOndyb25n\r\n");
    assert!(wrong.starts_with("HTTP/1.1 407 "));
    assert!(get(&mut stream, target, "/", "").contains("answer"));
    drop(stream);
    let records = proxy.await_records(2);
    let users: Vec<&serde_json::Value> = records.iter().map(|record| &record["user"]).collect();
    assert_eq!(users, [&serde_json::json!("ann"), &serde_json::Value::Null]);
}

/// Between two requests the idle deadline holds, within a head the handshake's, however it drips.
#[test]
fn deadlines_hold_for_connections_that_are_kept() {
    let target = server(Arc::default());
    let proxy =
        Setup::new().with("[timeouts]\nidle = '2s'\nhandshake = '1s'").user("ann", "").start();
    let ended = |(mut stream, began): (TcpStream, Instant), drips: bool| {
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
    let fresh = || (proxy.connect(), Instant::now());
    let kept = || {
        let mut stream = proxy.connect();
        let began = Instant::now();
        assert!(get(&mut stream, target, "/", LOGIN).contains("answer"));
        (stream, began)
    };
    let about = |time: Duration, seconds: f64| {
        let seconds = seconds - 0.1..seconds + 0.9;
        assert!(seconds.contains(&time.as_secs_f64()), "{time:?}, not {seconds:?}");
    };
    about(ended(kept(), false), 2.0);
    about(ended(kept(), true), 1.0);
    // The first head has no more time.
    about(ended(fresh(), true), 1.0);
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

/// A target that has ended the connection which was kept for it: what can be asked again is.
#[test]
fn a_kept_connection_that_ended_is_made_again() {
    let proxy = with_ann();
    let (sender, heads) = std::sync::mpsc::channel();
    // Each connection answers one request, and ends when a second has come.
    let target = target(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        for number in 0..2 {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if reader.read_line(&mut head).unwrap_or(0) == 0 {
                    return;
                }
            }
            sender.send(head).unwrap();
            if number == 0 {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
            }
        }
    });
    let mut stream = proxy.connect();
    for _ in 0..3 {
        assert!(get(&mut stream, target, "/", LOGIN).ends_with("ok"));
    }
    // One that changes something is not.
    write!(stream, "POST http://{target}/ HTTP/1.1\r\nHost: x\r\n{LOGIN}Content-Length: 0\r\n\r\n")
        .unwrap();
    assert!(answer(&mut stream).starts_with("HTTP/1.1 502 "));
    drop(stream);
    let asked: Vec<String> = heads.try_iter().collect();
    assert_eq!(asked.iter().filter(|head| head.starts_with("GET ")).count(), 5, "{asked:?}");
    assert_eq!(asked.iter().filter(|head| head.starts_with("POST ")).count(), 1, "{asked:?}");
    // Every byte is in a record: three that were answered, two tries, and the last.
    let records = proxy.await_records(6);
    let sum = |key: &str| records.iter().map(|of| of[key].as_u64().unwrap()).sum::<u64>() as f64;
    for (direction, key) in [("up", "bytes_up"), ("down", "bytes_down")] {
        let metric = format!("culvert_bytes_total{{direction=\"{direction}\"}}");
        assert_eq!(proxy.metric(&metric), sum(key), "{records:?}");
    }
}

/// RFC 9112 section 9.6: a client that has sent more than is read gets the whole last answer.
#[test]
fn the_last_answer_is_not_lost_to_a_reset() {
    let proxy = with_ann();
    let target = target(|mut stream| {
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        let _ = stream.write_all(&vec![7; 3 << 20]);
    });
    for _ in 0..10 {
        let mut stream = proxy.connect();
        for _ in 0..2 {
            write!(stream, "GET http://{target}/ HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n").unwrap();
        }
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).unwrap();
        assert_eq!(whole.iter().filter(|byte| **byte == 7).count(), 3 << 20);
    }
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

/// A target that keeps every byte it is sent, and answers each head.
fn recorder(received: Arc<Mutex<Vec<u8>>>) -> SocketAddr {
    target(move |mut stream| {
        let (mut part, mut own) = ([0; 4096], Vec::new());
        let mut heads = 0;
        while let Ok(bytes @ 1..) = stream.read(&mut part) {
            received.lock().unwrap().extend_from_slice(&part[..bytes]);
            own.extend_from_slice(&part[..bytes]);
            let seen = own.windows(4).filter(|window| window == b"\r\n\r\n").count();
            for _ in heads..seen {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            }
            heads = seen;
        }
    })
}

/// Sends bytes and nothing more; gives what comes.
fn say(proxy: &TestProxy, bytes: &[u8]) -> String {
    let mut stream = proxy.connect();
    let mut answer = Vec::new();
    // It may be cut before all is sent.
    if stream.write_all(bytes).is_ok() {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// RELIABILITY G5: what could be read in two ways is refused, and what follows a request is another one.
#[test]
fn nothing_is_smuggled_past_the_proxy() {
    let proxy = with_ann();
    let received: Arc<Mutex<Vec<u8>>> = Arc::default();
    let target = recorder(Arc::clone(&received));
    // It has no login: refused if it is read as a request.
    let canary = format!("GET http://{target}/canary HTTP/1.1\r\nHost: x\r\n\r\n");
    // Fields of a request that is refused as it is.
    let fields: &[&[u8]] = &[
        b"Content-Length: 6\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 6",
        b"Content-Length: 0\r\nContent-Length: 44",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5\r\ncontent-length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: 5, 6",
        b"Content-Length: +5",
        b"Content-Length: -5",
        b"Content-Length: 0x5",
        b"Content-Length: 5.0",
        b"Content-Length: 5e1",
        b"Content-Length: 5 5",
        b"Content-Length: 5;",
        b"Content-Length:",
        b"Content-Length: ",
        b"Content-Length: \x0b5",
        b"Content-Length: 5\x0c",
        b"Content-Length: 5\0",
        b"Content-Length: \xef\xbc\x95",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 18446744073709551617",
        b"Content-Length : 5",
        b"Content-Length\t: 5",
        b"Content-Length\0: 5",
        b"Content-Length",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunkedx",
        b"Transfer-Encoding: x",
        b"Transfer-Encoding:",
        b"Transfer-Encoding: ,chunked",
        b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: \"chunked\"",
        b"Transfer-Encoding: chun ked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: chunked\x0c",
        b"Transfer-Encoding: chunked\0",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\t: chunked",
        b"Transfer-Encoding\0: chunked",
        b"Transfer-Encoding: chunked\nX: y",
        b"Transfer-Encoding: chunked\r\r",
        b"Transfer-Encoding: chunked\r\n ",
        b"Transfer-Encoding:\r\n chunked",
        b"X: y\r\n Transfer-Encoding: chunked",
        b"X: y\r\n\tTransfer-Encoding: chunked",
        b"X: y\rTransfer-Encoding: chunked",
        b"X: y\nTransfer-Encoding: chunked",
        b" Transfer-Encoding: chunked",
        b"X: a\n\nGET /canary HTTP/1.1",
        b"X: a\r\r\nY: b",
        b"X: a\0b",
        b"X\0: a",
        b"X Y: a",
        b"X(: a",
        b"X\xff: a",
        b": a",
        b"no colon",
        b"Host: y",
        b"Host : y",
        b"Connection: content-length\r\nContent-Length: 5",
        b"Connection: close, Content-Length\r\nContent-Length: 5",
        b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
        b"Connection: host",
        b"Proxy-Connection: host",
    ];
    // Lines of a request that is refused as it is.
    let lines: &[&str] = &[
        "GET  {} HTTP/1.1",
        "GET {}  HTTP/1.1",
        "GET\t{} HTTP/1.1",
        "GET {} HTTP/1.1 ",
        "GET {} HTTP/1.1\t",
        "GET {} HTTP/1.1\0",
        "GET {}\0 HTTP/1.1",
        "GET {}\x7f HTTP/1.1",
        "GET {}a b HTTP/1.1",
        "G\0ET {} HTTP/1.1",
        "GE(T {} HTTP/1.1",
        "GET {} HTTP/1.2",
        "GET {} HTTP/2.0",
        "GET {} HTTP/0.9",
        "GET {} HTTP/11",
        "GET {} http/1.1",
        "GET {} HTTP/1.1\nX: y",
        "GET {} HTTP/1.1\rX: y",
        "GET {}",
        "GET / HTTP/1.1",
        "GET ftp://127.0.0.1/ HTTP/1.1",
        "GET http:// HTTP/1.1",
        "GET http:///x HTTP/1.1",
        "GET http://127.0.0.1:0x50/ HTTP/1.1",
        "GET http://127.0.0.1:+80/ HTTP/1.1",
        "GET http://127.0.0.1:65536/ HTTP/1.1",
        "GET http://127.0.0.1:80:80/ HTTP/1.1",
        "GET http://ann@127.0.0.1/ HTTP/1.1",
    ];
    // Chunks that are none; the request itself is well formed.
    let chunks: &[&[u8]] = &[
        b"5 \r\nhello",
        b" 5\r\nhello",
        b"+5\r\nhello",
        b"-5\r\nhello",
        b"0x5\r\nhello",
        b"5_0\r\nhello",
        b"g\r\nhello",
        b"\r\nhello",
        b"5\nhello",
        b"5\rhello",
        b"5\r\nhello\n",
        b"5\r\nhelloXX",
        b"5\r\nhello5\r\nhello",
        b"5;\nhello",
        b"5;a=\0\r\nhello",
        b"fffffffffffffffff\r\nhello",
        b"10000000000000005\r\nhello",
        b"0\n\r\n",
        b"0\r\n\n",
        b"0\r\nX y\r\n\r\n",
        b"0\r\n X: y\r\n\r\n",
        b"0\r\nX: y\n\r\n",
    ];
    let url = format!("http://{target}/");
    let taken = || std::mem::take(&mut *received.lock().unwrap());
    let whole = |line: &str, fields: &[u8]| {
        let head = format!("{line}\r\nHost: x\r\n{LOGIN}");
        [head.as_bytes(), fields, b"\r\n\r\n0\r\n\r\n", canary.as_bytes()].concat()
    };
    let post = format!("POST {url} HTTP/1.1");
    let of_fields = fields.iter().map(|fields| whole(&post, fields));
    let of_lines = lines.iter().map(|line| whole(&line.replace("{}", &url), b"X: y"));
    let of_versions =
        std::iter::once(whole(&format!("POST {url} HTTP/1.0"), b"Transfer-Encoding: chunked"));
    let mut count = chunks.len();
    for request in of_fields.chain(of_lines).chain(of_versions) {
        let said = say(&proxy, &request);
        let shown = String::from_utf8_lossy(&request);
        let refused =
            ["HTTP/1.1 400 ", "HTTP/1.1 505 "].iter().any(|start| said.starts_with(start));
        assert!(refused, "{shown:?}: {said:?}");
        assert_eq!(String::from_utf8_lossy(&taken()), "", "{shown:?}");
        count += 1;
    }
    for chunk in chunks {
        let head = format!("{post}\r\nHost: x\r\n{LOGIN}Transfer-Encoding: chunked\r\n\r\n");
        let request = [head.as_bytes(), chunk, b"\r\n0\r\n\r\n", canary.as_bytes()].concat();
        let said = say(&proxy, &request);
        let came = String::from_utf8_lossy(&taken()).into_owned();
        assert!(!came.contains("canary"), "{:?}: {came:?}", String::from_utf8_lossy(chunk));
        // The head may have been answered; nothing of the rest.
        assert!(said.matches("HTTP/1.1 200 ").count() <= 1, "{said:?}");
    }
    assert!(count >= 87, "{count}");

    // What is well formed is passed on, and the next request is the proxy's to judge.
    for fields in [
        "",
        "Content-Length: 0\r\n",
        "Connection: upgrade\r\nUpgrade: chat\r\n",
        "Expect: 100-continue\r\n",
        "Transfer_Encoding: chunked\r\n",
        "X: \u{e9}\r\n",
    ] {
        let request = format!("{post}\r\nHost: x\r\n{LOGIN}{fields}\r\n{canary}");
        let said = say(&proxy, request.as_bytes());
        assert!(said.starts_with("HTTP/1.1 200 ") && said.contains("HTTP/1.1 407 "), "{said:?}");
        let came = String::from_utf8_lossy(&taken()).into_owned();
        assert!(came.starts_with("POST / HTTP/1.1\r\n") && !came.contains("canary"), "{came:?}");
    }
}

/// RELIABILITY G6: what is between the client and the proxy stays there.
#[test]
fn what_is_for_the_proxy_goes_no_further() {
    let proxy = with_ann();
    let received: Arc<Mutex<Vec<u8>>> = Arc::default();
    let target = recorder(Arc::clone(&received));
    let own = [
        "Proxy-Connection: keep-alive",
        "Connection: keep-alive",
        "Connection: x-secret\r\nX-Secret: canary",
        "Connection: X-Secret, keep-alive\r\nx-secret: canary",
        "Connection: keep-alive\r\nConnection: x-secret\r\nX-SECRET: canary",
        "Proxy-Connection: x-secret\r\nX-Secret: canary",
        "X-Secret: canary\r\nConnection: ,, x-secret ,",
        "X-Secret: canary\r\nX-Secret: canary\r\nConnection: x-secret",
        "Connection: cookie\r\nCookie: canary",
        "Connection: authorization\r\nAuthorization: Basic canary",
        "Keep-Alive: timeout=canary",
        "Proxy-Authenticate: Basic realm=canary",
        "Proxy-Authentication-Info: canary",
        "TE: canary",
        "Connection: TE\r\nTE: canary",
        "Trailer: canary",
        "Upgrade: canary",
        "X-Proxy-Username: canary",
        "X-Proxy-Password: canary",
        "x-proxy-password: canary\r\nX-PROXY-USERNAME: canary",
    ];
    let others = [
        "Authorization: Basic passes",
        "Cookie: passes=1",
        "X-Forwarded-For: passes",
        "Via: 1.1 passes",
        "Accept: passes",
        "Range: bytes=0-1",
        "If-None-Match: passes",
        "Connection: keep-alive\r\nX-Other: passes",
        "User-Agent: passes",
        "X-Proxy-Other: passes",
    ];
    for (fields, passes) in own.map(|of| (of, false)).into_iter().chain(others.map(|of| (of, true)))
    {
        for login in
            [LOGIN, &LOGIN.to_ascii_uppercase().replace("YW5UONNLY3JLDA==", "YW5uOnNlY3JldA==")]
        {
            let mut stream = proxy.connect();
            write!(stream, "GET http://{target}/ HTTP/1.1\r\nHost: x\r\n{login}{fields}\r\n\r\n")
                .unwrap();
            let said = answer(&mut stream);
            assert!(said.starts_with("HTTP/1.1 200 "), "{fields:?}: {said:?}");
            let came = std::mem::take(&mut *received.lock().unwrap());
            let came = String::from_utf8(came).unwrap();
            let lower = came.to_ascii_lowercase();
            for never in ["proxy-authorization", "yw5uonnly3jlda", "canary", "proxy-connection"] {
                assert!(!lower.contains(never), "{fields:?}: {came:?}");
            }
            let (_, field) = fields.rsplit_once("\r\n").unwrap_or(("", fields));
            assert_eq!(came.contains(field), passes, "{fields:?}: {came:?}");
        }
    }
    // Nor is any of it written down.
    proxy.await_records(1);
    let written =
        proxy.log() + &proxy.records().iter().map(|of| of.to_string()).collect::<String>();
    for never in ["YW5uOnNlY3JldA", "canary", "secret\""] {
        assert!(!written.contains(never), "{never}");
    }
    // A head has at most 100 fields.
    let many = |count: usize| {
        let fields: String = (0..count).map(|n| format!("X-{n}: y\r\n")).collect();
        get(&mut proxy.connect(), target, "/", &format!("{LOGIN}{fields}"))
    };
    assert!(many(98).starts_with("HTTP/1.1 200 "));
    assert!(many(99).starts_with("HTTP/1.1 431 "), "{}", many(99));
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

/// RELIABILITY A3, where an end would be the answer's end: a reset is none, whichever way it goes.
#[test]
fn a_reset_is_passed_on_in_either_direction_of_an_exchange() {
    let proxy = with_ann();
    for framing in ["", "Transfer-Encoding: chunked\r\n"] {
        let target = target(move |mut stream| {
            let mut head = [0; 512];
            let _ = stream.read(&mut head).unwrap();
            let body = if framing.is_empty() { "half" } else { "4\r\nhalf\r\n" };
            write!(stream, "HTTP/1.1 200 OK\r\n{framing}\r\n{body}").unwrap();
            // Once it has arrived.
            let _ = stream.read(&mut head).unwrap();
            reset(stream);
        });
        let mut stream = proxy.connect();
        let length = "Content-Length: 5\r\n";
        write!(stream, "POST http://{target}/ HTTP/1.1\r\nHost: x\r\n{length}{LOGIN}\r\n").unwrap();
        let mut text = Vec::new();
        while !text.windows(4).any(|part| part == b"half") {
            let mut part = [0; 512];
            let read = stream.read(&mut part).unwrap();
            text.extend_from_slice(&part[..read]);
        }
        stream.write_all(b"x").unwrap();
        let error = stream.read_to_end(&mut text).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{framing}");
    }
    let (sender, ends) = mpsc::channel();
    let target = target(move |mut stream| {
        let mut head = [0; 512];
        let _ = stream.read(&mut head).unwrap();
        let mut body = Vec::new();
        let _ = sender.send(stream.read_to_end(&mut body).map_err(|error| error.kind()));
    });
    let mut stream = proxy.connect();
    let length = "Content-Length: 100\r\n";
    write!(stream, "POST http://{target}/ HTTP/1.1\r\nHost: x\r\n{length}{LOGIN}\r\nhalf").unwrap();
    proxy.await_metric("culvert_exchanges_total", 3.0);
    reset(stream);
    let end = ends.recv_timeout(PATIENCE).unwrap();
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    let records = proxy.await_records(3);
    let ends = |end: &str| records.iter().filter(|record| record["end"] == end).count();
    assert_eq!((ends("upstream_reset"), ends("client_reset")), (2, 1), "{records:?}");
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
