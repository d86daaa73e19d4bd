//! The node's side of the control link: follows the policy, reports what was counted.
//!
//! Nothing waits for it. A node restarts and serves from its copy of the policy; sums wait in the
//! ledger's file, records in the spool, until the control plane has them in its database.

mod copy;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use culvert_api::{
    Problem,
    link::{self, Down, Up, command, down, up},
    policy::Policy,
};
use culvert_link::{Connector, Identity, LinkError};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::Notify,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use copy::{Change, Copy};

use crate::{
    config::Control,
    ledger::{Bytes, Lease, Recovered, Unrecorded, recover},
    log::Spool,
    node::{Node, beside_the_workers},
    policy::clock,
    session::LiveInfo,
};

/// How often sums are reported when they changed.
const REPORT: Duration = Duration::from_secs(1);
/// How often the node says how it is, and which sessions run.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The control plane answers a hello within this time.
const WELCOME: Duration = Duration::from_secs(5);
/// A report that is not acknowledged for so long never will be.
const SILENT: Duration = Duration::from_secs(20);
/// Pauses between two tries to connect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// Records sent at once.
const RECORDS: usize = 500;
/// Records that may be on their way.
const RECORDS_AHEAD: u64 = 4000;
/// Questions that are answered at once.
const QUESTIONS: usize = 16;
/// Users whose leases are asked for at once.
const LEASES: usize = 500;
/// When a lease that was not granted is asked for again, at the next look: another node may have given some
/// back, or all may be spent by now.
const ASK_AGAIN: Duration = Duration::from_millis(80);
/// How long leases are kept without a control plane, which gives them to others after a day.
const LEASES_KEPT: Duration = Duration::from_secs(12 * 3600);
/// How often the spool is looked at, and what leases are still to be asked for.
const LOOK: Duration = Duration::from_millis(100);
/// Sessions listed at most.
const LIVE_MAX: usize = 10_000;
/// The last report of a boot comes after all others, and what its ledger's file says after that.
const LAST: u64 = RECOVERED - 1;
const RECOVERED: u64 = i64::MAX as u64;
/// The first number of records of sessions that were cut by a crash, beyond all others.
const CRASHED: u64 = 1 << 62;

type Peer = culvert_link::Peer<Down, Up>;

/// Follows one control plane.
pub struct Follower {
    way: Way,
    name: String,
    boot: u64,
    copy: Mutex<Copy>,
    /// Records of this boot.
    pub spool: Arc<Spool>,
    /// Records and sums that other boots left.
    left: Mutex<(Vec<Spool>, Vec<Recovered>)>,
    sums: Mutex<Sums>,
    leases: Mutex<Leases>,
    /// Whether the control plane has taken this node.
    welcomed: AtomicBool,
    /// Whether all records were written when the node had drained.
    written: AtomicBool,
    /// The last command that came.
    command: AtomicU64,
    /// Whether the last policy that came is in force; if not, the copy is of another.
    refuses: AtomicBool,
    /// When the copy was last known to be what the control plane has; now, while that has taken this node
    /// and none was refused.
    current: Mutex<SystemTime>,
    ending: Notify,
    ledger: PathBuf,
    /// The control plane's generation in force; 0 is none.
    pub generation: AtomicU64,
}

/// Sums of this boot, by user.
#[derive(Default)]
struct Sums {
    by_worker: HashMap<(usize, u64), Bytes>,
    all: HashMap<u64, Bytes>,
    acknowledged: HashMap<u64, Bytes>,
    sequence: u64,
    /// A worker did not tell in time; what it had to tell is in the ledger's file only.
    missed: bool,
}

/// Leases of this boot, by user.
#[derive(Default)]
struct Leases {
    /// All that were asked for.
    known: HashMap<u64, Arc<Lease>>,
    /// Those that are asked for and not answered yet.
    asked: HashMap<u64, Instant>,
    /// Those of which some was taken back, until the control plane knows what is left.
    held: HashMap<u64, u64>,
}

/// A report that is not acknowledged yet.
struct Sent {
    at: Instant,
    sequence: u64,
    sums: Vec<(u64, Bytes)>,
    held: HashMap<u64, u64>,
}

