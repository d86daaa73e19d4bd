//! A node: it owns the listening sockets, starts the workers, publishes snapshots and ends in order.
//!
//! It runs on the main thread with a small tokio runtime, which also resolves names and serves metrics
//! and health. The workers never wait for it.

mod explain;
mod reload;
mod state;

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use crossbeam::queue::ArrayQueue;
use culvert_api::{
    Place, Problem,
    policy::{Access, Policy},
};
use culvert_rt::{Driver, Runtime, RuntimeOptions, Sender, bind_listener, mailbox, probe_listener};
use tokio::sync::{Notify, mpsc, oneshot};

pub use reload::Source;
pub(crate) use reload::beside_the_workers;

use crate::{
    config::Config,
    end::Cause,
    ledger::{Bytes, Direction, Map, Region, Wanted},
    link::Follower,
    log::AccessLog,
    policy::{
        Draft, LoginPool, OwnAddresses, Snapshot, Table, Throttles, UserId, UserUse, compile,
    },
    session::LiveInfo,
    settings::Settings,
    telemetry::WorkerCounters,
    upstream::{LOOKUPS_MAX, Resolver},
    worker::{self, MAILBOX, Message, NodePlaces, Parts, RECORDS, Shared},
};

/// Descriptors that are not for sessions: two a lookup; rings, listeners, logs, pipes, headroom.
const DESCRIPTORS_RESERVED: u64 = 2 * LOOKUPS_MAX as u64 + 512;
/// Descriptors a session takes.
const DESCRIPTORS_PER_SESSION: u64 = 2;
/// How long a worker may take to answer before the node is not alive.
const ALIVE: Duration = Duration::from_secs(1);
/// How long a worker may take to tell its sessions, which it does in slices.
const LISTED: Duration = Duration::from_secs(10);
/// Between the end of a drain and the end of the process, for resets to leave and records to be
/// written.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Between two looks for sessions whose address gave way to another.
const EVICTED_PAUSE: Duration = Duration::from_millis(50);
/// How long the control plane may take to acknowledge the last report.
const LAST_REPORT: Duration = Duration::from_secs(3);

/// A running node, as the admin interface and the signals see it.
pub struct Node {
    /// Its name.
    pub name: String,
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// The workers.
    pub workers: Vec<WorkerHandle>,
    /// Where clients connect: name and bound address.
    pub listeners: Vec<(String, SocketAddr)>,
    /// The listening sockets, of which workers have duplicates.
    sockets: Mutex<Vec<OwnedFd>>,
    /// Snapshots refused since the start.
    pub rejected: AtomicU64,
    /// When the present snapshot was published.
    pub published: Mutex<Instant>,
    /// When the node started.
    pub started: Instant,
    /// Access records.
    pub access: AccessLog,
    /// Asks the node to drain.
    pub drain: mpsc::Sender<()>,
    own: OwnAddresses,
    /// As it was at the start, without the policy.
    config: Config,
    /// As they are in the file now.
    present: Mutex<Settings>,
    /// What follows the control plane.
    pub(crate) follower: Option<Arc<Follower>>,
    /// The addresses as configured, where port 0 is still 0.
    binds: Vec<SocketAddr>,
    /// When sessions were last judged, and when the next user of that snapshot expires, in seconds since 1970.
    judged: Mutex<(i64, i64)>,
    ready: AtomicBool,
    drain_timeout: Duration,
    state_dir: Option<PathBuf>,
}

/// The outside of a worker.
pub struct WorkerHandle {
    /// What it counts.
    pub counters: Arc<WorkerCounters>,
    /// What drives it.
    pub driver: Driver,
    /// Its ring, for its fdinfo.
    pub ring_fd: Option<i32>,
    sender: Sender<Message>,
    records: Arc<ArrayQueue<crate::session::Record>>,
}

