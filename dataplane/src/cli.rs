//! The command line.

mod client;
mod commands;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::config::Origin;

/// A proxy server for many users.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node.
    Run(File),
    /// Check a configuration file and say everything that is wrong with it.
    Check(File),
    /// Run a proxy without a file. Without a user it serves this host only, unless --allow names
    /// clients.
    Server {
        /// What it speaks.
        #[arg(long, value_enum)]
        protocol: ProtocolArg,
        /// Where it listens, such as :1080 or 127.0.0.1:1080.
        #[arg(long, value_parser = parse_listen)]
        addr: SocketAddr,
        /// A user and a password, as user:password. Other users of this host see the command line; set
        /// CULVERT_USER instead to hide it.
        #[arg(long, env = "CULVERT_USER", hide_env_values = true, value_parser = parse_user)]
        user: Option<UserArg>,
        /// Clients that may connect.
        #[arg(long)]
        allow: Vec<IpNet>,
        /// Internal targets that may be dialled.
        #[arg(long)]
        allow_internal: Vec<IpNet>,
    },
    /// Connect standard input and output, or a local port, to a host through a proxy.
    Client {
        /// What the proxy speaks.
        #[arg(long, value_enum)]
        protocol: ProtocolArg,
        /// The proxy: host:port, or a URL such as tcp://host:port/.
        #[arg(long)]
        addr: String,
        /// The target's host.
        #[arg(long)]
        host: String,
        /// The target's port.
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
        /// A user and a password, as user:password; better set CULVERT_USER.
        #[arg(long, env = "CULVERT_USER", hide_env_values = true, value_parser = parse_user)]
        user: Option<UserArg>,
        /// Forward a local port instead of standard input and output.
        #[arg(long, value_parser = parse_listen)]
        listen: Option<SocketAddr>,
    },
    /// Read a password from standard input and print its hash.
    HashPassword,
    /// Ask a running node to take no more sessions, let the others end, and stop.
    Drain(File),
}

#[derive(Debug, Args)]
struct File {
    /// The configuration file (.toml, .yaml, .json).
    #[arg(short, long, env = "CULVERT_CONFIG")]
    config: PathBuf,
    /// Sets a key over the file and the environment, such as node.workers=2; may be given often. Lists are
    /// set in the file only.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

impl From<File> for Origin {
    fn from(file: File) -> Self {
        Self { path: file.config, set: file.set }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProtocolArg {
    Socks5,
    Http,
    Websocket,
}

/// A user and a password from the command line.
#[derive(Clone)]
struct UserArg {
    name: String,
    password: String,
}

impl std::fmt::Debug for UserArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:***", self.name)
    }
}

fn parse_user(text: &str) -> Result<UserArg, String> {
    match text.split_once(':') {
        Some((name, password)) if !name.is_empty() && !password.is_empty() => {
            Ok(UserArg { name: name.to_owned(), password: password.to_owned() })
        }
        _ => Err("write user:password".to_owned()),
    }
}

/// `:1080` is every IPv4 address of this host.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let whole = match text.strip_prefix(':') {
        Some(port) => format!("0.0.0.0:{port}"),
        None => text.to_owned(),
    };
    whole.parse().map_err(|_| format!("`{text}` is not an address with a port, such as :1080"))
}

/// Runs the program.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(file) => commands::run(file.into()),
        Command::Check(file) => commands::check(&file.into()),
        Command::Server { protocol, addr, user, allow, allow_internal } => {
            commands::server(protocol, addr, user, allow, allow_internal)
        }
        Command::Client { protocol, addr, host, port, user, listen } => {
            client::run(protocol, &addr, &host, port, user, listen)
        }
        Command::HashPassword => commands::hash_password(),
        Command::Drain(file) => commands::drain(&file.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command line's definition, for tests of the documentation.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}
