//! What a worker knows of its running sessions: to list them, to judge them again, to end them.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::Instant,
};

use culvert_proto::{Host, Name, Protocol, Target};
use culvert_rt::Watch;
use serde::Serialize;

use crate::{
    end::Cause,
    ledger::{Direction, Meter},
    policy::{Decision, Held, Permit, Query, Snapshot, User},
    settings::ListenerRules,
    telemetry::LoginResult,
    worker::{Worker, unix_now},
};

/// One running session, as its worker's list has it.
pub struct Live {
    /// Unique within the node's life: the worker in the upper 16 bits.
    pub id: u64,
    /// The listener's place among the listeners, and its rules when the session began.
    index: usize,
    listener: Arc<ListenerRules>,
    peer: SocketAddr,
    started: Instant,
    stop: Box<dyn Fn(u8)>,
    protocol: Cell<Option<Protocol>>,
    asked: RefCell<Option<Asked>>,
    exchanges: Cell<u32>,
    rests: Cell<bool>,
    login: Cell<Option<LoginResult>>,
    device: RefCell<Weak<Held>>,
    meter: Rc<Meter>,
    worker: Rc<Worker>,
}

struct Asked {
    target: Target,
    user: Option<Arc<User>>,
    dialled: Option<SocketAddr>,
    rule: Option<Arc<str>>,
    generation: u64,
    /// When, in seconds since 1970.
    at: i64,
}

impl Live {
    /// Enters a session into its worker's list.
    pub(super) fn enter(
        worker: &Rc<Worker>,
        (index, listener): (usize, &Arc<ListenerRules>),
        peer: SocketAddr,
        watch: &Watch,
        meter: &Rc<Meter>,
        started: Instant,
    ) -> Rc<Self> {
        let live = Rc::new(Self {
            id: worker.next_session_id(),
            index,
            listener: listener.clone(),
            peer,
            started,
            stop: Box::new(watch.stopper()),
            protocol: Cell::new(None),
            asked: RefCell::default(),
            exchanges: Cell::new(0),
            rests: Cell::new(false),
            login: Cell::new(None),
            device: RefCell::default(),
            meter: meter.clone(),
            worker: worker.clone(),
        });
        worker.enter(&live);
        live
    }

    /// Ends the session.
    pub fn stop(&self, cause: Cause) {
        (self.stop)(cause.code());
    }

    /// Whether the session moves bytes, or is about to.
    pub fn has_asked(&self) -> bool {
        self.asked.borrow().is_some() && !self.rests.get()
    }

    /// Between two requests.
    pub(super) fn rests(&self) {
        self.rests.set(true);
    }

    pub(super) fn speaks(&self, protocol: Protocol) {
        self.protocol.set(Some(protocol));
    }

    pub(super) fn login_result(&self, result: LoginResult) {
        self.login.set(Some(result));
    }

    pub(super) fn last_login(&self) -> Option<LoginResult> {
        self.login.get()
    }

    /// The client's address, as one of the user's devices.
    pub(super) fn comes_from(&self, device: Option<&Rc<Held>>) {
        self.device.replace(device.map_or_else(Weak::new, Rc::downgrade));
    }

    pub(super) fn asked(&self, target: &Target, user: Option<Arc<User>>) {
        let (target, at) = (target.clone(), unix_now());
        let asked = Asked { target, user, dialled: None, rule: None, generation: 0, at };
        self.asked.replace(Some(asked));
        self.rests.set(false);
    }

    pub(super) fn connected(&self, permit: &Permit, dialled: SocketAddr) {
        if let Some(asked) = &mut *self.asked.borrow_mut() {
            asked.dialled = Some(dialled);
            asked.rule = permit.rule().cloned();
            asked.generation = permit.version();
            asked.at = permit.at();
        }
    }

    pub(super) fn exchanged(&self) {
        self.exchanges.set(self.exchanges.get() + 1);
    }

    pub(super) fn exchanges(&self) -> u32 {
        self.exchanges.get()
    }

    /// Whether the client's address had to give way to another of its user.
    pub fn is_evicted(&self) -> bool {
        self.device.borrow().upgrade().is_some_and(|device| !device.is_current())
    }

