//! The keys of a node's file. All are optional but a listener.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use culvert_api::{ByteCount, ByteRate, Span, Throttle, policy::Policy};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};

use crate::{settings::Prefer, upstream::ResolverOptions};

/// A node's file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// The node itself.
    pub node: Node,
    /// Where clients connect.
    pub listener: Vec<Listener>,
    /// Metrics and health.
    pub admin: Admin,
    /// Names.
    pub dns: Dns,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// Limits of the node and of client addresses.
    pub limits: Limits,
    /// Failed logins.
    pub auth: Auth,
    /// Logs.
    pub log: Log,
    /// The control plane, instead of a policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
    /// Who may do what.
    pub policy: Policy,
}

/// The node itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Its name in logs and metrics.
    pub name: String,
    /// Where it keeps what survives a restart.
    pub state_dir: PathBuf,
    /// Worker threads: "auto" is one a core.
    pub workers: Auto,
    /// auto, io_uring or epoll.
    pub driver: Driver,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: "culvert".to_owned(),
            state_dir: std::env::var_os("STATE_DIRECTORY")
                .map_or_else(|| PathBuf::from("/var/lib/culvert"), PathBuf::from),
            workers: Auto(None),
            driver: Driver::Auto,
        }
    }
}

/// What drives the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// io_uring if it can be had, otherwise epoll with a warning.
    #[default]
    Auto,
    /// io_uring or no start.
    IoUring,
    /// epoll.
    Epoll,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Its name in logs; its address when left out.
    #[serde(default)]
    pub name: String,
    /// Address and port.
    pub bind: SocketAddr,
    /// socks5, socks4, http.
    #[serde(default = "default_protocols")]
    pub protocols: Vec<ProtocolName>,
    /// password, none, or both.
    #[serde(default = "default_auth")]
    pub auth: Vec<AuthMethod>,
    /// Clients of this listener; left out: all.
    #[serde(default)]
    pub allow: Option<Vec<IpNet>>,
}

fn default_protocols() -> Vec<ProtocolName> {
    vec![ProtocolName::Socks5, ProtocolName::Http]
}

fn default_auth() -> Vec<AuthMethod> {
    vec![AuthMethod::Password]
}

/// A protocol's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProtocolName {
    /// SOCKS5.
    Socks5,
    /// SOCKS4 and 4a.
    Socks4,
    /// HTTP proxy.
    Http,
    /// WebSocket; not in this version.
    Websocket,
}

/// A login method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMethod {
    /// User name and password.
    Password,
    /// Nothing.
    None,
}

/// Metrics and health.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Address and port; "none" serves nothing.
    pub bind: Bind,
}

impl Default for Admin {
    fn default() -> Self {
        Self { bind: Bind(Some(SocketAddr::from(([127, 0, 0, 1], 9182)))) }
    }
}

/// Names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// "system", or addresses of servers.
    pub servers: Vec<String>,
    /// resolver, or getaddrinfo.
    pub mode: DnsMode,
    /// For one name, all tries together.
    pub timeout: Span,
    /// race, ipv4 or ipv6.
    pub prefer: Prefer,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            servers: vec!["system".to_owned()],
            mode: DnsMode::Resolver,
            timeout: Span(Duration::from_secs(3)),
            prefer: Prefer::Race,
        }
    }
}

impl Dns {
    /// What the resolver is started with; entries that are no servers are left out (the checks name
    /// them).
    pub fn options(&self) -> ResolverOptions {
        ResolverOptions {
            servers: self.servers.iter().filter_map(|text| server(text)).collect(),
            getaddrinfo: self.mode == DnsMode::Getaddrinfo,
            timeout: self.timeout.0,
        }
    }
}

/// An address, with port 53 unless it names one.
pub(super) fn server(text: &str) -> Option<SocketAddr> {
    let address = text.parse().ok();
    address.or_else(|| text.parse().ok().map(|ip| SocketAddr::new(ip, 53)))
}

/// How names are resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DnsMode {
    /// Our own resolver, which knows TTLs.
    #[default]
    Resolver,
    /// The C library's, which knows what the host knows (NSS).
    Getaddrinfo,
}

