//! The server side: greeting, login, request, reply.

use std::net::{Ipv4Addr, SocketAddr};

use super::{
    Address, LOGIN_VERSION, METHOD_NO_ACCEPTABLE, METHOD_NONE, METHOD_PASSWORD, VERSION, bound,
    encode_address, parse_address, reply_code,
};
use crate::{
    Command, Credentials, Handshake, Login, Malformed, Next, Outcome, Refusal, Request, Secret,
    Verdict,
};

/// One client's handshake.
#[derive(Debug)]
pub struct Server {
    login: Login,
    state: State,
    /// The message being collected; at most 513 bytes (RFC 1929's longest).
    input: Vec<u8>,
    /// Bytes to be written, and how many have left.
    output: Vec<u8>,
    sent: usize,
}

#[derive(Debug)]
enum State {
    /// Reading VER, NMETHODS, METHODS.
    Greeting,
    /// Reading the login.
    Login,
    /// The login is complete and waits for its verdict.
    Verify(Credentials),
    /// Reading the request.
    Request,
    /// The request is complete and waits for its reply, or for the second of two.
    Carry(Request),
    /// The last reply is said.
    Done,
    /// The client was refused.
    Refused(Refusal),
}

impl Server {
    /// A handshake that takes the given logins.
    pub fn new(login: Login) -> Self {
        Self { login, state: State::Greeting, input: Vec::new(), output: Vec::new(), sent: 0 }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.output.clear();
        self.output.extend_from_slice(bytes);
        self.sent = 0;
    }

    fn refuse(&mut self, refusal: Refusal, answer: &[u8]) {
        self.say(answer);
        self.state = State::Refused(refusal);
    }

    fn say_reply(&mut self, code: u8, address: SocketAddr) {
        let mut reply = vec![VERSION, code, 0];
        encode_address(&bound(address), &mut reply);
        self.say(&reply);
    }

    fn refuse_request(&mut self, refusal: Refusal, code: u8) {
        self.say_reply(code, UNSPECIFIED);
        self.state = State::Refused(refusal);
    }

    /// How many bytes the message being collected needs at least, in all.
    fn need(&self) -> usize {
        let input = self.input.as_slice();
        match (&self.state, input) {
            (State::Greeting, [_, methods, ..]) => 2 + usize::from(*methods),
            (State::Greeting, _) => 2,
            (State::Login, [_, user, ..]) => {
                let password = 2 + usize::from(*user);
                input.get(password).map_or(password + 1, |len| password + 1 + usize::from(*len))
            }
            (State::Login, _) => 2,
            (State::Request, [_, _, _, address @ ..]) => match parse_address(address) {
                Address::Short(need) => 3 + need,
                Address::Unknown => 4,
                Address::Bad(len) | Address::Is(_, len) => 3 + len,
            },
            (State::Request, _) => 4,
            _ => 0,
        }
    }

    /// The first byte of every message is a version; a wrong one is told at once.
    fn check_version(&self) -> Result<(), Malformed> {
        let expected = match self.state {
            State::Login => LOGIN_VERSION,
            _ => VERSION,
        };
        match self.input.first() {
            Some(&version) if version != expected => Err(Malformed::Version),
            _ => Ok(()),
        }
    }

    fn complete(&mut self) {
        let message = std::mem::take(&mut self.input);
        match self.state {
            State::Greeting => self.greeting(&message[2..]),
            State::Login => self.login(&message),
            State::Request => self.request(&message),
            _ => {}
        }
        // The buffer is used again; the longest message bounds it. It held a password.
        self.input = message;
        zeroize::Zeroize::zeroize(&mut self.input);
    }

    /// Offered both methods, the password is chosen.
    fn greeting(&mut self, offered: &[u8]) {
        if self.login.takes_password() && offered.contains(&METHOD_PASSWORD) {
            self.say(&[VERSION, METHOD_PASSWORD]);
            self.state = State::Login;
        } else if self.login.allows_none() && offered.contains(&METHOD_NONE) {
            self.say(&[VERSION, METHOD_NONE]);
            self.state = State::Request;
        } else {
            self.refuse(Refusal::NoLoginMethod, &[VERSION, METHOD_NO_ACCEPTABLE]);
        }
    }

    fn login(&mut self, message: &[u8]) {
        let (user, rest) = message[2..].split_at(usize::from(message[1]));
        let password = &rest[1..];
        // RFC 1929 section 2: both have 1 to 255 bytes.
        if user.is_empty() || password.is_empty() {
            return self.refuse(Refusal::LoginRejected, &[LOGIN_VERSION, 1]);
        }
        let credentials = Credentials { user: user.into(), password: Secret::new(password) };
        self.state = State::Verify(credentials);
    }

    fn request(&mut self, message: &[u8]) {
        let target = match parse_address(&message[3..]) {
            Address::Is(target, _) => target,
            Address::Bad(_) => return self.refuse_request(Refusal::BadTarget, 0x01),
            _ => return self.refuse_request(Refusal::AddressUnsupported, 0x08),
        };
        let command = match message[1] {
            1 => Command::Connect,
            2 => Command::Bind,
            3 => Command::Associate,
            _ => return self.refuse_request(Refusal::CommandUnsupported, 0x07),
        };
        self.state = State::Carry(Request { command, target });
    }
}

