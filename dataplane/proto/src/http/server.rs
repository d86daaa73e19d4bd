//! The proxy's side of a client connection: CONNECT, absolute-form requests, Basic login.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{
    Body, Exchange,
    head::{Collector, Fields, check_lines, push_field, slots, syntax},
    proxy_status, status,
};
use crate::{
    Command, Credentials, Forward, Handshake, Host, Login, Malformed, Next, Outcome, Refusal,
    Request, Secret, Target, Verdict, limits::HTTP_LOGINS_MAX,
};

/// One client connection, for any number of requests.
#[derive(Debug)]
pub struct Server {
    login: Login,
    state: State,
    input: Collector,
    output: Vec<u8>,
    sent: usize,
    logins: u32,
    /// Empty lines skipped before the present request.
    skipped: u8,
}

#[derive(Debug)]
enum State {
    /// Reading a head.
    Head,
    /// The head is complete; its credentials wait for their verdict.
    Verify(Credentials, Parsed),
    /// The request waits for its reply.
    Carry(Request, Reuse),
    /// The reply is said.
    Done(Reuse),
    /// The client was refused, and the connection ends.
    Refused(Refusal),
}

/// Whether another request may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reuse {
    Keep,
    Close,
}

/// A request as read, before its login is judged.
#[derive(Debug)]
struct Parsed {
    request: Request,
    reuse: Reuse,
    credentials: Option<Credentials>,
}

/// What an answer of our own says.
#[derive(Clone, Copy)]
struct Text<'a> {
    line: &'a str,
    /// It is only announced: the request was HEAD (RFC 9110 section 9.3.2).
    head_only: bool,
}

fn is_head(request: &Request) -> bool {
    matches!(&request.command, Command::Forward(forward) if forward.exchange.head_only)
}

impl Server {
    /// A connection that takes the given logins.
    pub fn new(login: Login) -> Self {
        Self {
            login,
            state: State::Head,
            input: Collector::default(),
            output: Vec::new(),
            sent: 0,
            logins: 0,
            skipped: 0,
        }
    }

    fn say(&mut self, message: Vec<u8>) {
        self.output = message;
        self.sent = 0;
    }

    /// Answers with a status and no more than a line of text.
    fn answer(
        &mut self,
        status: u16,
        reason: &str,
        fields: &[(&str, &str)],
        text: Text<'_>,
        reuse: Reuse,
    ) {
        let mut head = format!("HTTP/1.1 {status} {reason}\r\n").into_bytes();
        for (name, value) in fields {
            push_field(&mut head, name, value.as_bytes());
        }
        push_field(&mut head, "Content-Type", b"text/plain; charset=utf-8");
        push_field(&mut head, "Content-Length", text.line.len().to_string().as_bytes());
        push_field(
            &mut head,
            "Connection",
            if reuse == Reuse::Keep { b"keep-alive" } else { b"close" },
        );
        head.extend_from_slice(b"\r\n");
        if !text.head_only {
            head.extend_from_slice(text.line.as_bytes());
        }
        self.say(head);
    }

    fn refuse(&mut self, error: Malformed) {
        let (status, reason, text) = match error {
            Malformed::TooLarge => {
                (431, "Request Header Fields Too Large", "The request head is too large.\n")
            }
            Malformed::Target => (
                400,
                "Bad Request",
                "This is a proxy: use CONNECT host:port, or http:// followed by a host.\n",
            ),
            _ => (400, "Bad Request", "The request is malformed.\n"),
        };
        let text = Text { line: text, head_only: false };
        self.answer(status, reason, &[], text, Reuse::Close);
        let refusal = match error {
            Malformed::Target => Refusal::BadTarget,
            _ => Refusal::BadRequest,
        };
        self.state = State::Refused(refusal);
    }

    fn complete(&mut self) -> Result<(), Malformed> {
        let mut head = self.input.finish();
        let parsed = parse(&head, self.login.takes_password());
        // It may have held a password.
        zeroize::Zeroize::zeroize(&mut head);
        let mut parsed = parsed?;
        match parsed.credentials.take() {
            Some(credentials) => self.state = State::Verify(credentials, parsed),
            None if self.login.allows_none() => {
                self.state = State::Carry(parsed.request, parsed.reuse);
            }
            None => self.challenge(&parsed),
        }
        Ok(())
    }

