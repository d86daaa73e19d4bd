//! One client connection and what it carries: detect → negotiate → authenticate → authorize → dial →
//! relay → record.
//!
//! Each stage yields a value that only it can make: the connection is accepted, a [`Request`] comes
//! out of the handshake, a [`Permit`] out of the policy, a connection out of the dial, an [`End`] out
//! of the relay. An HTTP session goes round once a request (an *exchange*), each with its own permit,
//! upstream and record. A stage's memory is freed when it is over, so that a relay holds little.

mod establish;
mod exchange;
mod live;
mod login;
mod negotiate;
mod record;

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use culvert_proto::{Command, Handshake, Outcome, Protocol, Request};
use culvert_rt::{Accepted, Socket, Watch, either, sleep};

pub use live::{Live, LiveInfo};
pub use record::Record;

use crate::{
    end::{Cause, End, Stage},
    ledger::Meter,
    policy::{Admission, AdmissionError, Held, Permit, User},
    relay::{Allowance, Context, Leg, Until, relay},
    settings::ListenerRules,
    telemetry::protocol_index,
    upstream::Dialled,
    worker::Worker,
};

/// Everything about one client connection.
pub struct Session {
    worker: Rc<Worker>,
    listener: Arc<ListenerRules>,
    client: Socket,
    peer: SocketAddr,
    watch: Watch,
    meter: Rc<Meter>,
    live: Rc<Live>,
    times: Times,
    /// Bytes received and not yet used.
    early: RefCell<Vec<u8>>,
    protocol: Cell<Option<Protocol>>,
    login: RefCell<Option<LoggedIn>>,
    /// The node is full: say so, and no more.
    refused: bool,
    _place: Place,
    /// Bytes that are in records already.
    recorded: Cell<[u64; 2]>,
    /// The end was counted; a session that ends without was ended by a panic.
    ended: Cell<bool>,
}

/// A session's place in the counts of the node and of its client's address.
pub struct Place {
    /// One of the sessions of the client's address.
    pub address: Held,
    /// One of the node's sessions, or of those it only refuses.
    pub node: crate::worker::NodePlace,
}

/// Who uses the session.
struct LoggedIn {
    user: Arc<User>,
    admission: Result<Admission, AdmissionError>,
}

/// When what began.
struct Times {
    accepted: Instant,
    wall: SystemTime,
    requested: Cell<Option<Instant>>,
}

/// An upstream connection and the permit it was made under. Boxed, so that no future holds it twice.
struct Established {
    permit: Permit,
    dialled: Dialled,
    /// Whether it has carried a request before.
    is_used: bool,
}

/// A connection to a target that may carry a further request, for a while.
struct Kept {
    established: Box<Established>,
    since: Instant,
}

/// After that a target, or somebody on the way, may have forgotten a connection.
const KEPT: Duration = Duration::from_secs(30);

impl Kept {
    fn new(established: Box<Established>) -> Self {
        Self { established, since: Instant::now() }
    }

    /// The connection, unless it is too old.
    fn take(self) -> Option<Box<Established>> {
        (self.since.elapsed() < KEPT).then_some(self.established)
    }

    /// Waits until it is of no more use: too old, or the target has ended it or said what nobody asked for.
    async fn spoilt(&self) {
        let left = KEPT.saturating_sub(self.since.elapsed());
        either(sleep(left), self.established.dialled.socket.readable()).await;
    }
}

/// A session from accept to record.
pub fn run(
    worker: Rc<Worker>,
    listener: (usize, Arc<ListenerRules>),
    accepted: Accepted,
    place: Place,
) -> impl Future<Output = ()> {
    // Made before the future, which would otherwise hold every part twice.
    let session = Session::begin(worker, listener, accepted, place);
    async move {
        if let Ok(session) = &session {
            let end = session.serve().await;
            session.close(end);
        }
    }
}

