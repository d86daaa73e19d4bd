//! A worker: one thread on one core with its own runtime, its sessions, its caches and its counters.
//!
//! It takes no lock and never blocks. Others reach it through its mailbox; it reads what they publish
//! through atomics.

mod accept;
mod place;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    os::fd::OwnedFd,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use crossbeam::queue::ArrayQueue;
use culvert_proto::Name;
use culvert_rt::{Mailbox, Sender, Signal, Wheel, sleep, spawn, spawn_vital};
use tokio::sync::{Notify, oneshot};

pub use place::{NodePlace, NodePlaces};

use crate::{
    end::Cause,
    ledger::{Bytes, Ledger, Region, Wanted},
    policy::{LoginPool, Snapshot, Table, Throttles, UserUse},
    session::{Live, LiveInfo, Record},
    telemetry::WorkerCounters,
    upstream::{Answer, Names, Resolver},
};

/// Messages a worker's mailbox holds: every lookup and login under way may answer at once.
pub const MAILBOX: usize = 8192;
/// Records a worker's queue holds before new ones are dropped and counted.
pub const RECORDS: usize = 8192;
/// Sessions judged again, or told of, between two looks at the clock.
const SLICE: usize = 100;
/// So long that goes on before others have their turn, and so long is theirs.
const TURN: Duration = Duration::from_millis(1);

/// What all workers share.
pub struct Shared {
    /// The policy in force.
    pub snapshot: ArcSwap<Snapshot>,
    /// Sessions of the node.
    pub places: Arc<NodePlaces>,
    /// What all sessions share: rates of the node.
    pub everyone: Arc<UserUse>,
    /// Leases that run low.
    pub wanted: Wanted,
    /// Sessions and rates of client addresses.
    pub addresses: Arc<Table>,
    /// Failed logins.
    pub throttles: Throttles,
    /// Threads that verify passwords.
    pub logins: LoginPool,
    /// Where names are resolved.
    pub resolver: Resolver,
    /// A client address gave way to another of its user.
    pub evicted: Notify,
    /// The node takes no more sessions.
    pub draining: AtomicBool,
}

/// Tells logins apart: a keyed hash of the user, its credential and the password offered.
pub type LoginKey = [u8; 32];

/// What others tell a worker.
pub enum Message {
    /// A password was verified.
    LoggedIn {
        /// Which login.
        key: LoginKey,
        /// Whether it was right.
        right: bool,
    },
    /// A name was looked up.
    Resolved {
        /// The name.
        name: Name,
        /// Its addresses.
        answer: Answer,
    },
    /// A new snapshot, or the passing of a time, asks for running sessions to be judged again.
    Judge,
    /// Are you there?
    Ping(oneshot::Sender<()>),
    /// What have users moved?
    Totals(oneshot::Sender<Vec<(u64, Bytes)>>),
    /// Take from users' leases what was moved before they began.
    Settle(Arc<[u64]>, oneshot::Sender<()>),
    /// End the sessions of client addresses that gave way.
    EndEvicted,
    /// End all sessions of a user.
    EndUser(u64, Cause),
    /// Which sessions run?
    List(oneshot::Sender<Vec<LiveInfo>>),
    /// Take no more sessions.
    Drain,
    /// End one session.
    End(u64, Cause),
    /// End all sessions.
    EndAll(Cause),
}

/// What a worker is made of; moved into its thread.
pub struct Parts {
    /// Its number.
    pub index: usize,
    /// What all share.
    pub shared: Arc<Shared>,
    /// Its mailbox.
    pub mailbox: Mailbox<Message>,
    /// The way into it.
    pub sender: Sender<Message>,
    /// Its counters.
    pub counters: Arc<WorkerCounters>,
    /// Its records.
    pub records: Arc<ArrayQueue<Record>>,
    /// Its listening sockets.
    pub listeners: Vec<OwnedFd>,
    /// Its part of the ledger.
    pub region: Region,
}

