//! The ledger's memory: a file that outlives a killed process, or plain memory where nobody asks.

use std::{
    fs::{File, OpenOptions},
    io,
    mem::size_of,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
};

use memmap2::{MmapOptions, MmapRaw};

use super::Bytes;

/// Tells our files from others; the last byte is the layout's version.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"culvled\x02");
/// Bytes of the head: magic, boot, workers, slots and totals of each.
pub(super) const HEAD: usize = 4096;
/// Users one worker can count for during one boot (8 MiB).
pub(super) const TOTALS: usize = 1 << 18;

/// One session's counters.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Slot {
    pub(super) pending: [AtomicU64; 2],
    pub(super) done: [AtomicU64; 2],
    /// The user's total before `done` was added to it.
    before: [AtomicU64; 2],
    state: AtomicU64,
    /// The number that the record of `done` is about to have; 0 is none yet.
    sequence: AtomicU64,
}

/// What a slot is in the middle of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing, or nobody's session.
    Free,
    /// A user's session; with the index of the total.
    Live(u32),
    /// `done` is being added to the total.
    Closing(u32),
    /// `done` is in the total, and in no record that would outlive the process.
    Owed(u32),
    /// A user's session that has its record up to here; as `Live` when it has moved more.
    Resumed(u32),
}

impl State {
    pub(super) fn read(word: u64) -> Self {
        let index = (word >> 8) as u32;
        match word & 0xff {
            1 => Self::Live(index),
            2 => Self::Closing(index),
            3 => Self::Owed(index),
            4 => Self::Resumed(index),
            _ => Self::Free,
        }
    }

    fn word(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Live(index) => u64::from(index) << 8 | 1,
            Self::Closing(index) => u64::from(index) << 8 | 2,
            Self::Owed(index) => u64::from(index) << 8 | 3,
            Self::Resumed(index) => u64::from(index) << 8 | 4,
        }
    }
}

fn read(words: &[AtomicU64; 2]) -> Bytes {
    [words[0].load(Relaxed), words[1].load(Relaxed)]
}

/// Stores in this order, which a killed process leaves too.
fn write(words: &[AtomicU64; 2], bytes: Bytes) {
    words[0].store(bytes[0], Release);
    words[1].store(bytes[1], Release);
}

impl Slot {
    pub(super) fn set(&self, state: State) {
        self.state.store(state.word(), Release);
    }

    pub(super) fn done(&self) -> Bytes {
        read(&self.done)
    }

    /// First what the total was, then that it is about to change.
    pub(super) fn closing(&self, index: u32, before: Bytes) {
        write(&self.before, before);
        self.set(State::Closing(index));
    }

    /// The record is about to be written, under this number.
    pub(super) fn recorded_as(&self, sequence: u64) {
        self.sequence.store(sequence, Release);
    }

    /// First free, then empty: a free slot's numbers mean nothing.
    pub(super) fn clear(&self) {
        self.set(State::Free);
        self.sequence.store(0, Release);
        write(&self.pending, [0; 2]);
        write(&self.done, [0; 2]);
    }
}

/// What one user's ended sessions moved on one worker.
#[derive(Debug, Default)]
#[repr(C, align(32))]
pub(super) struct Total {
    /// 0 is not in use.
    pub(super) user: AtomicU64,
    bytes: [AtomicU64; 2],
    spare: AtomicU64,
}

impl Total {
    pub(super) fn read(&self) -> Bytes {
        read(&self.bytes)
    }

    pub(super) fn write(&self, bytes: Bytes) {
        write(&self.bytes, bytes);
    }
}

/// Memory for all workers.
pub struct Map {
    memory: Arc<MmapRaw>,
    workers: usize,
    slots: usize,
    /// The file, if it is one.
    pub path: Option<PathBuf>,
}

/// One worker's part of it.
#[derive(Clone)]
pub struct Region {
    memory: Arc<MmapRaw>,
    start: usize,
    slots: usize,
    /// Whether it outlives the process.
    pub(super) is_kept: bool,
}

pub(super) fn region_bytes(slots: usize) -> usize {
    slots * size_of::<Slot>() + TOTALS * size_of::<Total>()
}

/// Where a boot's file lies in a state directory.
pub fn path(dir: &Path, boot: u64) -> PathBuf {
    dir.join(format!("ledger-{boot:016x}"))
}

impl Map {
    /// Memory for so many workers with so many slots each; in a directory, a new file of this boot, whose
    /// room on the disk is taken now: a full disk must not be found out by a write.
    ///
    /// # Errors
    /// No room, or no right to write there.
    pub fn new(dir: Option<&Path>, boot: u64, workers: usize, slots: usize) -> io::Result<Self> {
        let length = slots
            .checked_mul(size_of::<Slot>())
            .and_then(|slots| slots.checked_add(TOTALS * size_of::<Total>()))
            .and_then(|region| region.checked_mul(workers))
            .and_then(|regions| regions.checked_add(HEAD))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let Some(dir) = dir else {
            let memory = MmapOptions::new().len(length).map_anon()?;
            return Ok(Self { memory: Arc::new(memory.into()), workers, slots, path: None });
        };
        let path = path(dir, boot);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        if let Err(error) = allocate(&file, length) {
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        // Nobody else writes this file: its name has this boot's random number, in our own folder.
        let memory = MmapOptions::new().len(length).map_raw(&file)?;
        let map = Self { memory: Arc::new(memory), workers, slots, path: Some(path) };
        for (index, word) in [MAGIC, boot, workers as u64, slots as u64].into_iter().enumerate() {
            map.head(index).store(word, Release);
        }
        Ok(map)
    }

    fn head(&self, index: usize) -> &AtomicU64 {
        assert!(index < HEAD / 8);
        // SAFETY: the head lies within the mapping, which is page-aligned and lives as long as
        // `self`; the word is only used as an atomic.
        unsafe { &*self.memory.as_mut_ptr().cast::<AtomicU64>().add(index) }
    }

    /// A worker's part. Each must be taken once.
    pub fn region(&self, worker: usize) -> Region {
        assert!(worker < self.workers);
        let start = HEAD + worker * region_bytes(self.slots);
        let is_kept = self.path.is_some();
        Region { memory: self.memory.clone(), start, slots: self.slots, is_kept }
    }
}

impl Region {
    pub(super) fn slots(&self) -> &[Slot] {
        // SAFETY: the mapping has room for all workers' regions, of which this is one; the
        // head is a multiple of a slot's alignment; zeroed memory is a valid `Slot`, all of it atomics.
        unsafe {
            let first = self.memory.as_mut_ptr().add(self.start).cast::<Slot>();
            std::slice::from_raw_parts(first, self.slots)
        }
    }

    pub(super) fn totals(&self) -> &[Total] {
        let start = self.start + self.slots * size_of::<Slot>();
        // SAFETY: as for the slots, behind which the totals lie.
        unsafe {
            let first = self.memory.as_mut_ptr().add(start).cast::<Total>();
            std::slice::from_raw_parts(first, TOTALS)
        }
    }
}

fn allocate(file: &File, length: usize) -> io::Result<()> {
    let length = libc::off_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}