/// Runs a node until it has drained. `source` is where the configuration came from, to be read again.
///
/// # Errors
/// What keeps the node from starting, with the next step.
pub fn run(config: Config, source: Source) -> anyhow::Result<()> {
    culvert_rt::refuse_huge_pages();
    let logging = crate::log::start(&config.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let signals = reload::Signals::install()?;
        let (drain, drained) = mpsc::channel(1);
        let node = Arc::new(Node::start(&config, drain).await?);
        crate::admin::start(&node, &config).await?;
        let link = node.link().map(tokio::spawn);
        tokio::spawn(node.clone().end_evicted());
        let is_written = reload::serve(&node, source, signals, drained).await?;
        if let (Some(link), Some(follower)) = (link, &node.follower) {
            follower.finish(is_written);
            // What was counted is in the ledger's file, should the control plane be away.
            let _ = tokio::time::timeout(LAST_REPORT, link).await;
        }
        anyhow::Ok(())
    })?;
    // Writes what is left.
    drop(logging);
    // The workers' runtimes must not be dropped with operations in flight; the process simply ends.
    std::process::exit(0);
}

impl Node {
    /// Binds every listener once a worker; returns the sockets by worker, and the addresses.
    fn bind(config: &Config) -> anyhow::Result<(Vec<Vec<OwnedFd>>, Vec<SocketAddr>)> {
        let mut addresses = Vec::new();
        let mut sockets: Vec<Vec<OwnedFd>> = (0..config.workers).map(|_| Vec::new()).collect();
        for listener in &config.listeners {
            let mut bind = listener.bind;
            let failed = |error: std::io::Error| {
                let hint = bind_hint(&error);
                anyhow::anyhow!("listener {}: {}: {error}{hint}", listener.name, listener.bind)
            };
            // Two listeners share a port if one takes IPv4 and the other IPv6.
            let beside = |other: &crate::config::ListenerConfig| {
                other.bind.is_ipv4() && other.bind.port() == bind.port()
            };
            let only_v6 = bind.is_ipv6() && config.listeners.iter().any(beside);
            probe_listener(bind, only_v6).map_err(failed)?;
            for sockets in &mut sockets {
                let fd = bind_listener(bind, only_v6).map_err(failed)?;
                // Port 0 was chosen by the kernel for the first worker; the others share it.
                bind = local_addr(&fd)?;
                sockets.push(fd);
            }
            addresses.push(bind);
        }
        Ok((sockets, addresses))
    }

