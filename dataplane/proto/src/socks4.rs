//! SOCKS version 4 and 4a, for clients that know nothing newer. The protocol has a user id and no
//! password, so it serves only listeners that require none.

use std::net::{Ipv4Addr, SocketAddr};

use crate::{
    Command, Handshake, Host, Malformed, Next, Outcome, Refusal, Request, Target, Verdict,
    limits::{NAME_MAX, SOCKS4_USER_MAX},
};

const VERSION: u8 = 4;
const GRANTED: u8 = 90;
const REJECTED: u8 = 91;
/// VN, CD, DSTPORT, DSTIP.
const FIXED: usize = 8;

/// One client's handshake.
#[derive(Debug)]
pub struct Server {
    state: State,
    input: Vec<u8>,
    output: [u8; 8],
    unsent: usize,
}

#[derive(Debug)]
enum State {
    Request,
    Carry(Request),
    Done,
    Refused(Refusal),
}

impl Server {
    /// A handshake; whether clients without a password are welcome is the listener's to check.
    pub fn new() -> Self {
        Self { state: State::Request, input: Vec::new(), output: [0; 8], unsent: 0 }
    }

    fn say(&mut self, code: u8, address: SocketAddr) {
        let ip = match address.ip() {
            std::net::IpAddr::V4(ip) => ip,
            // The reply has no room for IPv6.
            std::net::IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        self.output[..2].copy_from_slice(&[0, code]);
        self.output[2..4].copy_from_slice(&address.port().to_be_bytes());
        self.output[4..].copy_from_slice(&ip.octets());
        self.unsent = self.output.len();
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.say(REJECTED, (Ipv4Addr::UNSPECIFIED, 0).into());
        self.state = State::Refused(refusal);
    }

    /// Whether the request is complete: the fixed part, the user id and, in 4a, the name.
    fn is_complete(&self) -> Result<bool, Malformed> {
        let Some((fixed, rest)) = self.input.split_at_checked(FIXED) else { return Ok(false) };
        let Some(user) = terminated(rest, SOCKS4_USER_MAX)? else { return Ok(false) };
        if !is_4a(fixed) {
            return Ok(true);
        }
        Ok(terminated(&rest[user.len() + 1..], NAME_MAX + 1)?.is_some())
    }

    fn complete(&mut self) {
        let message = std::mem::take(&mut self.input);
        let (fixed, rest) = message.split_at(FIXED);
        let port = u16::from_be_bytes([fixed[2], fixed[3]]);
        let host = if is_4a(fixed) {
            let name = rest.split(|&b| b == 0).nth(1).unwrap_or_default();
            Host::parse(name)
        } else {
            Ok(Host::ip([fixed[4], fixed[5], fixed[6], fixed[7]].into()))
        };
        let Ok(host) = host else { return self.refuse(Refusal::BadTarget) };
        let command = match fixed[1] {
            1 => Command::Connect,
            2 => Command::Bind,
            _ => return self.refuse(Refusal::CommandUnsupported),
        };
        self.state = State::Carry(Request { command, target: Target { host, port } });
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

/// 4a: the address 0.0.0.x with x not 0 says that a name follows.
fn is_4a(fixed: &[u8]) -> bool {
    matches!(fixed, [_, _, _, _, 0, 0, 0, last] if *last != 0)
}

/// The bytes before a NUL; `None` when there is none yet.
fn terminated(bytes: &[u8], max: usize) -> Result<Option<&[u8]>, Malformed> {
    match bytes.iter().position(|&b| b == 0) {
        Some(end) if end <= max => Ok(Some(&bytes[..end])),
        None if bytes.len() <= max => Ok(None),
        _ => Err(Malformed::Length),
    }
}

impl Handshake for Server {
    fn handle_input(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        let mut used = 0;
        // Byte by byte after the fixed part, which only a NUL ends; requests are short.
        while matches!(self.poll(), Next::Read) && used < input.len() {
            self.input.push(input[used]);
            used += 1;
            if self.input[0] != VERSION {
                return Err(Malformed::Version);
            }
            let ended = input[used - 1] == 0 && self.input.len() > FIXED;
            if (ended || self.input.len() > FIXED + SOCKS4_USER_MAX) && self.is_complete()? {
                self.complete();
            }
        }
        Ok(used)
    }

    fn poll(&self) -> Next<'_> {
        if self.unsent > 0 {
            return Next::Write(&self.output[self.output.len() - self.unsent..]);
        }
        match &self.state {
            State::Request => Next::Read,
            State::Carry(request) => Next::Request(request),
            State::Done => Next::Done,
            State::Refused(refusal) => Next::Refused(*refusal),
        }
    }

    fn sent(&mut self, len: usize) {
        self.unsent = self.unsent.saturating_sub(len);
    }

    fn authenticated(&mut self, _verdict: Verdict) {}

    fn reply(&mut self, outcome: Outcome) {
        let State::Carry(request) = &mut self.state else { return };
        match outcome {
            Outcome::Connected { bound } => {
                // BIND is answered twice.
                if request.command == Command::Bind {
                    request.command = Command::Connect;
                } else {
                    self.state = State::Done;
                }
                self.say(GRANTED, bound);
            }
            _ => {
                self.state = State::Done;
                self.say(REJECTED, (Ipv4Addr::UNSPECIFIED, 0).into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(message: &[u8], step: usize) -> (Result<Option<Request>, Malformed>, usize) {
        let mut server = Server::new();
        let mut used = 0;
        for piece in message.chunks(step) {
            match server.handle_input(piece) {
                Ok(n) => used += n,
                Err(error) => return (Err(error), used),
            }
        }
        match server.poll() {
            Next::Request(request) => (Ok(Some(request.clone())), used),
            _ => (Ok(None), used),
        }
    }

    #[test]
    fn every_split_gives_the_same_result() {
        for (message, target) in [
            (&b"\x04\x01\x00\x50\x7f\x00\x00\x01me\0early"[..], "127.0.0.1:80"),
            (&b"\x04\x01\x01\xbb\x00\x00\x00\x01\0host.example\0early"[..], "host.example:443"),
        ] {
            for step in 1..=message.len() {
                let (result, used) = request(message, step);
                assert_eq!(result.unwrap().unwrap().target.to_string(), target);
                assert_eq!(used, message.len() - 5);
            }
        }
    }

    #[test]
    fn endless_fields_are_refused() {
        let user = [b"\x04\x01\x00\x50\x7f\x00\x00\x01".to_vec(), vec![b'u'; 300]].concat();
        assert_eq!(request(&user, 1).0, Err(Malformed::Length));
        let name = [b"\x04\x01\x00\x50\0\0\0\x01\0".to_vec(), vec![b'n'; 300]].concat();
        assert_eq!(request(&name, 7).0, Err(Malformed::Length));
    }

    #[test]
    fn replies_have_eight_bytes() {
        let mut server = Server::new();
        server.handle_input(b"\x04\x01\x00\x50\x7f\x00\x00\x01\0").unwrap();
        server.reply(Outcome::Connected { bound: "10.1.2.3:258".parse().unwrap() });
        assert!(matches!(server.poll(), Next::Write(b"\x00\x5a\x01\x02\x0a\x01\x02\x03")));
    }
}
