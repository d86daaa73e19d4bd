//! What a worker counts: single-writer atomics on cache lines of its own, read when scraped.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use culvert_proto::Protocol;

use crate::{end::Cause, policy::Denial};

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owning worker calls it.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Subtracts; only the owning worker calls it.
    #[inline]
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of the histograms' buckets in seconds.
pub const BUCKETS: [f64; 16] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0,
    3600.0, 86_400.0,
];

/// A histogram of durations with one writer.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS.len() + 1],
    nanoseconds: Counter,
}

impl Histogram {
    /// Adds a duration.
    pub fn record(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        self.buckets[bucket].add(1);
        self.nanoseconds.add(duration.as_nanos() as u64);
    }

    /// The counts by bucket (the last is beyond all bounds) and the sum in seconds.
    pub fn read(&self) -> ([u64; BUCKETS.len() + 1], f64) {
        (std::array::from_fn(|i| self.buckets[i].get()), self.nanoseconds.get() as f64 / 1e9)
    }
}

/// Results of logins, in the order of `auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginResult {
    /// Accepted.
    Accepted,
    /// Wrong name or password.
    Rejected,
    /// Not checked: too many waited.
    Busy,
    /// Not checked: too many had failed.
    Throttled,
}

impl LoginResult {
    /// All results.
    pub const ALL: [Self; 4] = [Self::Accepted, Self::Rejected, Self::Busy, Self::Throttled];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
            Self::Busy => "busy",
            Self::Throttled => "throttled",
        }
    }
}

/// Why a client was turned away before a session began, in the order of `turned_away`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnedAway {
    /// Its address is not in the listener's list or the whitelist.
    Address,
    /// Too many sessions from its address.
    AddressSessions,
    /// Too many new sessions a second from its address.
    AddressRate,
    /// The node is full, and so is the room for telling clients.
    Node,
    /// The node is shutting down.
    Draining,
}

impl TurnedAway {
    /// All reasons.
    pub const ALL: [Self; 5] =
        [Self::Address, Self::AddressSessions, Self::AddressRate, Self::Node, Self::Draining];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::AddressSessions => "address_sessions",
            Self::AddressRate => "address_rate",
            Self::Node => "node",
            Self::Draining => "draining",
        }
    }
}

/// Protocols of sessions in counters: those of [`Protocol::ALL`], then "none" for a client that never
/// said.
pub const PROTOCOLS: usize = Protocol::ALL.len() + 1;

/// The position of a protocol in counters.
pub fn protocol_index(protocol: Option<Protocol>) -> usize {
    Protocol::ALL.iter().position(|known| Some(*known) == protocol).unwrap_or(Protocol::ALL.len())
}

/// The name at a position of counters.
pub fn protocol_name(index: usize) -> &'static str {
    Protocol::ALL.get(index).map_or("none", |protocol| protocol.name())
}

/// Everything one worker counts.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// Sessions open now.
    pub sessions_active: Counter,
    /// Sessions ended, by protocol and cause.
    pub sessions: [[Counter; Cause::ALL.len()]; PROTOCOLS],
    /// HTTP requests forwarded.
    pub exchanges: Counter,
    /// Bytes moved, by direction.
    pub bytes: [Counter; 2],
    /// Logins by result.
    pub auth: [Counter; LoginResult::ALL.len()],
    /// Requests refused by policy, by reason.
    pub denied: [Counter; Denial::NAMES.len()],
    /// Clients turned away before a session began.
    pub turned_away: [Counter; TurnedAway::ALL.len()],
    /// Accepts that failed for want of descriptors or memory.
    pub accept_exhausted: Counter,
    /// Records that found their queue full.
    pub records_dropped: Counter,
    /// Records queued.
    pub records: Counter,
    /// Names looked up, found in the cache.
    pub dns_cached: Counter,
    /// Names looked up, asked of a server.
    pub dns_asked: Counter,
    /// Lookups refused because too many were under way.
    pub dns_refused: Counter,
    /// Sessions ended because a new snapshot forbids them.
    pub revoked: Counter,
    /// Generation of the snapshot the worker last took up.
    pub generation: Counter,
    /// Flows moved to splice.
    pub spliced: Counter,
    /// How long sessions lived.
    pub session_duration: Histogram,
    /// From accept to request.
    pub handshake: Histogram,
    /// Resolving and connecting.
    pub dial: Histogram,
}

impl Default for WorkerCounters {
    fn default() -> Self {
        Self {
            sessions_active: Counter::default(),
            sessions: std::array::from_fn(|_| std::array::from_fn(|_| Counter::default())),
            exchanges: Counter::default(),
            bytes: Default::default(),
            auth: Default::default(),
            denied: Default::default(),
            turned_away: Default::default(),
            accept_exhausted: Counter::default(),
            records_dropped: Counter::default(),
            records: Counter::default(),
            dns_cached: Counter::default(),
            dns_asked: Counter::default(),
            dns_refused: Counter::default(),
            revoked: Counter::default(),
            generation: Counter::default(),
            spliced: Counter::default(),
            session_duration: Histogram::default(),
            handshake: Histogram::default(),
            dial: Histogram::default(),
        }
    }
}