impl Session {
    fn begin(
        worker: Rc<Worker>,
        (index, listener): (usize, Arc<ListenerRules>),
        accepted: Accepted,
        place: Place,
    ) -> io::Result<Self> {
        let client = Socket::from_fd(accepted.fd)?;
        let watch = Watch::new();
        let timeouts = worker.snapshot().settings.timeouts;
        watch.stage(timeouts.handshake, Cause::HandshakeTimeout.code());
        if let Some(lifetime) = timeouts.lifetime {
            watch.life(lifetime, Cause::Lifetime.code());
        }
        let times =
            Times { accepted: Instant::now(), wall: SystemTime::now(), requested: Cell::new(None) };
        let meter = Rc::new(worker.ledger.open().ok_or(io::ErrorKind::QuotaExceeded)?);
        let at = (index, &listener);
        let live = Live::enter(&worker, at, accepted.peer, &watch, &meter, times.accepted);
        if worker.is_draining() {
            // The drain came between accept and now.
            watch.stop(Cause::Drained.code());
        }
        Ok(Self {
            meter,
            client,
            peer: accepted.peer,
            watch,
            live,
            times,
            early: RefCell::default(),
            protocol: Cell::new(None),
            login: RefCell::default(),
            refused: place.node.refusing,
            _place: place,
            recorded: Cell::default(),
            ended: Cell::new(false),
            listener,
            worker,
        })
    }

    async fn serve(&self) -> End {
        let mut handshake = match Box::pin(self.detect()).await {
            Ok(handshake) => handshake,
            Err(end) => return self.record_nothing(end),
        };
        let mut kept = None;
        loop {
            let request = match Box::pin(self.negotiate(&mut *handshake, &mut kept)).await {
                Ok(request) => request,
                // Between two requests, silence or a farewell ends the session well.
                Err(End {
                    cause: Cause::ClientClosed | Cause::ClientReset | Cause::IdleTimeout,
                    stage: Stage::Handshake,
                    ..
                }) if self.live.exchanges() > 0 => {
                    return End::new(Stage::Relay, Cause::Finished);
                }
                Err(end) => return self.record_nothing(end),
            };
            self.live.asked(&request.target, self.user());
            let done = Box::pin(self.carry(handshake, &request, &mut kept)).await;
            handshake = match done {
                Ok(handshake) => handshake,
                Err(end) => return end,
            };
        }
    }

    /// Carries out one request; gives the handshake back if another may follow.
    async fn carry(
        &self,
        mut handshake: Box<dyn Handshake>,
        request: &Request,
        kept: &mut Option<Kept>,
    ) -> Result<Box<dyn Handshake>, End> {
        let mut record = Record::begin(self, request);
        let established = match Box::pin(self.establish(request, &mut record, kept)).await {
            Ok(established) => established,
            Err(end) => {
                let told = Box::pin(self.tell(&mut *handshake, end.cause.outcome())).await;
                record.finish(self, end);
                self.live.exchanged();
                if told.is_ok() && !self.worker.is_draining() && handshake.resume() {
                    self.await_next();
                    return Ok(handshake);
                }
                if told.is_ok() {
                    Box::pin(self.linger()).await;
                }
                return Err(end);
            }
        };
        self.live.connected(&established.permit, established.dialled.address);
        if !self.is_still_allowed(&established.permit) {
            let end = End::new(Stage::Policy, Cause::Revoked);
            let _ = Box::pin(self.tell(&mut *handshake, Outcome::Forbidden)).await;
            record.finish(self, end);
            return Err(end);
        }
        match &request.command {
            Command::Forward(forward) => {
                let again = established.is_used && forward.may_be_sent_again();
                let exchange = self.exchange(&mut *handshake, forward, &established.dialled, again);
                let exchanged = Box::pin(exchange).await;
                record.status = exchanged.status;
                record.finish(self, exchanged.end);
                if exchanged.again {
                    // The target had ended the kept connection (RFC 9110 section 9.2.2).
                    drop(established);
                    return Box::pin(self.carry(handshake, request, kept)).await;
                }
                self.live.exchanged();
                if !exchanged.client_stays || self.worker.is_draining() {
                    drop(established);
                    // A next request may have come meanwhile: unread, it would reset the answer.
                    if exchanged.unread || exchanged.end.cause == Cause::Finished {
                        Box::pin(self.linger()).await;
                    }
                    return Err(exchanged.end);
                }
                *kept = exchanged.upstream_stays.then(|| Kept::new(established));
                self.await_next();
                Ok(handshake)
            }
            _ => {
                let end = Box::pin(self.tunnel(handshake, &established.dialled)).await;
                record.finish(self, end);
                Err(end)
            }
        }
    }

