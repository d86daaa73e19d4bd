//! Running planes, an HTTP client and a SOCKS5 client, with what a test does not care about left out.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// Longer than anything a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const PASSWORD: &str = "a secret of somebody";

/// Lets time pass where there is no event to wait for.
#[allow(clippy::disallowed_methods)]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

/// Waits until there is something.
pub fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what}");
        pause(Duration::from_millis(10));
    }
}

/// Says that it is over when dropped, also by a panic: whoever goes on until then is waited for.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// A program that runs; killed when dropped.
pub struct Program {
    child: Child,
    lines: Mutex<Receiver<String>>,
}

impl Program {
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines: Mutex::new(lines) }
    }

    /// Waits for a line of the log; gives the address in it.
    pub fn await_line(&self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.lock().unwrap().recv_timeout(left) {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no line with {part:?} in the log:\n{}", seen.join("\n")),
            }
        }
    }

    /// What the log has said that nobody has waited for.
    pub fn lines(&self) -> String {
        self.lines.lock().unwrap().try_iter().collect::<Vec<_>>().join("\n")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself, with an error.
    pub fn await_failure(&mut self) {
        let status = await_some("end of the program", || self.child.try_wait().unwrap());
        assert!(!status.success());
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    pub fn terminate(&mut self) {
        self.signal("TERM");
        await_some("end of the program", || self.child.try_wait().unwrap());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn address_of(line: &str, key: &str) -> SocketAddr {
    let (_, rest) = line.split_once(key).unwrap();
    let word = rest.split_whitespace().next().unwrap();
    word.parse().unwrap()
}

/// A control plane and nodes that follow it.
pub struct Planes {
    pub folder: tempfile::TempDir,
    pub control: Program,
    pub api: SocketAddr,
    /// Where nodes of other hosts connect.
    pub link: SocketAddr,
    pub token: String,
    database: Option<String>,
    /// Of all programs.
    environment: Vec<(&'static str, String)>,
}

/// A node.
pub struct Node {
    pub program: Program,
    pub proxy: SocketAddr,
    pub dir: PathBuf,
    name: String,
}

/// Runs a test on every database there is.
pub fn on_each(test: impl Fn(Planes)) {
    test(Planes::start(None));
    on_server(|url, _| test(Planes::start(Some(url))));
}

/// Runs a test on the database server, if there is one: with the address of a database of its own, and
/// the server's socket.
pub fn on_server(test: impl FnOnce(String, &str)) {
    if let Some((url, socket)) = new_database() {
        test(url, &socket);
    }
}

/// How many rounds of a test that proves more the longer it runs: many in a soak.
pub fn rounds(few: usize, many: usize) -> usize {
    if is_soak() { many } else { few }
}

/// Whether there is time, and a quiet machine.
pub fn is_soak() -> bool {
    std::env::var_os("SOAK").is_some()
}

/// Runs a test on a database server of its own, whose settings it may change, if there is one at all.
pub fn on_own_server(options: &str, test: impl Fn(&str, &str)) {
    if std::env::var("TEST_MYSQL").is_err() {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/mariadb");
    let mut server = Command::new(script)
        .env("MARIADB_OPTIONS", options)
        .args(["sh", "-c", "echo \"$TEST_MYSQL\"; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut url = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut url).unwrap();
    let url = url.trim();
    let (_, socket) = url.split_once("socket=").unwrap();
    let tested = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(url, socket)));
    // It ends with its input.
    drop(server.stdin.take());
    server.wait().unwrap();
    if let Err(panic) = tested {
        std::panic::resume_unwind(panic);
    }
}

/// The address of a new database on the server, and the server's socket, if there is a server.
fn new_database() -> Option<(String, String)> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let server = std::env::var("TEST_MYSQL").ok()?;
    let name = format!("t{}_{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use sea_orm::ConnectionTrait;
        let db = sea_orm::Database::connect(&server).await.unwrap();
        db.execute_unprepared(&format!("CREATE DATABASE {name}")).await.unwrap();
    });
    let (_, socket) = server.split_once("socket=").unwrap();
    Some((server.replace("/culvert?", &format!("/{name}?")), socket.to_owned()))
}

/// A way to the database that can be cut.
pub struct Gate {
    pub path: PathBuf,
    open: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Gate {
    pub fn before(socket: &str, folder: &Path) -> Self {
        let path = folder.join("gate");
        let listener = UnixListener::bind(&path).unwrap();
        let (open, streams) = (Arc::new(AtomicBool::new(true)), Arc::<Mutex<Vec<_>>>::default());
        let (is_open, kept, socket) = (open.clone(), streams.clone(), socket.to_owned());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if !is_open.load(Relaxed) {
                    continue;
                }
                let server = UnixStream::connect(&socket).unwrap();
                let mut kept = kept.lock().unwrap();
                // It may have been closed just now.
                if !is_open.load(Relaxed) {
                    continue;
                }
                let pairs = [(&client, &server), (&server, &client)];
                for (from, to) in pairs {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                kept.extend([client, server]);
            }
        });
        Self { path, open, streams }
    }

    pub fn close(&self) {
        self.open.store(false, Relaxed);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn open(&self) {
        self.open.store(true, Relaxed);
    }
}

impl Planes {
    pub fn start(database: Option<String>) -> Self {
        let planes = Self::start_with(database, "");
        let token = planes.login("admin", &planes.admin_password()).unwrap();
        Self { token, ..planes }
    }

    /// Starts with more keys of the server; nobody is logged in.
    pub fn start_with(database: Option<String>, server: &str) -> Self {
        Self::start_as(database, server, Vec::new())
    }

    /// The same, in an environment.
    pub fn start_as(
        database: Option<String>,
        server: &str,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::configure(folder.path(), database.as_deref(), server);
        let (control, [api, link]) = Self::start_control(folder.path(), &environment);
        Self { folder, control, api, link, token: String::new(), database, environment }
    }

    /// Starts one whose state directory is a disk of so many bytes of its own, at the same path.
    pub fn start_on_disk(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("control");
        fs::create_dir(&dir).unwrap();
        Self::configure(folder.path(), None, "");
        let mut command = on_disk(&dir, bytes, Path::new(env!("CARGO_BIN_EXE_culvert-control")));
        let (control, [api, link]) =
            Self::listening(Program::spawn(command.args(Self::serve(folder.path()))));
        let (token, environment) = (String::new(), Vec::new());
        let planes = Self { folder, control, api, link, token, database: None, environment };
        let password = fs::read_to_string(planes.on_disk("initial-admin")).unwrap();
        let token = planes.login("admin", password.trim().split(' ').nth(1).unwrap()).unwrap();
        Self { token, ..planes }
    }

    /// A file of the state directory as the control plane sees it.
    pub fn on_disk(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join("control").join(name);
        PathBuf::from(format!("/proc/{}/root{}", self.control.id(), path.display()))
    }

    /// Whether its database is a server's.
    pub fn has_server(&self) -> bool {
        self.database.is_some()
    }

    pub fn admin_password(&self) -> String {
        let password = fs::read_to_string(self.state().join("initial-admin")).unwrap();
        password.trim().split(' ').nth(1).unwrap().to_owned()
    }

    fn configure(folder: &Path, database: Option<&str>, server: &str) {
        let config = folder.join("control.toml");
        let url = database.map_or(String::new(), |url| format!("[database]\nurl = '{url}'\n"));
        let dir = folder.join("control");
        let text = format!(
            "[server]\nbind = '127.0.0.1:0'\n{server}[link]\nbind = '127.0.0.1:0'\n[state]\ndir = '{}'\n{url}",
            dir.display()
        );
        fs::write(&config, text).unwrap();
    }

    fn start_control(
        folder: &Path,
        environment: &[(&'static str, String)],
    ) -> (Program, [SocketAddr; 2]) {
        let mut program = Command::new(env!("CARGO_BIN_EXE_culvert-control"));
        program.args(Self::serve(folder)).envs(environment.iter().cloned());
        Self::listening(Program::spawn(&mut program))
    }

    fn serve(folder: &Path) -> [String; 3] {
        let config = folder.join("control.toml").to_str().unwrap().to_owned();
        ["serve".to_owned(), "-c".to_owned(), config]
    }

    /// Starts the control plane again, whether or not it can serve.
    pub fn restart_unready(&mut self) {
        let mut program = Command::new(env!("CARGO_BIN_EXE_culvert-control"));
        self.control = Program::spawn(program.args(Self::serve(self.folder.path())));
    }

    /// Waits until the control plane serves.
    pub fn await_listening(&mut self) {
        let line = self.control.await_line("listening");
        [self.api, self.link] = ["address=", "nodes="].map(|key| address_of(&line, key));
    }

    fn listening(control: Program) -> (Program, [SocketAddr; 2]) {
        let line = control.await_line("listening");
        let addresses = ["address=", "nodes="].map(|key| address_of(&line, key));
        (control, addresses)
    }

    /// A second control plane on the same database, with a state directory of its own.
    pub fn second(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("control");
        fs::create_dir_all(&dir).unwrap();
        // The control planes of one database share these keys.
        for key in ["jwt.key", "seal.key", "link-authority.key"] {
            fs::copy(self.folder.path().join("control").join(key), dir.join(key)).unwrap();
        }
        Self::configure(folder.path(), self.database.as_deref(), "");
        let environment = self.environment.clone();
        let (control, [api, link]) = Self::start_control(folder.path(), &environment);
        let (token, database) = (self.token.clone(), self.database.clone());
        Self { folder, control, api, link, token, database, environment }
    }

    /// Runs a command of the control plane; whether it succeeded, and what it said.
    pub fn command(&self, words: &[&str], input: &str) -> (bool, String) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_culvert-control"))
            .args(words)
            .arg("-c")
            .arg(self.folder.path().join("control.toml"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        let writer = thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().unwrap();
        let _ = writer.join().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// Goes on with an empty database: of the other kind, if there is a server.
    pub fn forget_database(&mut self) {
        let dir = self.folder.path().join("control");
        for file in fs::read_dir(dir).unwrap().flatten() {
            if file.file_name().to_string_lossy().starts_with("culvert.db") {
                fs::remove_file(file.path()).unwrap();
            }
        }
        let mut other = None;
        if self.database.take().is_none() {
            other = new_database().map(|(url, _)| url);
        }
        self.database = other;
        let url = self
            .database
            .as_ref()
            .map_or(String::new(), |url| format!("[database]\nurl = '{url}'\n"));
        let config = self.folder.path().join("control.toml");
        let text = fs::read_to_string(&config).unwrap();
        let head = text.split("[database]").next().unwrap();
        fs::write(&config, format!("{head}{url}")).unwrap();
    }

    pub fn restart_control(&mut self) {
        let (control, [api, link]) = Self::start_control(self.folder.path(), &self.environment);
        (self.control, self.api, self.link) = (control, api, link);
    }

    /// Starts a node that follows, and waits until it does.
    pub fn node(&self, name: &str) -> Node {
        let node = self.node_alone(name);
        node.program.await_line("policy followed");
        node
    }

    /// Starts a node whether or not there is somebody to follow.
    pub fn node_alone(&self, name: &str) -> Node {
        let socket = self.folder.path().join("control/control.sock");
        self.node_by(name, &format!("connect = 'unix:{}'", socket.display()))
    }

    /// Starts a node as if it were on another host, with an identity.
    pub fn node_afar(&self, name: &str, identity: &str) -> Node {
        let file = self.folder.path().join(format!("{name}.pem"));
        fs::write(&file, identity).unwrap();
        let (link, file) = (self.link, file.display());
        self.node_by(name, &format!("connect = 'tls://{link}'\nidentity = '{file}'"))
    }

    /// Starts a node with the keys of its `[control]`.
    pub fn node_by(&self, name: &str, control: &str) -> Node {
        self.node_of(name, name, "1s", control, Command::new)
    }

    /// Starts a node whose state directory is a disk of so many bytes of its own.
    pub fn node_on_disk(&self, name: &str, bytes: usize) -> Node {
        let dir = self.folder.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        let control = format!("connect = 'unix:{}'", self.state().join("control.sock").display());
        let mut node =
            self.node_of(name, name, "1s", &control, |program| on_disk(&dir, bytes, program));
        node.dir = PathBuf::from(format!("/proc/{}/root{}", node.program.id(), dir.display()));
        node.program.await_line("policy followed");
        node
    }

    /// Starts another boot of a node, beside the one that runs, which both take long to drain.
    pub fn boot(&self, name: &str, number: u32) -> Node {
        let socket = self.folder.path().join("control/control.sock");
        let control = format!("connect = 'unix:{}'", socket.display());
        let node = self.node_of(&format!("{name}-{number}"), name, "30s", &control, Command::new);
        node.program.await_line("policy followed");
        node
    }

    fn node_of(
        &self,
        folder: &str,
        name: &str,
        drain: &str,
        control: &str,
        command: impl FnOnce(PathBuf) -> Command,
    ) -> Node {
        let dir = self.folder.path().join(folder);
        let config = self.folder.path().join(format!("{folder}.toml"));
        let text = format!(
            "[node]\nname = '{name}'\nstate_dir = '{}'\n[[listener]]\nbind = '127.0.0.1:0'\n\
             [admin]\nbind = 'none'\n[timeouts]\ndrain = '{drain}'\n\
             [limits]\nsessions_per_address = 100000\nnew_sessions_per_second_per_address = 0\n\
             [auth]\nfailures_per_address = 0\nfailures_per_user = 0\n\
             [control]\n{control}\n",
            dir.display(),
        );
        fs::write(&config, text).unwrap();
        let control = Path::new(env!("CARGO_BIN_EXE_culvert-control"));
        let path = control.with_file_name("culvert");
        assert!(path.exists(), "build the data plane first: cargo build -p culvert");
        let mut program = command(path);
        program.args(["run", "-c", config.to_str().unwrap()]).envs(self.environment.clone());
        let program = Program::spawn(&mut program);
        let proxy = address_of(&program.await_line("listening"), "address=");
        Node { program, proxy, dir, name: name.to_owned() }
    }

    /// Starts a node again that has ended.
    pub fn again(&self, node: &mut Node) {
        *node = self.node_alone(&node.name.clone());
    }

    /// The control plane's state directory.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// Another token of the first admin.
    pub fn login_admin(&self) -> String {
        self.login("admin", &self.admin_password()).unwrap()
    }

    pub fn login(&self, user: &str, password: &str) -> Result<String, u16> {
        let body = json!({ "username": user, "password": password });
        let (status, answer) = self.ask_as("", "POST", "/auth/login", Some(&body));
        match status {
            200 => Ok(answer["access_token"].as_str().unwrap().to_owned()),
            status => Err(status),
        }
    }

    /// One request of the admin.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.ask_as(&self.token, method, path, body)
    }

    /// The same, which must succeed.
    pub fn must(&self, method: &str, path: &str, body: Value) -> Value {
        let body = (!body.is_null()).then_some(&body);
        let (status, answer) = self.ask(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    pub fn ask_as(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, Value) {
        let path = format!("/api/v1{path}");
        let (status, text) = self.raw(token, method, &path, body.map(Value::to_string).as_deref());
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Posts CSV as the admin.
    pub fn import(&self, path: &str, text: &str) -> (u16, String) {
        self.send(&self.token, "POST", path, Some(("text/csv", text)))
    }

    pub fn raw(&self, token: &str, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        self.send(token, method, path, body.map(|body| ("application/json", body)))
    }

    fn send(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<(&str, &str)>,
    ) -> (u16, String) {
        let mut stream = TcpStream::connect(self.api).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let login = if token.is_empty() {
            String::new()
        } else {
            format!("Authorization: Bearer {token}\r\n")
        };
        let body = body.map_or(String::new(), |(kind, body)| {
            format!("Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        });
        let end = if body.is_empty() { "\r\n" } else { "" };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: culvert\r\nConnection: close\r\n{login}{body}{end}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        (status, if chunked { unchunk(body) } else { body.to_owned() })
    }

    /// All rows of a list, page after page.
    pub fn all(&self, path: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        for page in 1.. {
            let part = self.must("GET", &format!("{path}&page={page}&page_size=500"), Value::Null);
            rows.extend(part["items"].as_array().unwrap().iter().cloned());
            if rows.len() as u64 >= part["total"].as_u64().unwrap() {
                break;
            }
        }
        rows
    }

    /// Has the database do something.
    pub fn sql(&self, text: &str) {
        let sqlite = self.state().join("culvert.db");
        let sqlite = format!("sqlite://{}", sqlite.display());
        let url = self.database.as_deref().unwrap_or(&sqlite);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use sea_orm::ConnectionTrait;
            let db = sea_orm::Database::connect(url).await.unwrap();
            db.execute_unprepared(text).await.unwrap();
        });
    }

    /// Makes a user with the usual password, who may use the loopback; gives the number.
    pub fn user(&self, name: &str, more: Value) -> String {
        self.must("PATCH", "/settings", json!({ "allow_internal": ["127.0.0.0/8"] }));
        let mut body = json!({ "name": name, "password": PASSWORD });
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        self.must("POST", "/users", body)["id"].as_str().unwrap().to_owned()
    }

    /// What a user has moved, both ways.
    pub fn used(&self, id: &str) -> u64 {
        let usage = self.must("GET", &format!("/users/{id}/usage"), Value::Null);
        usage["up"].as_u64().unwrap() + usage["down"].as_u64().unwrap()
    }
}

/// What runs a program for which a folder is a disk of so many bytes of its own.
fn on_disk(dir: &Path, bytes: usize, program: impl AsRef<Path>) -> Command {
    let mount = format!("mount -t tmpfs -o size={bytes} none {}", dir.display());
    let mut command = Command::new("unshare");
    command.args(["-r", "-m", "sh", "-c", &format!("{mount} && exec \"$0\" \"$@\"")]);
    command.arg(program.as_ref());
    command
}

fn unchunk(mut text: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        whole.push_str(&rest[..size]);
        text = &rest[size + 2..];
    }
    whole
}

impl Node {
    /// The value of a metric, given as its line begins; 0 when it is not there.
    pub fn metric(&self, start: &str) -> f64 {
        let mut stream = UnixStream::connect(self.dir.join("admin.sock")).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let value = |line: &str| line.strip_prefix(start)?.strip_prefix(' ')?.parse().ok();
        answer.lines().find_map(value).unwrap_or(0.0)
    }

    /// All access records so far, as lines.
    pub fn access_log(&self) -> String {
        let files = fs::read_dir(&self.dir).unwrap().flatten();
        let logs =
            files.filter(|file| file.file_name().to_string_lossy().starts_with("access.log"));
        logs.map(|file| fs::read_to_string(file.path()).unwrap()).collect()
    }

    /// A tunnel to a target.
    ///
    /// # Errors
    /// The reply's code, 255 for a rejected login, 254 for a lost connection.
    pub fn tunnel(&self, user: &str, target: SocketAddr) -> Result<TcpStream, u8> {
        self.tunnel_with(user, PASSWORD, target)
    }

    pub fn tunnel_with(
        &self,
        user: &str,
        password: &str,
        target: SocketAddr,
    ) -> Result<TcpStream, u8> {
        let lost = |_| 254;
        let mut stream = TcpStream::connect(self.proxy).map_err(lost)?;
        stream.set_nodelay(true).map_err(lost)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
        let mut login = vec![5, 1, 2, 1, user.len() as u8];
        login.extend_from_slice(user.as_bytes());
        login.push(password.len() as u8);
        login.extend_from_slice(password.as_bytes());
        stream.write_all(&login).map_err(lost)?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).map_err(lost)?;
        if answer[3] != 0 {
            return Err(255);
        }
        let mut request = vec![5, 1, 0, 1, 127, 0, 0, 1];
        request.extend_from_slice(&target.port().to_be_bytes());
        stream.write_all(&request).map_err(lost)?;
        let mut reply = [0; 10];
        stream.read_exact(&mut reply).map_err(lost)?;
        if reply[1] == 0 { Ok(stream) } else { Err(reply[1]) }
    }
}

/// A target that sends back what it gets.
pub fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

/// A web server whose every page is so many sevens.
pub fn web(bytes: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while let Some(Ok(line)) = lines.next() {
                    if line.is_empty() {
                        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n");
                        let _ = stream.write_all(&[head.as_bytes(), &vec![7; bytes]].concat());
                    }
                }
            });
        }
    });
    address
}

/// Waits until a session is over, whether in order or by a reset.
pub fn await_cut(stream: &mut TcpStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("not cut: {other:?}"),
    }
}

/// One message there and back.
pub fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)
}
