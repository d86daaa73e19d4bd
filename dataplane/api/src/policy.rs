//! The policy a node follows, as a file or the control plane writes it: who may use the proxy, where
//! to, how much. A node compiles it into its own matchers; both planes check it with the same rules.

mod check;
mod hours;
mod target;

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

pub use check::{check_users, check_users_bound};
pub use hours::{Hours, Weekday};
pub use target::{check_pattern, listed_name, listed_suffix, pattern_set, redirect_target};

use crate::{ByteCount, ByteRate};

/// What to do when no rule decides, or what a filter or rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Let through.
    #[default]
    Allow,
    /// Refuse.
    Deny,
}

/// A whole policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// What to do when no rule decides.
    pub default: Access,
    /// Internal targets (loopback, private, link-local and so on) that may be dialled.
    pub allow_internal: Vec<IpNet>,
    /// Target ports nobody may use.
    pub deny_ports: Vec<u16>,
    /// Clients that may connect; left out: all.
    pub whitelist: Option<Vec<IpNet>>,
    /// The zone of rules' times, such as `Europe/Berlin`; left out: UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timezone: Option<String>,
    /// Users.
    pub user: Vec<User>,
    /// Black and white lists of targets.
    pub filter: Vec<Filter>,
    /// Ordered rules; the first match decides.
    pub rule: Vec<Rule>,
    /// Ways out, named by rules.
    pub upstream: Vec<Upstream>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            default: Access::Allow,
            allow_internal: Vec::new(),
            deny_ports: vec![25],
            whitelist: None,
            timezone: None,
            user: Vec::new(),
            filter: Vec::new(),
            rule: Vec::new(),
            upstream: Vec::new(),
        }
    }
}

/// Whether a user may log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Yes.
    #[default]
    Active,
    /// No, and live sessions end.
    Disabled,
}

/// One user.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The number the control plane gave; in a file there is none, and the name stands for it.
    #[serde(skip)]
    pub id: Option<u64>,
    /// The name clients log in with: 1 to 255 bytes without control characters.
    pub name: String,
    /// The password's hash, bcrypt or argon2id, as `culvert hash-password` prints it.
    pub password_hash: String,
    /// Whether the user may log in.
    #[serde(default)]
    pub status: Status,
    /// Groups, for rules.
    #[serde(default)]
    pub groups: Vec<String>,
    /// From when on the user may not log in, RFC 3339; live sessions end then.
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub expires: Option<OffsetDateTime>,
    /// Limits.
    #[serde(default)]
    pub limits: Limits,
}

/// What one user may use, over all workers of the node. What is left out is not limited.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes a second to targets.
    pub up: Option<ByteRate>,
    /// Bytes a second to the client.
    pub down: Option<ByteRate>,
    /// Bytes that may go at once after a pause, in each direction; a tenth of a second's worth when
    /// left out.
    pub burst: Option<ByteCount>,
    /// Sessions at once.
    pub sessions: Option<u32>,
    /// New sessions a second.
    pub new_sessions_per_second: Option<u32>,
    /// Client addresses at once (1 to 64; IPv6 counted by /64).
    pub devices: Option<u32>,
    /// With `devices` in use, a further address takes the place of the one that came first, whose sessions
    /// end; otherwise the further address is refused. Addresses that are there when `devices` changes are not
    /// counted.
    pub evict_oldest: bool,
    /// Client addresses the user may come from.
    pub source_addresses: Option<Vec<IpNet>>,
    /// The local address to dial from.
    pub egress_address: Option<IpAddr>,
    /// Bytes are moved only on leases of the control plane, which keeps the quota; never in a file.
    #[serde(skip)]
    pub metered: bool,
}

