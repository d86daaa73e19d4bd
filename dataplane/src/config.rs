//! A node's configuration: file, then environment, then flags; read once and built into what the parts
//! need.

mod build;
mod file;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use culvert_api::{
    Place, Problem,
    config::{Format, Tree},
    policy::Policy,
};
use culvert_proto::{Login, Protocol};
use culvert_rt::DriverChoice;
use ipnet::IpNet;

pub use file::{File, Rotate};

use crate::{
    policy::NetSet,
    settings::{ListenerRules, Settings},
    upstream::ResolverOptions,
};

/// Prefix of environment variables that set a node's keys.
pub const ENVIRONMENT: &str = "CULVERT";

/// Variables that stand for flags of the command line, not for keys.
const FLAG_VARIABLES: [&str; 2] = ["CULVERT_CONFIG", "CULVERT_USER"];

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name, in logs and metrics.
    pub name: String,
    /// Where the node keeps what survives a restart; `None` keeps nothing.
    pub state_dir: Option<PathBuf>,
    /// Worker threads.
    pub workers: usize,
    /// What drives them.
    pub driver: DriverChoice,
    /// Listeners; at least one.
    pub listeners: Vec<ListenerConfig>,
    /// Where metrics and health are served; `None` nowhere.
    pub admin: Option<SocketAddr>,
    /// How names are resolved.
    pub resolver: ResolverOptions,
    /// Deadlines and limits.
    pub settings: Settings,
    /// Sessions at once; `None` from the descriptor limit.
    pub sessions: Option<usize>,
    /// How long a drain may take.
    pub drain: Duration,
    /// Logs.
    pub log: LogConfig,
    /// Who may do what.
    pub policy: Policy,
    /// The control plane whose policy is followed instead.
    pub control: Option<Control>,
}

/// Where the control plane is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// On this host.
    Unix(PathBuf),
    /// On another, over mutual TLS.
    Tls {
        /// Its host and port.
        address: String,
        /// The file of the identity that `culvert-control node add` wrote.
        identity: PathBuf,
    },
}

impl std::fmt::Display for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tls { address, .. } => write!(f, "tls://{address}"),
        }
    }
}

/// Where a node's configuration comes from: a file, the environment over it, flags over both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub path: PathBuf,
    /// The flags, each `section.key=value`.
    pub set: Vec<String>,
}

/// One listener.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenerConfig {
    /// Its name in logs.
    pub name: String,
    /// Where it listens; port 0 lets the kernel choose.
    pub bind: SocketAddr,
    /// What it speaks.
    pub protocols: Vec<Protocol>,
    /// Which logins it takes.
    pub login: Login,
    /// Clients it takes; `None` is all.
    pub allow: Option<Vec<IpNet>>,
}

impl ListenerConfig {
    /// What it asks of its clients.
    pub fn rules(&self) -> ListenerRules {
        ListenerRules {
            name: self.name.as_str().into(),
            protocols: self.protocols.clone(),
            login: self.login,
            allow: self.allow.clone().map(NetSet::new),
        }
    }
}

/// Logs.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// Level, or a filter of `tracing_subscriber`.
    pub level: String,
    /// JSON instead of text.
    pub json: bool,
    /// Where the log goes; `None` is standard error.
    pub file: Option<PathBuf>,
    /// Where access records go; `None` is nowhere.
    pub access_file: Option<PathBuf>,
    /// How often both begin a new file.
    pub rotate: Rotate,
}

impl Config {
    /// Reads a node's configuration from where it comes.
    ///
    /// # Errors
    /// Every problem found.
    pub fn load(origin: &Origin) -> Result<Self, Vec<Problem>> {
        let path = &origin.path;
        let problem = |message: String| vec![Problem::new(Place::Nowhere, "", message)];
        let text = std::fs::read_to_string(path)
            .map_err(|error| problem(format!("{}: {error}", path.display())))?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let format = Format::of_extension(extension).ok_or_else(|| {
            problem(format!("{}: name it .toml, .yaml, .yml or .json", path.display()))
        })?;
        Self::parse(&text, format, std::env::vars(), &origin.set)
    }

    /// Parses configuration text with the environment over it, and flags over both.
    ///
    /// # Errors
    /// Every problem found.
    pub fn parse(
        text: &str,
        format: Format,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[String],
    ) -> Result<Self, Vec<Problem>> {
        let mut tree = Tree::parse(text, format)?;
        // The control plane's variables and those of our own flags begin with the same word.
        let ours = environment.into_iter().filter(|(name, _)| {
            !name.starts_with("CULVERT_CTL_") && !FLAG_VARIABLES.contains(&name.as_str())
        });
        let mut problems = tree.overlay(ENVIRONMENT, ours);
        problems.extend(tree.overlay_flags(flags));
        match tree.read::<File>() {
            Ok(file) => {
                let (config, more) = build::build(file, &tree);
                problems.extend(more);
                match config {
                    Some(config) if problems.is_empty() => return Ok(config),
                    _ => {}
                }
            }
            Err(more) => problems.extend(more),
        }
        problems.sort();
        Err(problems)
    }

    /// Keys that differ in another configuration and are read at the start only.
    pub fn restart_keys(&self, other: &Self) -> Vec<&'static str> {
        let changed = [
            ("node.name", self.name != other.name),
            ("node.state_dir", self.state_dir != other.state_dir),
            ("node.workers", self.workers != other.workers),
            ("node.driver", self.driver != other.driver),
            ("admin.bind", self.admin != other.admin),
            ("dns", self.resolver != other.resolver),
            ("timeouts.drain", self.drain != other.drain),
            ("control", self.control != other.control),
            ("log", self.log != other.log),
        ];
        changed.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key).collect()
    }

    /// The configuration of `culvert server`: one listener, no file.
    pub fn of_server(
        bind: SocketAddr,
        protocol: Protocol,
        user: Option<culvert_api::policy::User>,
        allow: Vec<IpNet>,
    ) -> Self {
        let loopback: [IpNet; 2] = [
            IpNet::new_assert(IpAddr::from([127, 0, 0, 0]), 8),
            IpNet::new_assert(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), 128),
        ];
        let allow = match (&user, allow.is_empty()) {
            (_, false) => Some(allow),
            (Some(_), true) => None,
            // Without a password only this host's own clients are served.
            (None, true) => Some(loopback.to_vec()),
        };
        let login = if user.is_some() { Login::Password } else { Login::None };
        let listener = ListenerConfig {
            name: protocol.name().to_owned(),
            bind,
            protocols: vec![protocol],
            login,
            allow,
        };
        let listeners = vec![Arc::new(listener.rules())];
        Self {
            name: "culvert".to_owned(),
            state_dir: None,
            workers: culvert_rt::available_cores().len(),
            driver: DriverChoice::Auto,
            listeners: vec![listener],
            admin: None,
            resolver: file::Dns::default().options(),
            settings: Settings { listeners, ..Settings::default() },
            sessions: None,
            drain: Duration::from_secs(5),
            log: LogConfig {
                level: "info".to_owned(),
                json: false,
                file: None,
                access_file: None,
                rotate: Rotate::Never,
            },
            policy: Policy { user: user.into_iter().collect(), ..Policy::default() },
            control: None,
        }
    }
}
