//! A node's configuration: file, then environment, then flags; read once and built into what the parts
//! need.

mod build;
mod file;

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
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

use crate::{settings::Settings, upstream::ResolverOptions};

/// Prefix of environment variables that set a node's keys.
pub const ENVIRONMENT: &str = "CULVERT";

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
    /// Reads a configuration file with the environment over it.
    ///
    /// # Errors
    /// Every problem found.
    pub fn load(
        path: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Vec<Problem>> {
        let problem = |message: String| vec![Problem::new(Place::Nowhere, "", message)];
        let text = std::fs::read_to_string(path)
            .map_err(|error| problem(format!("{}: {error}", path.display())))?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let format = Format::of_extension(extension).ok_or_else(|| {
            problem(format!("{}: name it .toml, .yaml, .yml or .json", path.display()))
        })?;
        Self::parse(&text, format, environment)
    }

    /// Parses configuration text with the environment over it.
    ///
    /// # Errors
    /// Every problem found.
    pub fn parse(
        text: &str,
        format: Format,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Vec<Problem>> {
        let mut tree = Tree::parse(text, format)?;
        // The control plane's variables begin with the same word.
        let ours = environment.into_iter().filter(|(name, _)| !name.starts_with("CULVERT_CTL_"));
        let mut problems = tree.overlay(ENVIRONMENT, ours);
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
        Self {
            name: "culvert".to_owned(),
            state_dir: None,
            workers: culvert_rt::available_cores().len(),
            driver: DriverChoice::Auto,
            listeners: vec![listener],
            admin: None,
            resolver: file::Dns::default().options(),
            settings: Settings::default(),
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
        }
    }
}