const UNSPECIFIED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

impl Handshake for Server {
    fn handle_input(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        let mut used = 0;
        while matches!(self.poll(), Next::Read) {
            let need = self.need();
            let missing = need - self.input.len();
            if missing == 0 {
                self.complete();
                continue;
            }
            let rest = &input[used..];
            if rest.is_empty() {
                break;
            }
            let taken = missing.min(rest.len());
            self.input.extend_from_slice(&rest[..taken]);
            used += taken;
            self.check_version()?;
        }
        Ok(used)
    }

    fn poll(&self) -> Next<'_> {
        if self.sent < self.output.len() {
            return Next::Write(&self.output[self.sent..]);
        }
        match &self.state {
            State::Greeting | State::Login | State::Request => Next::Read,
            State::Verify(credentials) => Next::Authenticate(credentials),
            State::Carry(request) => Next::Request(request),
            State::Done => Next::Done,
            State::Refused(refusal) => Next::Refused(*refusal),
        }
    }

    fn sent(&mut self, len: usize) {
        self.sent = (self.sent + len).min(self.output.len());
    }

    fn authenticated(&mut self, verdict: Verdict) {
        if !matches!(self.state, State::Verify(_)) {
            return;
        }
        match verdict {
            Verdict::Accepted => {
                self.say(&[LOGIN_VERSION, 0]);
                self.state = State::Request;
            }
            Verdict::Rejected => self.refuse(Refusal::LoginRejected, &[LOGIN_VERSION, 1]),
        }
    }

    fn reply(&mut self, outcome: Outcome) {
        let State::Carry(request) = &self.state else { return };
        let code = reply_code(outcome);
        let (address, last) = match outcome {
            // RFC 1928 section 4: BIND is answered twice, when listening and when connected.
            Outcome::Connected { bound } => (bound, request.command != Command::Bind),
            _ => (UNSPECIFIED, true),
        };
        if last {
            self.state = State::Done;
        } else if let State::Carry(request) = &mut self.state {
            request.command = Command::Connect;
        }
        self.say_reply(code, address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Drives a server with `input` in pieces of `step` bytes; answers logins with `verdict` and
    /// requests with `outcome`. Returns what was written, the request and what was left over.
    fn drive(
        login: Login,
        input: &[u8],
        step: usize,
        verdict: Verdict,
        outcome: Outcome,
    ) -> (Vec<u8>, Option<Request>, Result<usize, Malformed>) {
        let mut server = Server::new(login);
        let (mut written, mut request, mut used) = (Vec::new(), None, 0);
        let mut until = 0;
        loop {
            match server.poll() {
                Next::Read => {
                    if until > used {
                        match server.handle_input(&input[used..until]) {
                            Ok(n) => used += n,
                            Err(error) => return (written, request, Err(error)),
                        }
                    } else if until == input.len() {
                        return (written, request, Ok(used));
                    } else {
                        until = (until + step).min(input.len());
                    }
                }
                Next::Write(bytes) => {
                    written.extend_from_slice(bytes);
                    let len = bytes.len();
                    server.sent(len);
                }
                Next::Authenticate(_) => server.authenticated(verdict),
                Next::Request(asked) => {
                    request = Some(asked.clone());
                    server.reply(outcome);
                }
                Next::Done | Next::Refused(_) => return (written, request, Ok(used)),
            }
        }
    }

    const FAILED: Outcome = Outcome::Failed;

    fn connect(address: &[u8]) -> Vec<u8> {
        [&[5, 1, 2, 1, 3, b'a', b'n', b'n', 2, b'p', b'w', 5, 1, 0], address].concat()
    }

    #[test]
    fn every_split_gives_the_same_result() {
        let bound = "10.0.0.1:4000".parse().unwrap();
        let name: Vec<u8> = [
            &[3u8, 255][..],
            &[b'a'; 63],
            b".",
            &[b'b'; 63],
            b".",
            &[b'c'; 63],
            b".",
            &[b'd'; 63],
            &[0, 80],
        ]
        .concat();
        for address in [
            vec![1, 127, 0, 0, 1, 0, 80],
            vec![3, 1, b'x', 1, 187],
            vec![3, 0, 0, 80],
            name,
            vec![4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80],
        ] {
            let input = [connect(&address), b"early".to_vec()].concat();
            let whole = drive(
                Login::Password,
                &input,
                input.len(),
                Verdict::Accepted,
                Outcome::Connected { bound },
            );
            for step in 1..input.len() {
                let split = drive(
                    Login::Password,
                    &input,
                    step,
                    Verdict::Accepted,
                    Outcome::Connected { bound },
                );
                assert_eq!(split, whole, "step {step}");
            }
            assert_eq!(whole.2, Ok(input.len() - 5), "early payload stays");
        }
    }

    #[test]
    fn lengths_of_0_1_and_255_are_read_as_they_are() {
        for user in [0usize, 1, 255] {
            for password in [0usize, 1, 255] {
                let mut input = vec![5, 1, 2, 1, user as u8];
                input.extend(vec![b'u'; user]);
                input.push(password as u8);
                input.extend(vec![b'p'; password]);
                for step in [1, 7, input.len()] {
                    let (written, ..) =
                        drive(Login::Password, &input, step, Verdict::Accepted, FAILED);
                    let accepted = u8::from(user == 0 || password == 0);
                    assert_eq!(written, [5, 2, 1, accepted], "{user} {password}");
                }
            }
        }
    }

    #[test]
    fn chooses_the_password_when_both_are_offered() {
        let chosen = |login, offered: &[u8]| {
            let input = [&[5, offered.len() as u8], offered].concat();
            drive(login, &input, 1, Verdict::Accepted, FAILED).0[1]
        };
        assert_eq!(chosen(Login::Either, &[0, 2]), 2);
        assert_eq!(chosen(Login::Either, &[0]), 0);
        assert_eq!(chosen(Login::Password, &[0]), 0xff);
        assert_eq!(chosen(Login::Password, &[0, 1, 2]), 2);
        assert_eq!(chosen(Login::None, &[0, 2]), 0);
        assert_eq!(chosen(Login::None, &[2]), 0xff);
        assert_eq!(chosen(Login::Either, &[]), 0xff);
    }

    #[test]
    fn replies_carry_the_code_of_the_outcome() {
        let codes = [
            (FAILED, 1),
            (Outcome::LimitReached, 1),
            (Outcome::Forbidden, 2),
            (Outcome::NetworkUnreachable, 3),
            (Outcome::HostUnreachable, 4),
            (Outcome::TimedOut, 4),
            (Outcome::Refused, 5),
            (Outcome::CommandUnsupported, 7),
            (Outcome::AddressUnsupported, 8),
        ];
        for (outcome, code) in codes {
            let input = [&[5, 1, 0, 5, 1, 0][..], &[1, 1, 2, 3, 4, 0, 80]].concat();
            let (written, ..) = drive(Login::None, &input, 3, Verdict::Accepted, outcome);
            assert_eq!(written, [5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn unknown_commands_and_addresses_have_their_codes() {
        for (request, code) in [
            (vec![5, 9, 0, 1, 1, 2, 3, 4, 0, 80], 7),
            (vec![5, 1, 0, 2], 8),
            (vec![5, 1, 0, 3, 2, b'a', 0, 0, 80], 1),
        ] {
            let input = [vec![5, 1, 0], request].concat();
            let (written, ..) = drive(Login::None, &input, 1, Verdict::Accepted, FAILED);
            assert_eq!(written[3], code);
        }
    }

    #[test]
    fn bind_is_answered_twice() {
        let mut server = Server::new(Login::None);
        server.handle_input(&[5, 1, 0]).unwrap();
        server.sent(2);
        server.handle_input(&[5, 2, 0, 1, 1, 2, 3, 4, 0, 80]).unwrap();
        let first = "10.0.0.1:1".parse().unwrap();
        assert!(matches!(server.poll(), Next::Request(Request { command: Command::Bind, .. })));
        server.reply(Outcome::Connected { bound: first });
        server.sent(10);
        assert!(matches!(server.poll(), Next::Request(_)));
        server.reply(Outcome::Connected { bound: first });
        server.sent(10);
        assert!(matches!(server.poll(), Next::Done));
    }

    #[test]
    fn a_wrong_version_is_told_at_the_first_byte() {
        assert_eq!(Server::new(Login::None).handle_input(&[4]), Err(Malformed::Version));
        let mut server = Server::new(Login::Password);
        server.handle_input(&[5, 1, 2]).unwrap();
        server.sent(2);
        assert_eq!(server.handle_input(&[5]), Err(Malformed::Version));
    }

    /// RELIABILITY E1: no sequence of messages reaches a request without a verified login.
    #[test]
    fn no_sequence_of_messages_passes_the_login() {
        let messages: [&[u8]; 8] = [
            &[5, 1, 0],
            &[5, 1, 2],
            &[5, 2, 0, 2],
            &[5, 0],
            &[1, 1, b'a', 1, b'b'],
            &[1, 0, 0],
            &[5, 1, 0, 1, 1, 2, 3, 4, 0, 80],
            &[5, 3, 0, 1, 1, 2, 3, 4, 0, 80],
        ];
        let depth = 6;
        let mut reached = 0;
        for mut sequence in 0..messages.len().pow(depth) {
            let mut input = Vec::new();
            for _ in 0..depth {
                input.extend_from_slice(messages[sequence % messages.len()]);
                sequence /= messages.len();
            }
            let (_, request, _) =
                drive(Login::Password, &input, input.len(), Verdict::Rejected, FAILED);
            assert_eq!(request, None);
            let (_, request, _) =
                drive(Login::Password, &input, input.len(), Verdict::Accepted, FAILED);
            reached += usize::from(request.is_some());
        }
        assert!(reached > 0, "with a right password some sequences get through");
    }
}