    /// A snapshot published during the dial could not judge what was not connected yet.
    fn is_still_allowed(&self, permit: &Permit) -> bool {
        let snapshot = self.worker.snapshot();
        permit.generation() == snapshot.generation || self.live.is_allowed(&snapshot)
    }

    /// CONNECT: says yes and relays until both directions have ended.
    async fn tunnel(&self, mut handshake: Box<dyn Handshake>, dialled: &Dialled) -> End {
        let Ok(bound) = dialled.socket.local_addr() else {
            return End::new(Stage::Dial, Cause::UpstreamReset);
        };
        let outcome = Outcome::Connected { bound };
        if let Err(end) = Box::pin(self.tell(&mut *handshake, outcome)).await {
            return end;
        }
        drop(handshake);
        let client = Leg::client(&self.client, self.early.take());
        let upstream = Leg::upstream(&dialled.socket, Vec::new());
        let end = self.relay(&client, &upstream).await;
        if end.cause.cuts() {
            dialled.socket.reset_on_close();
        }
        end
    }

    async fn relay(&self, client: &Leg<'_>, upstream: &Leg<'_>) -> End {
        let timeouts = self.worker.snapshot().settings.timeouts;
        self.watch.stage_over();
        self.watch.silence(timeouts.idle, Cause::IdleTimeout.code());
        let allowance = self.allowance();
        let context = self.context(&allowance, timeouts.half_close);
        #[cfg(feature = "faults")]
        if self.user().is_some_and(|user| &*user.name == "panic-relay") {
            let cut = async {
                culvert_rt::sleep(Duration::from_millis(100)).await;
                panic!("a fault that a test asked for")
            };
            culvert_rt::join(cut, relay(client, upstream, &context, Until::BothEnd)).await;
        }
        let relayed = relay(client, upstream, &context, Until::BothEnd).await;
        if relayed.spliced {
            self.worker.counters.spliced.add(1);
        }
        End::new(Stage::Relay, self.stopped().unwrap_or(relayed.cause))
    }

    fn context<'a>(&'a self, allowance: &'a Allowance<'a>, half_close: Duration) -> Context<'a> {
        Context { watch: &self.watch, meter: &self.meter, allowance, half_close }
    }

    fn allowance(&self) -> Allowance<'_> {
        let user = self.login.borrow().as_ref().map(|login| login.user.shared.clone());
        let shared = &self.worker.shared;
        Allowance::new(user, &shared.everyone, &shared.wanted)
    }

    /// Between two requests of a connection: the idle deadline holds, then the handshake's.
    fn await_next(&self) {
        self.live.rests();
        let timeouts = self.worker.snapshot().settings.timeouts;
        self.watch.silence_over();
        self.watch.stage(timeouts.idle, Cause::IdleTimeout.code());
    }

    /// Why the session was stopped from outside, if it was.
    fn stopped(&self) -> Option<Cause> {
        self.watch.stopped().map(|stopped| Cause::of_code(stopped.0))
    }

    fn user(&self) -> Option<Arc<User>> {
        self.login.borrow().as_ref().map(|login| login.user.clone())
    }

    /// Every session leaves a record, also one that never got to a request.
    fn record_nothing(&self, end: End) -> End {
        // A client that leaves after its login was refused was refused.
        let end = match end.cause {
            Cause::ClientClosed | Cause::ClientReset => self.login_end().unwrap_or(end),
            _ => end,
        };
        Record::nothing(self).finish(self, end);
        end
    }

    fn close(&self, end: End) {
        self.ended.set(true);
        let counters = &self.worker.counters;
        counters.sessions[protocol_index(self.protocol.get())][end.cause as usize].add(1);
        counters.session_duration.record(self.times.accepted.elapsed());
        // What was cut must not look finished. Before the relay there is nothing to be cut.
        if end.cause.cuts() && end.stage == Stage::Relay {
            self.client.reset_on_close();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended.get() && std::thread::panicking() {
            let end = End::new(Stage::Relay, Cause::Panicked);
            self.worker.counters.sessions[protocol_index(self.protocol.get())][end.cause as usize]
                .add(1);
            Record::nothing(self).finish(self, end);
            self.client.reset_on_close();
        }
    }
}
