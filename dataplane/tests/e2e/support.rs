//! A running node, targets and clients, with what a test does not care about left out.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use culvert_proto::{Command as SocksCommand, Credentials, Host, Secret, Target, socks5};

/// bcrypt of `secret` with the lowest cost, so that tests do not wait for it.
pub const HASH: &str = "$2b$04$EZC/nS15H.Knlay1RgXGr.HJqNiUp7R2m3MbbZPVmpzmUeaKf/hvO";
pub const PASSWORD: &str = "secret";
/// Longer than anything a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Says that it is over when dropped, also by a panic: whoever goes on until then is waited for.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// How a node is to be started.
pub struct Setup {
    head: String,
    listener: String,
    policy: String,
    wrapper: Vec<String>,
    program: PathBuf,
    state: Vec<(String, Vec<u8>)>,
    bind: String,
}

impl Setup {
    pub fn new() -> Self {
        Self {
            head: String::new(),
            listener: "auth = ['password', 'none']\nprotocols = ['socks5', 'socks4', 'http']\n"
                .into(),
            policy: "[policy]\nallow_internal = ['127.0.0.0/8', '::1/128']\n".into(),
            wrapper: Vec::new(),
            program: env!("CARGO_BIN_EXE_culvert").into(),
            state: Vec::new(),
            bind: "127.0.0.1:0".into(),
        }
    }

    /// Replaces the listener's address.
    pub fn bind(mut self, bind: &str) -> Self {
        self.bind = bind.into();
        self
    }

    /// Adds top-level sections.
    pub fn with(mut self, text: &str) -> Self {
        self.head.push_str(text);
        self.head.push('\n');
        self
    }

    /// Replaces the listener's keys (but its address).
    pub fn listener(mut self, text: &str) -> Self {
        self.listener = format!("{text}\n");
        self
    }

    /// Replaces the policy's own keys.
    pub fn policy(mut self, text: &str) -> Self {
        self.policy = format!("[policy]\n{text}\n");
        self
    }

    /// Adds tables of the policy.
    pub fn and(mut self, text: &str) -> Self {
        self.policy.push_str(text);
        self.policy.push('\n');
        self
    }

    /// Adds a user with the password `secret`.
    pub fn user(self, name: &str, more: &str) -> Self {
        self.and(&format!("[[policy.user]]\nname = '{name}'\npassword_hash = '{HASH}'\n{more}"))
    }

    /// The same, with another hash of the same password.
    pub fn rehashed_user(self, name: &str) -> Self {
        let hash = HASH.replace("$2b$", "$2y$");
        self.and(&format!("[[policy.user]]\nname = '{name}'\npassword_hash = '{hash}'"))
    }

    /// Puts a file into the state directory before the start.
    pub fn state(mut self, name: &str, bytes: &[u8]) -> Self {
        self.state.push((name.to_owned(), bytes.to_vec()));
        self
    }

    /// Runs the node through another program, such as strace.
    pub fn through(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self
    }

    pub fn start(self) -> TestProxy {
        TestProxy::start(self)
    }

    fn text(&self, state: &Path) -> String {
        let bind = &self.bind;
        let driver = std::env::var("TEST_DRIVER").unwrap_or_else(|_| "auto".into());
        let node = if self.head.contains("[node]") { "" } else { "[node]\n" };
        let keys = format!("{node}state_dir = '{}'\ndriver = '{driver}'\n", state.display());
        let head = match self.head.split_once("[node]\n") {
            Some((before, after)) => format!("{before}[node]\n{keys}{after}"),
            None => format!("{keys}{}", self.head),
        };
        let limits = if self.head.contains("[limits]") {
            ""
        } else {
            "[limits]\nsessions_per_address = 100000\nnew_sessions_per_second_per_address = 0\n"
        };
        format!(
            "{head}\n{limits}[admin]\nbind = '127.0.0.1:0'\n[[listener]]\nname = 'main'\nbind = '{bind}'\n\
             {}{}",
            self.listener, self.policy
        )
    }
}

/// A running node; ended by its process id when dropped.
pub struct TestProxy {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub folder: tempfile::TempDir,
    setup: Setup,
    log: Arc<Mutex<Vec<String>>>,
    lines: Mutex<Receiver<String>>,
    records: Mutex<Records>,
}

