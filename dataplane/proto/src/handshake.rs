//! The protocol seam: what a proxy handshake asks of its driver, in words no protocol owns.

use std::{fmt, net::SocketAddr};

use zeroize::Zeroize;

use crate::{Target, http::Body};

/// What the driver does next.
#[derive(Debug)]
pub enum Next<'a> {
    /// More bytes are needed from the client.
    Read,
    /// Send these bytes to the client, then call [`Handshake::sent`].
    Write(&'a [u8]),
    /// Decide whether this user may proceed, then call [`Handshake::authenticated`].
    Authenticate(&'a Credentials),
    /// Carry out this request, then call [`Handshake::reply`] once, or twice for bind.
    Request(&'a Request),
    /// The client was refused and told so; close.
    Refused(Refusal),
    /// Nothing is left to say: relay, or close, or (HTTP) [`Handshake::resume`] for the next request.
    Done,
}

/// One server side of a proxy handshake, driven by whoever owns the socket.
pub trait Handshake {
    /// Takes bytes from the client; returns how many were used. Unused bytes belong to what follows
    /// (the next message, or early payload) and are to be offered again.
    ///
    /// # Errors
    /// The bytes are not this protocol. If the protocol has an answer for that, [`Handshake::poll`]
    /// still gives it to be written; then close.
    fn handle_input(&mut self, input: &[u8]) -> Result<usize, Malformed>;

    /// What to do now. Has no effect.
    fn poll(&self) -> Next<'_>;

    /// The first `len` bytes of the last [`Next::Write`] have left.
    fn sent(&mut self, len: usize);

    /// The answer to [`Next::Authenticate`].
    fn authenticated(&mut self, verdict: Verdict);

    /// Tells the client how its request went, in this protocol's words.
    fn reply(&mut self, outcome: Outcome);

    /// After a finished request: whether another may follow on this connection. If so the handshake
    /// reads again.
    fn resume(&mut self) -> bool {
        false
    }
}

/// Which logins a listener takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login {
    /// Nobody is asked.
    None,
    /// A user name and a password are required.
    Password,
    /// A password is taken when offered, and not required.
    Either,
}

impl Login {
    /// Whether a client without credentials may proceed.
    pub fn allows_none(self) -> bool {
        matches!(self, Self::None | Self::Either)
    }

    /// Whether credentials are looked at.
    pub fn takes_password(self) -> bool {
        matches!(self, Self::Password | Self::Either)
    }
}

/// A password or another secret: never shown, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Wraps a secret.
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// The secret itself, for a comparison.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// What a client logs in with. Both are bytes as sent: comparisons take them whole, so a name that
/// contains a NUL never matches its prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub user: Box<[u8]>,
    /// Password.
    pub password: Secret,
}

/// Whether a user may proceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The credentials are right.
    Accepted,
    /// They are not, or cannot be checked now.
    Rejected,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// With whom.
    pub target: Target,
}

/// The command of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Connect to the target and relay.
    Connect,
    /// Wait for a connection from the target: two replies (RFC 1928 section 4).
    Bind,
    /// Relay datagrams; the target is where the client will send from.
    Associate,
    /// Forward one HTTP request.
    Forward(Box<Forward>),
}

impl Command {
    /// The name in logs and records.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Bind => "bind",
            Self::Associate => "associate",
            Self::Forward(_) => "forward",
        }
    }
}

/// One HTTP request as it goes to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Request line in origin form and the fields that may pass.
    pub head: Vec<u8>,
    /// How the body that follows ends.
    pub body: Body,
    /// What reading the response depends on.
    pub exchange: crate::http::Exchange,
}

impl Forward {
    /// Whether the request changes nothing at the target and is told by its head alone (RFC 9110 section
    /// 9.2.1).
    pub fn may_be_sent_again(&self) -> bool {
        let safe: [&[u8]; 3] = [b"GET ", b"HEAD ", b"OPTIONS "];
        self.body.is_over() && safe.iter().any(|method| self.head.starts_with(method))
    }
}

/// How a request went, in neutral words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Connected (or bound, or associated); `bound` is our address towards the target.
    Connected {
        /// The local address.
        bound: SocketAddr,
    },
    /// Policy says no.
    Forbidden,
    /// No route to the network.
    NetworkUnreachable,
    /// No such host, or none that answers.
    HostUnreachable,
    /// The target refused.
    Refused,
    /// The target did not answer in time.
    TimedOut,
    /// This proxy does not do that command.
    CommandUnsupported,
    /// This proxy does not do that kind of address.
    AddressUnsupported,
    /// A limit of the user or the proxy is reached.
    LimitReached,
    /// Anything else.
    Failed,
}

/// Why a handshake refused a client by itself, or after a rejected login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// None of the offered login methods is taken here.
    NoLoginMethod,
    /// The credentials were rejected.
    LoginRejected,
    /// The command is unknown.
    CommandUnsupported,
    /// The address type is unknown.
    AddressUnsupported,
    /// The target is no host name or address.
    BadTarget,
    /// The request is not one a proxy takes.
    BadRequest,
}

/// Bytes that are not the protocol they claim to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The first byte belongs to no protocol of this listener.
    #[error("no protocol of this listener begins so")]
    Unknown,
    /// A version byte is wrong.
    #[error("wrong version byte")]
    Version,
    /// A length is out of its bounds.
    #[error("a length is out of bounds")]
    Length,
    /// A head is larger than [`crate::limits::HTTP_HEAD_MAX`] or has too many fields.
    #[error("the head is too large")]
    TooLarge,
    /// The syntax is broken.
    #[error("broken syntax")]
    Syntax,
    /// The message could be understood in two ways.
    #[error("ambiguous message framing")]
    Ambiguous,
    /// The stream ended inside a message.
    #[error("the message is incomplete")]
    Truncated,
    /// The client's request named no acceptable target.
    #[error("no acceptable target")]
    Target,
}
