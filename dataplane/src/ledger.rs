//! Where moved bytes are counted: one slot a session, written by its worker only.
//!
//! The meter sets `pending` before the system call that moves bytes and adds the result to `done`
//! afterwards, so whoever reads a slot at any moment knows: `done` ≤ what the peer got ≤ `done +
//! pending`. A byte counts when the kernel has accepted it for the other side.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::telemetry::WorkerCounters;

/// Slots are made so many at a time (64 KiB).
const CHUNK: usize = 1024;

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

/// One session's counters.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Slot {
    pending: [AtomicU64; 2],
    done: [AtomicU64; 2],
}

/// A worker's slots.
pub struct Ledger {
    counters: Arc<WorkerCounters>,
    free: RefCell<Vec<(Arc<[Slot]>, u32)>>,
}

impl Ledger {
    /// A ledger that adds to a worker's counters too.
    pub fn new(counters: Arc<WorkerCounters>) -> Rc<Self> {
        Rc::new(Self { counters, free: RefCell::default() })
    }

    /// Opens a slot for a session.
    pub fn open(self: &Rc<Self>) -> Meter {
        let mut free = self.free.borrow_mut();
        if free.is_empty() {
            let chunk: Arc<[Slot]> = (0..CHUNK).map(|_| Slot::default()).collect();
            free.extend((0..CHUNK as u32).rev().map(|index| (chunk.clone(), index)));
        }
        let (chunk, index) = free.pop().expect("a chunk of slots was just added");
        Meter { ledger: self.clone(), chunk, index }
    }
}

/// The writer of one slot; frees it when dropped.
pub struct Meter {
    ledger: Rc<Ledger>,
    chunk: Arc<[Slot]>,
    index: u32,
}

impl Meter {
    fn slot(&self) -> &Slot {
        &self.chunk[self.index as usize]
    }

    /// Says that a call is about to move up to `bytes`.
    #[inline]
    pub fn pending(&self, direction: Direction, bytes: usize) {
        self.slot().pending[direction as usize].store(bytes as u64, Relaxed);
    }

    /// Says how many bytes the call moved.
    #[inline]
    pub fn moved(&self, direction: Direction, bytes: usize) {
        let slot = self.slot();
        let done = &slot.done[direction as usize];
        done.store(done.load(Relaxed) + bytes as u64, Relaxed);
        slot.pending[direction as usize].store(0, Relaxed);
        self.ledger.counters.bytes[direction as usize].add(bytes as u64);
    }

    /// Bytes moved so far.
    pub fn done(&self, direction: Direction) -> u64 {
        self.slot().done[direction as usize].load(Relaxed)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for direction in Direction::ALL {
            self.slot().pending[direction as usize].store(0, Relaxed);
            self.slot().done[direction as usize].store(0, Relaxed);
        }
        self.ledger.free.borrow_mut().push((self.chunk.clone(), self.index));
    }
}
