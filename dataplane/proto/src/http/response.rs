//! The response side of a forwarded request: a framing that rewrites the head and finds the end.

use super::{
    Body,
    head::{Collector, Fields, check_lines, push_field, slots, syntax},
};
use crate::{Decoded, Framing, Malformed, Payload};

/// What reading a response depends on: the request it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// The request was HEAD: its response has no body whatever it says.
    pub head_only: bool,
    /// HTTP/1.0 or 1.1: 0 or 1.
    pub version: u8,
    /// The client asked for an upgrade, so 101 may follow.
    pub upgrade: bool,
    /// The client wants to send another request afterwards.
    pub keep_alive: bool,
}

/// A response on its way to the client.
#[derive(Debug)]
pub struct Response {
    exchange: Exchange,
    stage: Stage,
    status: u16,
    upstream_keeps: bool,
    interim: u32,
}

#[derive(Debug)]
enum Stage {
    Head(Collector),
    Body(Body),
    Switched,
}

/// Interim (1xx) responses that one response may have before it.
const INTERIM_MAX: u32 = 16;

impl Response {
    /// The response to a request.
    pub fn new(exchange: Exchange) -> Self {
        Self {
            exchange,
            stage: Stage::Head(Collector::default()),
            status: 0,
            upstream_keeps: false,
            interim: 0,
        }
    }

    /// The final status; 0 before it came.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Whether a byte of the final head has been forwarded, so that no answer of our own can be given.
    pub fn has_started(&self) -> bool {
        !matches!(self.stage, Stage::Head(_))
    }

    /// Whether the target has not said a word.
    pub fn is_untouched(&self) -> bool {
        let Stage::Head(head) = &self.stage else { return false };
        head.bytes().is_empty() && self.interim == 0
    }

    /// 101: both directions carry another protocol from here on.
    pub fn has_switched(&self) -> bool {
        matches!(self.stage, Stage::Switched)
    }

    /// Whether the response is complete.
    pub fn is_over(&self) -> bool {
        matches!(&self.stage, Stage::Body(body) if body.is_over())
    }

    /// Whether the connection to the target can carry another request.
    pub fn upstream_keeps_alive(&self) -> bool {
        self.upstream_keeps && self.is_over()
    }

    /// Whether the client was told that it may send another request.
    pub fn client_keeps_alive(&self) -> bool {
        self.exchange.keep_alive && self.is_over()
    }

    /// Parses a complete head and returns it as the client gets it.
    fn rewrite(&mut self, head: &[u8]) -> Result<Vec<u8>, Malformed> {
        check_lines(head)?;
        let mut slots = slots();
        let mut response = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut response, head, &mut slots)
            .map_err(syntax)?;
        let (httparse::Status::Complete(_), Some(status), Some(version)) =
            (parsed, response.code, response.version)
        else {
            return Err(Malformed::Syntax);
        };
        let headers = &*response.headers;
        let fields = Fields::read(headers)?;
        if !(100..1000).contains(&status) || (fields.chunked && version == 0) {
            return Err(Malformed::Syntax);
        }
        self.status = status;
        let switched = status == 101;
        // RFC 9110 section 15.2: an HTTP/1.0 client knows no interim responses.
        let withheld = status < 200 && self.exchange.version == 0;
        if switched && !self.exchange.upgrade {
            return Err(Malformed::Syntax);
        }

        let interim = status < 200 && !switched;
        let bodyless = self.exchange.head_only || interim || matches!(status, 204 | 304);
        let body = match fields.body() {
            _ if bodyless => Body::NONE,
            Some(body) => body,
            None => Body::UntilClose,
        };
        // An HTTP/1.0 client does not know chunks, and asked this target not to send any.
        if self.exchange.version == 0 && matches!(body, Body::Chunked(_)) {
            return Err(Malformed::Syntax);
        }
        let until_close = body == Body::UntilClose;
        if !interim {
            self.upstream_keeps = fields.keeps_alive(version) && !until_close && !switched;
            self.exchange.keep_alive &= !until_close;
        }

        let mut out = Vec::with_capacity(head.len() + 32);
        out.extend_from_slice(format!("HTTP/1.1 {status} ").as_bytes());
        out.extend_from_slice(response.reason.unwrap_or_default().as_bytes());
        out.extend_from_slice(b"\r\n");
        for header in headers {
            let upgrade = switched && header.name.eq_ignore_ascii_case("upgrade");
            if fields.passes(header.name) || upgrade {
                push_field(&mut out, header.name, header.value);
            }
        }
        if switched {
            push_field(&mut out, "Connection", b"upgrade");
        } else if !interim && !self.exchange.keep_alive {
            push_field(&mut out, "Connection", b"close");
        } else if !interim && self.exchange.version == 0 {
            push_field(&mut out, "Connection", b"keep-alive");
        }
        out.extend_from_slice(b"\r\n");

