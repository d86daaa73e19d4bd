//! Building a worker's runtime: io_uring where the kernel gives a real ring, epoll otherwise.
//!
//! The ring is built in the worker's own thread with SINGLE_ISSUER and DEFER_TASKRUN (kernel 6.1),
//! without them on older kernels; with half the entries as long as memory is short. What cannot be
//! had says why and what to do.

use std::{cell::Cell, fmt, future::Future, io, os::fd::RawFd, sync::Mutex};

use monoio::{IoUringDriver, LegacyDriver, RuntimeBuilder, time::TimeDriver};

/// Smallest ring, below which monoio does not go.
const ENTRIES_MIN: u32 = 256;
/// Completion entries for each submission entry: a session may have a wait in each direction, and all
/// may complete at once.
const CQ_FACTOR: u32 = 8;

thread_local! {
    static ON_RING: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling worker runs on a ring.
#[inline]
pub(crate) fn on_ring() -> bool {
    ON_RING.get()
}

thread_local! {
    /// The worker's ring, if a receive on it can be taken back.
    static CANCELS: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// Whether the calling worker's ring can take back a receive ([`cancel_receive`]).
#[inline]
pub(crate) fn can_cancel() -> bool {
    CANCELS.get().is_some()
}

/// Takes back the receive that waits on a socket; it then completes with ECANCELED, unless bytes came
/// first. Whether there was one.
pub(crate) fn cancel_receive(socket: RawFd) -> bool {
    CANCELS.get().is_some_and(|ring| sync_cancel(ring, socket).is_ok())
}

/// IORING_REGISTER_SYNC_CANCEL (kernel 6.0), of receives only (6.6).
fn sync_cancel(ring: RawFd, socket: RawFd) -> io::Result<()> {
    /// `struct io_uring_sync_cancel_reg`.
    #[repr(C)]
    struct SyncCancel {
        addr: u64,
        fd: i32,
        flags: u32,
        timeout: [i64; 2],
        opcode: u8,
        pad: [u8; 7],
        pad2: [u64; 3],
    }
    const REGISTER_SYNC_CANCEL: libc::c_uint = 24;
    const CANCEL_FD: u32 = 1 << 1;
    const CANCEL_OP: u32 = 1 << 5;
    const OP_RECV: u8 = 27;
    let cancel = SyncCancel {
        addr: 0,
        fd: socket,
        flags: CANCEL_FD | CANCEL_OP,
        timeout: [0; 2],
        opcode: OP_RECV,
        pad: [0; 7],
        pad2: [0; 3],
    };
    // SAFETY: `cancel` has the layout the kernel reads and outlives the call, which does not keep it.
    let done = unsafe {
        libc::syscall(libc::SYS_io_uring_register, ring, REGISTER_SYNC_CANCEL, &raw const cancel, 1)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What drives a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// io_uring.
    IoUring,
    /// epoll.
    Epoll,
}

impl Driver {
    /// The name in logs, metrics and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriverChoice {
    /// io_uring if it can be had, otherwise epoll with a warning.
    #[default]
    Auto,
    /// io_uring or no start.
    IoUring,
    /// epoll.
    Epoll,
}

/// How a worker's runtime is built.
#[derive(Debug, Clone, Copy)]
pub struct RuntimeOptions {
    /// Which driver.
    pub driver: DriverChoice,
    /// Submission entries to ask for (a power of two, 256 at least).
    pub entries: u32,
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        Self { driver: DriverChoice::Auto, entries: 2048 }
    }
}

/// Why a ring could not be had, with the remedy.
#[derive(Debug)]
pub struct RuntimeError(io::Error);

impl std::error::Error for RuntimeError {}

impl fmt::Display for RuntimeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = match self.0.raw_os_error() {
            Some(libc::EPERM) => {
                "io_uring is forbidden: `sysctl kernel.io_uring_disabled=0`, or allow \
                 io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp \
                 profile"
            }
            Some(libc::ENOSYS) => "this kernel has no io_uring: run Linux 5.15 or newer",
            Some(libc::ENOMEM) => {
                "no memory may be locked for io_uring: raise LimitMEMLOCK (systemd) or \
                 `ulimit -l`"
            }
            Some(libc::EMFILE | libc::ENFILE) => "no descriptor is left: raise LimitNOFILE",
            _ => "io_uring could not be set up",
        };
        write!(f, "{remedy} ({})", self.0)
    }
}

enum Kind {
    Ring(Box<monoio::Runtime<TimeDriver<IoUringDriver>>>),
    Epoll(Box<monoio::Runtime<TimeDriver<LegacyDriver>>>),
}

/// A worker's runtime. It belongs to the thread that built it.
pub struct Runtime {
    kind: Kind,
    ring_fd: Option<i32>,
    fallback: Option<RuntimeError>,
}