    /// Binds, compiles, starts the workers, and returns when all of them accept.
    async fn start(config: &Config, drain: mpsc::Sender<()>) -> anyhow::Result<Self> {
        let (sockets, bound) = Self::bind(config)?;
        let own = OwnAddresses {
            listeners: bound.iter().copied().chain(config.admin).collect(),
            local: culvert_rt::local_addresses(),
        };
        let key = state::remember_key(config.state_dir.as_deref())?;
        let boot = boot_number();
        let following = config.control.is_some();
        // A node without a control plane counts for its metrics and records only.
        let dir = config.state_dir.as_deref().filter(|_| following);
        let follower = match (&config.control, dir) {
            (Some(socket), Some(dir)) => {
                Some(Arc::new(Follower::open(socket, dir, &config.name, boot)?))
            }
            _ => None,
        };
        let kept = follower.as_ref().and_then(|follower| follower.policy());
        let compiled = |policy: &Policy| {
            compile(Draft::Whole(policy), config.settings.clone(), own.clone(), 1, None)
        };
        let mut snapshot = match compiled(kept.as_ref().unwrap_or(&config.policy)) {
            Ok(snapshot) => snapshot,
            Err(problems) => {
                let problems = crate::log::problems(&problems);
                let Some(follower) = &follower else { anyhow::bail!(problems) };
                // Another version's copy must not keep this one from asking for a good policy.
                tracing::error!(%problems, "the copy of the policy is of no use; nobody may log in");
                follower.forget();
                let empty = compiled(&Policy { default: Access::Deny, ..Policy::default() });
                empty.map_err(|problems| anyhow::anyhow!("{}", crate::log::problems(&problems)))?
            }
        };
        drop(kept);
        if let Some(follower) = &follower {
            snapshot.version = follower.generation.load(Relaxed);
        }
        // Sessions of all kinds, and records that are not written yet.
        let slots = sessions_max(None) + SLOTS_SPARE + RECORDS;
        let map = Map::new(dir, boot, config.workers, slots).map_err(|error| {
            let what = dir.map_or("memory".into(), |dir| dir.display().to_string());
            anyhow::anyhow!("{what}: no room for the ledger: {error}")
        })?;
        let places = NodePlaces::new(sessions_max(config.sessions));
        let everyone = Arc::new(UserUse::new(UserId(0)));
        everyone.apply(&config.settings.node);
        let shared = Arc::new(Shared {
            everyone,
            wanted: Wanted::default(),
            snapshot: ArcSwap::from_pointee(snapshot),
            // A reload may allow more sessions than there are now.
            addresses: Arc::new(Table::new(places.max().max(ADDRESSES))),
            places,
            throttles: Throttles::new(),
            logins: LoginPool::start(culvert_rt::available_cores().len(), key)?,
            resolver: Resolver::start(&config.resolver)?,
            evicted: Notify::new(),
            draining: AtomicBool::new(false),
        });
        state::recall(&shared.snapshot.load(), config.state_dir.as_deref());
        let mut workers = Vec::new();
        for (index, sockets) in sockets.iter().enumerate() {
            let sockets = sockets.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
            let region = map.region(index);
            workers.push(start_worker(index, config, &shared, sockets, region).await?);
        }
        warn_of_fallback(&workers);
        let queues = workers.iter().map(|worker| worker.records.clone()).collect();
        let named = config.listeners.iter().map(|listener| listener.name.clone());
        Ok(Self {
            name: config.name.clone(),
            config: Config { policy: Policy::default(), ..config.clone() },
            access: AccessLog::start(
                &config.log,
                queues,
                follower.as_ref().map(|follower| follower.spool.clone()),
            )?,
            present: Mutex::new(config.settings.clone()),
            follower,
            listeners: named.zip(bound).collect(),
            sockets: Mutex::new(sockets.into_iter().flatten().collect()),
            rejected: AtomicU64::new(0),
            published: Mutex::new(Instant::now()),
            started: Instant::now(),
            own,
            binds: config.listeners.iter().map(|listener| listener.bind).collect(),
            judged: Mutex::new((worker::unix_now(), 0)),
            drain,
            ready: AtomicBool::new(true),
            drain_timeout: config.drain,
            state_dir: config.state_dir.clone(),
            workers,
            shared,
        })
    }

