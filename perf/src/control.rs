//! The control plane's figures: how fast an edit reaches many nodes, what a first subscription costs, and
//! records into the database beside a bare INSERT of the same rows.

use std::{
    convert::Infallible,
    fmt::Write as _,
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use culvert_api::link::{self, Down, Up, down, up};
use serde_json::{Value, json};
use tokio::{net::UnixStream, sync::mpsc};

/// Users of a control plane, and of the swap scenario.
pub(crate) const USERS: usize = 100_000;
const NODES: usize = 200;
/// How often a node tells how it is, and which sessions run.
const HEARTBEAT: Duration = Duration::from_secs(5);
const PASSWORD: &str = "a long password";
/// Records of one round, and of one message.
const RECORDS: u64 = 20_000;
const PART: u64 = 500;

type Peer = culvert_link::Peer<Down, Up>;

/// Measures and prints.
pub(crate) fn run(
    program: &Path,
    database: Option<&str>,
    rounds: usize,
    folder: &Path,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let plane = Plane::start(program, database, &folder.join("control"), &users()?)?;
    println!("control: {USERS} users, {}", if database.is_some() { "MariaDB" } else { "SQLite" });
    let token = plane.login()?;
    runtime.block_on(async {
        plane.subscriptions(&token, rounds).await?;
        plane.edits(&token, rounds).await?;
        plane.ingest(database, rounds).await
    })
}

/// A running control plane.
pub(crate) struct Plane {
    child: Child,
    api: SocketAddr,
    folder: PathBuf,
}

impl Drop for Plane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Plane {
    /// Starts one with what a backup says.
    pub(crate) fn start(
        program: &Path,
        database: Option<&str>,
        folder: &Path,
        backup: &str,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let api = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let command = |word: &str| {
            let mut command = Command::new(program);
            command
                .arg(word)
                .env("CULVERT_CTL_STATE_DIR", folder)
                .env("CULVERT_CTL_SERVER_BIND", api.to_string())
                .env("CULVERT_CTL_LOG_LEVEL", "warn")
                .env("CULVERT_CTL_DATABASE_URL", database.unwrap_or_default());
            command
        };
        let mut restore = command("restore").stdin(Stdio::piped()).spawn()?;
        let mut input = restore.stdin.take().context("no standard input")?;
        input.write_all(backup.as_bytes())?;
        drop(input);
        ensure!(restore.wait()?.success(), "the users could not be restored");
        let plane = Self { child: command("serve").spawn()?, api, folder: folder.to_owned() };
        let began = Instant::now();
        while !matches!(plane.ask("", "GET", "/readyz", ""), Ok((200, _))) {
            ensure!(began.elapsed() < Duration::from_secs(20), "the control plane does not start");
            std::thread::yield_now();
        }
        Ok(plane)
    }

    /// The socket nodes connect to.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    fn ask(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: &str,
    ) -> anyhow::Result<(u16, Value)> {
        let mut stream = TcpStream::connect(self.api)?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, serde_json::from_str(body).unwrap_or_default()))
    }

    /// A token of the admin.
    pub(crate) fn login(&self) -> anyhow::Result<String> {
        let body = json!({ "username": "admin", "password": PASSWORD }).to_string();
        let (status, answer) = self.ask("", "POST", "/api/v1/auth/login", &body)?;
        ensure!(status == 200, "login: {status} {answer}");
        Ok(answer["access_token"].as_str().context("no token")?.to_owned())
    }

    /// An edit of one user.
    pub(crate) fn edit(&self, token: &str, user: usize) -> anyhow::Result<()> {
        let body = json!({ "comment": format!("edited {:?}", Instant::now()) }).to_string();
        let (status, answer) = self.ask(token, "PATCH", &format!("/api/v1/users/{user}"), &body)?;
        ensure!(status == 200, "edit: {status} {answer}");
        Ok(())
    }

    async fn connect(&self, name: &str, boot: u64) -> anyhow::Result<Peer> {
        let mut peer = Peer::new(UnixStream::connect(self.socket()).await?);
        let hello = link::Hello {
            node: name.to_owned(),
            boot,
            version_min: link::VERSION_MIN,
            version: link::VERSION,
            ..link::Hello::default()
        };
        peer.send(up::Body::Hello(hello)).await?;
        Ok(peer)
    }

    /// A node that has nothing subscribes: until it has all users, and what that takes.
    async fn subscriptions(&self, token: &str, rounds: usize) -> anyhow::Result<()> {
        let (mut times, mut bytes) = (Vec::new(), 0);
        for round in 0..rounds {
            // Nothing is known of the generation from another node.
            self.edit(token, 100 + round)?;
            let began = Instant::now();
            let mut peer = self.connect("cold", round as u64 + 1).await?;
            loop {
                if let Some(down::Body::Snapshot(snapshot)) = peer.receive().await?.body {
                    ensure!(snapshot.users.len() > USERS, "{} users", snapshot.users.len());
                    times.push(began.elapsed().as_secs_f64());
                    bytes = prost::Message::encoded_len(&snapshot);
                    break;
                }
            }
        }
        println!(
            "  first subscription: {:.0} ms (median of {rounds}), {:.0} bytes a user",
            median(&mut times) * 1e3,
            bytes as f64 / USERS as f64
        );
        Ok(())
    }

    /// An edit by the API until the last of many nodes has it.
    async fn edits(&self, token: &str, rounds: usize) -> anyhow::Result<()> {
        let (sender, mut told) = mpsc::unbounded_channel();
        let mut nodes = Vec::new();
        for node in 0..NODES {
            let peer = self.connect(&format!("node {node}"), node as u64 + 1000).await?;
            let sender = sender.clone();
            // Each at a time of its own.
            let first = tokio::time::Instant::now() + HEARTBEAT * node as u32 / NODES as u32;
            let beat = tokio::time::interval_at(first, HEARTBEAT);
            nodes.push(tokio::spawn(async move {
                let Err(error) = simulate(peer, beat, &sender).await;
                let _ = sender.send(Err(error));
            }));
        }
        for _ in 0..NODES {
            told.recv().await.context("no node")??;
        }
        let mut times = Vec::new();
        for round in 0..rounds {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let began = Instant::now();
            self.edit(token, 200 + round)?;
            let answered = began.elapsed();
            let mut last = answered;
            for _ in 0..NODES {
                let at = told.recv().await.context("no news")??;
                last = last.max(at.duration_since(began));
            }
            times.push(last.as_secs_f64());
        }
        let most = times.iter().copied().fold(0.0, f64::max);
        println!(
            "  an edit until {NODES} nodes have it: {:.0} ms (median of {rounds}, at most {:.0})",
            median(&mut times) * 1e3,
            most * 1e3
        );
        nodes.iter().for_each(tokio::task::JoinHandle::abort);
        Ok(())
    }

    /// Records of a node until they are acknowledged, and the same rows by a bare INSERT.
    async fn ingest(&self, database: Option<&str>, rounds: usize) -> anyhow::Result<()> {
        let (mut link, mut bare) = (Vec::new(), Vec::new());
        for round in 0..rounds as u64 {
            let boot = 5_000_000 + round;
            let mut peer = self.connect("busy", boot).await?;
            let began = Instant::now();
            for part in 0..RECORDS / PART {
                let record = |n| link::Record { sequence: n, json: record(n), user: n % 1000 + 2 };
                let first = part * PART + 1;
                let records = (first..first + PART).map(record).collect();
                peer.send(up::Body::Records(link::Records { boot, records })).await?;
            }
            loop {
                if let Some(down::Body::RecordAck(ack)) = peer.receive().await?.body
                    && ack.sequence >= RECORDS
                {
                    break;
                }
            }
            link.push(RECORDS as f64 / began.elapsed().as_secs_f64());
            bare.push(RECORDS as f64 / self.insert(database, boot)?.as_secs_f64());
        }
        let (link, bare) = (median(&mut link), median(&mut bare));
        println!(
            "  records: {link:.0}/s over the link, {bare:.0}/s by a bare INSERT of {PART} rows: {:.2}",
            link / bare
        );
        Ok(())
    }

    /// The same rows, straight into a table of the same shape.
    fn insert(&self, database: Option<&str>, boot: u64) -> anyhow::Result<Duration> {
        let script = self.folder.join("insert.sql");
        let mut sql = String::new();
        if database.is_none() {
            sql.push_str("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;\n");
        }
        for part in 0..RECORDS / PART {
            sql.push_str(
                "INSERT INTO access_logs (node_id, boot, sequence, at, user_id, user_name, client, target, ended, \
                 bytes_up, bytes_down, body) VALUES ",
            );
            let first = part * PART + 1;
            for n in first..first + PART {
                let body = String::from_utf8(record(n))?.replace('\'', "''");
                let comma = if n == first { "" } else { "," };
                write!(
                    sql,
                    "{comma}(0,{boot},{n},{},{},'user {}','192.0.2.7:4711','www.example.com:443','finished',1234,56789,'{body}')",
                    1_795_273_274_000_000u64 + n,
                    n % 1000 + 2,
                    n % 1000
                )?;
            }
            sql.push_str(";\n");
        }
        std::fs::write(&script, sql)?;
        let mut command = match database {
            None => {
                let mut command = Command::new("sqlite3");
                command.arg(self.folder.join("culvert.db"));
                command
            }
            Some(url) => {
                let socket = url.split_once("socket=").context("a url with ?socket=")?.1;
                let name = url.rsplit('/').find(|part| part.contains("?socket=")).unwrap_or(url);
                let name = name.split('?').next().unwrap_or_default();
                let mut command = Command::new("mariadb");
                command.args(["--no-defaults", "-u", "root", "-S", socket, name]);
                command
            }
        };
        let began = Instant::now();
        let status = command.stdin(File::open(&script)?).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "the bare INSERT failed");
        Ok(began.elapsed())
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A node that follows, and tells how it is; when news came is told to `news`.
async fn simulate(
    mut peer: Peer,
    mut beat: tokio::time::Interval,
    news: &mpsc::UnboundedSender<anyhow::Result<Instant>>,
) -> anyhow::Result<Infallible> {
    loop {
        let message = tokio::select! {
            message = peer.receive() => message?.body,
            _ = beat.tick() => {
                peer.send(up::Body::Heartbeat(heartbeat())).await?;
                peer.send(up::Body::Live(live())).await?;
                continue;
            }
        };
        let generation = match message {
            Some(down::Body::Snapshot(snapshot)) => snapshot.generation,
            Some(down::Body::Delta(delta)) => delta.generation,
            _ => continue,
        };
        let _ = news.send(Ok(Instant::now()));
        peer.send(up::Body::Applied(link::Applied { generation })).await?;
    }
}

