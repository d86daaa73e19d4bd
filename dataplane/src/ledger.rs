//! Where moved bytes are counted: one slot a session and one total a user, written by their worker
//! only, in memory that may be a file.
//!
//! The meter sets `pending` before the system call that moves bytes and adds the result to `done`
//! afterwards, so whoever reads a slot at any moment knows: `done` ≤ what the peer got ≤ `done +
//! pending`. A byte counts when the kernel has accepted it for the other side. When a session ends, or
//! goes on as another user, what it has done is added to the user's total in steps that recovery can
//! take again after the process was killed between any two of them.

mod lease;
#[allow(unsafe_code)]
mod map;
mod owed;
mod recover;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, Release},
    },
};

use crossbeam::queue::SegQueue;
use lease::Told;
pub use lease::{Lease, Reserved, Wanted};
pub use map::{Map, Region, path};
use map::{Slot, State};
pub use owed::Owed;
pub use recover::{Recovered, Unrecorded, recover};

use crate::telemetry::WorkerCounters;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the target.
    Up,
    /// To the client.
    Down,
}

impl Direction {
    /// Both, in the order of counters.
    pub const ALL: [Self; 2] = [Self::Up, Self::Down];

    /// The name in metrics and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Bytes both ways, in the order of [`Direction::ALL`].
pub type Bytes = [u64; 2];

/// A worker's slots and totals.
pub struct Ledger {
    counters: Arc<WorkerCounters>,
    region: Region,
    /// Slots that were used and are free again; those from `unused` on never were.
    free: RefCell<Vec<u32>>,
    unused: Cell<u32>,
    /// Those whose record was written since, by the log's thread.
    written: Arc<SegQueue<u32>>,
    /// Which total is whose.
    index: RefCell<HashMap<u64, u32, ahash::RandomState>>,
    /// What each total and its running sessions come to, kept as it grows: telling costs nothing that
    /// sessions at rest have part in.
    sums: RefCell<Sums>,
}

#[derive(Default)]
struct Sums {
    all: Vec<Sum>,
    /// Those that grew since they were last told.
    grown: Vec<u32>,
}

struct Sum {
    bytes: Bytes,
    lease: Told,
    /// Among those that grew.
    listed: bool,
}

impl Ledger {
    /// A ledger in its worker's region, that adds to the worker's counters too.
    pub fn new(counters: Arc<WorkerCounters>, region: Region) -> Rc<Self> {
        Rc::new(Self {
            counters,
            region,
            free: RefCell::default(),
            unused: Cell::new(0),
            written: Arc::default(),
            index: RefCell::default(),
            sums: RefCell::default(),
        })
    }

    /// Opens a slot for a session, nobody's at first; `None` when all are in use.
    pub fn open(self: &Rc<Self>) -> Option<Meter> {
        let index = Cell::new(self.slot()?);
        Some(Meter { ledger: self.clone(), index, user: Cell::new(None), settled: Cell::default() })
    }

    fn slot(&self) -> Option<u32> {
        let free = self.free.borrow_mut().pop();
        free.or_else(|| self.written.pop()).or_else(|| {
            let unused = self.unused.get();
            ((unused as usize) < self.region.slots().len()).then(|| {
                self.unused.set(unused + 1);
                unused
            })
        })
    }

    /// The total of a user; `None` when there is no room for another.
    fn total(&self, lease: &Arc<Lease>) -> Option<u32> {
        let (user, mut index) = (lease.user(), self.index.borrow_mut());
        if let Some(&known) = index.get(&user) {
            let told = &mut self.sums.borrow_mut().all[known as usize].lease;
            // The user was gone for a while.
            if !Arc::ptr_eq(&told.lease, lease) {
                *told = Told::new(lease);
            }
            return Some(known);
        }
        let next = u32::try_from(index.len()).ok()?;
        self.region.totals().get(next as usize)?.user.store(user, Release);
        index.insert(user, next);
        let sum = Sum { bytes: [0; 2], lease: Told::new(lease), listed: false };
        self.sums.borrow_mut().all.push(sum);
        Some(next)
    }

    /// The sums, since the process began, of users whose sums changed since the last call.
    pub fn tell(&self) -> Vec<(u64, Bytes)> {
        let Sums { all, grown } = &mut *self.sums.borrow_mut();
        let told = |index: u32| {
            let sum = &mut all[index as usize];
            sum.listed = false;
            (sum.lease.lease.user(), sum.bytes)
        };
        grown.drain(..).map(told).collect()
    }

