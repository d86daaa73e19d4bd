//! Values that hold for every session and may change while the node runs.

use std::{net::IpAddr, sync::Arc, time::Duration};

use culvert_api::Throttle;
use culvert_proto::{Login, Protocol};

use crate::policy::NetSet;

/// Deadlines and limits, as configured and checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Deadlines of a session.
    pub timeouts: Timeouts,
    /// Limits of one client address.
    pub address: AddressLimits,
    /// Rates of all sessions together.
    pub node: culvert_api::policy::Limits,
    /// Failed logins.
    pub failures: crate::policy::ThrottleLimits,
    /// Which addresses of a name are tried first.
    pub prefer: Prefer,
    /// What each listener asks of its clients, in the order of the listeners.
    pub listeners: Vec<Arc<ListenerRules>>,
}

/// What a listener asks of its clients.
#[derive(Debug)]
pub struct ListenerRules {
    /// Its name.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocols: Vec<Protocol>,
    /// Which logins it takes.
    pub login: Login,
    /// Clients it takes; `None` is all.
    pub allow: Option<NetSet>,
}

impl ListenerRules {
    /// Whether the listener takes a client.
    pub fn admits(&self, client: IpAddr) -> bool {
        self.allow.as_ref().is_none_or(|allow| allow.contains(client))
    }
}

/// Deadlines of a session.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From accept to the complete request.
    pub handshake: Duration,
    /// For resolving and connecting, all tries together.
    pub connect: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// The same, once one direction has ended.
    pub half_close: Duration,
    /// A session's whole life; `None` is no limit.
    pub lifetime: Option<Duration>,
}

/// Limits of one client address.
#[derive(Debug, Clone, Copy)]
pub struct AddressLimits {
    /// Sessions at once.
    pub sessions: u32,
    /// New sessions a second.
    pub new_sessions_per_second: u32,
}

/// Which addresses of a name are tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// IPv6 and IPv4 in turns, IPv6 first (RFC 8305).
    #[default]
    Race,
    /// IPv4 only, unless there is none.
    Ipv4,
    /// IPv6 only, unless there is none.
    Ipv6,
}

impl Default for Settings {
    fn default() -> Self {
        let per_two_minutes = |events| Throttle { events, span: Duration::from_secs(120) };
        Self {
            timeouts: Timeouts {
                handshake: Duration::from_secs(10),
                connect: Duration::from_secs(10),
                idle: Duration::from_secs(600),
                half_close: Duration::from_secs(30),
                lifetime: Some(Duration::from_secs(7 * 24 * 3600)),
            },
            address: AddressLimits { sessions: 1000, new_sessions_per_second: 200 },
            node: culvert_api::policy::Limits::default(),
            failures: crate::policy::ThrottleLimits {
                address: per_two_minutes(10),
                user: per_two_minutes(100),
            },
            prefer: Prefer::Race,
            listeners: Vec::new(),
        }
    }
}