/// The access records that were read.
#[derive(Default)]
struct Records {
    /// How far, of each file.
    read: HashMap<PathBuf, u64>,
    all: Vec<serde_json::Value>,
}

impl TestProxy {
    fn start(setup: Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("culvert.toml");
        fs::write(&config, setup.text(folder.path())).unwrap();
        for (name, bytes) in &setup.state {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let mut words = setup.wrapper.clone();
        words.push(setup.program.display().to_string());
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .args(["run", "-c"])
            .arg(&config)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (kept, stderr) = (log.clone(), BufReader::new(child.stderr.take().unwrap()));
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line.clone());
                let _ = sender.send(line);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut proxy = Self {
            child,
            address: nowhere,
            admin: nowhere,
            folder,
            setup,
            log,
            lines: Mutex::new(lines),
            records: Mutex::default(),
        };
        let address = |line: &str| {
            let (_, rest) = line.split_once("address=").unwrap();
            rest.split_whitespace().next().unwrap().parse::<SocketAddr>().unwrap()
        };
        proxy.admin = address(&proxy.await_line("metrics and health"));
        proxy.address = address(&proxy.await_line("listening"));
        proxy.await_line("ready");
        proxy
    }

    /// The node's process (behind a wrapper: the wrapper's child).
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    pub fn pid(&self) -> u32 {
        if self.setup.wrapper.is_empty() {
            return self.child.id();
        }
        let parent = self.child.id().to_string();
        let children = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (_, rest) = stat.rsplit_once(") ")?;
            (rest.split_whitespace().nth(1)? == parent).then_some(pid)
        });
        children.into_iter().next().unwrap_or(self.child.id())
    }

    /// Waits for a line of the log.
    pub fn await_line(&mut self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = self.lines.lock().unwrap().recv_timeout(left);
            match next {
                Ok(line) if line.contains(part) => return line,
                Ok(_) => {}
                Err(_) => panic!("no line with {part:?} in the log:\n{}", self.log()),
            }
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Waits for the process to end.
    pub fn await_end(&mut self) -> std::process::ExitStatus {
        await_some("the node's end", || self.child.try_wait().unwrap())
    }

    /// Replaces the policy in the file and waits until it is in force or refused.
    pub fn reload(&mut self, change: impl FnOnce(Setup) -> Setup) -> String {
        let setup = std::mem::replace(&mut self.setup, Setup::new());
        self.setup = change(setup);
        let text = self.setup.text(self.folder.path());
        self.rewrite(&text)
    }

    pub fn rewrite(&mut self, text: &str) -> String {
        let new = self.folder.path().join("new.toml");
        fs::write(&new, text).unwrap();
        fs::rename(&new, self.folder.path().join("culvert.toml")).unwrap();
        let line = self.await_line("configuration ");
        if line.contains("refused") { self.await_line("stays in force") } else { line }
    }

    /// A connection to the proxy.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A tunnel to a target through SOCKS5, as a user or nobody.
    pub fn tunnel(&self, user: Option<&str>, target: SocketAddr) -> TcpStream {
        match self.socks5(user.map(|user| (user, PASSWORD)), &Target::from(target)) {
            Ok(stream) => stream,
            Err(code) => panic!("SOCKS5 reply {code}\n{}", self.log()),
        }
    }

    /// Asks for a target through SOCKS5.
    ///
    /// # Errors
    /// The reply's code, or 255 for a rejected login.
    pub fn socks5(&self, login: Option<(&str, &str)>, target: &Target) -> Result<TcpStream, u8> {
        let mut stream = self.connect();
        let mut answer = [0; 2];
        stream.write_all(&socks5::encode_greeting(login.is_some())).map_err(|_| 254)?;
        stream.read_exact(&mut answer).map_err(|_| 254)?;
        if let Some((user, password)) = login {
            let credentials = Credentials {
                user: user.as_bytes().into(),
                password: Secret::new(password.as_bytes()),
            };
            stream.write_all(&socks5::encode_login(&credentials).unwrap()).map_err(|_| 254)?;
            stream.read_exact(&mut answer).map_err(|_| 254)?;
            if answer[1] != 0 {
                return Err(255);
            }
        }
        stream
            .write_all(&socks5::encode_request(&SocksCommand::Connect, target))
            .map_err(|_| 254)?;
        let mut reply = Vec::new();
        loop {
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(|_| 254)?;
            reply.push(byte[0]);
            match socks5::parse_reply(&reply) {
                Ok(Some(_)) => return Ok(stream),
                Ok(None) => {}
                Err(socks5::ClientError::Refused(code)) => return Err(code),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// One GET of the admin interface: status and body.
    pub fn admin(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// A command to the node, which must be accepted.
    pub fn command(&self, method: &str, path: &str) {
        let socket = self.folder.path().join("admin.sock");
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    }

    /// The value of a metric, given as its line begins; 0 when it is not there.
    pub fn metric(&self, start: &str) -> f64 {
        let text = self.admin("/metrics").1;
        text.lines()
            .find_map(|line| line.strip_prefix(start)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or(0.0)
    }

    /// Waits until a metric has a value.
    pub fn await_metric(&self, start: &str, value: f64) {
        let what = format!("{start} = {value}");
        await_some(&what, || (self.metric(start) == value).then_some(()));
    }

    /// All access records so far.
    pub fn records(&self) -> Vec<serde_json::Value> {
        self.read_records().all.clone()
    }

    /// Reads what has come since.
    fn read_records(&self) -> MutexGuard<'_, Records> {
        let mut records = self.records.lock().unwrap();
        let Records { read, all } = &mut *records;
        for entry in fs::read_dir(self.folder.path()).unwrap().flatten() {
            if !entry.file_name().to_string_lossy().starts_with("access.log") {
                continue;
            }
            let read = read.entry(entry.path()).or_default();
            let mut file = fs::File::open(entry.path()).unwrap();
            file.seek(SeekFrom::Start(*read)).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            // What is being written is no line yet.
            let whole = text.rfind('\n').map_or(0, |end| end + 1);
            *read += whole as u64;
            all.extend(
                text[..whole]
                    .lines()
                    .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()),
            );
        }
        records
    }

    /// Waits until there are so many access records.
    pub fn await_records(&self, count: usize) -> Vec<serde_json::Value> {
        await_some("access records", || (self.read_records().all.len() >= count).then_some(()));
        self.records()
    }

    /// Waits for a record, by its number.
    pub fn await_record(&self, number: usize) -> serde_json::Value {
        await_some("an access record", || self.read_records().all.get(number).cloned())
    }

    /// Open descriptors of the node.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Resident memory of the node in bytes.
    pub fn memory(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The most memory that was ever resident, in bytes.
    pub fn most_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let (_, most) = status.split_once("VmHWM:").unwrap();
        most.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    /// CPU time of the node.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for TestProxy {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the node's log:\n{}", self.log());
        }
        let pid = self.pid().to_string();
        let _ = Command::new("kill").args(["-9", &pid]).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls a condition that nothing announces (a file, a counter of another process).
#[allow(clippy::disallowed_methods)]
pub fn await_some<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A time that is part of what a test is about, such as a peer's silence.
#[allow(clippy::disallowed_methods)]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

/// A target that serves each connection on a thread.
pub fn target(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    target_on("127.0.0.1:0", serve)
}

pub fn target_on(bind: &str, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind(bind).unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            stream.set_nodelay(true).unwrap();
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// A target that sends back what it gets.
pub fn echo() -> SocketAddr {
    target(|mut stream| {
        let mut other = stream.try_clone().unwrap();
        let _ = std::io::copy(&mut stream, &mut other);
        let _ = other.shutdown(std::net::Shutdown::Write);
    })
}

/// One message there and back.
pub fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// A port nobody listens on, and nobody else is given.
pub fn closed_port() -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    std::mem::forget(socket);
    address
}

/// A target by name.
pub fn named(name: &str, port: u16) -> Target {
    Target { host: Host::parse(name.as_bytes()).unwrap(), port }
}

/// A socket whose close is a reset.
pub fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// How many rounds of a test that proves more the longer it runs: many in a soak.
pub fn rounds(few: usize, many: usize) -> usize {
    if is_soak() { many } else { few }
}

/// Whether there is time, and a quiet machine.
pub fn is_soak() -> bool {
    std::env::var_os("SOAK").is_some()
}

/// So many tunnels, each with the target's end.
pub fn pairs(proxy: &TestProxy, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    let pair = |_| (proxy.tunnel(None, target), listener.accept().unwrap().0);
    (0..count).map(pair).collect()
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}
