//! The commands that need no more than a screen.

use std::{
    io::{IsTerminal, Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
};

use anyhow::{Context, bail};
use culvert_api::policy::{Limits, Status, User};
use culvert_proto::Protocol;
use ipnet::IpNet;

use super::{ProtocolArg, UserArg};
use crate::{
    config::{Config, Origin},
    node::{self, Source},
    policy,
};

fn load(origin: &Origin) -> anyhow::Result<Config> {
    Config::load(origin).map_err(|problems| {
        let count = problems.len();
        let list = crate::log::problems(&problems);
        let plural = if count == 1 { "problem" } else { "problems" };
        let path = origin.path.display();
        anyhow::anyhow!("{path}: {count} {plural}\n{}", list.trim_end())
    })
}

pub(super) fn run(origin: Origin) -> anyhow::Result<()> {
    let config = load(&origin)?;
    node::run(config, Source::File(origin))
}

pub(super) fn check(origin: &Origin) -> anyhow::Result<()> {
    let config = load(origin)?;
    println!(
        "{}: ok: {} listeners, {} users, {} filters, {} rules",
        origin.path.display(),
        config.listeners.len(),
        config.policy.user.len(),
        config.policy.filter.len(),
        config.policy.rule.len()
    );
    Ok(())
}

pub(super) fn protocol(protocol: ProtocolArg) -> anyhow::Result<Protocol> {
    match protocol {
        ProtocolArg::Socks5 => Ok(Protocol::Socks5),
        ProtocolArg::Http => Ok(Protocol::Http),
        ProtocolArg::Websocket => {
            bail!("this version does not speak WebSocket; use socks5 or http")
        }
    }
}

pub(super) fn server(
    name: ProtocolArg,
    addr: SocketAddr,
    user: Option<UserArg>,
    allow: Vec<IpNet>,
    allow_internal: Vec<IpNet>,
) -> anyhow::Result<()> {
    let user = match user {
        Some(UserArg { name, password }) => Some(User {
            id: None,
            name,
            password_hash: policy::hash_password(password.as_bytes())?,
            status: Status::Active,
            groups: Vec::new(),
            expires: None,
            limits: Limits::default(),
        }),
        None => None,
    };
    let mut config = Config::of_server(addr, protocol(name)?, user, allow);
    config.policy.allow_internal = allow_internal;
    node::run(config, Source::CommandLine)
}

pub(super) fn hash_password() -> anyhow::Result<()> {
    let password = if std::io::stdin().is_terminal() {
        rpassword::prompt_password("Password: ")?.into_bytes()
    } else {
        let mut password = Vec::new();
        std::io::stdin().read_to_end(&mut password)?;
        // A line from `echo` or a file ends with a line break that is no part of it.
        let line = password.strip_suffix(b"\n").unwrap_or(&password);
        line.strip_suffix(b"\r").unwrap_or(line).to_vec()
    };
    if password.contains(&b'\n') {
        bail!("a password is one line; standard input has several");
    }
    println!("{}", policy::hash_password(&password)?);
    Ok(())
}

pub(super) fn drain(origin: &Origin) -> anyhow::Result<()> {
    let config = load(origin)?;
    let Some(dir) = config.state_dir else { bail!("the node has no state_dir") };
    let socket = dir.join(crate::admin::SOCKET);
    let mut stream = UnixStream::connect(&socket)
        .with_context(|| format!("{}: is the node running?", socket.display()))?;
    let request =
        "POST /drain HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.lines().next() {
        Some(status) if status.contains(" 202 ") => {
            println!("draining; the node ends within {:?}", config.drain);
            Ok(())
        }
        status => bail!("the node answered {:?}", status.unwrap_or_default()),
    }
}
