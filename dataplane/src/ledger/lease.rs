//! Leases: how much of a user's quota the node may move, granted by the control plane.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::*},
};

use crossbeam::queue::ArrayQueue;
use tokio::sync::Notify;

/// Users that may be waiting to be asked for.
const WANTED_MAX: usize = 65_536;

/// One user's lease, shared by all workers.
///
/// The control plane says which sum of this boot, both directions together, the user may reach. What is
/// to be moved is reserved first, so that sessions that move at the same time do not spend the same
/// bytes; what was moved without having been reserved (before the lease began, or bytes of our own) is
/// taken from it afterwards.
#[derive(Debug)]
pub struct Lease {
    user: u64,
    /// Odd while the user is metered; counts how often that has changed.
    epoch: AtomicU32,
    /// What may still be reserved; below zero when more was moved than was reserved.
    left: AtomicI64,
    /// The sum that may be reached.
    limit: AtomicU64,
    /// Less than this left: it is time to ask for more.
    low: AtomicI64,
    asked: AtomicBool,
    /// When ([`crate::policy::clock`]) it may be asked for again.
    ask_after: AtomicU64,
    /// Until when ([`crate::policy::clock`]) it is known that no more will come.
    spent: AtomicU64,
}

/// Bytes reserved and not moved yet, of one epoch of a lease.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reserved {
    epoch: u32,
    bytes: u64,
}

/// How long an answer that the quota is spent holds, in nanoseconds; then it is asked for again.
const SPENT: u64 = 1_000_000_000;
/// The same of an answer that others hold what is left.
const ELSEWHERE: u64 = 300_000_000;

impl Lease {
    /// Of a user who is not metered.
    pub fn new(user: u64) -> Arc<Self> {
        Arc::new(Self {
            user,
            epoch: AtomicU32::new(0),
            left: AtomicI64::new(0),
            limit: AtomicU64::new(0),
            low: AtomicI64::new(0),
            asked: AtomicBool::new(false),
            ask_after: AtomicU64::new(0),
            spent: AtomicU64::new(0),
        })
    }

    /// Whose it is.
    pub fn user(&self) -> u64 {
        self.user
    }

    /// Says whether bytes may be moved only on the lease. What begins to be metered has nothing yet.
    pub fn set_metered(&self, metered: bool) {
        let epoch = self.epoch.load(Acquire);
        if (epoch % 2 == 1) == metered {
            return;
        }
        self.left.store(0, Relaxed);
        self.limit.store(0, Relaxed);
        self.low.store(0, Relaxed);
        self.spent.store(0, Relaxed);
        self.ask_after.store(0, Relaxed);
        self.asked.store(false, Relaxed);
        self.epoch.store(epoch.wrapping_add(1), Release);
    }

    /// Which time of being metered this is; `None` when the user is not.
    #[inline]
    pub fn epoch(&self) -> Option<u32> {
        let epoch = self.epoch.load(Acquire);
        (epoch % 2 == 1).then_some(epoch)
    }

    /// Reserves up to `want` bytes; none if none are left.
    pub fn reserve(&self, want: u64, reserved: &mut Reserved) -> u64 {
        let Some(epoch) = self.epoch() else { return want };
        if reserved.epoch != epoch {
            *reserved = Reserved { epoch, bytes: 0 };
        }
        let want = i64::try_from(want).unwrap_or(i64::MAX);
        let take = |left: i64| (left > 0).then(|| left - left.min(want));
        let granted = match self.left.fetch_update(AcqRel, Acquire, take) {
            Ok(left) => left.min(want).unsigned_abs(),
            Err(_) => 0,
        };
        reserved.bytes += granted;
        granted
    }

    /// Gives back up to `bytes` of what was reserved.
    pub fn give_back(&self, bytes: u64, reserved: &mut Reserved) {
        let back = reserved.bytes.min(bytes);
        reserved.bytes -= back;
        if back > 0 && self.epoch() == Some(reserved.epoch) {
            self.left.fetch_add(back.cast_signed(), AcqRel);
        }
    }

