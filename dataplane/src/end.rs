//! How a session ends: decided once. The reply, the log level and the counter are three matches on it.

use std::io;

use culvert_proto::{Malformed, Outcome, Refusal};

/// Who ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client.
    Client,
    /// The target, or what stands between it and us.
    Upstream,
    /// This proxy.
    Proxy,
}

/// How far the session had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the client's handshake.
    Handshake,
    /// Judging its credentials.
    Login,
    /// Judging its request.
    Policy,
    /// Resolving and connecting.
    Dial,
    /// Moving bytes.
    Relay,
}

macro_rules! causes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why it ended.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Cause { $($(#[$doc])* $name,)* }

        impl Cause {
            /// All causes, in order.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name in metrics and records.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

causes! {
    /// Both sides said all they had to say.
    Finished = "finished",
    /// The client went away before it was done.
    ClientClosed = "client_closed",
    /// The client reset the connection.
    ClientReset = "client_reset",
    /// The client sent what is not its protocol.
    ClientMalformed = "client_malformed",
    /// The target closed before it was done.
    UpstreamClosed = "upstream_closed",
    /// The target reset the connection.
    UpstreamReset = "upstream_reset",
    /// The target sent what is not its protocol.
    UpstreamMalformed = "upstream_malformed",
    /// The handshake was not complete in time.
    HandshakeTimeout = "handshake_timeout",
    /// Nothing moved for too long.
    IdleTimeout = "idle_timeout",
    /// One direction had ended, and in the other nothing moved for too long.
    HalfCloseTimeout = "half_close_timeout",
    /// The session lived as long as it may.
    Lifetime = "lifetime",
    /// The target did not answer in time.
    ConnectTimeout = "connect_timeout",
    /// Wrong credentials.
    LoginRejected = "login_rejected",
    /// Too many logins at once.
    LoginBusy = "login_busy",
    /// Too many failed logins before.
    LoginThrottled = "login_throttled",
    /// No login method in common.
    NoLoginMethod = "no_login_method",
    /// Policy said no.
    Denied = "denied",
    /// All sessions the node takes are in use.
    NodeLimit = "node_limit",
    /// A limit of the user.
    UserLimit = "user_limit",
    /// The user has moved all that the quota allows.
    QuotaSpent = "quota_spent",
    /// The name does not exist.
    Unresolved = "unresolved",
    /// The name could not be resolved now.
    DnsFailed = "dns_failed",
    /// The target refused.
    Refused = "refused",
    /// No route to the network.
    NetworkUnreachable = "network_unreachable",
    /// No route to the host.
    HostUnreachable = "host_unreachable",
    /// No local port is left towards the target.
    NoPorts = "no_ports",
    /// No descriptor is left.
    NoDescriptors = "no_descriptors",
    /// Another failure to connect.
    DialFailed = "dial_failed",
    /// The command or address type is not supported.
    Unsupported = "unsupported",
    /// The user's limit of devices is reached, and another one came later.
    Evicted = "evicted",
    /// The user or the permission was taken away.
    Revoked = "revoked",
    /// An operator ended it.
    Kicked = "kicked",
    /// The node shut down.
    Drained = "drained",
    /// A bug ended it.
    Panicked = "panicked",
}

impl Cause {
    /// For [`culvert_rt::Watch`], which carries a number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The cause of a number that [`Cause::code`] gave.
    pub fn of_code(code: u8) -> Self {
        Self::ALL.get(usize::from(code)).copied().unwrap_or(Self::Panicked)
    }

    /// Why a connect failed.
    pub fn of_dial(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc_errno::ECONNREFUSED) => Self::Refused,
            Some(libc_errno::ENETUNREACH | libc_errno::ENETDOWN) => Self::NetworkUnreachable,
            Some(libc_errno::EHOSTUNREACH | libc_errno::EHOSTDOWN) => Self::HostUnreachable,
            Some(libc_errno::ETIMEDOUT) => Self::ConnectTimeout,
            Some(libc_errno::EADDRNOTAVAIL) => Self::NoPorts,
            Some(libc_errno::EMFILE | libc_errno::ENFILE) => Self::NoDescriptors,
            _ => Self::DialFailed,
        }
    }

    /// What the client is told.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Denied => Outcome::Forbidden,
            Self::NodeLimit | Self::UserLimit => Outcome::LimitReached,
            Self::Unresolved | Self::DnsFailed | Self::HostUnreachable => Outcome::HostUnreachable,
            Self::NetworkUnreachable => Outcome::NetworkUnreachable,
            Self::Refused => Outcome::Refused,
            Self::ConnectTimeout => Outcome::TimedOut,
            Self::Unsupported => Outcome::CommandUnsupported,
            _ => Outcome::Failed,
        }
    }

    /// Whether the connections are reset, so that what was cut does not look finished.
    pub fn cuts(self) -> bool {
        self != Self::Finished
    }
}

/// Linux error numbers, named so that this crate needs no `libc`.
mod libc_errno {
    pub(super) const ENFILE: i32 = 23;
    pub(super) const EMFILE: i32 = 24;
    pub(super) const EADDRNOTAVAIL: i32 = 99;
    pub(super) const ENETDOWN: i32 = 100;
    pub(super) const ENETUNREACH: i32 = 101;
    pub(super) const ETIMEDOUT: i32 = 110;
    pub(super) const ECONNREFUSED: i32 = 111;
    pub(super) const EHOSTDOWN: i32 = 112;
    pub(super) const EHOSTUNREACH: i32 = 113;
}

/// How a session or an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Who ended it.
    pub side: Side,
    /// How far it had come.
    pub stage: Stage,
    /// Why.
    pub cause: Cause,
}

impl End {
    /// An end; the side follows from the cause.
    pub fn new(stage: Stage, cause: Cause) -> Self {
        use Cause::*;
        let side = match cause {
            Finished | ClientClosed | ClientReset | ClientMalformed => Side::Client,
            UpstreamClosed | UpstreamReset | UpstreamMalformed | Refused | NetworkUnreachable
            | HostUnreachable | ConnectTimeout | Unresolved | DnsFailed => Side::Upstream,
            _ => Side::Proxy,
        };
        Self { side, stage, cause }
    }

    /// A handshake that refused by itself.
    pub fn of_refusal(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoLoginMethod => Self::new(Stage::Handshake, Cause::NoLoginMethod),
            Refusal::LoginRejected => Self::new(Stage::Login, Cause::LoginRejected),
            Refusal::CommandUnsupported | Refusal::AddressUnsupported => {
                Self::new(Stage::Handshake, Cause::Unsupported)
            }
            Refusal::BadTarget | Refusal::BadRequest => {
                Self::new(Stage::Handshake, Cause::ClientMalformed)
            }
        }
    }

    /// A client that does not speak its protocol.
    pub fn of_malformed(_: Malformed) -> Self {
        Self::new(Stage::Handshake, Cause::ClientMalformed)
    }
}