        self.stage = if switched {
            Stage::Switched
        } else if interim {
            self.interim += 1;
            if self.interim > INTERIM_MAX {
                return Err(Malformed::TooLarge);
            }
            Stage::Head(Collector::default())
        } else {
            Stage::Body(body)
        };
        Ok(if withheld { Vec::new() } else { out })
    }
}

impl Framing for Response {
    fn decode(&mut self, input: &mut [u8]) -> Result<Decoded, Malformed> {
        match &mut self.stage {
            Stage::Head(collector) => {
                let (used, complete) = collector.take(input)?;
                if !complete {
                    return Ok(Decoded { used, payload: Payload::None, end: false });
                }
                let head = collector.finish();
                let payload = Payload::Own(self.rewrite(&head)?);
                let end = self.is_over() || self.has_switched();
                Ok(Decoded { used, payload, end })
            }
            Stage::Body(body) => body.decode(input),
            Stage::Switched => Ok(Decoded { used: 0, payload: Payload::None, end: true }),
        }
    }

    fn end_of_input(&mut self) -> Result<(), Malformed> {
        match &mut self.stage {
            Stage::Head(_) => Err(Malformed::Truncated),
            Stage::Body(body) => body.end_of_input(),
            Stage::Switched => Ok(()),
        }
    }

    fn is_over(&self) -> bool {
        Self::is_over(self) || self.has_switched()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Exchange =
        Exchange { head_only: false, version: 1, upgrade: false, keep_alive: true };

    /// What the client gets, how much was used, and the response, for one way to cut the input.
    fn run(
        exchange: Exchange,
        input: &[u8],
        step: usize,
    ) -> Result<(Vec<u8>, usize, Response), Malformed> {
        let mut response = Response::new(exchange);
        let (mut out, mut used) = (Vec::new(), 0);
        let mut end = false;
        while used < input.len() && !end {
            let until = (used + step).min(input.len());
            let mut piece = input[used..until].to_vec();
            let decoded = response.decode(&mut piece)?;
            match decoded.payload {
                Payload::None => {}
                Payload::Input(range) => out.extend_from_slice(&piece[range]),
                Payload::Own(bytes) => out.extend_from_slice(&bytes),
            }
            used += decoded.used;
            end = decoded.end;
        }
        Ok((out, used, response))
    }

    #[test]
    fn every_split_gives_the_same_response() {
        let input = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nKeep-Alive: 5\r\nConnection: x-drop\r\n\
            X-Drop: 1\r\nContent-Length: 5\r\nSet-Cookie: a\r\n\r\nhelloHTTP/1.1 200";
        for step in 1..=input.len() {
            let (out, used, response) = run(PLAIN, input, step).unwrap();
            assert_eq!(
                String::from_utf8(out).unwrap(),
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: a\r\n\r\nhello"
            );
            assert_eq!(used, input.len() - 12);
            assert!(response.upstream_keeps_alive() && response.client_keeps_alive());
        }
    }

    #[test]
    fn a_body_without_length_ends_with_the_connection() {
        let (out, _, mut response) = run(PLAIN, b"HTTP/1.1 200 OK\r\n\r\nabc", 4).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("Connection: close\r\n"));
        assert!(response.end_of_input().is_ok());
        assert!(!response.client_keeps_alive());
    }

    #[test]
    fn heads_without_bodies() {
        let head = Exchange { head_only: true, ..PLAIN };
        for (exchange, message) in [
            (head, &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"[..]),
            (PLAIN, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
            (PLAIN, b"HTTP/1.1 204 No Content\r\n\r\n"),
        ] {
            let (_, _, response) = run(exchange, message, 9).unwrap();
            assert!(response.is_over());
        }
    }

    #[test]
    fn a_switch_needs_to_have_been_asked_for() {
        let message =
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw";
        assert!(run(PLAIN, message, 7).is_err());
        let asked = Exchange { upgrade: true, ..PLAIN };
        let (out, used, response) = run(asked, message, 7).unwrap();
        assert!(response.has_switched());
        assert_eq!(used, message.len() - 3);
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("Upgrade: websocket\r\nConnection: upgrade\r\n"), "{out}");
    }

    #[test]
    fn ambiguous_responses_are_refused() {
        for message in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
            b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 5\r\n\r\n",
            b"SMTP ready\r\n\r\n",
        ] {
            assert!(run(PLAIN, message, 11).is_err(), "{}", String::from_utf8_lossy(message));
        }
    }
}