/// Targets, in any of several ways; a target in one of the lists matches. With `port` it must also use
/// one of the ports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// `deny` is the black list; `allow` exempts from it.
    pub action: Access,
    /// Exact host names.
    pub domain: Vec<String>,
    /// Host names and all below them.
    pub domain_suffix: Vec<String>,
    /// Parts of host names.
    pub domain_keyword: Vec<String>,
    /// Regular expressions on host names (linear time; not anchored unless written so).
    pub domain_regex: Vec<String>,
    /// Addresses, after resolution.
    pub cidr: Vec<IpNet>,
    /// Ports and ranges of ports.
    pub port: Vec<PortRange>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            action: Access::Deny,
            domain: Vec::new(),
            domain_suffix: Vec::new(),
            domain_keyword: Vec::new(),
            domain_regex: Vec::new(),
            cidr: Vec::new(),
            port: Vec::new(),
        }
    }
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// Its name in logs and records.
    pub name: String,
    /// Its conditions; none matches everything.
    pub when: When,
    /// What it does.
    pub action: RuleAction,
    /// The upstream to go through (with `allow`); left out: dial directly.
    pub upstream: Option<String>,
    /// `host:port` to go to instead (with `redirect`).
    pub to: Option<String>,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    /// Let through.
    #[default]
    Allow,
    /// Refuse.
    Deny,
    /// Go elsewhere.
    Redirect,
}

/// Conditions: all that are given must hold. The `domain…` and `cidr` lists are one condition on the
/// target, met by any of them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct When {
    /// User names.
    pub user: Vec<String>,
    /// Groups.
    pub group: Vec<String>,
    /// Client addresses.
    pub client: Vec<IpNet>,
    /// Protocols: socks5, socks4, http.
    pub protocol: Vec<String>,
    /// Exact host names.
    pub domain: Vec<String>,
    /// Host names and all below them.
    pub domain_suffix: Vec<String>,
    /// Parts of host names.
    pub domain_keyword: Vec<String>,
    /// Regular expressions on host names.
    pub domain_regex: Vec<String>,
    /// Addresses, after resolution.
    pub cidr: Vec<IpNet>,
    /// Ports and ranges of ports.
    pub port: Vec<PortRange>,
    /// Parts of the day, in the policy's zone, at which a request is made.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub time: Vec<Hours>,
    /// Days of the week, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weekday: Vec<Weekday>,
}

/// A way out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Its name in rules.
    pub name: String,
    /// What it is.
    #[serde(rename = "type", default)]
    pub kind: UpstreamKind,
    /// The local address to dial from.
    #[serde(default)]
    pub egress_address: Option<IpAddr>,
}

/// Kinds of upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamKind {
    /// Dial the target.
    #[default]
    Direct,
    /// Through a SOCKS5 proxy; not in this version.
    Socks5,
    /// Through an HTTP proxy; not in this version.
    Http,
    /// Through a WebSocket server; not in this version.
    Websocket,
    /// Through a reverse tunnel; not in this version.
    Tunnel,
}

/// `443` or `"8000-8100"`, inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

impl PortRange {
    /// Parses a port or a range.
    pub fn parse(text: &str) -> Option<Self> {
        let port = |text: &str| text.trim().parse::<u16>().ok();
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        (first <= last).then_some(Self { first, last })
    }

    /// Whether a port lies in the range.
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl Serialize for PortRange {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}-{}", self.first, self.last))
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = PortRange;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port such as 443 or a range such as \"8000-8100\"")
            }

            fn visit_u64<E: serde::de::Error>(self, port: u64) -> Result<PortRange, E> {
                let invalid = E::invalid_value(serde::de::Unexpected::Unsigned(port), &self);
                u16::try_from(port)
                    .map(|port| PortRange { first: port, last: port })
                    .or(Err(invalid))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PortRange, E> {
                let invalid = E::invalid_value(serde::de::Unexpected::Str(text), &self);
                PortRange::parse(text).ok_or(invalid)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Users a policy may have.
pub const USERS_MAX: usize = 1_000_000;
/// Filters and filter entries a policy may have, together.
pub const FILTER_ENTRIES_MAX: usize = 1_000_000;
/// Rules a policy may have.
pub const RULES_MAX: usize = 10_000;
/// Client addresses at once a user may be limited to.
pub const DEVICES_MAX: u32 = 64;
