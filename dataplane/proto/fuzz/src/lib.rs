//! What a session does with a handshake, whatever a client says.

use culvert_proto::{Handshake, Login, Next, Outcome, Verdict};

/// The first byte decides what the listener asks, whether the login is right and how the request goes.
pub fn choices(input: &[u8]) -> Option<(Login, bool, Outcome, &[u8])> {
    let (first, rest) = input.split_first()?;
    let login = [Login::None, Login::Password, Login::Either][usize::from(first % 3)];
    let bound = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let outcome = if first & 64 == 0 { Outcome::Connected { bound } } else { Outcome::Forbidden };
    Some((login, first & 128 == 0, outcome, rest))
}

/// Plays a session to its end: it ends, nobody is served without a login that was asked for, and no more is
/// used than was there.
pub fn drive(mut server: impl Handshake, login: Login, right: bool, outcome: Outcome, input: &[u8]) {
    let (mut used, mut verified, mut broken) = (0, false, false);
    for _ in 0..8 * input.len() + 64 {
        match server.poll() {
            Next::Write(bytes) => {
                let bytes = bytes.len();
                assert!(bytes > 0);
                server.sent(bytes.div_ceil(2));
            }
            _ if broken => return,
            Next::Read => match server.handle_input(&input[used..]) {
                Ok(0) => return,
                Ok(taken) => {
                    used += taken;
                    assert!(used <= input.len());
                }
                Err(_) => broken = true,
            },
            Next::Authenticate(_) => {
                verified = right;
                server.authenticated(if right { Verdict::Accepted } else { Verdict::Rejected });
            }
            Next::Request(_) => {
                assert!(verified || login.allows_none(), "no login was verified");
                server.reply(outcome);
            }
            Next::Refused(_) => return,
            Next::Done => {
                if !server.resume() {
                    return;
                }
                // Each request is logged in for itself.
                verified = false;
            }
        }
    }
    panic!("it goes round without an end");
}