    fn announce(&self) {
        for (name, address) in &self.listeners {
            tracing::info!(listener = %name, %address, "listening");
        }
        let driver = self.workers.first().map_or("none", |worker| worker.driver.name());
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            workers = self.workers.len(),
            driver,
            sessions_max = self.shared.places.max(),
            "ready"
        );
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    }

    /// Compiles a policy beside the present one and publishes it; on any problem nothing changes.
    ///
    /// # Errors
    /// All problems.
    pub fn publish(&self, config: &Config) -> Result<u64, Vec<Problem>> {
        let published = self.same_listeners(config).and_then(|()| {
            for key in self.config.restart_keys(config) {
                tracing::warn!(key, "changed; takes effect at the next start");
            }
            let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            // Who is followed is a matter of the next start; until then the policy stays.
            let draft = match self.follower.is_some() || config.control.is_some() {
                true => Draft::SAME,
                false => Draft::Whole(&config.policy),
            };
            let generation = self.put(draft, None, &config.settings)?;
            self.shared.places.set_max(sessions_max(config.sessions));
            *present = config.settings.clone();
            Ok(generation)
        });
        published.inspect_err(|_| {
            self.rejected.fetch_add(1, Relaxed);
        })
    }

    /// Puts the control plane's policy, of its generation `version`, in force with the settings of the file.
    ///
    /// # Errors
    /// All problems; the policy before stays.
    pub fn follow(&self, draft: Draft<'_>, version: u64) -> Result<u64, Vec<Problem>> {
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        self.put(draft, Some(version), &present)
    }

    fn put(
        &self,
        draft: Draft<'_>,
        version: Option<u64>,
        settings: &Settings,
    ) -> Result<u64, Vec<Problem>> {
        let previous = self.shared.snapshot.load_full();
        let generation = previous.generation + 1;
        // The host may have got further addresses since.
        let local = culvert_rt::local_addresses();
        let compiled = compile(
            draft,
            settings.clone(),
            OwnAddresses { local, ..self.own.clone() },
            generation,
            Some(&previous),
        );
        let mut snapshot = compiled?;
        if self.follower.is_some() {
            snapshot.version = version.unwrap_or(previous.version);
        }
        // Sorted here, not where the main thread may wait for it.
        snapshot.directory.next_expiry(worker::unix_now());
        self.shared.everyone.apply(&settings.node);
        self.shared.snapshot.store(Arc::new(snapshot));
        if let Ok(mut published) = self.published.lock() {
            *published = Instant::now();
        }
        self.judge();
        tokio::spawn(retire(previous));
        Ok(generation)
    }

    /// A listener's address cannot change while the node runs; all else of it can.
    fn same_listeners(&self, config: &Config) -> Result<(), Vec<Problem>> {
        let binds: Vec<SocketAddr> =
            config.listeners.iter().map(|listener| listener.bind).collect();
        if binds == self.binds {
            return Ok(());
        }
        let message = "addresses of listeners changed; restart the node for that";
        Err(vec![Problem::new(Place::Nowhere, "listener", message)])
    }

    /// Has all sessions judged again.
    pub fn judge(&self) {
        {
            // Who comes later has seen no earlier snapshot.
            let mut judged = self.judged.lock().unwrap_or_else(PoisonError::into_inner);
            let now = worker::unix_now();
            let next = self.shared.snapshot.load().directory.next_expiry(now);
            *judged = (now, next.unwrap_or(i64::MAX));
        }
        self.tell(|| Message::Judge);
    }

    /// Has all sessions judged again if a user has expired since, or the clock was set back.
    pub fn judge_expired(&self) {
        let now = worker::unix_now();
        let (judged, next) = *self.judged.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= next || now < judged {
            self.judge();
        }
    }

    /// Whether the node takes sessions.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Relaxed)
    }

    /// Whether every worker answers within a second.
    pub async fn is_alive(&self) -> bool {
        for answer in self.ask(Message::Ping) {
            if !matches!(tokio::time::timeout(ALIVE, answer).await, Ok(Ok(()))) {
                return false;
            }
        }
        true
    }

    /// What follows the control plane, if one is followed.
    fn link(self: &Arc<Self>) -> Option<impl Future<Output = ()> + Send + 'static> {
        let follower = self.follower.clone()?;
        let node = self.clone();
        Some(async move { follower.run(node).await })
    }

    /// What users have moved since the start, of those for whom it may have changed since the last
    /// call: each worker's own sum, and whether every worker told.
    pub async fn totals(&self) -> (Vec<(usize, Vec<(u64, Bytes)>)>, bool) {
        let (mut totals, mut whole) = (Vec::new(), true);
        for (worker, answer) in self.ask(Message::Totals).into_iter().enumerate() {
            match tokio::time::timeout(ALIVE, answer).await {
                Ok(Ok(sums)) => totals.push((worker, sums)),
                _ => whole = false,
            }
        }
        (totals, whole)
    }

    /// Has every worker take from users' leases what it moved before they began.
    pub async fn settle(&self, users: Arc<[u64]>) {
        for answer in self.ask(|reply| Message::Settle(users.clone(), reply)) {
            // One that does not answer takes it with the user's next byte.
            let _ = tokio::time::timeout(ALIVE, answer).await;
        }
    }

    /// Ends the sessions of client addresses that gave way to another of their user, as they do.
    async fn end_evicted(self: Arc<Self>) {
        loop {
            self.shared.evicted.notified().await;
            self.tell(|| Message::EndEvicted);
            // Two devices of one user may take each other's place without end.
            tokio::time::sleep(EVICTED_PAUSE).await;
        }
    }

    /// Ends all sessions of a user.
    pub fn end_user(&self, user: u64) {
        self.tell(|| Message::EndUser(user, Cause::Kicked));
    }

    /// Bytes moved since the start, to targets and to clients.
    pub fn bytes(&self) -> Bytes {
        Direction::ALL.map(|direction| {
            self.workers.iter().map(|worker| worker.counters.bytes[direction as usize].get()).sum()
        })
    }

    /// All running sessions.
    pub async fn sessions(&self) -> Vec<LiveInfo> {
        let mut sessions = Vec::new();
        for answer in self.ask(Message::List) {
            if let Ok(Ok(list)) = tokio::time::timeout(LISTED, answer).await {
                sessions.extend(list);
            }
        }
        sessions
    }

    /// Ends one session; its worker is in the upper bits of its number.
    pub fn end_session(&self, id: u64) -> bool {
        let worker = usize::try_from(id >> 48).ok().and_then(|index| self.workers.get(index));
        worker.is_some_and(|worker| worker.sender.send(Message::End(id, Cause::Kicked)).is_ok())
    }

    /// Sessions open now.
    pub fn sessions_active(&self) -> u64 {
        self.workers.iter().map(|worker| worker.counters.sessions_active.get()).sum()
    }

    fn ask<T>(&self, message: impl Fn(oneshot::Sender<T>) -> Message) -> Vec<oneshot::Receiver<T>> {
        let ask = |worker: &WorkerHandle| {
            let (sender, receiver) = oneshot::channel();
            // A full mailbox means a stuck worker; the answer never comes, which says so.
            let _ = worker.sender.send(message(sender));
            receiver
        };
        self.workers.iter().map(ask).collect()
    }

    fn tell(&self, message: impl Fn() -> Message) {
        for worker in &self.workers {
            if worker.sender.send(message()).is_err() {
                tracing::error!("a worker's mailbox is full");
            }
        }
    }

    /// Takes no more sessions, lets the running ones end, ends them at the deadline; whether all records
    /// were written.
    pub async fn drain(&self) -> bool {
        self.ready.store(false, Relaxed);
        self.shared.draining.store(true, Relaxed);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!(sessions = self.sessions_active(), deadline = ?self.drain_timeout, "draining");
        self.tell(|| Message::Drain);
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let deadline = Instant::now() + self.drain_timeout;
        while self.sessions_active() > 0 && Instant::now() < deadline {
            self.judge_expired();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let cut = self.sessions_active();
        if cut > 0 {
            self.tell(|| Message::EndAll(Cause::Drained));
            let deadline = Instant::now() + LAST_WORDS;
            while self.sessions_active() > 0 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        if let Some(dir) = &self.state_dir {
            state::keep_remembered(dir, &self.shared.snapshot.load());
        }
        tracing::info!(cut, "drained");
        self.access.end()
    }
}

/// More sessions than that are for further nodes, however many descriptors there are: the ledger has a slot
/// for each, in each worker.
const SESSIONS_MAX: usize = 1 << 20;
/// Room for client addresses with sessions, however few sessions there may be at the start.
const ADDRESSES: usize = 1 << 16;
/// Slots of sessions that end and begin at the same moment, and of those that are only refused.
const SLOTS_SPARE: usize = 1024;

fn boot_number() -> u64 {
    let mut bytes = [0; 8];
    // Two boots of one number would be one; without entropy none may begin.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    u64::from_le_bytes(bytes)
}

/// How many sessions fit: as asked, but no more than the descriptors allow.
fn sessions_max(asked: Option<usize>) -> usize {
    let descriptors = culvert_rt::raise_descriptor_limit();
    let fit = descriptors.saturating_sub(DESCRIPTORS_RESERVED.min(descriptors / 2));
    let fit = usize::try_from(fit / DESCRIPTORS_PER_SESSION).unwrap_or(usize::MAX);
    let fit = fit.min(SESSIONS_MAX);
    match asked {
        Some(asked) if asked > fit => {
            let remedy = if fit < SESSIONS_MAX { "raise LimitNOFILE" } else { "run more nodes" };
            tracing::warn!(asked, fit, descriptors, "limits.sessions lowered; {remedy}");
            fit
        }
        Some(asked) => asked,
        None => fit,
    }
}

fn local_addr(fd: &OwnedFd) -> std::io::Result<SocketAddr> {
    std::net::TcpListener::from(fd.try_clone()?).local_addr()
}

fn bind_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "; another program listens there (ss -ltnp)",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 need CAP_NET_BIND_SERVICE",
        std::io::ErrorKind::AddrNotAvailable => "; this host does not have that address",
        _ => "",
    }
}

