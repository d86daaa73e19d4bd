//! One immutable policy with its users.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use culvert_api::policy::{Access, Hours, RuleAction, Weekday};
use culvert_proto::{Protocol, Target};
use jiff::tz::TimeZone;

use super::{NetSet, Ports, TargetSet, User, embedded_v4, index::RuleIndex};
use crate::settings::Settings;

/// Snapshots in memory.
static ALIVE: AtomicUsize = AtomicUsize::new(0);

/// How many snapshots are in memory: the one in force, and those somebody still looks at.
pub fn snapshots_alive() -> usize {
    ALIVE.load(Relaxed)
}

/// Counts the snapshot it is part of.
#[derive(Debug)]
pub(super) struct Alive(());

impl Alive {
    pub(super) fn new() -> Self {
        ALIVE.fetch_add(1, Relaxed);
        Self(())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Relaxed);
    }
}

/// Everything a session is judged by.
#[derive(Debug)]
pub struct Snapshot {
    /// Its number; each published snapshot has a higher one.
    pub generation: u64,
    /// What records call it: the control plane's generation, or the number where there is none.
    pub version: u64,
    /// Users.
    pub directory: Directory,
    /// Values that may change while sessions run: deadlines, limits.
    pub settings: Settings,
    /// All that is not of users; shared with the snapshot before when it did not change.
    pub(super) matchers: Arc<Matchers>,
    pub(super) own: OwnAddresses,
    pub(super) _alive: Alive,
}

/// A policy without its users, compiled.
#[derive(Debug)]
pub(super) struct Matchers {
    /// A hash of what it was compiled from.
    pub(super) fingerprint: blake3::Hash,
    pub(super) default: Access,
    pub(super) deny_ports: Box<[u16]>,
    /// How many filters.
    pub(super) filters: usize,
    /// Clients that may connect; `None` is all.
    pub(super) whitelist: Option<NetSet>,
    pub(super) allow_internal: NetSet,
    /// Filters, grouped by their ports.
    pub(super) black: Box<[(Ports, TargetSet)]>,
    pub(super) white: Box<[(Ports, TargetSet)]>,
    pub(super) rules: Box<[Rule]>,
    /// Which of them can match, if they are many.
    pub(super) index: Option<RuleIndex>,
    /// The zone of their times.
    pub(super) zone: TimeZone,
    pub(super) direct: Arc<Upstream>,
}

impl Snapshot {
    /// Whether a client may connect at all.
    pub fn admits(&self, client: IpAddr) -> bool {
        self.matchers.whitelist.as_ref().is_none_or(|list| list.contains(client))
    }

    /// How many rules there are.
    pub fn rules(&self) -> usize {
        self.matchers.rules.len()
    }

    /// How many filters there are.
    pub fn filters(&self) -> usize {
        self.matchers.filters
    }
}

/// A compiled rule.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: Arc<str>,
    pub(super) users: Option<Box<[Arc<str>]>>,
    pub(super) groups: Option<Box<[u64]>>,
    pub(super) clients: Option<NetSet>,
    pub(super) protocols: Option<Box<[Protocol]>>,
    pub(super) targets: Option<TargetSet>,
    pub(super) ports: Ports,
    pub(super) time: Option<Box<[Hours]>>,
    pub(super) weekdays: Option<Box<[Weekday]>>,
    pub(super) action: Action,
}

/// What a compiled rule does.
#[derive(Debug)]
pub(super) enum Action {
    Allow(Arc<Upstream>),
    Deny,
    Redirect(Target, Arc<Upstream>),
}

impl Action {
    pub(super) fn of(kind: RuleAction, to: Option<Target>, upstream: Arc<Upstream>) -> Self {
        match (kind, to) {
            (RuleAction::Redirect, Some(target)) => Self::Redirect(target, upstream),
            (RuleAction::Allow, _) => Self::Allow(upstream),
            _ => Self::Deny,
        }
    }
}

/// A way out.
#[derive(Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Its name; `direct` when no rule names one.
    pub name: Arc<str>,
    /// The local address to dial from.
    pub egress: Option<IpAddr>,
}