impl Runtime {
    /// Builds the runtime in the calling thread. With [`DriverChoice::Auto`] a missing ring is no
    /// error: [`Runtime::fallback`] then says why there is none.
    ///
    /// # Errors
    /// The driver that was demanded cannot be had.
    pub fn build(options: RuntimeOptions) -> Result<Self, RuntimeError> {
        if options.driver == DriverChoice::Epoll {
            return Self::epoll(None);
        }
        match ring(options.entries) {
            Ok((runtime, ring_fd)) => {
                let kind = Kind::Ring(Box::new(runtime));
                Ok(Self { kind, ring_fd, fallback: None })
            }
            Err(error) if options.driver == DriverChoice::Auto => {
                Self::epoll(Some(RuntimeError(error)))
            }
            Err(error) => Err(RuntimeError(error)),
        }
    }

    fn epoll(fallback: Option<RuntimeError>) -> Result<Self, RuntimeError> {
        let runtime = RuntimeBuilder::<LegacyDriver>::new()
            .with_entries(4096)
            .enable_timer()
            .build()
            .map_err(RuntimeError)?;
        Ok(Self { kind: Kind::Epoll(Box::new(runtime)), ring_fd: None, fallback })
    }

    /// Which driver runs.
    pub fn driver(&self) -> Driver {
        match self.kind {
            Kind::Ring(_) => Driver::IoUring,
            Kind::Epoll(_) => Driver::Epoll,
        }
    }

    /// Why there is no ring although one was wanted.
    pub fn fallback(&self) -> Option<&RuntimeError> {
        self.fallback.as_ref()
    }

    /// The ring's descriptor, for [`cq_overflow`].
    pub fn ring_fd(&self) -> Option<i32> {
        self.ring_fd
    }

    /// Runs a future, and all tasks it spawns, until the future ends. Run it once, and let the process
    /// end afterwards: monoio's runtime must not be dropped with operations in flight, so it is leaked.
    pub fn block_on<F: Future>(self, future: F) -> F::Output {
        ON_RING.set(matches!(self.kind, Kind::Ring(_)));
        // Asked of a descriptor nothing waits on, a kernel that can says ENOENT.
        let can = |ring: &RawFd| {
            sync_cancel(*ring, *ring).is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT))
        };
        CANCELS.set(self.ring_fd.filter(can));
        match self.kind {
            Kind::Ring(runtime) => Box::leak(runtime).block_on(future),
            Kind::Epoll(runtime) => Box::leak(runtime).block_on(future),
        }
    }
}

type RingRuntime = monoio::Runtime<TimeDriver<IoUringDriver>>;

/// The largest ring that can be had.
fn ring(entries: u32) -> io::Result<(RingRuntime, Option<i32>)> {
    let mut entries = entries.next_power_of_two().max(ENTRIES_MIN);
    let mut deferred = true;
    loop {
        match ring_of(entries, deferred) {
            // A kernel before 6.1.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && deferred => {
                deferred = false;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && entries > ENTRIES_MIN => {
                entries /= 2;
            }
            other => return other,
        }
    }
}

fn ring_of(entries: u32, deferred: bool) -> io::Result<(RingRuntime, Option<i32>)> {
    /// One ring is built at a time, so that the new descriptor can be told.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());

    let mut builder = io_uring::IoUring::builder();
    builder.setup_cqsize(entries * CQ_FACTOR).setup_clamp();
    if deferred {
        builder.setup_single_issuer().setup_defer_taskrun();
    }
    let before = ring_descriptors();
    let runtime = RuntimeBuilder::<IoUringDriver>::new()
        .with_entries(entries)
        .uring_builder(builder)
        .enable_timer()
        .build()?;
    let ring_fd = ring_descriptors().into_iter().find(|fd| !before.contains(fd));
    Ok((runtime, ring_fd))
}

/// The descriptors of this process that are rings.
fn ring_descriptors() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|link| link.as_os_str() == "anon_inode:[io_uring]")
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether completions of a ring overflow its queue right now: the kernel lists them in the ring's
/// fdinfo. `None` when it does not tell.
pub fn cq_overflow(ring_fd: i32) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{ring_fd}")).ok()?;
    let (_, list) = info.split_once("CqOverflowList:")?;
    Some(list.lines().filter(|line| line.contains("user_data")).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_a_ring_and_finds_its_descriptor() {
        std::thread::spawn(|| {
            let runtime = Runtime::build(RuntimeOptions::default()).unwrap();
            if runtime.driver() == Driver::IoUring {
                assert_eq!(cq_overflow(runtime.ring_fd().unwrap()), Some(0));
            }
            assert_eq!(runtime.block_on(async { 7 }), 7);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn an_error_names_the_remedy() {
        let text = RuntimeError(io::Error::from_raw_os_error(libc::EPERM)).to_string();
        assert!(text.contains("sysctl kernel.io_uring_disabled=0"), "{text}");
    }
}
