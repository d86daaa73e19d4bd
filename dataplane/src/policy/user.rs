//! A user as the workers see one, and what all sessions of the user share.

use std::{
    net::IpAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
};

use culvert_api::policy::{self as api, Status};

use crate::ledger::{Direction, Lease};

use super::{Bucket, Credential, Held, NetSet, Table, TableError, client_key};

/// A user's number. In file mode it is a hash of the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserId(pub u64);

/// One user of one snapshot.
#[derive(Debug)]
pub struct User {
    /// Number.
    pub id: UserId,
    /// Name, as logged in with.
    pub name: Arc<str>,
    /// Password hash, and the password once it was verified; kept while the hash stays the same.
    pub credential: Arc<Credential>,
    /// Whether logging in is allowed.
    pub status: Status,
    /// Seconds since 1970 at which the user expires.
    pub expires: Option<i64>,
    /// Hashes of the groups' names, for rules.
    pub(super) groups: Box<[u64]>,
    /// Where clients may come from; `None` is anywhere.
    pub(super) sources: Option<NetSet>,
    /// The address to dial from.
    pub egress: Option<IpAddr>,
    /// What all sessions of the user share, over all workers and snapshots.
    pub shared: Arc<UserUse>,
    /// A hash of all the above, to tell an unchanged user.
    pub(super) fingerprint: u64,
    pub(super) limits: api::Limits,
}

impl User {
    /// Whether the user may have sessions at a time (seconds since 1970).
    pub fn is_active(&self, now: i64) -> bool {
        self.status == Status::Active && self.expires.is_none_or(|expires| now < expires)
    }

    /// Whether the user may come from an address.
    pub fn comes_from(&self, client: IpAddr) -> bool {
        self.sources.as_ref().is_none_or(|sources| sources.contains(client))
    }
}

/// What all sessions of a user share, or all sessions of the node.
#[derive(Debug)]
pub struct UserUse {
    /// What of the user's quota may be moved.
    pub lease: Arc<Lease>,
    /// Bytes a second to targets.
    up: Bucket,
    /// Bytes a second to the client.
    down: Bucket,
    new_sessions: Bucket,
    sessions: AtomicU32,
    sessions_max: AtomicU32,
    devices: arc_swap::ArcSwapOption<Table>,
    devices_max: AtomicU32,
    evict_oldest: AtomicBool,
}

/// A session's place among a user's sessions, given back when dropped.
#[derive(Debug)]
pub struct Admission {
    user: Arc<UserUse>,
    /// The client address as one of the user's devices, if those are limited.
    pub device: Option<Rc<Held>>,
}

/// Why a user gets no further session now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdmissionError {
    /// Too many at once.
    Sessions,
    /// Too many new ones a second.
    NewSessions,
    /// Too many client addresses at once.
    Devices,
}

impl UserUse {
    /// Of a user (0: of the node as a whole), without limits.
    pub fn new(user: UserId) -> Self {
        Self {
            lease: Lease::new(user.0),
            up: Bucket::default(),
            down: Bucket::default(),
            new_sessions: Bucket::default(),
            sessions: AtomicU32::new(0),
            sessions_max: AtomicU32::new(u32::MAX),
            devices: arc_swap::ArcSwapOption::empty(),
            devices_max: AtomicU32::new(0),
            evict_oldest: AtomicBool::new(false),
        }
    }

    /// The bytes a second of a direction.
    pub fn bucket(&self, direction: Direction) -> &Bucket {
        match direction {
            Direction::Up => &self.up,
            Direction::Down => &self.down,
        }
    }

    /// Counts a new session; whether there may be one more this second.
    pub fn begin_session(&self, now: u64) -> bool {
        self.new_sessions.try_take(now)
    }

    /// Applies limits; they hold from now on, for running sessions too (rates) or for new ones.
    pub fn apply(&self, limits: &api::Limits) {
        let rate = |rate: Option<culvert_api::ByteRate>| rate.map_or(0, |rate| rate.0);
        let burst = |rate: u64| limits.burst.map_or(rate / 10, |burst| burst.0);
        let (up, down) = (rate(limits.up), rate(limits.down));
        self.up.set(up, burst(up));
        self.down.set(down, burst(down));
        self.lease.set_metered(limits.metered);
        let new = limits.new_sessions_per_second.unwrap_or(0).into();
        self.new_sessions.set(new, new);
        self.sessions_max.store(limits.sessions.unwrap_or(u32::MAX), Relaxed);
        self.evict_oldest.store(limits.evict_oldest, Relaxed);
        let devices = limits.devices.unwrap_or(0);
        if self.devices_max.swap(devices, Relaxed) != devices {
            // Sessions that run keep their place in the old table; new ones are counted anew.
            let table = (devices > 0).then(|| Arc::new(Table::exact(devices as usize)));
            self.devices.store(table);
        }
    }