/// The addresses this node listens on, which nobody may reach through it.
#[derive(Debug, Clone, Default)]
pub struct OwnAddresses {
    /// Bound sockets.
    pub listeners: Vec<SocketAddr>,
    /// Addresses of the host's interfaces.
    pub local: Vec<IpAddr>,
}

impl OwnAddresses {
    /// Whether an address is one of this host's.
    pub fn is_here(&self, ip: IpAddr) -> bool {
        self.local.contains(&ip)
            || embedded_v4(ip).is_some_and(|inner| self.local.contains(&inner.into()))
    }

    /// Whether a target is one of our own listeners.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let ip = embedded_v4(address.ip()).map_or(address.ip(), IpAddr::from);
        let here = || ip.is_loopback() || ip.is_unspecified() || self.local.contains(&ip);
        self.listeners.iter().any(|own| {
            own.port() == address.port()
                && (own.ip() == ip || (own.ip().is_unspecified() && here()))
                || (own.port() == address.port() && own.ip().is_loopback() && ip.is_unspecified())
        })
    }
}

/// Number of shards of the directory.
pub(super) const SHARDS: usize = 256;

/// Some of the users, by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Shard {
    users: HashMap<Box<[u8]>, Arc<User>, ahash::RandomState>,
    /// When they expire, in order; made when first asked for.
    expiries: OnceLock<Box<[i64]>>,
}

impl Shard {
    /// For as many users.
    pub(super) fn with_capacity(users: usize) -> Self {
        let users = HashMap::with_capacity_and_hasher(users, ahash::RandomState::new());
        Self { users, expiries: OnceLock::new() }
    }

    pub(super) fn get(&self, name: &[u8]) -> Option<&Arc<User>> {
        self.users.get(name)
    }

    pub(super) fn len(&self) -> usize {
        self.users.len()
    }

    pub(super) fn insert(&mut self, user: User) {
        self.expiries.take();
        self.users.insert(user.name.as_bytes().into(), Arc::new(user));
    }

    pub(super) fn remove(&mut self, name: &[u8]) {
        self.expiries.take();
        self.users.remove(name);
    }

    fn next_expiry(&self, now: i64) -> Option<i64> {
        let expiries = self.expiries.get_or_init(|| {
            let mut expiries: Vec<i64> =
                self.users.values().filter_map(|user| user.expires).collect();
            expiries.sort_unstable();
            expiries.into()
        });
        expiries.get(expiries.partition_point(|at| *at <= now)).copied()
    }
}

/// The users, in shards so that an edit rebuilds one and shares the others.
#[derive(Debug)]
pub struct Directory {
    pub(super) shards: Box<[Arc<Shard>]>,
}

impl Directory {
    /// A directory without users.
    pub(super) fn empty() -> Self {
        let shard = Arc::new(Shard::default());
        Self { shards: vec![shard; SHARDS].into() }
    }

    /// The user of a name, compared byte by byte and whole.
    pub fn find(&self, name: &[u8]) -> Option<&Arc<User>> {
        self.shards[shard_of(name)].get(name)
    }

    /// A user whose login takes as long as one under an unknown name is to take: for a name, the same one
    /// each time.
    pub fn alike(&self, name: &[u8]) -> Option<&Arc<User>> {
        let (before, from) = self.shards.split_at(shard_of(name));
        from.iter().chain(before).find_map(|shard| shard.users.values().next())
    }

    /// All users.
    pub fn users(&self) -> impl Iterator<Item = &Arc<User>> {
        self.shards.iter().flat_map(|shard| shard.users.values())
    }

    /// When the next of them expires after a time, both in seconds since 1970.
    pub fn next_expiry(&self, now: i64) -> Option<i64> {
        self.shards.iter().filter_map(|shard| shard.next_expiry(now)).min()
    }

    /// How many users there are.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names stay in their shard as long as the process runs.
pub(super) fn shard_of(name: &[u8]) -> usize {
    static HASHER: OnceLock<ahash::RandomState> = OnceLock::new();
    HASHER.get_or_init(ahash::RandomState::new).hash_one(name) as usize % SHARDS
}
