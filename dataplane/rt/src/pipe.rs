//! Pipes for `splice(2)`: a bounded pool a worker, each 1 MiB.
//!
//! A flow borrows a pipe only while bytes are inside it, so the pool serves many flows. Without
//! privileges a user gets 64 pipes of this size before later ones fall to 8 KiB
//! (`/proc/sys/fs/pipe-user-pages-soft`); a pipe that comes out short is refused, and flows stay on
//! copying for a while.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use crate::Socket;

/// Capacity of a pipe in bytes.
pub const PIPE_BYTES: usize = 1 << 20;
/// Pipes one process may have, over all workers.
pub const PIPES_MAX: usize = 48;
/// A user who has too many pipes may have fewer after so long.
const SHORT_FOR: Duration = Duration::from_secs(10);

thread_local! {
    static FREE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static MADE: Cell<usize> = const { Cell::new(0) };
    static MAX: Cell<usize> = const { Cell::new(PIPES_MAX / 2) };
    /// When a pipe last came out short.
    static SHORT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Sets how many pipes the calling worker may make: its share of [`PIPES_MAX`].
pub fn set_pipes_max(pipes: usize) {
    MAX.set(pipes);
}

/// A pipe and how many bytes are in it.
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    len: usize,
}

impl Pipe {
    /// An empty pipe from the worker's pool, or `None` when all are in use or none can be had.
    pub fn take() -> Option<Self> {
        if let Some(pipe) = FREE.with_borrow_mut(Vec::pop) {
            return Some(pipe);
        }
        let is_short = SHORT.get().is_some_and(|at| at.elapsed() < SHORT_FOR);
        if is_short || MADE.get() >= MAX.get() {
            return None;
        }
        match Self::create() {
            Ok(pipe) => Some(pipe),
            Err(error) => {
                // Short, as further ones would be: do not ask again for every flow. A want of
                // descriptors passes.
                if error.kind() == io::ErrorKind::Other {
                    SHORT.set(Some(Instant::now()));
                }
                None
            }
        }
    }

    fn create() -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors the call writes.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so both descriptors are open and owned by nobody else.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        MADE.set(MADE.get() + 1);
        let pipe = Self { read, write, len: 0 };
        // SAFETY: no memory is passed.
        let size = unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
        if size < PIPE_BYTES as libc::c_int {
            return Err(io::Error::other("the pipe came out short"));
        }
        Ok(pipe)
    }

    /// Gives an empty pipe back. One with bytes in it is closed: they belong to its flow.
    pub fn give_back(self) {
        if self.len == 0 {
            FREE.with_borrow_mut(|free| free.push(self));
        }
    }

    /// Bytes inside.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is inside.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Moves at most `max` bytes from a socket into the pipe; 0 is the end of its stream.
    pub fn fill_from(&mut self, socket: &Socket, max: usize) -> io::Result<usize> {
        let moved = splice(socket.raw_fd(), self.write.as_raw_fd(), max.min(PIPE_BYTES))?;
        self.len += moved;
        Ok(moved)
    }

    /// Moves bytes from the pipe into a socket.
    pub fn drain_to(&mut self, socket: &Socket) -> io::Result<usize> {
        let moved = splice(self.read.as_raw_fd(), socket.raw_fd(), self.len)?;
        self.len -= moved;
        Ok(moved)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let _ = MADE.try_with(|made| made.set(made.get() - 1));
    }
}

/// `splice(2)` between a non-blocking socket and a non-blocking pipe.
fn splice(from: i32, to: i32, len: usize) -> io::Result<usize> {
    const FLAGS: libc::c_uint = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open (borrowed from live owners); no memory is passed.
    match unsafe { libc::splice(from, none, to, none, len, FLAGS) } {
        -1 => Err(io::Error::last_os_error()),
        moved => Ok(moved as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_bounded_and_reused() {
        set_pipes_max(2);
        let (a, b) = (Pipe::take().unwrap(), Pipe::take().unwrap());
        assert!(Pipe::take().is_none());
        let fd = a.read.as_raw_fd();
        a.give_back();
        assert_eq!(Pipe::take().unwrap().read.as_raw_fd(), fd);
        b.give_back();
    }

    #[test]
    fn a_short_pipe_is_no_reason_for_ever() {
        SHORT.set(Some(Instant::now()));
        assert!(Pipe::take().is_none());
        SHORT.set(Instant::now().checked_sub(SHORT_FOR));
        assert!(Pipe::take().is_some());
    }
}