    /// Whether little is left.
    pub fn is_low(&self) -> bool {
        self.left.load(Relaxed) < self.low.load(Relaxed).max(1)
    }

    /// Takes bytes that were moved; below zero gives back what was reserved twice.
    fn debit(&self, bytes: i64) {
        self.left.fetch_sub(bytes, AcqRel);
    }

    /// The user may reach another sum. A lower one takes back what is not spent or reserved yet.
    /// Returns the sum that holds now.
    pub fn set_limit(&self, limit: u64) -> u64 {
        let before = self.limit.load(Relaxed);
        let more = limit.cast_signed() - before.cast_signed();
        let change = |left: i64| Some(left + more.max(-left.max(0)));
        let left = match self.left.fetch_update(AcqRel, Acquire, change) {
            Ok(left) | Err(left) => left,
        };
        let more = more.max(-left.max(0));
        let limit = before.saturating_add_signed(more);
        self.limit.store(limit, Relaxed);
        self.low.store((left + more) / 2, Relaxed);
        self.asked.store(false, Release);
        limit
    }

    /// The sum that may be reached; 0 when nothing was granted yet.
    pub fn limit(&self) -> u64 {
        self.limit.load(Relaxed)
    }

    /// No more will come for a while: none at all, or none before others have given some back.
    pub fn set_refused(&self, spent: bool, now: u64) {
        if spent {
            self.spent.store(now + SPENT, Relaxed);
        }
        self.ask_after.store(now + if spent { SPENT } else { ELSEWHERE }, Relaxed);
        self.asked.store(false, Release);
    }

    /// Whether no more will come.
    pub fn is_spent(&self, now: u64) -> bool {
        now < self.spent.load(Relaxed)
    }
}

/// What one worker's ledger has told a lease of.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) lease: Arc<Lease>,
    epoch: u32,
    /// The sum up to which bytes were taken from it.
    sum: u64,
}

impl Told {
    pub(super) fn new(lease: &Arc<Lease>) -> Self {
        Self { lease: lease.clone(), epoch: 0, sum: 0 }
    }

    /// Takes what was moved since the last time from the lease, but for `covered` bytes that were
    /// reserved.
    pub(super) fn settle(&mut self, sum: u64, covered: u64) {
        let Some(epoch) = self.lease.epoch() else { return };
        if self.epoch != epoch {
            (self.epoch, self.sum) = (epoch, 0);
        }
        let owed = (sum - self.sum).cast_signed() - covered.cast_signed();
        self.sum = sum;
        if owed != 0 {
            self.lease.debit(owed);
        }
    }
}

impl Reserved {
    /// Some of it was moved; says how much of `bytes` had been reserved since the lease is what it is.
    pub fn moved(&mut self, bytes: u64, lease: &Lease) -> u64 {
        if self.bytes == 0 || lease.epoch() != Some(self.epoch) {
            self.bytes = 0;
            return 0;
        }
        let covered = self.bytes.min(bytes);
        self.bytes -= covered;
        covered
    }

    /// What is reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Leases that run low, on their way to whoever asks the control plane.
#[derive(Debug)]
pub struct Wanted {
    leases: ArrayQueue<Arc<Lease>>,
    some: Notify,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { leases: ArrayQueue::new(WANTED_MAX), some: Notify::new() }
    }
}

impl Wanted {
    /// Asks for more, unless that was done already, or the answer is known.
    pub fn ask(&self, lease: &Arc<Lease>, now: u64) {
        if now < lease.ask_after.load(Relaxed) || lease.asked.swap(true, AcqRel) {
            return;
        }
        if self.leases.push(lease.clone()).is_err() {
            // Asked again by whoever needs it next.
            lease.asked.store(false, Release);
        }
        self.some.notify_one();
    }

    /// Waits until some are asked for. May be dropped: nothing is lost.
    pub async fn wait(&self) {
        self.some.notified().await;
    }