    /// Asks for a place for one more session from an address; `evicted` is told if another address of the
    /// user may have had to give way: its sessions are to end.
    ///
    /// # Errors
    /// A limit is reached; nobody had to give way then.
    pub fn admit(
        self: &Arc<Self>,
        client: IpAddr,
        now: u64,
        evicted: impl FnOnce(),
    ) -> Result<Admission, AdmissionError> {
        if !self.begin_session(now) {
            return Err(AdmissionError::NewSessions);
        }
        let admitted = self.admit_beside(client, now, evicted);
        if admitted.is_err() {
            self.new_sessions.give_back(1);
        }
        admitted
    }

    fn admit_beside(
        self: &Arc<Self>,
        client: IpAddr,
        now: u64,
        evicted: impl FnOnce(),
    ) -> Result<Admission, AdmissionError> {
        let mut has_evicted = false;
        let device = match &*self.devices.load() {
            Some(devices) => Some(self.hold_device(devices, client, now, || has_evicted = true)?),
            None => None,
        };
        // Those who give way are about to leave theirs.
        let max = if has_evicted { u32::MAX } else { self.sessions_max.load(Relaxed) };
        if has_evicted {
            evicted();
        }
        let more = |sessions: u32| (sessions < max).then_some(sessions + 1);
        if self.sessions.fetch_update(Relaxed, Relaxed, more).is_err() {
            return Err(AdmissionError::Sessions);
        }
        Ok(Admission { user: self.clone(), device })
    }

    fn hold_device(
        &self,
        devices: &Arc<Table>,
        client: IpAddr,
        now: u64,
        evicted: impl FnOnce(),
    ) -> Result<Rc<Held>, AdmissionError> {
        let client = client_key(client);
        let held = match self.evict_oldest.load(Relaxed) {
            true => devices.hold_or_evict(client, now, evicted),
            false => devices.hold(client, u32::MAX, now),
        };
        held.map(Rc::new).map_err(|error| match error {
            TableError::Full => AdmissionError::Devices,
            TableError::Limit => AdmissionError::Sessions,
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.user.sessions.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(limits: api::Limits) -> Arc<UserUse> {
        let user = Arc::new(UserUse::new(UserId(1)));
        user.apply(&limits);
        user
    }

    fn admit(user: &Arc<UserUse>, client: IpAddr) -> Result<Admission, AdmissionError> {
        user.admit(client, clock(), || panic!("nobody is to give way"))
    }

    #[test]
    fn sessions_are_limited_and_given_back() {
        let user = with(api::Limits { sessions: Some(2), ..api::Limits::default() });
        let client = IpAddr::from([10, 0, 0, 1]);
        let (a, _b) = (admit(&user, client).unwrap(), admit(&user, client).unwrap());
        assert_eq!(admit(&user, client).unwrap_err(), AdmissionError::Sessions);
        drop(a);
        assert!(admit(&user, client).is_ok());
        assert_eq!(user.sessions.load(Relaxed), 1);
    }

    #[test]
    fn devices_are_told_apart() {
        let user = with(api::Limits { devices: Some(2), ..api::Limits::default() });
        let from = |last: u8| admit(&user, IpAddr::from([10, 0, 0, last]));
        let (a, b, again) = (from(1).unwrap(), from(2).unwrap(), from(1).unwrap());
        assert_eq!(from(3).unwrap_err(), AdmissionError::Devices);
        drop(a);
        assert_eq!(from(3).unwrap_err(), AdmissionError::Devices);
        drop(again);
        assert!(from(3).is_ok());
        drop(b);
    }

    #[test]
    fn the_oldest_device_gives_way() {
        let limits = || api::Limits {
            devices: Some(1),
            evict_oldest: true,
            sessions: Some(1),
            ..api::Limits::default()
        };
        let user = with(limits());
        let [one, other] = [1, 2].map(|last| IpAddr::from([10, 0, 0, last]));
        let a = admit(&user, one).unwrap();
        let mut has_evicted = false;
        // It takes the session's place too, which is about to be free.
        let b = user.admit(other, clock(), || has_evicted = true).unwrap();
        assert!(has_evicted && b.device.as_ref().unwrap().is_current());
        assert!(!a.device.as_ref().unwrap().is_current());
        drop(a);
        assert_eq!(admit(&user, other).unwrap_err(), AdmissionError::Sessions);
        // Who may not come now takes nobody's place.
        user.apply(&api::Limits { new_sessions_per_second: Some(1), ..limits() });
        assert!(user.begin_session(clock()));
        assert_eq!(admit(&user, one).unwrap_err(), AdmissionError::NewSessions);
        assert!(b.device.as_ref().unwrap().is_current());
    }

    #[test]
    fn new_sessions_are_limited_by_the_second() {
        let user = with(api::Limits { new_sessions_per_second: Some(3), ..api::Limits::default() });
        let now = clock();
        let admitted =
            (0..10).filter(|_| user.admit(IpAddr::from([10, 0, 0, 1]), now, || ()).is_ok()).count();
        assert_eq!((admitted, user.sessions.load(Relaxed)), (3, 0));
    }

    fn clock() -> u64 {
        super::super::clock()
    }
}