/// Deadlines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// From accept to the complete request.
    pub handshake: Span,
    /// For resolving and connecting.
    pub connect: Span,
    /// Without a byte in either direction.
    pub idle: Span,
    /// The same, once one direction has ended.
    pub half_close: Span,
    /// A session's whole life; 0 is no limit.
    pub lifetime: Span,
    /// For running sessions when the node shuts down.
    pub drain: Span,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = |seconds| Span(Duration::from_secs(seconds));
        Self {
            handshake: seconds(10),
            connect: seconds(10),
            idle: seconds(600),
            half_close: seconds(30),
            lifetime: seconds(7 * 24 * 3600),
            drain: seconds(30),
        }
    }
}

/// Limits of the node and of client addresses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Sessions at once; "auto" from the descriptor limit.
    pub sessions: Auto,
    /// Sessions of one client address at once.
    pub sessions_per_address: u32,
    /// New sessions of one client address a second; 0 is no limit.
    pub new_sessions_per_second_per_address: u32,
    /// Bytes a second to targets, of all sessions together.
    pub up: Option<ByteRate>,
    /// Bytes a second to clients, of all sessions together.
    pub down: Option<ByteRate>,
    /// Bytes that may go at once after a pause; a tenth of a second's worth when left out.
    pub burst: Option<ByteCount>,
    /// New sessions a second, of all clients together.
    pub new_sessions_per_second: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: Auto(None),
            sessions_per_address: 1000,
            new_sessions_per_second_per_address: 200,
            up: None,
            down: None,
            burst: None,
            new_sessions_per_second: None,
        }
    }
}

/// Failed logins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// From one address.
    pub failures_per_address: Throttle,
    /// Of one user.
    pub failures_per_user: Throttle,
}

impl Default for Auth {
    fn default() -> Self {
        let per_two_minutes = |events| Throttle { events, span: Duration::from_secs(120) };
        Self { failures_per_address: per_two_minutes(10), failures_per_user: per_two_minutes(100) }
    }
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// error, warn, info, debug or trace.
    pub level: String,
    /// text or json.
    pub format: LogFormat,
    /// "stderr" or a file.
    pub file: PathBuf,
    /// Access records, JSON lines; "none" writes none.
    pub access_file: PathBuf,
    /// daily, hourly or never.
    pub rotate: Rotate,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
            file: PathBuf::from("stderr"),
            access_file: PathBuf::from("access.log"),
            rotate: Rotate::Daily,
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// How often a log begins a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rotate {
    /// At midnight UTC.
    #[default]
    Daily,
    /// At each full hour.
    Hourly,
    /// Never.
    Never,
}

/// The control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// `unix:/path` on its host, `tls://host:port` on another.
    pub connect: String,
    /// With `tls`: the file of the identity that `culvert-control node add` wrote.
    #[serde(default)]
    pub identity: Option<PathBuf>,
}

/// A number, or "auto".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Auto(pub Option<usize>);

impl Serialize for Auto {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(number) => serializer.serialize_u64(number as u64),
            None => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Auto {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AutoVisitor;
        impl Visitor<'_> for AutoVisitor {
            type Value = Auto;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number of at least 1, or \"auto\"")
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Auto, E> {
                let fits = usize::try_from(number).ok().filter(|&number| number > 0);
                let invalid = || E::invalid_value(serde::de::Unexpected::Unsigned(number), &self);
                fits.map(|number| Auto(Some(number))).ok_or_else(invalid)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Auto, E> {
                match text.parse() {
                    Ok(number) => self.visit_u64(number),
                    Err(_) if text == "auto" => Ok(Auto(None)),
                    Err(_) => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(AutoVisitor)
    }
}

/// An address to bind, or "none".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind(pub Option<SocketAddr>);

impl Serialize for Bind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(address) => serializer.collect_str(&address),
            None => serializer.serialize_str("none"),
        }
    }
}

impl<'de> Deserialize<'de> for Bind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.parse() {
            Ok(address) => Ok(Self(Some(address))),
            Err(_) if text == "none" => Ok(Self(None)),
            Err(_) => Err(serde::de::Error::custom(format!(
                "`{text}` is not an address with a port, such as \"127.0.0.1:9182\", or \"none\""
            ))),
        }
    }
}