    /// Takes from a user's lease what was moved before it began.
    pub fn settle(&self, user: u64) {
        if let Some(&index) = self.index.borrow().get(&user) {
            let sum = &mut self.sums.borrow_mut().all[index as usize];
            sum.lease.settle(sum.bytes[0] + sum.bytes[1], 0);
        }
    }
}

/// The writer of one slot at a time; frees it when dropped.
pub struct Meter {
    ledger: Rc<Ledger>,
    index: Cell<u32>,
    /// Whose bytes are counted, and in which total; `None` is nobody.
    user: Cell<Option<(u64, u32)>>,
    /// What was added to totals already, or was nobody's.
    settled: Cell<Bytes>,
}

impl Meter {
    fn slot(&self) -> &Slot {
        &self.ledger.region.slots()[self.index.get() as usize]
    }

    /// Bytes moved from now on are those of a lease's user, or nobody's. `false` when there is no room
    /// to count for another user.
    pub fn belongs_to(&self, lease: Option<&Arc<Lease>>) -> bool {
        let user = lease.map(|lease| lease.user());
        if self.user.get().map(|(known, _)| known) == user {
            return true;
        }
        self.settle();
        self.user.set(None);
        let Some(lease) = lease else { return true };
        let Some(total) = self.ledger.total(lease) else { return false };
        self.user.set(Some((lease.user(), total)));
        self.slot().set(State::Live(total));
        true
    }

    /// Adds what was done to the user's total, and leaves the slot free. Each step is safe to be taken
    /// again by recovery.
    fn settle(&self) {
        if self.slot().done() != [0; 2] {
            self.close();
        }
        self.slot().clear();
    }

    /// Adds what was done to the user's total; the slot is to be freed, or owed.
    fn close(&self) {
        let (slot, done) = (self.slot(), self.slot().done());
        if let Some((_, index)) = self.user.get() {
            let total = &self.ledger.region.totals()[index as usize];
            let before = total.read();
            slot.closing(index, before);
            total.write([before[0] + done[0], before[1] + done[1]]);
        }
        let settled = self.settled.get();
        self.settled.set([settled[0] + done[0], settled[1] + done[1]]);
    }

    /// What was done since the last time goes into a record: until that is written, recovery finds it
    /// here. Goes on in another slot. `None` if it is nobody's, if nothing outlives this process, or if there
    /// is no other slot.
    pub fn record(&self) -> Option<Owed> {
        let (_, total) = self.user.get().filter(|_| self.ledger.region.is_kept)?;
        let next = self.ledger.slot()?;
        self.close();
        self.slot().set(State::Owed(total));
        let owed =
            Owed::new(self.ledger.region.clone(), self.index.get(), self.ledger.written.clone());
        self.index.set(next);
        self.slot().set(State::Resumed(total));
        Some(owed)
    }

    /// Says that a call is about to move up to `bytes`.
    #[inline]
    pub fn pending(&self, direction: Direction, bytes: usize) {
        self.slot().pending[direction as usize].store(bytes as u64, Release);
    }

    /// Says how many bytes the call moved, and how many of them had been reserved from the lease.
    #[inline]
    pub fn moved(&self, direction: Direction, bytes: usize, covered: u64) {
        let slot = self.slot();
        let done = &slot.done[direction as usize];
        done.store(done.load(Relaxed) + bytes as u64, Release);
        slot.pending[direction as usize].store(0, Release);
        self.ledger.counters.bytes[direction as usize].add(bytes as u64);
        if let Some((_, total)) = self.user.get() {
            let Sums { all, grown } = &mut *self.ledger.sums.borrow_mut();
            let sum = &mut all[total as usize];
            sum.bytes[direction as usize] += bytes as u64;
            sum.lease.settle(sum.bytes[0] + sum.bytes[1], covered);
            if !std::mem::replace(&mut sum.listed, true) {
                grown.push(total);
            }
        }
    }

    /// Bytes moved so far.
    pub fn done(&self, direction: Direction) -> u64 {
        self.settled.get()[direction as usize] + self.slot().done[direction as usize].load(Relaxed)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.settle();
        self.ledger.free.borrow_mut().push(self.index.get());
    }
}

#[cfg(test)]
mod tests;
