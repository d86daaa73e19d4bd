//! The proxies that are measured: how each is started, and how one connects through it.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream as StdStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::ValueEnum;
use culvert_proto::{Command as SocksCommand, Credentials, Secret, Target, socks5};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    Scenario,
    control::{self, Plane},
    process,
};

/// A proxy, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// No proxy at all.
    Direct,
    /// Culvert, SOCKS5 with user and password, metrics, limits and records on.
    Culvert,
    /// The same, following a control plane that takes in its sums and records.
    Followed,
    /// The same, with a user who has a quota.
    Metered,
    /// haproxy in TCP mode: no handshake.
    Haproxy,
    /// nginx stream: no handshake.
    Nginx,
    /// dante, SOCKS5 without login.
    Dante,
    /// microsocks, SOCKS5 with user and password.
    Microsocks,
    /// SOCKS5 on Culvert's runtime, and nothing else.
    Bare,
}

impl Kind {
    /// Culvert and its peers.
    pub(crate) const ALL: [Self; 7] = [
        Self::Direct,
        Self::Culvert,
        Self::Haproxy,
        Self::Nginx,
        Self::Dante,
        Self::Microsocks,
        Self::Bare,
    ];

    fn is_culvert(self) -> bool {
        matches!(self, Self::Culvert | Self::Followed | Self::Metered)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Culvert => "culvert",
            Self::Followed => "followed",
            Self::Metered => "metered",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Dante => "dante",
            Self::Microsocks => "microsocks",
            Self::Bare => "bare",
        }
    }

    /// Thousands of idle sessions are thousands of processes or threads for some.
    pub(crate) fn takes_part(self, scenario: Scenario) -> bool {
        match scenario {
            Scenario::Swap => matches!(self, Self::Culvert | Self::Followed),
            Scenario::Idle => {
                !matches!(self, Self::Direct | Self::Dante | Self::Microsocks | Self::Bare)
            }
            _ => true,
        }
    }

    fn greets(self) -> Greeting {
        match self {
            Self::Direct | Self::Haproxy | Self::Nginx => Greeting::None,
            Self::Dante => Greeting::Socks5,
            Self::Culvert | Self::Followed | Self::Metered | Self::Microsocks | Self::Bare => {
                Greeting::Login
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Greeting {
    None,
    Socks5,
    Login,
}

/// The user all proxies know that know users.
const USER: &str = "perf";
const PASSWORD: &str = "perf-password";

/// A running proxy; ended when dropped.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    address: SocketAddr,
    child: Option<Child>,
    folder: PathBuf,
    /// What it follows; ended after it.
    pub(crate) plane: Option<Arc<Plane>>,
}

impl Peer {
    /// Starts a proxy, with so many users beside the one that is used if it follows a control plane; `None`
    /// when it is not installed.
    pub(crate) fn start(
        kind: Kind,
        users: usize,
        target: SocketAddr,
        culvert: &Path,
        driver: &str,
        folder: &Path,
    ) -> anyhow::Result<Option<Self>> {
        if kind == Kind::Direct {
            let folder = PathBuf::new();
            return Ok(Some(Self { kind, address: target, child: None, folder, plane: None }));
        }
        let address = free_address()?;
        let folder = folder.join(kind.name());
        fs::create_dir_all(&folder)?;
        let plane = match kind {
            Kind::Followed | Kind::Metered => Some(Arc::new(plane(kind, users, culvert, &folder)?)),
            _ => None,
        };
        let socket = plane.as_ref().map(|plane| plane.socket());
        let Some(mut command) =
            command(kind, address, target, culvert, driver, &folder, socket.as_deref())?
        else {
            return Ok(None);
        };
        let log = fs::File::create(folder.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut peer = Self { kind, address, child: Some(child), folder, plane };
        peer.await_ready()?;
        let began = Instant::now();
        while socket.is_some() && !peer.log().contains("policy followed") {
            anyhow::ensure!(
                began.elapsed() < Duration::from_secs(10),
                "no policy:\n{}",
                peer.log()
            );
            std::thread::yield_now();
        }
        Ok(Some(peer))
    }

    fn await_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while StdStream::connect(self.address).is_err() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                let log = self.log();
                anyhow::bail!("{} did not start:\n{log}", self.kind.name());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// What the proxy has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Culvert's configuration; a change of it is a reload.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.join("culvert.toml")
    }

    /// What the proxy has used so far.
    pub(crate) fn usage(&self) -> process::Usage {
        self.child.as_ref().map_or_else(process::Usage::default, |child| process::usage(child.id()))
    }

    /// A connection to the target.
    pub(crate) async fn connect(&self, target: SocketAddr) -> anyhow::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let greeting = self.kind.greets();
        if greeting == Greeting::None {
            return Ok(stream);
        }
        let login = greeting == Greeting::Login;
        stream.write_all(&socks5::encode_greeting(login)).await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        if login {
            let credentials = Credentials {
                user: USER.as_bytes().into(),
                password: Secret::new(PASSWORD.as_bytes()),
            };
            stream.write_all(&socks5::encode_login(&credentials)?).await?;
            stream.read_exact(&mut answer).await?;
            anyhow::ensure!(answer[1] == 0, "login rejected");
        }
        let request = socks5::encode_request(&SocksCommand::Connect, &Target::from(target));
        stream.write_all(&request).await?;
        let mut reply = [0; 10];
        stream.read_exact(&mut reply).await?;
        socks5::parse_reply(&reply)?.context("a reply of another length")?;
        Ok(stream)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        let tree = process::tree(child.id());
        process::terminate(child.id());
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && !matches!(child.try_wait(), Ok(Some(_))) {
            std::thread::yield_now();
        }
        // Children that outlive their parent, as dante's do.
        for pid in tree {
            if process::tree(pid).len() == 1 && Path::new(&format!("/proc/{pid}")).exists() {
                process::kill(pid);
            }
        }
        let _ = child.wait();
    }
}

/// A free port below those the kernel gives to clients: churn leaves all of these in TIME_WAIT.
fn free_address() -> anyhow::Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    for _ in 0..1_000 {
        let address = SocketAddr::from(([127, 0, 0, 1], NEXT.fetch_add(1, Relaxed)));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    anyhow::bail!("no free port between 20000 and 21000")
}

fn command(
    kind: Kind,
    address: SocketAddr,
    target: SocketAddr,
    culvert: &Path,
    driver: &str,
    folder: &Path,
    socket: Option<&Path>,
) -> anyhow::Result<Option<Command>> {
    let port = address.port();
    let config = folder.join(if kind.is_culvert() { "culvert.toml" } else { "config" });
    let text = match kind {
        Kind::Direct => return Ok(None),
        Kind::Culvert | Kind::Followed | Kind::Metered => {
            culvert_config(address, driver, folder, socket)?
        }
        Kind::Haproxy => format!(
            "global\n maxconn 9900\n nbthread 2\ndefaults\n mode tcp\n maxconn 9900\n \
             timeout connect 10s\n timeout client 1h\n timeout server 1h\nfrontend in\n \
             bind 127.0.0.1:{port} backlog 4096\n default_backend out\nbackend out\n server t {target}\n"
        ),
        Kind::Nginx => nginx_config(port, target, folder),
        Kind::Dante => format!(
            "errorlog: stderr\ninternal: 127.0.0.1 port = {port}\nexternal: lo\n\
             external.rotation: none\nclientmethod: none\nsocksmethod: none\nuser.privileged: root\n\
             user.unprivileged: nobody\ntimeout.negotiate: 30\ntimeout.io.tcp: 0\n\
             client pass {{\n from: 127.0.0.0/8 to: 127.0.0.0/8\n}}\n\
             socks pass {{\n from: 127.0.0.0/8 to: 0.0.0.0/0\n command: connect\n socksmethod: none\n protocol: tcp\n}}\n"
        ),
        Kind::Microsocks | Kind::Bare => String::new(),
    };
    fs::write(&config, text)?;
    let own = std::env::current_exe()?;
    let mut command = Command::new(match kind {
        _ if kind.is_culvert() => culvert.as_os_str(),
        Kind::Bare => own.as_os_str(),
        Kind::Haproxy => "haproxy".as_ref(),
        Kind::Nginx => "nginx".as_ref(),
        Kind::Dante => "danted".as_ref(),
        _ => "microsocks".as_ref(),
    });
    match kind {
        _ if kind.is_culvert() => command.arg("run").arg("-c").arg(&config),
        Kind::Haproxy => command.args(["-db", "-q", "-f"]).arg(&config),
        Kind::Nginx => command.args(["-e", "stderr", "-p"]).arg(folder).arg("-c").arg(&config),
        Kind::Dante => {
            command.arg("-f").arg(&config).arg("-p").arg(folder.join("pid")).args(["-N", "1"])
        }
        Kind::Bare => command.arg("--bare").arg(address.to_string()),
        _ => command.args(["-i", "127.0.0.1", "-p", &port.to_string(), "-u", USER, "-P", PASSWORD]),
    };
    Ok(Some(command))
}

/// Everything a production node has on: login, limits, filters, rules, records, metrics.
fn culvert_config(
    address: SocketAddr,
    driver: &str,
    folder: &Path,
    socket: Option<&Path>,
) -> anyhow::Result<String> {
    let dir = folder.display();
    let node = format!(
        "[node]\nstate_dir = '{dir}'\ndriver = '{driver}'\n[[listener]]\nbind = '{address}'\n\
         [admin]\nbind = 'none'\n\
         [limits]\nsessions_per_address = 100000\nnew_sessions_per_second_per_address = 1000000\n"
    );
    if let Some(socket) = socket {
        return Ok(format!("{node}[control]\nconnect = 'unix:{}'\n", socket.display()));
    }
    let hash = bcrypt::hash(PASSWORD, 10)?;
    Ok(format!(
        "{node}[policy]\nallow_internal = ['127.0.0.0/8']\n\
         [[policy.user]]\nname = '{USER}'\npassword_hash = '{hash}'\n\
         limits = {{ up = '100Gbit/s', down = '100Gbit/s', sessions = 100000, new_sessions_per_second = 1000000, devices = 64 }}\n\
         [[policy.filter]]\ndomain_suffix = ['ads.example']\n\
         [[policy.rule]]\nname = 'perf'\nwhen = {{ user = ['{USER}'], cidr = ['127.0.0.0/8'] }}\n"
    ))
}

/// A control plane whose policy is the same.
fn plane(kind: Kind, users: usize, culvert: &Path, folder: &Path) -> anyhow::Result<Plane> {
    let hash = bcrypt::hash(PASSWORD, 10)?;
    let quota = (kind == Kind::Metered).then_some(1 << 50);
    let conditions = json!({ "user": [USER], "cidr": ["127.0.0.0/8"] }).to_string();
    let others =
        (3..users + 3).map(|id| control::user(id, &format!("user-{id}"), &hash, "user", None));
    let rows = [
        ("users", control::admin()?),
        ("users", control::user(2, USER, &hash, "user", quota)),
        ("settings", json!({ "name": "allow_internal", "value": "[\"127.0.0.0/8\"]" })),
        (
            "url_filters",
            json!({ "id": 1, "action": "deny", "kind": "domain_suffix", "value": "ads.example",
                "ports": "[]", "enabled": true, "comment": "", "created_at": 1 }),
        ),
        (
            "rules",
            json!({ "id": 1, "position": 1, "name": "perf", "enabled": true, "conditions": conditions,
                "action": "allow", "upstream": null, "target": null, "created_at": 1 }),
        ),
    ];
    // Each start is a first one.
    fs::remove_dir_all(folder)?;
    fs::create_dir_all(folder)?;
    let dir = folder.join("control");
    Plane::start(
        &culvert.with_file_name("culvert-control"),
        None,
        &dir,
        &control::backup(rows.into_iter().chain(others.map(|user| ("users", user)))),
    )
}

fn nginx_config(port: u16, target: SocketAddr, folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root;\nworker_processes 2;\n\
         worker_rlimit_nofile 19000;\ndaemon off;\npid {folder}/nginx.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 19000; multi_accept on; }}\nstream {{ access_log off; tcp_nodelay on;\n\
         server {{ listen 127.0.0.1:{port} backlog=4096 reuseport; proxy_connect_timeout 10s; \
         proxy_timeout 1h; proxy_half_close on; proxy_buffer_size 16k; proxy_pass {target}; }} }}\n"
    )
}