/// A running worker.
pub struct Worker {
    /// Its number.
    pub index: usize,
    /// What all share.
    pub shared: Arc<Shared>,
    /// The way into its own mailbox, for answers.
    pub sender: Sender<Message>,
    /// What it counts.
    pub counters: Arc<WorkerCounters>,
    /// Its sessions' slots.
    pub ledger: Rc<Ledger>,
    /// Its names.
    pub names: Names,
    snapshot: RefCell<arc_swap::Cache<SharedSnapshot, Arc<Snapshot>>>,
    records: Arc<ArrayQueue<Record>>,
    sessions: RefCell<HashMap<u64, std::rc::Weak<Live>, ahash::RandomState>>,
    logins: RefCell<HashMap<LoginKey, Rc<Signal<bool>>, ahash::RandomState>>,
    last_id: Cell<u64>,
    draining: Rc<Signal<()>>,
    /// Whether sessions are being judged again, and whether that must begin anew.
    judging: Cell<Judging>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Judging {
    No,
    Yes,
    Again,
}

/// Lets a cache of the snapshot live as long as the shared state.
struct SharedSnapshot(Arc<Shared>);

impl std::ops::Deref for SharedSnapshot {
    type Target = ArcSwap<Snapshot>;

    fn deref(&self) -> &ArcSwap<Snapshot> {
        &self.0.snapshot
    }
}

/// Seconds since 1970.
pub fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// Runs a worker in its own runtime; returns only when the process is to end.
pub async fn run(parts: Parts, ready: impl FnOnce()) -> std::io::Result<()> {
    let Parts { index, shared, mailbox, sender, counters, records, listeners, region } = parts;
    let inbox = mailbox.open()?;
    let worker = Rc::new(Worker {
        index,
        sender,
        ledger: Ledger::new(counters.clone(), region),
        names: Names::new(shared.resolver.clone()),
        snapshot: RefCell::new(arc_swap::Cache::new(SharedSnapshot(shared.clone()))),
        records,
        sessions: RefCell::default(),
        logins: RefCell::default(),
        last_id: Cell::new((index as u64) << 48),
        draining: Rc::new(Signal::default()),
        judging: Cell::new(Judging::No),
        counters,
        shared,
    });
    worker.counters.generation.add(worker.snapshot().generation);
    spawn_vital(Wheel::run());
    for (index, fd) in listeners.into_iter().enumerate() {
        let listener = culvert_rt::Listener::from_fd(fd)?;
        spawn_vital(accept::run(worker.clone(), listener, index));
    }
    ready();
    loop {
        let message = inbox.receive().await;
        worker.handle(message);
    }
}

impl Worker {
    /// The snapshot in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow_mut().load().clone()
    }