    /// 407: tells the client to log in (RFC 9110 section 11.7.1).
    fn challenge(&mut self, parsed: &Parsed) {
        self.logins += 1;
        // A request body would have to be read past before the next head.
        let bodyless = match &parsed.request.command {
            Command::Forward(forward) => forward.body.is_over(),
            _ => true,
        };
        let again = parsed.reuse == Reuse::Keep && bodyless && self.logins < HTTP_LOGINS_MAX;
        let reuse = if again { Reuse::Keep } else { Reuse::Close };
        self.answer(
            407,
            "Proxy Authentication Required",
            &[("Proxy-Authenticate", "Basic realm=\"culvert\", charset=\"UTF-8\"")],
            Text {
                line: "A user name and a password are required.\n",
                head_only: is_head(&parsed.request),
            },
            reuse,
        );
        self.state = if again { State::Head } else { State::Refused(Refusal::LoginRejected) };
    }
}

impl Handshake for Server {
    fn handle_input(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        if !matches!(self.poll(), Next::Read) {
            return Ok(0);
        }
        let result = self.input.take(input).and_then(|(used, complete)| {
            // RFC 9112 section 2.2: an empty line before the request line is skipped.
            while self.input.bytes().starts_with(b"\r\n") {
                self.skipped += 1;
                if self.skipped > 2 {
                    return Err(Malformed::Syntax);
                }
                self.input.skip(2);
            }
            let complete = complete && !self.input.bytes().is_empty();
            if complete {
                self.skipped = 0;
                self.complete()?;
            }
            Ok(used)
        });
        if let Err(error) = result {
            self.refuse(error);
        }
        result
    }

    fn poll(&self) -> Next<'_> {
        if self.sent < self.output.len() {
            return Next::Write(&self.output[self.sent..]);
        }
        match &self.state {
            State::Head => Next::Read,
            State::Verify(credentials, _) => Next::Authenticate(credentials),
            State::Carry(request, _) => Next::Request(request),
            State::Done(_) => Next::Done,
            State::Refused(refusal) => Next::Refused(*refusal),
        }
    }

    fn sent(&mut self, len: usize) {
        self.sent = (self.sent + len).min(self.output.len());
    }

    fn authenticated(&mut self, verdict: Verdict) {
        let state = std::mem::replace(&mut self.state, State::Head);
        let State::Verify(_, parsed) = state else {
            self.state = state;
            return;
        };
        match verdict {
            Verdict::Accepted => self.state = State::Carry(parsed.request, parsed.reuse),
            Verdict::Rejected => self.challenge(&parsed),
        }
    }

    fn reply(&mut self, outcome: Outcome) {
        let State::Carry(request, reuse) = &self.state else { return };
        let (forward, bodyless, reuse) = match &request.command {
            Command::Forward(forward) => (true, forward.body.is_over(), *reuse),
            _ => (false, true, *reuse),
        };
        let (code, reason) = status(outcome);
        match outcome {
            // The response's own head follows.
            Outcome::Connected { .. } if forward => self.state = State::Done(reuse),
            Outcome::Connected { .. } => {
                self.say(format!("HTTP/1.1 {code} {reason}\r\n\r\n").into_bytes());
                self.state = State::Done(Reuse::Close);
            }
            _ => {
                // Where there is no room, no connection is kept.
                let stays = bodyless && outcome != Outcome::LimitReached;
                let reuse = if stays { reuse } else { Reuse::Close };
                let proxy_status = format!("culvert; error={}", proxy_status(outcome));
                let (line, head_only) = (format!("{reason}.\n"), is_head(request));
                let text = Text { line: &line, head_only };
                self.answer(code, reason, &[("Proxy-Status", &proxy_status)], text, reuse);
                self.state = State::Done(reuse);
            }
        }
    }

    fn resume(&mut self) -> bool {
        let again = matches!(self.state, State::Done(Reuse::Keep));
        if again {
            self.state = State::Head;
        }
        again
    }
}

fn parse(head: &[u8], take_credentials: bool) -> Result<Parsed, Malformed> {
    check_lines(head)?;
    let mut slots = slots();
    let mut request = httparse::Request::new(&mut []);
    let parsed = httparse::ParserConfig::default()
        .parse_request_with_uninit_headers(&mut request, head, &mut slots)
        .map_err(syntax)?;
    let (httparse::Status::Complete(_), Some(method), Some(uri), Some(version)) =
        (parsed, request.method, request.path, request.version)
    else {
        return Err(Malformed::Syntax);
    };
    if !uri.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Malformed::Syntax);
    }
    let fields = Fields::read(request.headers)?;
    // RFC 9112 section 6.1: chunks do not exist in HTTP/1.0.
    if fields.chunked && version == 0 {
        return Err(Malformed::Ambiguous);
    }
    let credentials = match fields.credentials {
        Some(value) if take_credentials => Some(basic(value)),
        _ => None,
    };
    let reuse = if fields.keeps_alive(version) { Reuse::Keep } else { Reuse::Close };
    let request = if method == "CONNECT" {
        // RFC 9110 section 9.3.6: what follows is the tunnel; a body would be read as its beginning.
        if fields.chunked || fields.length.is_some_and(|length| length > 0) {
            return Err(Malformed::Ambiguous);
        }
        let target = Target::parse(uri.as_bytes()).map_err(|_| Malformed::Target)?;
        Request { command: Command::Connect, target }
    } else {
        forward(method, uri, version, &fields, request.headers)?
    };
    if request.target.port == 0 {
        return Err(Malformed::Target);
    }
    Ok(Parsed { request, reuse, credentials })
}

