//! The control link's server: nodes connect, follow the policy, and report.

mod authority;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use culvert_api::link::{self, Down, Up, command, down, up};
use culvert_link::{Acceptor, Identity, LinkError, Stream};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DbErr, EntityTrait, IntoActiveModel,
    QueryFilter, QueryOrder, Set, TransactionTrait, sea_query::OnConflict,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Notify, Semaphore, oneshot, watch},
    time::{Instant, timeout},
};

use crate::{
    http, lease,
    publish::{News, Publisher},
    store::{
        Actor, Boot, Command, ROWS, Store,
        entity::{boot, command as asked, heartbeat, node, session},
        note, now, retry,
    },
    usage,
};

/// A node says hello within this time.
const HELLO: Duration = Duration::from_secs(5);
/// Questions that wait for a node, and how long one may take to answer.
const QUESTIONS_MAX: usize = 64;
const ANSWER: Duration = Duration::from_secs(8);
/// Nodes that shake hands at once.
const GREETING_MAX: usize = 1024;
/// A node that is silent so long is gone; it sends a heartbeat every 5 s.
const SILENT: Duration = Duration::from_secs(20);
/// How often commands of other control planes are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// Edits that come closer together are sent as one.
const COALESCE: Duration = Duration::from_millis(100);
/// How long the database may be away before a node is let go, to come back.
const PATIENCE: Duration = Duration::from_secs(2);
/// One step with the database takes no longer than that: it may hang. MySQL waits 50 s for a lock.
const STEP: Duration = Duration::from_secs(120);
/// And so much longer for each user of a report.
const STEP_OF_USER: Duration = Duration::from_millis(5);

use authority::fingerprint;
pub use authority::{Authority, Issued};

type Peer = culvert_link::Peer<Up, Down>;

/// The nodes that are connected here.
pub struct Hub {
    publisher: Publisher,
    store: Store,
    look: watch::Sender<u64>,
    connected: AtomicUsize,
    /// Questions that any node may answer, and the way back.
    questions: Mutex<VecDeque<Question>>,
    asked: Notify,
    /// What nodes have said here, since the start.
    pub counts: Counts,
}

/// What nodes have said.
#[derive(Debug, Default)]
pub struct Counts {
    /// Reports that were applied.
    pub reports: AtomicU64,
    /// Records that were stored, those that had been before among them.
    pub records: AtomicU64,
}

struct Question {
    explain: link::Explain,
    answer: oneshot::Sender<link::Explained>,
}

/// Why a node is let go.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("the database failed: {0}")]
    Database(#[from] DbErr),
    #[error("{0}")]
    Refused(String),
}

