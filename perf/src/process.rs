//! CPU time, memory and descriptors of a process and all its children, from `/proc`.

use std::{collections::HashMap, fs};

/// What a process tree has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// CPU time in nanoseconds: of living threads exactly, of ended children in clock ticks.
    pub(crate) cpu: u64,
    /// Resident memory in bytes.
    pub(crate) memory: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
}

/// The usage of a process and everything below it.
pub(crate) fn usage(root: u32) -> Usage {
    let mut usage = Usage::default();
    for pid in tree(root) {
        usage.cpu += threads(pid) + ended_children(pid);
        usage.memory += resident(pid);
        usage.descriptors +=
            fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count() as u64);
    }
    usage
}

/// A process and its descendants.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next) {
        tree.extend(children.get(pid).into_iter().flatten());
        next += 1;
    }
    tree
}

/// The fields of `/proc/PID/stat` behind the name: state, parent and so on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// Time on a CPU of all living threads, from their schedstat.
fn threads(pid: u32) -> u64 {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

/// cutime and cstime, in ticks of 10 ms.
fn ended_children(pid: u32) -> u64 {
    let ticks = |index: usize, fields: &[String]| fields.get(index)?.parse::<u64>().ok();
    let sum = stat(pid).and_then(|fields| Some(ticks(13, &fields)? + ticks(14, &fields)?));
    sum.unwrap_or(0) * 10_000_000
}

fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// Raises the soft descriptor limit to the hard one.
#[allow(unsafe_code)]
pub(crate) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Lets a receiver sleep until so many bytes are there (`SO_RCVLOWAT`), so that the receivers of a bulk
/// load are not woken for every segment.
#[allow(unsafe_code)]
pub(crate) fn receive_in_bulk(socket: &impl std::os::fd::AsRawFd, bytes: usize) {
    let bytes = bytes as libc::c_int;
    // SAFETY: `bytes` is readable for the size passed.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            std::mem::size_of_val(&bytes) as libc::socklen_t,
        );
    }
}

/// Asks a process to end.
#[allow(unsafe_code)]
pub(crate) fn terminate(pid: u32) {
    // SAFETY: no memory is passed; the pid is of a child that has not been waited for.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}

/// Ends a process at once.
#[allow(unsafe_code)]
pub(crate) fn kill(pid: u32) {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
}