async fn start_worker(
    index: usize,
    config: &Config,
    shared: &Arc<Shared>,
    sockets: Vec<OwnedFd>,
    region: Region,
) -> anyhow::Result<WorkerHandle> {
    let (sender, mailbox) = mailbox(MAILBOX)?;
    let counters = Arc::new(WorkerCounters::default());
    let records = Arc::new(ArrayQueue::new(RECORDS));
    let parts = Parts {
        index,
        shared: shared.clone(),
        mailbox,
        sender: sender.clone(),
        counters: counters.clone(),
        records: records.clone(),
        listeners: sockets,
        region,
    };
    let cores = culvert_rt::available_cores();
    // Pinned when there is a core for each; otherwise the scheduler knows better.
    let core = (config.workers <= cores.len()).then(|| cores[index % cores.len()]);
    let pipes = culvert_rt::PIPES_MAX / config.workers.min(culvert_rt::PIPES_MAX);
    let options = RuntimeOptions { driver: config.driver, ..RuntimeOptions::default() };
    let (built, driver) = oneshot::channel();
    thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        culvert_rt::shorten_slice();
        if let Some(core) = core {
            let _ = culvert_rt::pin_to_core(core);
        }
        culvert_rt::set_pipes_max(pipes);
        let runtime = match Runtime::build(options) {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = built.send(Err(error.to_string()));
                return;
            }
        };
        let fallback = runtime.fallback().map(ToString::to_string);
        let driver = (runtime.driver(), runtime.ring_fd(), fallback);
        // A panic outside a session leaves the worker in no known state: the process ends, and its
        // supervisor starts another.
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(worker::run(parts, || {
                let _ = built.send(Ok(driver));
            }))
        }));
        tracing::error!(worker = index, ?ran, "a worker ended; the process ends with it");
        std::process::abort();
    })?;
    let (driver, ring_fd, fallback) = driver.await?.map_err(|error| anyhow::anyhow!(error))?;
    if let (0, Some(reason)) = (index, &fallback) {
        tracing::warn!(%reason, "running on epoll");
    }
    Ok(WorkerHandle { counters, driver, ring_fd, sender, records })
}

/// Holds an old snapshot until no worker does, so that none of them frees it.
async fn retire(snapshot: Arc<Snapshot>) {
    while Arc::strong_count(&snapshot) > 1 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::task::spawn_blocking(move || drop(snapshot));
}

/// One worker may find no ring where another did (locked memory is shared): say so once.
fn warn_of_fallback(workers: &[WorkerHandle]) {
    let rings = workers.iter().filter(|worker| worker.driver == Driver::IoUring).count();
    if rings > 0 && rings < workers.len() {
        tracing::warn!(
            rings,
            workers = workers.len(),
            "some workers run on epoll: raise LimitMEMLOCK"
        );
    }
}