impl Hub {
    /// A hub for a database.
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self {
            publisher: Publisher::new(store.clone()),
            store,
            look: watch::Sender::new(0),
            connected: AtomicUsize::new(0),
            questions: Mutex::default(),
            asked: Notify::new(),
            counts: Counts::default(),
        })
    }

    /// Has the nodes' sessions look for commands now.
    pub fn look(&self) {
        self.look.send_modify(|count| *count += 1);
    }

    /// How many nodes are connected here.
    pub fn connected(&self) -> usize {
        self.connected.load(Relaxed)
    }

    /// Asks a node what it would decide; `None` when none answers in time.
    pub async fn explain(&self, explain: link::Explain) -> Option<link::Explained> {
        if self.connected() == 0 {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        {
            let mut questions = self.questions.lock().ok()?;
            questions.retain(|question| !question.answer.is_closed());
            if questions.len() >= QUESTIONS_MAX {
                return None;
            }
            questions.push_back(Question { explain, answer });
        }
        self.asked.notify_one();
        timeout(ANSWER, answered).await.ok()?.ok()
    }

    /// Listens on a Unix socket (0660). Clients are those whom its permissions let in; with `allow_uids`
    /// only those of these user ids, our own and root. A node that comes this way is enrolled by coming.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn listen(self: &Arc<Self>, path: &Path, allow_uids: Vec<u32>) -> anyhow::Result<()> {
        let listener = bind(path)?;
        // Who made the socket is who we are.
        let own = std::fs::metadata(path).map(|meta| std::os::unix::fs::MetadataExt::uid(&meta))?;
        let hub = self.clone();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(COALESCE).await;
                    continue;
                };
                let uid = stream.peer_cred().map(|peer| peer.uid()).unwrap_or(u32::MAX);
                let listed = allow_uids.is_empty() || allow_uids.contains(&uid);
                if uid != own && uid != 0 && !listed {
                    tracing::warn!(uid, "a client of the link's socket is not in link.allow_uids");
                    continue;
                }
                let hub = hub.clone();
                tokio::spawn(async move { hub.serve(stream, None).await });
            }
        });
        Ok(())
    }

    /// Listens for nodes of other hosts, which show the certificate they were enrolled with. Returns the
    /// bound address.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn listen_tls(
        self: &Arc<Self>,
        bind: SocketAddr,
        authority: &Authority,
    ) -> anyhow::Result<SocketAddr> {
        let listener = TcpListener::bind(bind).await;
        let listener = listener
            .map_err(|error| anyhow::anyhow!("{bind}: {error}; choose another with link.bind"))?;
        let identity = Identity::of_pem(authority.control_plane()?.pem.as_bytes())?;
        let acceptor = Acceptor::new(identity)?;
        let address = listener.local_addr()?;
        let hub = self.clone();
        let greeting = Arc::new(Semaphore::new(GREETING_MAX));
        tokio::spawn(async move {
            loop {
                let place = greeting.clone().acquire_owned().await;
                let Ok((stream, from)) = listener.accept().await else {
                    tokio::time::sleep(COALESCE).await;
                    continue;
                };
                let (hub, acceptor) = (hub.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let met = timeout(HELLO, async {
                        let (stream, shown) = acceptor.accept(stream).await?;
                        let known = hub.known(&shown).await.map_err(io::Error::other)?;
                        Ok::<_, io::Error>((stream, shown, known))
                    });
                    match met.await {
                        Ok(Ok((stream, shown, true))) => {
                            drop(place);
                            hub.serve(stream, Some(shown)).await;
                        }
                        Ok(Ok((stream, ..))) => {
                            // From whom nothing is read.
                            let refusal = "the identity was replaced, or its node revoked; get another \
                                           with culvert-control node identity, or node add";
                            let refusal = link::Welcome { version: 0, refusal: refusal.into() };
                            let _ = Peer::new(stream).send(down::Body::Welcome(refusal)).await;
                        }
                        Ok(Err(error)) => tracing::debug!(%from, %error, "not a node"),
                        Err(_) => tracing::debug!(%from, "silent instead of a node"),
                    }
                });
            }
        });
        Ok(address)
    }

    /// Whether a node that may follow has this certificate.
    async fn known(&self, shown: &[u8]) -> Result<bool, DbErr> {
        let known = node::Entity::find()
            .filter(node::Column::Certificate.eq(fingerprint(shown)))
            .filter(node::Column::Status.eq("active"));
        Ok(known.one(self.store.db()).await?.is_some())
    }

    /// Serves a node that comes over a socket of this host, or has shown a certificate.
    async fn serve(self: Arc<Self>, stream: impl Stream + 'static, shown: Option<Vec<u8>>) {
        let mut peer = Peer::new(stream);
        let mut node = match self.greet(&mut peer, shown.as_deref()).await {
            Ok(node) => node,
            Err(gone) => {
                tracing::warn!(%gone, "a node was not taken");
                return;
            }
        };
        self.connected.fetch_add(1, Relaxed);
        tracing::info!(node = %node.row.name, boot = node.row.boot.cast_unsigned(), "node connected");
        let gone = self.follow(&mut peer, &mut node).await;
        self.connected.fetch_sub(1, Relaxed);
        if let Err(Gone::Database(error)) = &gone {
            note(error);
        }
        if let Err(gone) = gone {
            tracing::info!(node = %node.row.name, %gone, "node disconnected");
        }
        let _ = timeout(STEP, self.disconnected(&node)).await;
    }

    async fn greet(&self, peer: &mut Peer, shown: Option<&[u8]>) -> Result<Node, Gone> {
        let first = timeout(HELLO, peer.receive()).await;
        let Ok(Ok(Up { body: Some(up::Body::Hello(hello)) })) = first else {
            return Err(Gone::Refused("it did not say hello".into()));
        };
        if !(1..=255).contains(&hello.node.len()) || hello.node.chars().any(char::is_control) {
            return Err(Gone::Refused(
                "its name has not 1 to 255 bytes, or control characters".into(),
            ));
        }
        let refusal = if hello.version_min > link::VERSION || hello.version < link::VERSION_MIN {
            format!(
                "it speaks versions {} to {} of the link, we {} to {}; upgrade the older one",
                hello.version_min,
                hello.version,
                link::VERSION_MIN,
                link::VERSION
            )
        } else {
            String::new()
        };
        let found = node::Entity::find().filter(node::Column::Name.eq(&hello.node));
        let known = found.one(self.store.db()).await?;
        let shown = shown.map(fingerprint);
        let refusal = match (&known, &shown) {
            (Some(row), _) if row.status != "active" => {
                format!("node {} was revoked; give it another name", row.name)
            }
            (Some(row), Some(shown)) if row.certificate == *shown => refusal,
            (_, Some(_)) => {
                format!("this is not the identity of node {}; set node.name", hello.node)
            }
            _ => refusal,
        };
        let welcome =
            link::Welcome { version: hello.version.min(link::VERSION), refusal: refusal.clone() };
        peer.send(down::Body::Welcome(welcome)).await?;
        if !refusal.is_empty() {
            return Err(Gone::Refused(refusal));
        }
        let row = match known {
            Some(row) => row,
            None => self.enrol(&hello.node).await?,
        };
        // What the database has of the boot before anything else: whose word holds when a connection is over.
        let boot = hello.boot.cast_signed();
        let seen_at = now();
        let begun = boot::ActiveModel {
            node_id: Set(row.id),
            boot: Set(boot),
            sequence: Set(-1),
            uncertain: Set(0),
            ended: Set(false),
            seen_at: Set(seen_at),
            // What was asked before it began is none of its business.
            command: Set(self.last_command().await?),
        };
        let over = OnConflict::columns([boot::Column::NodeId, boot::Column::Boot])
            .update_column(boot::Column::SeenAt)
            .to_owned();
        boot::Entity::insert(begun)
            .on_conflict(over)
            .exec_without_returning(self.store.db())
            .await?;
        let row = node::Model { boot, generation: hello.generation.cast_signed(), ..row };
        let mut node = Node { row, shown, seen_at, command: 0, taken_back: HashSet::new() };
        match self.begin(&mut node, &hello).await {
            Ok(()) => Ok(node),
            Err(error) => {
                let _ = timeout(STEP, self.disconnected(&node)).await;
                Err(error.into())
            }
        }
    }

    /// Says that a node is there, and what it has been told.
    async fn begin(&self, node: &mut Node, hello: &link::Hello) -> Result<(), DbErr> {
        let mut change = node.row.clone().into_active_model();
        change.boot = Set(node.row.boot);
        change.version = Set(hello.program.chars().take(64).collect());
        change.connected = Set(true);
        change.seen_at = Set(Some(node.seen_at));
        change.generation = Set(node.row.generation);
        // Another boot's; what this one refuses it will say.
        change.refusal = Set(String::new());
        let row = change.update(self.store.db()).await?;
        // MySQL reads it again, when it may be another boot's already.
        let (boot, generation) = (node.row.boot, node.row.generation);
        node.row = node::Model { boot, generation, ..row };
        let begun = boot::Entity::find_by_id(node.key()).one(self.store.db()).await?;
        // What came to it, or what was asked before it began; numbers are lower in a database that was restored.
        let command = begun.map_or(0, |boot| boot.command).max(hello.command.cast_signed());
        node.command = command.min(self.last_command().await?);
        Ok(())
    }

    async fn enrol(&self, name: &str) -> Result<node::Model, Gone> {
        let actor = Actor { name: "system:link".into(), address: String::new() };
        let edit = self.store.edit(actor).await?;
        let (row, change) = http::add_node(edit.db(), name, "").await?;
        edit.commit(change).await?;
        Ok(row)
    }

    /// Serves a node until it is gone.
    async fn follow(&self, peer: &mut Peer, node: &mut Node) -> Result<(), Gone> {
        let mut changed = self.store.watch();
        let mut looked = self.look.subscribe();
        let mut known = node.row.generation.cast_unsigned();
        let (mut asked, mut questions) = (0, HashMap::new());
        let mut heard = Instant::now();
        let (mut trimmed, mut whole) = (false, false);
        let mut due = Some(Instant::now());
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                received = peer.receive() => {
                    heard = Instant::now();
                    if let Some(body) = received?.body {
                        if matches!(body, up::Body::Refused(_)) {
                            // What is next goes out whole: the node has not this one. Nor may it have taken what
                            // was sent meanwhile, which was to be added to it.
                            if known != 0 && !std::mem::replace(&mut whole, true) {
                                due.get_or_insert(Instant::now() + COALESCE);
                            }
                            known = 0;
                        }
                        match body {
                            up::Body::Explained(explained) => {
                                if let Some(answer) = questions.remove(&explained.id) {
                                    let _ = oneshot::Sender::send(answer, explained);
                                }
                            }
                            body => {
                                let users = match &body {
                                    up::Body::Report(report) => report.users.len(),
                                    _ => 0,
                                };
                                let time = STEP + STEP_OF_USER * users as u32;
                                within(time, self.heard(peer, node, body)).await?;
                            }
                        }
                        // What the database took is not the node's silence.
                        heard = Instant::now();
                    }
                }
                () = self.asked.notified() => {
                    questions.retain(|_, answer: &mut oneshot::Sender<_>| !answer.is_closed());
                    while let Some(question) = self.next_question() {
                        asked += 1;
                        questions.insert(asked, question.answer);
                        let explain = link::Explain { id: asked, ..question.explain };
                        peer.send(down::Body::Explain(explain)).await?;
                    }
                }
                _ = changed.changed() => { due.get_or_insert(Instant::now() + COALESCE); }
                () = sleep_until(due) => {
                    due = None;
                    whole = known == 0;
                    let news = self.send_changes(peer, known).await?;
                    known = news.generation;
                    // Quotas may have been lowered just before the last connection was lost.
                    let users = news.metered.as_deref().filter(|_| trimmed);
                    trimmed = true;
                    let lowered = in_time(async {
                        Ok(lease::trim(&self.store, node.key(), users).await?)
                    });
                    self.take_back(peer, node, lowered.await?).await?;
                }
                _ = looked.changed() => in_time(self.command(peer, node)).await?,
                _ = look.tick() => {
                    // While it was sent something, what it said was only taken in.
                    if heard.elapsed().min(peer.heard().elapsed()) > SILENT {
                        return Err(Gone::Refused("silent for 20 s".into()));
                    }
                    in_time(self.command(peer, node)).await?;
                }
            }
        }
    }

    /// Has a node hold less, unless it is about to tell what it still holds.
    async fn take_back(
        &self,
        peer: &mut Peer,
        node: &mut Node,
        mut grant: link::LeaseGrant,
    ) -> Result<(), Gone> {
        grant.leases.retain(|lease| node.taken_back.insert(lease.user));
        if !grant.leases.is_empty() {
            peer.send(down::Body::LeaseGrant(grant)).await?;
        }
        Ok(())
    }

    fn next_question(&self) -> Option<Question> {
        self.questions.lock().ok()?.pop_front()
    }

    /// Brings a node from one generation to the present one, and says what it was told.
    async fn send_changes(&self, peer: &mut Peer, known: u64) -> Result<Arc<News>, Gone> {
        let began = Instant::now();
        loop {
            let news = in_time(async { Ok(self.publisher.news(known).await) });
            match news.await? {
                Ok(news) => {
                    if news.generation != known {
                        peer.send_frame(&news.frame).await?;
                    }
                    return Ok(news);
                }
                Err(error) if began.elapsed() > PATIENCE => return Err(Gone::Database(error)),
                Err(_) => tokio::time::sleep(COALESCE).await,
            }
        }
    }

    async fn heard(&self, peer: &mut Peer, node: &mut Node, body: up::Body) -> Result<(), Gone> {
        match body {
            up::Body::Explained(_) => {}
            up::Body::Hello(_) => return Err(Gone::Refused("a second hello".into())),
            up::Body::Applied(applied) => {
                self.told(node, applied.generation, String::new()).await?;
            }
            up::Body::Refused(refused) => {
                let reasons = refused.reasons.join("; ");
                tracing::warn!(node = %node.row.name, generation = refused.generation, %reasons, "a node refuses the policy");
                self.told(node, 0, reasons).await?;
            }
            up::Body::Heartbeat(beat) => self.beat(node, &beat).await?,
            up::Body::Report(report) => {
                usage::apply(&self.store, node.row.id, &report).await?;
                for usage in report.users.iter().filter(|usage| usage.held.is_some()) {
                    node.taken_back.remove(&usage.user);
                }
                self.counts.reports.fetch_add(1, Relaxed);
                let ack = link::ReportAck { boot: report.boot, sequence: report.sequence };
                peer.send(down::Body::ReportAck(ack)).await?;
            }
            up::Body::Records(records) => {
                let sequence = usage::store_records(&self.store, node.row.id, &records).await?;
                self.counts.records.fetch_add(records.records.len() as u64, Relaxed);
                let ack = link::RecordAck { boot: records.boot, sequence };
                peer.send(down::Body::RecordAck(ack)).await?;
            }
            up::Body::Live(live) => self.live(node, &live).await?,
            up::Body::LeaseRequest(request) => {
                // Who is to give some back asks again when that is known.
                let users: Vec<u64> = request
                    .users
                    .into_iter()
                    .filter(|user| !node.taken_back.contains(user))
                    .collect();
                for users in users.chunks(ROWS) {
                    let (grant, asks) = lease::grant(&self.store, node.key(), users).await?;
                    peer.send(down::Body::LeaseGrant(grant)).await?;
                    if asks {
                        self.look();
                    }
                }
            }
        }
        Ok(())
    }

    async fn told(&self, node: &mut Node, generation: u64, refusal: String) -> Result<(), DbErr> {
        if generation > 0 {
            node.row.generation = generation.cast_signed();
        }
        node.row.refusal = refusal;
        node::Entity::update_many()
            .col_expr(node::Column::Refusal, node.row.refusal.clone().into())
            .col_expr(node::Column::Generation, node.row.generation.into())
            .filter(node::Column::Id.eq(node.row.id))
            .filter(node::Column::Boot.eq(node.row.boot))
            .exec(self.store.db())
            .await
            .map(drop)
    }

    async fn beat(&self, node: &mut Node, beat: &link::Heartbeat) -> Result<(), DbErr> {
        let at = now();
        let row = heartbeat::ActiveModel {
            node_id: Set(node.row.id),
            boot: Set(node.row.boot),
            at: Set(at),
            sessions: Set(beat.sessions.cast_signed()),
            cpu_us: Set(beat.cpu_us.cast_signed()),
            memory: Set(beat.memory.cast_signed()),
            up: Set(beat.up.cast_signed()),
            down: Set(beat.down.cast_signed()),
            ready: Set(beat.ready),
            uptime: Set(beat.uptime.cast_signed()),
        };
        heartbeat::Entity::insert(row).exec_without_returning(self.store.db()).await?;
        boot::Entity::update_many()
            .col_expr(boot::Column::SeenAt, at.into())
            .filter(boot::Column::NodeId.eq(node.row.id))
            .filter(boot::Column::Boot.eq(node.row.boot))
            .exec(self.store.db())
            .await?;
        node.seen_at = at;
        let mut row = node::Entity::update_many()
            .col_expr(node::Column::SeenAt, at.into())
            .col_expr(node::Column::Connected, true.into())
            .filter(node::Column::Id.eq(node.row.id));
        // While one boot drains, the node is the other.
        if beat.ready {
            row = row
                .col_expr(node::Column::Boot, node.row.boot.into())
                .col_expr(node::Column::Version, node.row.version.clone().into())
                .col_expr(node::Column::Generation, node.row.generation.into())
                .col_expr(node::Column::Refusal, node.row.refusal.clone().into());
        }
        row.exec(self.store.db()).await.map(drop)
    }

    /// Puts a boot's sessions in place of those it had before.
    async fn live(&self, node: &Node, live: &link::Live) -> Result<(), DbErr> {
        let ((id, boot), told_at) = (node.key(), now());
        let replace = || async {
            let db = self.store.db().begin().await?;
            delete_sessions(&db, (id, boot)).await?;
            for part in live.sessions.chunks(ROWS) {
                let rows = part.iter().map(|live| session::ActiveModel {
                    node_id: Set(id),
                    boot: Set(boot),
                    session: Set(live.id.cast_signed()),
                    user_id: Set(live.user.cast_signed()),
                    told_at: Set(told_at),
                    body: Set(String::from_utf8_lossy(&live.json).into_owned()),
                });
                session::Entity::insert_many(rows).exec_without_returning(&db).await?;
            }
            db.commit().await
        };
        retry(replace).await
    }

    async fn last_command(&self) -> Result<i64, DbErr> {
        let last = asked::Entity::find().order_by_desc(asked::Column::Id).one(self.store.db());
        Ok(last.await?.map_or(0, |row| row.id))
    }

    /// Passes on what is asked of a node since the last time, on this connection or on one before.
    async fn command(&self, peer: &mut Peer, node: &mut Node) -> Result<(), Gone> {
        let rows = asked::Entity::find()
            .filter(asked::Column::Id.gt(node.command))
            .filter(asked::Column::NodeId.is_in([0, node.row.id]))
            .filter(asked::Column::Boot.is_in([0, node.row.boot]))
            .order_by_asc(asked::Column::Id)
            .all(self.store.db())
            .await;
        // The database may be away for a moment; commands wait.
        let Ok(rows) = rows else { return Ok(()) };
        for row in rows {
            node.command = row.id;
            let argument = row.argument.cast_unsigned();
            let kind = match Command::of(&row) {
                Some(Command::EndSession) => command::Kind::EndSession(argument),
                Some(Command::EndUser) => command::Kind::EndUser(argument),
                Some(Command::Drain) => command::Kind::Drain(true),
                Some(Command::TakeBack) if node.taken_back.contains(&argument) => continue,
                Some(Command::TakeBack) => {
                    let lowered = lease::take_back(&self.store, node.key(), argument).await?;
                    self.take_back(peer, node, lowered).await?;
                    continue;
                }
                None => continue,
            };
            let command = link::Command { kind: Some(kind), id: row.id.cast_unsigned() };
            peer.send(down::Body::Command(command)).await?;
        }
        let status = node::Entity::find_by_id(node.row.id).one(self.store.db()).await;
        if let Ok(Some(row)) = status {
            if row.status != "active" {
                return Err(Gone::Refused("it was revoked".into()));
            }
            if node.shown.as_ref().is_some_and(|shown| *shown != row.certificate) {
                return Err(Gone::Refused("its identity was replaced".into()));
            }
        }
        Ok(())
    }

    async fn disconnected(&self, node: &Node) -> Result<(), DbErr> {
        // The same boot may be back already, here or elsewhere, before this connection was seen to be dead.
        let last = boot::Entity::find_by_id(node.key()).one(self.store.db()).await?;
        if last.is_some_and(|boot| boot.seen_at != node.seen_at) {
            return Ok(());
        }
        let gone = node::Entity::update_many()
            .col_expr(node::Column::Connected, false.into())
            .filter(node::Column::Id.eq(node.row.id))
            .filter(node::Column::Boot.eq(node.row.boot));
        gone.exec(self.store.db()).await?;
        delete_sessions(self.store.db(), node.key()).await
    }
}