    /// Whether the node takes no more sessions.
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Relaxed)
    }

    /// A new session's number.
    pub fn next_session_id(&self) -> u64 {
        self.last_id.set(self.last_id.get() + 1);
        self.last_id.get()
    }

    /// Enters a session into the list.
    pub fn enter(&self, live: &Rc<Live>) {
        self.sessions.borrow_mut().insert(live.id, Rc::downgrade(live));
        self.counters.sessions_active.add(1);
    }

    /// Takes a session out of the list.
    pub fn leave(&self, id: u64) {
        self.sessions.borrow_mut().remove(&id);
        self.counters.sessions_active.sub(1);
    }

    /// Queues a record, or counts that there was no room.
    pub fn log(&self, record: Record) {
        match self.records.push(record) {
            Ok(()) => self.counters.records.add(1),
            Err(_) => self.counters.records_dropped.add(1),
        }
    }

    /// The verification of a login that is under way, if one is.
    pub fn login_under_way(&self, key: &LoginKey) -> Option<Rc<Signal<bool>>> {
        self.logins.borrow().get(key).cloned()
    }

    /// Registers a login whose answer is to come.
    pub fn expect_login(&self, key: LoginKey) -> Rc<Signal<bool>> {
        let answer = Rc::new(Signal::default());
        self.logins.borrow_mut().insert(key, answer.clone());
        answer
    }

    /// Waits no more for a login.
    pub fn forget_login(&self, key: &LoginKey) {
        self.logins.borrow_mut().remove(key);
    }

    fn handle(self: &Rc<Self>, message: Message) {
        match message {
            Message::LoggedIn { key, right } => {
                if let Some(answer) = self.logins.borrow_mut().remove(&key) {
                    answer.set(right);
                }
            }
            Message::Resolved { name, answer } => self.names.answered(name, answer),
            Message::Judge => self.judge(),
            Message::Ping(reply) => {
                let _ = reply.send(());
            }
            Message::Totals(reply) => {
                let _ = reply.send(self.ledger.tell());
            }
            Message::Settle(users, reply) => {
                users.iter().for_each(|user| self.ledger.settle(*user));
                let _ = reply.send(());
            }
            Message::EndUser(user, cause) => {
                for live in self.live().iter().filter(|live| live.user_id() == user) {
                    live.stop(cause);
                }
            }
            Message::EndEvicted => {
                for live in self.live().iter().filter(|live| live.is_evicted()) {
                    live.stop(Cause::Evicted);
                }
            }
            Message::List(reply) => self.list(reply),
            Message::Drain => self.drain(),
            Message::End(id, cause) => {
                let live = self.sessions.borrow().get(&id).and_then(std::rc::Weak::upgrade);
                if let Some(live) = live {
                    live.stop(cause);
                }
            }
            Message::EndAll(cause) => {
                for live in self.live() {
                    live.stop(cause);
                }
            }
        }
    }

    fn live(&self) -> Vec<Rc<Live>> {
        self.sessions.borrow().values().filter_map(std::rc::Weak::upgrade).collect()
    }

    /// Tells what runs, in slices: thousands of sessions must not wait for it.
    fn list(self: &Rc<Self>, reply: oneshot::Sender<Vec<LiveInfo>>) {
        let worker = self.clone();
        spawn(async move {
            let live = worker.live();
            let mut list = Vec::with_capacity(live.len());
            let mut began = Instant::now();
            for slice in live.chunks(SLICE) {
                list.extend(slice.iter().map(|live| live.info()));
                rest(&mut began).await;
            }
            let _ = reply.send(list);
        });
    }

    /// No session begins any more; those that have asked for nothing yet end.
    fn drain(&self) {
        self.draining.set(());
        for live in self.live() {
            if !live.has_asked() {
                live.stop(Cause::Drained);
            }
        }
    }

    /// Judges all sessions by the snapshot in force, in slices.
    fn judge(self: &Rc<Self>) {
        if self.judging.get() != Judging::No {
            self.judging.set(Judging::Again);
            return;
        }
        self.judging.set(Judging::Yes);
        let worker = self.clone();
        spawn_vital(async move {
            loop {
                worker.judging.set(Judging::Yes);
                worker.judge_once().await;
                if worker.judging.get() == Judging::Yes {
                    break;
                }
            }
            worker.judging.set(Judging::No);
        });
    }

    async fn judge_once(&self) {
        let snapshot = self.snapshot();
        let live = self.live();
        let mut began = Instant::now();
        for slice in live.chunks(SLICE) {
            for live in slice {
                if !live.is_allowed(&snapshot) {
                    live.stop(Cause::Revoked);
                    self.counters.revoked.add(1);
                }
            }
            rest(&mut began).await;
        }
        self.counters.generation.add(snapshot.generation - self.counters.generation.get());
    }
}

/// Lets others have their turn, if what goes on since `began` has had its own.
async fn rest(began: &mut Instant) {
    if began.elapsed() >= TURN {
        sleep(TURN).await;
        *began = Instant::now();
    }
}
