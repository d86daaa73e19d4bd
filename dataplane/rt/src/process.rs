//! Process limits: descriptors, thread names and priorities.

use std::io;

/// The soft limit of open descriptors (`RLIMIT_NOFILE`).
pub fn descriptor_limit() -> u64 {
    limits().map_or(1024, |limit| limit.rlim_cur)
}

/// Raises the soft descriptor limit to the hard one; returns the limit in force.
pub fn raise_descriptor_limit() -> u64 {
    let Ok(mut limit) = limits() else { return descriptor_limit() };
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: `limit` outlives the call. A refusal leaves the old limit in force.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
    descriptor_limit()
}

fn limits() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => Ok(limit),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps the kernel from backing this process with huge pages: what sessions take is small and scattered,
/// and a huge page that holds one of them cannot be given back (with them 9,000 idle sessions took half
/// as much memory again).
pub fn refuse_huge_pages() {
    // SAFETY: no memory is passed; the unused arguments must be 0. A refusal changes nothing.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
}

/// Names the calling thread (15 bytes at most, as the kernel keeps).
pub fn thread_name(name: &str) {
    let mut bytes = [0u8; 16];
    let len = name.len().min(15);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    // SAFETY: `bytes` is NUL-terminated and outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr()) };
}

/// Lowers the calling thread's priority by ten nice levels, for work that must not take a core from a
/// worker (password hashing, compiling). It still gets a tenth of a busy core; but it asks for the longest
/// slice (Linux 6.12: `sched_runtime` of SCHED_OTHER), so that a worker that wakes need not wait for its end.
pub fn lower_priority() {
    const NICE: libc::c_int = 10;
    const SLICE: u64 = 100_000_000;
    if !schedule(NICE, SLICE) {
        // SAFETY: no memory is passed; on Linux the call with pid 0 concerns the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    }
}

/// Asks for the shortest slice (Linux 6.12), for a thread that does little at once: when it wakes, what
/// computes for long on its core makes way at once instead of at the end of a slice of milliseconds.
pub fn shorten_slice() {
    const SLICE: u64 = 100_000;
    // SAFETY: no memory is passed; on Linux the call with pid 0 concerns the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    schedule(nice, SLICE);
}

/// Sets nice level and slice (nanoseconds) of the calling thread; a refusal changes nothing.
fn schedule(nice: libc::c_int, slice: u64) -> bool {
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: slice,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `attributes` outlives the call; pid 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) == 0 }
}