/// A step that asks the database, which may hang.
async fn in_time<T>(step: impl Future<Output = Result<T, Gone>>) -> Result<T, Gone> {
    within(STEP, step).await
}

async fn within<T>(time: Duration, step: impl Future<Output = Result<T, Gone>>) -> Result<T, Gone> {
    let hangs = || Gone::Database(DbErr::Custom("the database did not answer in time".into()));
    timeout(time, step).await.map_err(|_| hangs())?
}

async fn delete_sessions(db: &impl ConnectionTrait, (node, boot): Boot) -> Result<(), DbErr> {
    session::Entity::delete_many()
        .filter(session::Column::NodeId.eq(node))
        .filter(session::Column::Boot.eq(boot))
        .exec(db)
        .await
        .map(drop)
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // A socket of an earlier run; one that is served says so.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("{}: another control plane listens there", path.display());
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)
        .map_err(|error| anyhow::anyhow!("{}: {error}; set link.unix", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// The default place of the socket in a state directory.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}

struct Node {
    /// As this boot of it is.
    row: node::Model,
    /// The fingerprint of the certificate it has shown; `None` on this host's socket.
    shown: Option<String>,
    /// When this connection last said that the boot was seen.
    seen_at: i64,
    /// The last command that this boot was told.
    command: i64,
    /// Users of whose leases some was taken back, until it has told what it still holds.
    taken_back: HashSet<u64>,
}

impl Node {
    fn key(&self) -> Boot {
        (self.row.id, self.row.boot)
    }
}