    /// Those that are asked for.
    pub fn take(&self) -> Vec<Arc<Lease>> {
        std::iter::from_fn(|| self.leases.pop()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metered(limit: u64) -> Arc<Lease> {
        let lease = Lease::new(7);
        lease.set_metered(true);
        lease.set_limit(limit);
        lease
    }

    #[test]
    fn who_is_not_metered_has_no_limit() {
        let (lease, mut reserved) = (Lease::new(7), Reserved::default());
        assert_eq!(lease.reserve(1 << 40, &mut reserved), 1 << 40);
        assert_eq!(reserved.bytes(), 0);
    }

    #[test]
    fn no_byte_is_given_twice() {
        let lease = metered(1_000_000);
        let moved: u64 = std::thread::scope(|scope| {
            let spend = |_| {
                let lease = lease.clone();
                scope.spawn(move || {
                    let (mut told, mut reserved) = (Told::new(&lease), Reserved::default());
                    let mut moved = 0;
                    while lease.reserve(777, &mut reserved) > 0 {
                        let some = reserved.bytes().div_ceil(2);
                        moved += some;
                        told.settle(moved, reserved.moved(some, &lease));
                        lease.give_back(reserved.bytes(), &mut reserved);
                    }
                    moved
                })
            };
            let threads: Vec<_> = (0..4).map(spend).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(moved, 1_000_000);
    }

    #[test]
    fn what_was_moved_unreserved_is_taken_afterwards() {
        let (lease, mut reserved) = (Lease::new(7), Reserved::default());
        let mut told = Told::new(&lease);
        told.settle(500, 0);
        lease.set_metered(true);
        assert_eq!(lease.reserve(1, &mut reserved), 0);
        // The worker had moved 500 before, and 100 since.
        told.settle(600, 0);
        lease.set_limit(1_000);
        assert_eq!(lease.reserve(1_000, &mut reserved), 400);
        told.settle(1_050, reserved.moved(450, &lease));
        assert_eq!((lease.reserve(1, &mut reserved), reserved.bytes()), (0, 0));
        lease.set_limit(1_060);
        assert_eq!(lease.reserve(1_000, &mut reserved), 10);
    }

    #[test]
    fn a_lower_limit_takes_back_what_is_free() {
        let (lease, mut reserved) = (metered(1_000), Reserved::default());
        assert_eq!(lease.reserve(300, &mut reserved), 300);
        assert_eq!(lease.set_limit(500), 500);
        assert_eq!(lease.set_limit(100), 300, "what is reserved stays");
        assert_eq!(lease.reserve(1, &mut reserved), 0);
        lease.give_back(300, &mut reserved);
        assert_eq!(lease.reserve(1_000, &mut reserved), 300);
    }

    #[test]
    fn reservations_end_with_their_time() {
        let (lease, mut reserved) = (metered(1_000), Reserved::default());
        assert_eq!(lease.reserve(300, &mut reserved), 300);
        lease.set_metered(false);
        lease.set_metered(true);
        lease.give_back(300, &mut reserved);
        lease.set_limit(50);
        assert_eq!(lease.reserve(1_000, &mut reserved), 50);
    }

    #[test]
    fn it_is_asked_for_once() {
        let (lease, wanted) = (metered(0), Wanted::default());
        wanted.ask(&lease, 1);
        wanted.ask(&lease, 1);
        assert_eq!(wanted.take().len(), 1);
        lease.set_limit(10);
        wanted.ask(&lease, 1);
        assert_eq!(wanted.take().len(), 1);
        lease.set_refused(true, 1);
        wanted.ask(&lease, SPENT);
        assert_eq!(wanted.take().len(), 0);
        assert!(lease.is_spent(SPENT) && !lease.is_spent(SPENT + 1));
        wanted.ask(&lease, SPENT + 1);
        assert_eq!(wanted.take().len(), 1);
    }
}