    /// Whether the session's listener takes clients without a login.
    pub fn may_be_nobody(&self, snapshot: &Snapshot) -> bool {
        let rules = snapshot.settings.listeners.get(self.index);
        rules.is_some_and(|rules| rules.login.allows_none())
    }

    /// Whether a snapshot still allows what the session does. A session that has not connected yet will
    /// be judged when it does.
    pub fn is_allowed(&self, snapshot: &Snapshot) -> bool {
        let asked = self.asked.borrow();
        let client = self.peer.ip();
        let rules = snapshot.settings.listeners.get(self.index);
        if !snapshot.admits(client) || !rules.is_some_and(|rules| rules.admits(client)) {
            return false;
        }
        let Some(asked) = &*asked else { return true };
        if asked.user.is_none() && !self.may_be_nobody(snapshot) {
            return false;
        }
        let user = match &asked.user {
            Some(known) => match snapshot.directory.find(known.name.as_bytes()) {
                Some(user) if Arc::ptr_eq(&user.credential, &known.credential) => Some(user),
                _ => return false,
            },
            None => None,
        };
        let Some(protocol) = self.protocol.get() else { return true };
        // That a rule's time is over ends nothing that began in it.
        let query = Query { user, client, protocol, target: &asked.target, at: asked.at };
        let Some(dialled) = asked.dialled else {
            return snapshot.judge_client(query, unix_now()).is_none();
        };
        // Whatever name is asked for, the address in use is the one to be judged.
        let mut resolved: Vec<(Name, Arc<[std::net::IpAddr]>)> = Vec::new();
        if let Host::Name(name) = &asked.target.host {
            resolved.push((name.clone(), [dialled.ip()].into()));
        }
        loop {
            match snapshot.authorize(query, &resolved, unix_now()) {
                Decision::Permit(_) => return true,
                Decision::Denied(_) => return false,
                Decision::NeedsAddresses(name)
                    if resolved.iter().any(|(known, _)| *known == name) =>
                {
                    return false;
                }
                Decision::NeedsAddresses(name) => resolved.push((name, [dialled.ip()].into())),
            }
        }
    }

    /// Whose it is; 0 is nobody's.
    pub fn user_id(&self) -> u64 {
        let asked = self.asked.borrow();
        asked.as_ref().and_then(|asked| asked.user.as_ref()).map_or(0, |user| user.id.0)
    }

    /// What is shown of the session.
    pub fn info(&self) -> LiveInfo {
        let asked = self.asked.borrow();
        let asked = asked.as_ref();
        LiveInfo {
            id: self.id,
            listener: self.listener.name.clone(),
            protocol: self.protocol.get().map(Protocol::name),
            client: self.peer,
            user_id: self.user_id(),
            user: asked.and_then(|asked| asked.user.as_ref()).map(|user| user.name.clone()),
            target: asked.map(|asked| asked.target.to_string()),
            address: asked.and_then(|asked| asked.dialled),
            rule: asked.and_then(|asked| asked.rule.clone()),
            generation: asked.map_or(0, |asked| asked.generation),
            bytes_up: self.meter.done(Direction::Up),
            bytes_down: self.meter.done(Direction::Down),
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.worker.leave(self.id);
    }
}

/// A running session, as `/sessions` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct LiveInfo {
    /// Its number.
    pub id: u64,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The client's protocol, once known.
    pub protocol: Option<&'static str>,
    /// The client.
    pub client: SocketAddr,
    /// The user's number; 0 is nobody.
    #[serde(skip)]
    pub user_id: u64,
    /// The user.
    pub user: Option<Arc<str>>,
    /// What was asked for.
    pub target: Option<String>,
    /// What is connected.
    pub address: Option<SocketAddr>,
    /// The rule that decided.
    pub rule: Option<Arc<str>>,
    /// The snapshot that decided.
    pub generation: u64,
    /// Bytes to targets so far.
    pub bytes_up: u64,
    /// Bytes to the client so far.
    pub bytes_down: u64,
    /// Its age.
    pub seconds: f64,
}