/// An absolute-form request as it goes to the target, in origin form.
fn forward(
    method: &str,
    uri: &str,
    version: u8,
    fields: &Fields<'_>,
    headers: &[httparse::Header<'_>],
) -> Result<Request, Malformed> {
    let Uri { target, authority, path } = Uri::parse(uri)?;
    // RFC 9112 section 3.2: an HTTP/1.1 request has a Host field.
    if version == 1 && fields.host.is_none() {
        return Err(Malformed::Syntax);
    }
    let body = fields.body().unwrap_or(Body::NONE);
    let upgrade = fields.upgrade && fields.has_option(b"upgrade") && body.is_over() && version == 1;

    let path = match path {
        "" if method == "OPTIONS" => "*".to_owned(),
        "" => "/".to_owned(),
        query if query.starts_with('?') => format!("/{query}"),
        path => path.to_owned(),
    };
    let mut head = format!("{method} {path} HTTP/1.{version}\r\n").into_bytes();
    // RFC 9112 section 3.2.2: the Host field is replaced by the target's authority.
    push_field(&mut head, "Host", authority.as_bytes());
    for header in headers {
        let host = header.name.eq_ignore_ascii_case("host");
        let upgrading = upgrade && header.name.eq_ignore_ascii_case("upgrade");
        if !host && (fields.passes(header.name) || upgrading) {
            push_field(&mut head, header.name, header.value);
        }
    }
    // RFC 9110 section 7.6.3.
    push_field(&mut head, "Via", format!("1.{version} culvert").as_bytes());
    if upgrade {
        push_field(&mut head, "Connection", b"upgrade");
    } else if version == 0 {
        push_field(&mut head, "Connection", b"keep-alive");
    }
    head.extend_from_slice(b"\r\n");

    let exchange = Exchange {
        head_only: method == "HEAD",
        version,
        upgrade,
        keep_alive: fields.keeps_alive(version),
    };
    let command = Command::Forward(Box::new(Forward { head, body, exchange }));
    Ok(Request { command, target })
}

struct Uri<'a> {
    target: Target,
    authority: &'a str,
    path: &'a str,
}

impl<'a> Uri<'a> {
    /// Parses `http://host[:port][/path][?query]`.
    fn parse(uri: &'a str) -> Result<Self, Malformed> {
        let (scheme, rest) = uri.split_at_checked(7).ok_or(Malformed::Target)?;
        if !scheme.eq_ignore_ascii_case("http://") || uri.contains('#') {
            return Err(Malformed::Target);
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        // User information in a proxied URI is an old way to disguise the host.
        if authority.contains('@') {
            return Err(Malformed::Target);
        }
        let target = Target::parse(authority.as_bytes()).or_else(|_| {
            if authority.starts_with('[') != authority.contains(':') {
                return Err(Malformed::Target);
            }
            let host = Host::parse(authority.as_bytes()).map_err(|_| Malformed::Target)?;
            Ok(Target { host, port: 80 })
        })?;
        Ok(Self { target, authority, path })
    }
}

/// Basic credentials (RFC 7617): user and password before and after the first colon. Anything else is
/// a login that matches nobody: an empty name.
fn basic(value: &[u8]) -> Credentials {
    read_basic(value).unwrap_or(Credentials { user: [].into(), password: Secret::new(&[]) })
}

fn read_basic(value: &[u8]) -> Option<Credentials> {
    let (scheme, encoded) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let mut decoded = BASE64.decode(super::head::trim(encoded)).ok()?;
    let credentials = decoded.iter().position(|&b| b == b':').map(|colon| Credentials {
        user: decoded[..colon].into(),
        password: Secret::new(&decoded[colon + 1..]),
    });
    zeroize::Zeroize::zeroize(&mut decoded);
    credentials
}

/// RFC 4648 section 4, padding optional.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[cfg(test)]
mod tests {
    use super::*;

