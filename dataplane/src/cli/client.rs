//! `culvert client`: one stream, or a local port, through a proxy. Plain threads: it carries a few
//! connections, not many.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use base64::Engine;
use culvert_proto::{Command, Credentials, Host, Protocol, Secret, Target, socks5};

use super::{ProtocolArg, UserArg, commands};

/// For connecting to the proxy and for each answer of the handshake.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest HTTP answer head.
const HEAD_MAX: usize = 64 * 1024;

#[derive(Clone)]
struct Proxy {
    protocol: Protocol,
    address: String,
    target: Target,
    user: Option<UserArg>,
}

pub(super) fn run(
    protocol: ProtocolArg,
    address: &str,
    host: &str,
    port: u16,
    user: Option<UserArg>,
    listen: Option<SocketAddr>,
) -> anyhow::Result<()> {
    let host = Host::parse(host.as_bytes()).with_context(|| format!("--host {host}"))?;
    let proxy = Proxy {
        protocol: commands::protocol(protocol)?,
        address: host_and_port(address).to_owned(),
        target: Target { host, port },
        user,
    };
    match listen {
        Some(address) => forward(&proxy, address),
        None => {
            let stream = proxy.connect()?;
            let mut upload = stream.try_clone()?;
            thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut upload);
                let _ = upload.shutdown(Shutdown::Write);
            });
            copy_to_stdout(stream)
        }
    }
}

/// `tcp://host:port/` and the like as `host:port`.
fn host_and_port(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// Unbuffered, so that what arrives is seen at once.
fn copy_to_stdout(mut stream: TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut stdout = std::io::stdout().lock();
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            received => {
                stdout.write_all(&buffer[..received])?;
                stdout.flush()?;
            }
        }
    }
}

fn forward(proxy: &Proxy, address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("--listen {address}"))?;
    eprintln!("culvert: {} leads to {}", listener.local_addr()?, proxy.target);
    for client in listener.incoming().flatten() {
        let proxy = proxy.clone();
        thread::spawn(move || {
            if let Err(error) = carry(&proxy, client) {
                eprintln!("culvert: {error:#}");
            }
        });
    }
    Ok(())
}

fn carry(proxy: &Proxy, mut client: TcpStream) -> anyhow::Result<()> {
    let mut stream = proxy.connect()?;
    let (mut from, mut to) = (client.try_clone()?, stream.try_clone()?);
    // What was cut must not look finished, to either side: no end is passed on any more, and the close is a
    // reset. The other direction may wait for somebody who says nothing.
    let cut = Arc::new(AtomicBool::new(false));
    let cuts = |cut: &AtomicBool, sockets: [&TcpStream; 2]| {
        cut.store(true, Relaxed);
        for socket in sockets {
            let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
            let _ = socket.shutdown(Shutdown::Read);
        }
    };
    let was_cut = cut.clone();
    let upload = thread::spawn(move || match std::io::copy(&mut from, &mut to) {
        Ok(_) if !was_cut.load(Relaxed) => drop(to.shutdown(Shutdown::Write)),
        Ok(_) => {}
        Err(_) => cuts(&was_cut, [&from, &to]),
    });
    let copied = std::io::copy(&mut stream, &mut client);
    match &copied {
        Ok(_) if !cut.load(Relaxed) => drop(client.shutdown(Shutdown::Write)),
        Ok(_) => {}
        Err(_) => cuts(&cut, [&client, &stream]),
    }
    let _ = upload.join();
    copied.map(drop).map_err(Into::into)
}

impl Proxy {
    /// A connection on which the target's bytes come next.
    fn connect(&self) -> anyhow::Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)
            .with_context(|| format!("the proxy at {}", self.address))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let greeted = match self.protocol {
            Protocol::Http => self.http(&mut stream),
            _ => self.socks5(&mut stream),
        };
        greeted.map_err(|error| match error.downcast_ref::<std::io::Error>() {
            Some(_) => error.context(format!(
                "{} hung up in the handshake; does it speak {}?",
                self.address,
                self.protocol.name()
            )),
            None => error,
        })?;
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    fn socks5(&self, stream: &mut TcpStream) -> anyhow::Result<()> {
        stream.write_all(&socks5::encode_greeting(self.user.is_some()))?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer)?;
        match (answer, &self.user) {
            ([5, 0], _) => {}
            ([5, 2], Some(user)) => {
                let credentials = Credentials {
                    user: user.name.as_bytes().into(),
                    password: Secret::new(user.password.as_bytes()),
                };
                stream.write_all(&socks5::encode_login(&credentials)?)?;
                stream.read_exact(&mut answer)?;
                if answer[1] != 0 {
                    bail!("the proxy rejected the user name or the password");
                }
            }
            ([5, 0xff], None) => bail!("the proxy wants a user; give --user or CULVERT_USER"),
            ([5, 0xff], Some(_)) => bail!("the proxy takes no password; leave --user out"),
            _ => bail!("{} does not speak SOCKS5", self.address),
        }
        stream.write_all(&socks5::encode_request(&Command::Connect, &self.target))?;
        // Byte by byte, so that nothing of the target's first words is taken.
        let mut reply = Vec::new();
        while socks5::parse_reply(&reply)?.is_none() {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            reply.push(byte[0]);
        }
        Ok(())
    }

    fn http(&self, stream: &mut TcpStream) -> anyhow::Result<()> {
        let login = self.user.as_ref().map_or(String::new(), |user| {
            let pair = format!("{}:{}", user.name, user.password);
            let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
            format!("Proxy-Authorization: Basic {encoded}\r\n")
        });
        let target = &self.target;
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n");
        stream.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            if head.len() > HEAD_MAX {
                bail!("{} does not speak HTTP", self.address);
            }
        }
        let head = String::from_utf8_lossy(&head);
        let status = head.lines().next().unwrap_or_default();
        match status.split(' ').nth(1) {
            Some(code) if code.starts_with('2') => Ok(()),
            Some("407") if self.user.is_none() => {
                bail!("the proxy wants a user; give --user or CULVERT_USER")
            }
            Some("407") => bail!("the proxy rejected the user name or the password"),
            _ => bail!("the proxy answered: {status}"),
        }
    }
}