/// How far the end of the node is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    No,
    /// The last report is on its way.
    Asked,
    /// It is in the database.
    Reported,
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("the records kept in the state directory: {0}")]
    Spool(#[from] io::Error),
    #[error("the control plane refuses: {0}")]
    Refused(String),
    #[error("the control plane does not answer")]
    Silent,
    #[error("the node has ended")]
    Ended,
}

/// What was sent, on one connection, of what earlier boots left.
#[derive(Default)]
struct SentLeft {
    /// The last record of each boot.
    records: HashMap<u64, u64>,
    /// Boots whose sums were sent.
    sums: HashSet<u64>,
}

impl Follower {
    /// Takes up what earlier boots left in the state directory.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub fn open(control: &Control, dir: &Path, name: &str, boot: u64) -> anyhow::Result<Self> {
        let connector = match control {
            Control::Unix(_) => None,
            Control::Tls { identity, .. } => {
                let file = identity.display();
                let pem = std::fs::read(identity)
                    .map_err(|error| anyhow::anyhow!("control.identity: {file}: {error}"))?;
                let identity = Identity::of_pem(&pem).and_then(Connector::new);
                Some(
                    identity
                        .map_err(|error| anyhow::anyhow!("control.identity: {file}: {error}"))?,
                )
            }
        };
        let failed = |error: io::Error| anyhow::anyhow!("{}: {error}", dir.display());
        let (mut spools, mut found) =
            (Spool::left(dir).map_err(failed)?, recover(dir).map_err(failed)?);
        // A process that ends again and again leaves nothing unless it has counted something.
        spools.retain(|spool| {
            spool.delete();
            !spool.is_empty()
        });
        found.retain(|found| {
            let counted = !found.users.is_empty();
            if !counted {
                let _ = std::fs::remove_file(&found.path);
            }
            counted
        });
        let left = (spools, found);
        for found in &left.1 {
            tracing::info!(
                boot = format!("{:016x}", found.boot),
                users = found.users.len(),
                sessions_cut = found.sessions.len(),
                uncertain_bytes = found.uncertain,
                "an earlier process was not over; its sums are kept for the control plane"
            );
        }
        let copy = Copy::open(dir).map_err(failed)?;
        let copy_of = copy.written().unwrap_or_else(SystemTime::now);
        Ok(Self {
            way: Way { control: control.clone(), connector },
            name: name.to_owned(),
            boot,
            generation: AtomicU64::new(copy.generation),
            copy: Mutex::new(copy),
            spool: Arc::new(Spool::new(dir, boot).map_err(failed)?),
            left: Mutex::new(left),
            sums: Mutex::default(),
            leases: Mutex::default(),
            welcomed: AtomicBool::new(false),
            written: AtomicBool::new(false),
            command: AtomicU64::new(0),
            refuses: AtomicBool::new(false),
            current: Mutex::new(copy_of),
            ending: Notify::new(),
            ledger: crate::ledger::path(dir, boot),
        })
    }

    /// Whether the control plane has taken this node.
    pub fn is_connected(&self) -> bool {
        self.welcomed.load(Relaxed)
    }

    /// The policy may not be what the control plane has from now on.
    fn becomes_stale(&self) {
        if self.stale().is_none() {
            *lock(&self.current) = SystemTime::now();
        }
    }

    /// How long ago the policy was last known to be what the control plane has; `None` while it is known.
    pub fn stale(&self) -> Option<Duration> {
        let since = || lock(&self.current).elapsed().unwrap_or_default();
        let is_current = self.welcomed.load(Relaxed) && !self.refuses.load(Relaxed);
        (!is_current).then(since)
    }

    /// The policy of the copy, if there is one.
    pub fn policy(&self) -> Option<Policy> {
        let copy = lock(&self.copy);
        (copy.generation > 0).then(|| copy.policy())
    }

    /// The copy cannot be used: a whole snapshot is wanted.
    pub fn forget(&self) {
        lock(&self.copy).generation = 0;
        self.generation.store(0, Relaxed);
    }

    /// The node has drained, and written all records or not: one more report, and no more.
    pub fn finish(&self, is_written: bool) {
        self.written.store(is_written, Relaxed);
        self.ending.notify_one();
    }

    /// Connects, again and again, until the node has ended.
    pub async fn run(self: Arc<Self>, node: Arc<Node>) {
        let mut pause = PAUSE.0;
        let mut told = String::new();
        let mut away = Instant::now();
        loop {
            let began = Instant::now();
            let gone = match self.way.connect().await {
                Ok(mut peer) => Box::pin(self.follow(&node, &mut peer)).await,
                Err(error) => Err(Gone::Link(error.into())),
            };
            match gone {
                Ok(()) | Err(Gone::Ended) => return,
                Err(gone) => {
                    // Who is refused, or away for long, holds nothing that others might get.
                    self.becomes_stale();
                    if self.welcomed.swap(false, Relaxed) {
                        away = Instant::now();
                        // One that is ended as soon as it is there is not asked faster and faster.
                        if began.elapsed() > PAUSE.1 {
                            (pause, told) = (PAUSE.0, String::new());
                        }
                    }
                    if matches!(gone, Gone::Refused(_)) || away.elapsed() > LEASES_KEPT {
                        self.give_up();
                    }
                    // The same reason is told once.
                    let reason = gone.to_string();
                    if reason != told {
                        tracing::warn!(at = %self.way.control, %reason, "no control plane");
                        told = reason;
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.ending.notified() => return,
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn follow(self: &Arc<Self>, node: &Arc<Node>, peer: &mut Peer) -> Result<(), Gone> {
        let hello = link::Hello {
            node: self.name.clone(),
            boot: self.boot,
            version_min: link::VERSION_MIN,
            version: link::VERSION,
            generation: lock(&self.copy).generation,
            program: env!("CARGO_PKG_VERSION").into(),
            command: self.command.load(Relaxed),
        };
        peer.send(up::Body::Hello(hello)).await?;
        match timeout(WELCOME, peer.receive()).await {
            Ok(said) => match said?.body {
                Some(down::Body::Welcome(welcome)) if welcome.refusal.is_empty() => {}
                Some(down::Body::Welcome(welcome)) => return Err(Gone::Refused(welcome.refusal)),
                _ => return Err(Gone::Silent),
            },
            Err(_) => return Err(Gone::Silent),
        }
        self.welcomed.store(true, Relaxed);
        tracing::info!(at = %self.way.control, "control plane connected");
        // The sums are those since the start: all of them once more do no harm, should the other side
        // have lost what it acknowledged.
        lock(&self.sums).acknowledged.clear();
        lock(&self.leases).asked.values_mut().for_each(|due| *due = Instant::now());
        let mut sent_left = SentLeft::default();
        self.send_left(peer, &mut sent_left).await?;

        let mut report = interval(REPORT);
        let mut beat = interval(HEARTBEAT);
        let mut look = interval(LOOK);
        for tick in [&mut report, &mut beat, &mut look] {
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut outstanding: Option<Sent> = None;
        // Everything that is not acknowledged is sent anew on a new connection.
        let mut sent_record = 0;
        let mut end = End::No;
        let (mut questions, mut lists) = (JoinSet::new(), JoinSet::new());
        loop {
            tokio::select! {
                received = peer.receive() => match received?.body {
                    Some(down::Body::ReportAck(ack)) if ack.boot == self.boot => {
                        if let Some(sent) =
                            outstanding.take_if(|sent| sent.sequence <= ack.sequence)
                        {
                            lock(&self.sums).acknowledged.extend(sent.sums);
                            let known = |user: &u64, held: &mut u64| sent.held.get(user) != Some(held);
                            lock(&self.leases).held.retain(known);
                            if sent.sequence == LAST {
                                let _ = std::fs::remove_file(&self.ledger);
                                end = End::Reported;
                            }
                        }
                    }
                    // Names may take their time; beyond a few questions the asker gives up.
                    Some(down::Body::Explain(question)) if questions.len() < QUESTIONS => {
                        let node = node.clone();
                        questions.spawn(async move { node.explain(&question).await });
                    }
                    Some(down::Body::LeaseGrant(grant)) => {
                        let taken_back = self.granted(node, grant).await;
                        if taken_back {
                            // Others wait for what was taken back.
                            report.reset_immediately();
                        }
                    }
                    Some(body) => {
                        let is_room = matches!(&body, down::Body::RecordAck(_));
                        self.heard(node, peer, body).await?;
                        if is_room {
                            sent_record = self.send_records(peer, sent_record).await?;
                            self.send_left(peer, &mut sent_left).await?;
                        }
                    }
                    None => {}
                },
                Some(Ok(explained)) = questions.join_next() => {
                    let generation = self.generation.load(Relaxed);
                    let explained = link::Explained { generation, ..explained };
                    peer.send(up::Body::Explained(explained)).await?;
                }
                () = node.shared.wanted.wait(), if end == End::No => {
                    // What is asked for is judged by what is known to be spent.
                    if outstanding.is_none() {
                        outstanding = self.report(node, peer, false).await?;
                    }
                    self.ask(node, peer).await?;
                }
                _ = report.tick(), if outstanding.is_none() && end == End::No => {
                    outstanding = self.report(node, peer, false).await?;
                }
                _ = beat.tick() => {
                    self.beat(node, peer).await?;
                    // Beside all else: with many sessions it takes a while.
                    if lists.is_empty() {
                        let node = node.clone();
                        lists.spawn(async move { node.sessions().await });
                    }
                }
                Some(Ok(sessions)) = lists.join_next() => tell_live(peer, sessions).await?,
                _ = look.tick() => {
                    let waits = outstanding.as_ref().is_some_and(|sent| sent.at.elapsed() > SILENT);
                    if waits && peer.heard().elapsed() > SILENT {
                        return Err(Gone::Silent);
                    }
                    // What is not answered has to wait for another node.
                    if end == End::No {
                        self.ask(node, peer).await?;
                    }
                    sent_record = self.send_records(peer, sent_record).await?;
                }
                () = self.ending.notified(), if end == End::No => {
                    end = End::Asked;
                    outstanding = self.report(node, peer, true).await?;
                }
            }
            if end == End::Reported && self.spool.is_empty() {
                self.spool.delete();
                return Err(Gone::Ended);
            }
        }
    }

    /// Sends records that were not sent yet, as far as there is room for more that are not acknowledged;
    /// returns the last one that was sent.
    async fn send_records(&self, peer: &mut Peer, mut sent: u64) -> Result<u64, Gone> {
        while sent < self.spool.acknowledged() + RECORDS_AHEAD {
            let records = self.spool.after(sent, RECORDS)?;
            let Some(last) = records.last() else { break };
            sent = last.sequence;
            peer.send(up::Body::Records(link::Records { boot: self.boot, records })).await?;
        }
        Ok(sent)
    }

    /// Sends what earlier boots left, as far as there is room: records, those of sessions that were cut, and
    /// then the sums, with whose acknowledgement all of it is safe.
    async fn send_left(&self, peer: &mut Peer, sent: &mut SentLeft) -> Result<(), Gone> {
        let boots: BTreeSet<u64> = {
            let (spools, found) = &*lock(&self.left);
            spools
                .iter()
                .map(|spool| spool.boot)
                .chain(found.iter().map(|found| found.boot))
                .collect()
        };
        for boot in boots {
            let last = sent.records.entry(boot).or_insert(0);
            let is_all_sent = loop {
                let records = {
                    let (spools, _) = &*lock(&self.left);
                    match spools.iter().find(|spool| spool.boot == boot) {
                        Some(spool) if *last >= spool.acknowledged() + RECORDS_AHEAD => {
                            break false;
                        }
                        Some(spool) => spool.after(*last, RECORDS)?,
                        None => Vec::new(),
                    }
                };
                let Some(record) = records.last() else { break true };
                *last = record.sequence;
                peer.send(up::Body::Records(link::Records { boot, records })).await?;
            };
            if !is_all_sent || !sent.sums.insert(boot) {
                continue;
            }
            let found = {
                let (_, found) = &*lock(&self.left);
                let found = found.iter().find(|found| found.boot == boot);
                found.map(|found| (crashed(found), report_of(found)))
            };
            let Some((records, report)) = found else { continue };
            for part in records.chunks(RECORDS) {
                let records = link::Records { boot, records: part.to_vec() };
                peer.send(up::Body::Records(records)).await?;
            }
            peer.send(up::Body::Report(report)).await?;
        }
        Ok(())
    }

    async fn heard(
        self: &Arc<Self>,
        node: &Arc<Node>,
        peer: &mut Peer,
        body: down::Body,
    ) -> Result<(), Gone> {
        match body {
            down::Body::Snapshot(snapshot) => {
                let generation = snapshot.generation;
                self.put(node, peer, generation, move |copy| copy.whole(snapshot)).await?;
            }
            down::Body::Delta(delta) => {
                let generation = delta.generation;
                self.put(node, peer, generation, move |copy| copy.part(delta)).await?;
            }
            down::Body::ReportAck(ack) => {
                let mut left = lock(&self.left);
                left.1.retain(|found| {
                    let safe = found.boot == ack.boot;
                    if safe {
                        let _ = std::fs::remove_file(&found.path);
                    }
                    !safe
                });
            }
            down::Body::RecordAck(ack) if ack.boot == self.boot => {
                self.spool.acknowledge(ack.sequence);
            }
            down::Body::RecordAck(ack) => {
                let mut left = lock(&self.left);
                left.0.retain(|spool| {
                    if spool.boot == ack.boot {
                        spool.acknowledge(ack.sequence);
                    }
                    let safe = spool.is_empty();
                    if safe {
                        spool.delete();
                    }
                    !safe
                });
            }
            down::Body::Command(command) => {
                match command.kind {
                    Some(command::Kind::EndSession(id)) => drop(node.end_session(id)),
                    Some(command::Kind::EndUser(user)) => node.end_user(user),
                    Some(command::Kind::Drain(_)) => drop(node.drain.try_send(())),
                    None => {}
                }
                self.command.store(command.id, Relaxed);
            }
            down::Body::Welcome(_) | down::Body::LeaseGrant(_) | down::Body::Explain(_) => {}
        }
        Ok(())
    }

    /// Holds no leases any more.
    fn give_up(&self) {
        let Leases { known, held, .. } = &mut *lock(&self.leases);
        for (user, lease) in known.iter().filter(|(_, lease)| lease.limit() > 0) {
            held.insert(*user, lease.set_limit(0));
        }
    }

    /// Asks for what leases run short of.
    async fn ask(&self, node: &Node, peer: &mut Peer) -> Result<(), Gone> {
        let users: Vec<u64> = {
            let Leases { known, asked, held } = &mut *lock(&self.leases);
            let now = Instant::now();
            for lease in node.shared.wanted.take() {
                asked.entry(lease.user()).or_insert(now);
                known.insert(lease.user(), lease);
            }
            asked.retain(|user, _| known.get(user).is_some_and(|lease| lease.epoch().is_some()));
            // What was taken back is told first.
            let due =
                asked.iter_mut().filter(|(user, due)| **due <= now && !held.contains_key(user));
            due.map(|(user, due)| {
                *due = now + ASK_AGAIN;
                *user
            })
            .collect()
        };
        for users in users.chunks(LEASES) {
            let users = users.to_vec();
            peer.send(up::Body::LeaseRequest(link::LeaseRequest { users })).await?;
        }
        Ok(())
    }

    /// Puts grants in force; whether some of a lease was taken back.
    async fn granted(&self, node: &Node, grant: link::LeaseGrant) -> bool {
        let known: HashMap<u64, Arc<Lease>> = {
            let leases = lock(&self.leases);
            let of = |granted: &link::Lease| leases.known.get_key_value(&granted.user);
            grant.leases.iter().filter_map(of).map(|(user, lease)| (*user, lease.clone())).collect()
        };
        let of = |granted: &link::Lease| known.get(&granted.user);
        let new = grant.leases.iter().filter(|granted| of(granted).is_some_and(|l| l.limit() == 0));
        let new: Arc<[u64]> = new.map(|granted| granted.user).collect();
        if !new.is_empty() {
            node.settle(new).await;
        }
        let mut leases = lock(&self.leases);
        let mut taken_back = false;
        for granted in &grant.leases {
            let Some(lease) = of(granted) else { continue };
            let before = lease.limit();
            if granted.taken_back {
                let holds = lease.set_limit(granted.limit.min(before));
                leases.held.insert(granted.user, holds);
                taken_back = true;
            } else if !leases.held.contains_key(&granted.user) {
                leases.asked.remove(&granted.user);
                lease.set_limit(granted.limit.max(before));
                if granted.limit <= before {
                    lease.set_refused(granted.spent, clock());
                }
            }
        }
        taken_back
    }

    /// Puts a policy in force and keeps a copy of it; says so, or why not. All of it on the thread that
    /// compiles: this one resolves names.
    async fn put(
        self: &Arc<Self>,
        node: &Arc<Node>,
        peer: &mut Peer,
        generation: u64,
        change: impl FnOnce(&Copy) -> Result<Change, String> + Send + 'static,
    ) -> Result<(), Gone> {
        let (follower, followed) = (self.clone(), node.clone());
        let put = beside_the_workers(move || {
            let mut copy = lock(&follower.copy);
            let change = change(&copy).map_err(|reason| vec![reason])?;
            followed
                .follow(change.draft(), generation)
                .map_err(|problems| problems.iter().map(Problem::to_string).collect::<Vec<_>>())?;
            let appended = copy.apply(change);
            if let Err(error) = copy.keep(appended.as_deref()) {
                tracing::warn!(%error, "the policy is in force, but its copy could not be written");
                copy.write_anew();
            }
            follower.generation.store(generation, Relaxed);
            let users = followed.shared.snapshot.load().directory.len();
            tracing::info!(generation, users, "policy followed");
            Ok(())
        });
        let said = match put.await.unwrap_or_else(|error| Err(vec![error.to_string()])) {
            Ok(()) => {
                self.refuses.store(false, Relaxed);
                up::Body::Applied(link::Applied { generation })
            }
            Err(reasons) => {
                self.becomes_stale();
                self.refuses.store(true, Relaxed);
                node.rejected.fetch_add(1, Relaxed);
                for reason in &reasons {
                    tracing::error!(generation, %reason, "the control plane's policy is refused");
                }
                up::Body::Refused(link::Refused { generation, reasons })
            }
        };
        Ok(peer.send(said).await?)
    }

    /// Reports sums that changed since they were acknowledged.
    async fn report(
        &self,
        node: &Arc<Node>,
        peer: &mut Peer,
        last: bool,
    ) -> Result<Option<Sent>, Gone> {
        // Sessions that were cut may not be over yet, or their records not written; then the ledger's file
        // says the last word.
        let over = node.sessions_active() == 0;
        let held = lock(&self.leases).held.clone();
        let (totals, whole) = node.totals().await;
        let (sequence, users, missed) = {
            let mut sums = lock(&self.sums);
            for (worker, told) in totals {
                for (user, sum) in told {
                    let before = sums.by_worker.insert((worker, user), sum).unwrap_or_default();
                    let all = sums.all.entry(user).or_default();
                    (all[0], all[1]) = (all[0] + sum[0] - before[0], all[1] + sum[1] - before[1]);
                }
            }
            let changed = |(user, sum): (&u64, &Bytes)| {
                let told = sums.acknowledged.get(user) == Some(sum) && !held.contains_key(user);
                (!told).then_some((*user, *sum))
            };
            let mut users: Vec<(u64, Bytes)> = sums.all.iter().filter_map(changed).collect();
            let unmoved = held.keys().filter(|user| !sums.all.contains_key(user));
            users.extend(unmoved.map(|user| (*user, [0; 2])));
            sums.sequence += 1;
            sums.missed |= !whole;
            (if last { LAST } else { sums.sequence }, users, sums.missed)
        };
        let is_written = self.written.load(Relaxed);
        if last && (missed || !over || !is_written) {
            return Err(Gone::Ended);
        }
        if users.is_empty() && held.is_empty() && !last {
            return Ok(None);
        }
        let usage = |(user, sum): &(u64, Bytes)| link::Usage {
            user: *user,
            up: sum[0],
            down: sum[1],
            held: held.get(user).copied(),
        };
        let report = link::Report {
            boot: self.boot,
            sequence,
            users: users.iter().map(usage).collect(),
            last,
            uncertain: 0,
        };
        peer.send(up::Body::Report(report)).await?;
        Ok(Some(Sent { at: Instant::now(), sequence, sums: users, held }))
    }

    async fn beat(&self, node: &Arc<Node>, peer: &mut Peer) -> Result<(), Gone> {
        let [up, down] = node.bytes();
        let (cpu_us, memory) = process();
        let beat = link::Heartbeat {
            sessions: node.sessions_active(),
            cpu_us,
            memory,
            up,
            down,
            ready: node.is_ready(),
            uptime: node.started.elapsed().as_secs(),
        };
        Ok(peer.send(up::Body::Heartbeat(beat)).await?)
    }
}

async fn tell_live(peer: &mut Peer, sessions: Vec<LiveInfo>) -> Result<(), Gone> {
    let told = sessions.into_iter().take(LIVE_MAX).map(|live| link::LiveSession {
        id: live.id,
        user: live.user_id,
        json: serde_json::to_vec(&live).unwrap_or_default(),
    });
    Ok(peer.send(up::Body::Live(link::Live { sessions: told.collect() })).await?)
}

/// How the control plane is reached.
struct Way {
    control: Control,
    connector: Option<Connector>,
}

impl Way {
    async fn connect(&self) -> io::Result<Peer> {
        match (&self.control, &self.connector) {
            (Control::Unix(path), _) => Ok(Peer::new(UnixStream::connect(path).await?)),
            (Control::Tls { address, .. }, Some(connector)) => {
                let met = timeout(WELCOME, async {
                    connector.connect(TcpStream::connect(address).await?).await
                });
                Ok(Peer::new(met.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??))
            }
            (Control::Tls { .. }, None) => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The sums of a boot that is over.
fn report_of(found: &Recovered) -> link::Report {
    let usage = |(user, sum): (&u64, &Bytes)| link::Usage {
        user: *user,
        up: sum[0],
        down: sum[1],
        held: None,
    };
    link::Report {
        boot: found.boot,
        sequence: RECOVERED,
        users: found.users.iter().map(usage).collect(),
        last: true,
        uncertain: found.uncertain,
    }
}

/// Records of sessions that were cut by the end of a boot, or whose record was not written before it. Their
/// numbers are the same each time, so that none is there twice.
fn crashed(found: &Recovered) -> Vec<link::Record> {
    let time = time::OffsetDateTime::now_utc();
    let time = time.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    let record = |(number, cut): (u64, &Unrecorded)| {
        let end = if cut.ran { "crash" } else { "unrecorded" };
        let mut json = serde_json::json!({
            "time": time, "bytes_up": cut.bytes[0], "bytes_down": cut.bytes[1], "end": end,
        });
        if cut.ran {
            json["uncertain_bytes"] = cut.uncertain.into();
        }
        // One that was written after all is known there by its number.
        let sequence = if cut.sequence > 0 { cut.sequence } else { CRASHED + number };
        link::Record { sequence, json: json.to_string().into_bytes(), user: cut.user }
    };
    (0..).zip(&found.sessions).map(record).collect()
}

/// CPU time in microseconds and resident memory in bytes of this process, from /proc.
fn process() -> (u64, u64) {
    let read =
        |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let (stat, statm) = (read("stat"), read("statm"));
    // After the name in parentheses: utime and stime are fields 14 and 15, in hundredths of a second.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks = rest.split(' ').skip(11).take(2).filter_map(|text| text.parse::<u64>().ok());
    let pages = statm.split(' ').nth(1).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    (ticks.sum::<u64>() * 10_000, pages * 4096)
}