    fn request(head: &str) -> Result<Request, Malformed> {
        parse(head.as_bytes(), true).map(|parsed| parsed.request)
    }

    fn forwarded(head: &str) -> (String, Forward) {
        let Command::Forward(forward) = request(head).unwrap().command else { panic!("{head}") };
        (String::from_utf8(forward.head.clone()).unwrap(), *forward)
    }

    #[test]
    fn connect_names_host_and_port() {
        let target = |uri: &str| request(&format!("CONNECT {uri} HTTP/1.1\r\nHost: x\r\n\r\n"));
        assert_eq!(target("Example.com:443").unwrap().target.to_string(), "example.com:443");
        assert_eq!(target("[::1]:22").unwrap().target.to_string(), "[::1]:22");
        for uri in
            ["example.com", "example.com:0", "example.com:", ":443", "http://x:1", "a b:1", "/"]
        {
            assert!(target(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn absolute_form_becomes_origin_form() {
        let (head, forward) = forwarded(
            "GET http://Example.com:8080/a?b HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\
             Connection: close, x-hop\r\nX-Hop: 1\r\nTE: trailers\r\nAccept: */*\r\n\
             Proxy-Authorization: Basic eDp5\r\nX-Proxy-Password: p\r\n\r\n",
        );
        assert_eq!(
            head,
            "GET /a?b HTTP/1.1\r\nHost: Example.com:8080\r\nAccept: */*\r\nVia: 1.1 culvert\r\n\r\n"
        );
        assert!(!forward.exchange.keep_alive && forward.body.is_over());
        assert!(forwarded("GET http://a?q HTTP/1.1\r\nHost: a\r\n\r\n").0.starts_with("GET /?q "));
        assert!(
            forwarded("OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n").0.starts_with("OPTIONS * ")
        );
        assert!(
            forwarded("GET http://[::1] HTTP/1.1\r\nHost: a\r\n\r\n").0.contains("Host: [::1]\r\n")
        );
    }

    #[test]
    fn bodies_end_in_one_way() {
        let post = |fields: &str| {
            request(&format!("POST http://a/ HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).map(|request| {
                let Command::Forward(forward) = request.command else { panic!("{fields}") };
                forward.body
            })
        };
        assert_eq!(post("Content-Length: 10\r\n"), Ok(Body::Length(10)));
        assert!(matches!(post("Transfer-Encoding: Chunked\r\n"), Ok(Body::Chunked(_))));
        assert_eq!(post(""), Ok(Body::NONE));
    }

    #[test]
    fn smuggling_vectors_are_refused() {
        for fields in [
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: 5\r\nContent-Length: 5\r\n",
            "Content-Length: 5, 5\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: -5\r\n",
            "Content-Length: 0x5\r\n",
            "Content-Length: 5 5\r\n",
            "Content-Length:\r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Content-Length : 5\r\n",
            "Content-Length\t: 5\r\n",
            " Content-Length: 5\r\n",
            "X: y\r\n Content-Length: 5\r\n",
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
            "Transfer-Encoding: identity, chunked\r\n",
            "Transfer-Encoding: identity\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: \x0bchunked\r\n",
            "Transfer-Encoding: \"chunked\"\r\n",
            "Transfer-Encoding:\r\n chunked\r\n",
            "Transfer-Encoding : chunked\r\n",
            "Transfer-Encoding\0: chunked\r\n",
            "Connection: Content-Length\r\nContent-Length: 5\r\n",
            "Connection: host\r\n",
            "Connection: close, transfer-encoding\r\nTransfer-Encoding: chunked\r\n",
            "Host: b\r\n",
            "X: a\nContent-Length: 5\r\n",
            "X: a\rContent-Length: 5\r\n",
            "X: a\0b\r\n",
            "X: \x01\r\n",
            ": value\r\n",
            "no colon\r\n",
        ] {
            let head = format!("POST http://a/ HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
            assert!(request(&head).is_err(), "{fields:?}");
        }
        for head in [
            "POST http://a/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST http://a/ HTTP/1.1\r\n\r\n",
            "POST  http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://a/  HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://a/ HTTP/1.1 \r\nHost: a\r\n\r\n",
            "POST http://a/ HTTP/2.0\r\nHost: a\r\n\r\n",
            "POST http://a/ HTTP/1.1\nHost: a\r\n\r\n",
            "POST http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://a#b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://a\\@b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST https://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST * HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http:/// HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://a:0/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://\u{e9}/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert!(request(head).is_err(), "{head:?}");
        }
    }

    #[test]
    fn a_login_is_asked_for_and_judged() {
        let mut server = Server::new(Login::Password);
        let head = b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n";
        assert_eq!(server.handle_input(head), Ok(head.len()));
        let Next::Write(answer) = server.poll() else { panic!() };
        assert!(answer.starts_with(b"HTTP/1.1 407 "), "{}", String::from_utf8_lossy(answer));
        server.sent(usize::MAX / 2);
        assert!(matches!(server.poll(), Next::Read));
        // alice:a:b
        let head = b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: bAsIc YWxpY2U6YTpi\r\n\r\nearly";
        assert_eq!(server.handle_input(head), Ok(head.len() - 5));
        let Next::Authenticate(credentials) = server.poll() else { panic!() };
        assert_eq!(
            (&*credentials.user, credentials.password.expose()),
            (&b"alice"[..], &b"a:b"[..])
        );
        assert!(!format!("{credentials:?}").contains("a:b"));
        server.authenticated(Verdict::Accepted);
        assert!(matches!(server.poll(), Next::Request(_)));
    }

    #[test]
    fn logins_on_one_connection_are_bounded() {
        let mut server = Server::new(Login::Password);
        let head = b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eDp5\r\n\r\n";
        let mut tries = 0;
        while let Next::Read = server.poll() {
            server.handle_input(head).unwrap();
            server.authenticated(Verdict::Rejected);
            server.sent(4096);
            tries += 1;
        }
        assert_eq!(tries, HTTP_LOGINS_MAX);
        assert!(matches!(server.poll(), Next::Refused(Refusal::LoginRejected)));
    }

    #[test]
    fn every_split_gives_the_same_request() {
        let head =
            b"\r\nGET http://host.example/path HTTP/1.1\r\nHost: host.example\r\nX: y\r\n\r\nGET";
        for step in 1..=head.len() {
            let mut server = Server::new(Login::None);
            let mut used = 0;
            while used < head.len() && matches!(server.poll(), Next::Read) {
                let until = (used + step).min(head.len());
                used += server.handle_input(&head[used..until]).unwrap();
            }
            let Next::Request(request) = server.poll() else { panic!("step {step}") };
            assert_eq!(request.target.to_string(), "host.example:80");
            assert_eq!(used, head.len() - 3, "step {step}");
        }
    }

    #[test]
    fn a_large_head_is_refused_at_its_bound() {
        let mut server = Server::new(Login::None);
        let mut sent = 0;
        let line = [&b"GET http://a/ HTTP/1.1\r\nX: "[..], &[b'x'; 1000]].concat();
        let result = loop {
            match server.handle_input(&line) {
                Ok(used) => sent += used,
                Err(error) => break error,
            }
            assert!(sent <= crate::limits::HTTP_HEAD_MAX);
        };
        assert_eq!(result, Malformed::TooLarge);
        assert!(
            matches!(server.poll(), Next::Write(answer) if answer.starts_with(b"HTTP/1.1 431 "))
        );
    }

    #[test]
    fn a_failure_keeps_the_connection_when_nothing_is_left_unread() {
        let mut server = Server::new(Login::None);
        server.handle_input(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        server.reply(Outcome::Refused);
        let Next::Write(answer) = server.poll() else { panic!() };
        let answer = String::from_utf8_lossy(answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
        assert!(answer.contains("Proxy-Status: culvert; error=connection_refused\r\n"));
        server.sent(answer.len());
        assert!(server.resume() && matches!(server.poll(), Next::Read));
        server
            .handle_input(b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
            .unwrap();
        server.reply(Outcome::Forbidden);
        server.sent(4096);
        assert!(!server.resume());
    }

    /// RFC 9110 section 9.3.2: what came after the head would be the next answer's beginning.
    #[test]
    fn an_answer_to_head_is_a_head() {
        let mut server = Server::new(Login::Password);
        let said = |server: &mut Server| {
            let Next::Write(answer) = server.poll() else { panic!() };
            let answer = String::from_utf8(answer.to_vec()).unwrap();
            server.sent(answer.len());
            answer
        };
        server.handle_input(b"HEAD http://a/ HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let answer = said(&mut server);
        assert!(answer.starts_with("HTTP/1.1 407 ") && answer.ends_with("\r\n\r\n"), "{answer}");
        assert!(answer.contains("\r\nContent-Length: 41\r\n"), "{answer}");
        let login =
            b"HEAD http://a/ HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eDp5\r\n\r\n";
        server.handle_input(login).unwrap();
        server.authenticated(Verdict::Accepted);
        server.reply(Outcome::Refused);
        let answer = said(&mut server);
        assert!(answer.starts_with("HTTP/1.1 502 ") && answer.ends_with("\r\n\r\n"), "{answer}");
        assert!(server.resume());
    }
}