/// How a node is that serves.
fn heartbeat() -> link::Heartbeat {
    link::Heartbeat { sessions: 1, ready: true, memory: 64 << 20, ..Default::default() }
}

/// One session that runs.
fn live() -> link::Live {
    let json = json!({
        "id": 1, "user": "user 7", "client": "192.0.2.7:4711",
        "target": "www.example.com:443", "protocol": "socks5", "listener": "main",
    });
    let json = json.to_string().into_bytes();
    link::Live { sessions: vec![link::LiveSession { id: 1, user: 9, json }] }
}

/// A record as nodes write it.
fn record(n: u64) -> Vec<u8> {
    json!({
        "time": "2026-11-21T15:01:14.123456Z", "listener": "main", "protocol": "socks5",
        "client": "192.0.2.7:4711", "user": format!("user {}", n % 1000), "target": "www.example.com:443",
        "address": "198.51.100.7:443", "rule": null, "generation": 17, "end": "finished", "stage": "relay",
        "bytes_up": 1234, "bytes_down": 56789, "seconds": 1.25
    })
    .to_string()
    .into_bytes()
}

/// A backup of some rows.
pub(crate) fn backup(rows: impl IntoIterator<Item = (&'static str, Value)>) -> String {
    let head = ("head", json!({ "id": 1, "generation": 1 }));
    let lines = std::iter::once(head).chain(rows);
    let mut text = format!("{}\n", json!({ "culvert": "backup", "format": 1 }));
    for (table, row) in lines {
        text.push_str(&json!({ "table": table, "row": row }).to_string());
        text.push('\n');
    }
    text.push_str(&json!({ "end": true }).to_string());
    text
}

/// A user's row.
pub(crate) fn user(id: usize, name: &str, hash: &str, role: &str, quota: Option<u64>) -> Value {
    json!({
        "id": id, "name": name, "password_hash": hash, "role": role, "status": "active",
        "proxy_access": role == "user", "expires_at": null, "groups": "[\"staff\"]", "sessions": 100_000,
        "new_sessions_per_second": null, "devices": 3, "evict_oldest": false, "source_addresses": "[]",
        "egress_address": null, "quota_bytes": quota, "quota_period": quota.map(|_| "month"),
        "comment": "", "token_epoch": 1, "totp_secret": null, "totp_pending": null, "totp_step": 0,
        "created_at": 1, "updated_at": 1
    })
}

/// The admin's row.
pub(crate) fn admin() -> anyhow::Result<Value> {
    Ok(user(1, "admin", &bcrypt::hash(PASSWORD, 10)?, "admin", None))
}

/// A backup with many users, and an admin.
fn users() -> anyhow::Result<String> {
    let hash = bcrypt::hash(PASSWORD, 10)?;
    let users = (2..=USERS + 1).map(|id| user(id, &format!("user-{id}"), &hash, "user", None));
    Ok(backup(std::iter::once(admin()?).chain(users).map(|user| ("users", user))))
}
