//! A non-blocking stream socket of a worker.
//!
//! Waiting ([`Socket::readable`], [`Socket::writable`]) holds no data and may be dropped at any time.
//! Receives complete at once, but for [`Socket::receive_held`], which waits with a buffer and gives it
//! back when its session goes quiet. A send through the ring holds its buffer until the kernel has room (the
//! ring waits by itself, also on a non-blocking socket), so it is never dropped: a session that is
//! ended meanwhile shuts the socket down, which completes the send.

use std::{
    cell::{Cell, UnsafeCell},
    future::{Future, poll_fn},
    io,
    mem::ManuallyDrop,
    net::{Shutdown, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    pin::pin,
    time::Duration,
};

use monoio::io::{AsyncReadRent, AsyncWriteRent};

use crate::{
    Buffer, Watch,
    runtime::{can_cancel, cancel_receive, on_ring},
};

/// Receives of one worker that may wait with a buffer (8 MiB).
const HELD_MAX: usize = 512;
/// Silence after which they give it back.
const HELD_QUIET: Duration = Duration::from_secs(1);

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// One of the receives that wait with a buffer.
struct Held;

impl Held {
    fn take() -> Option<Self> {
        let held = HELD.get();
        (held < HELD_MAX && can_cancel()).then(|| {
            HELD.set(held + 1);
            Self
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
    }
}

/// A connected stream socket, or any other descriptor whose readiness is awaited.
pub struct Socket {
    // Only `send` and `receive_held` take a mutable reference, and not across an await.
    stream: UnsafeCell<ManuallyDrop<monoio::net::TcpStream>>,
}

impl Socket {
    /// Takes a descriptor into the calling worker's driver. It must be non-blocking.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // `from_std` only stores the number and registers it; it asks nothing of the socket.
        let stream = monoio::net::TcpStream::from_std(std::net::TcpStream::from(fd))?;
        Ok(Self { stream: UnsafeCell::new(ManuallyDrop::new(stream)) })
    }

    fn stream(&self) -> &monoio::net::TcpStream {
        // SAFETY: mutable references are made in `send` and `receive_held` only and end before anything
        // else runs.
        unsafe { &*self.stream.get() }
    }

    /// The descriptor's number.
    pub fn raw_fd(&self) -> RawFd {
        self.stream().as_raw_fd()
    }

    /// Waits until a receive would not block. Holds nothing; may be dropped.
    pub async fn readable(&self) -> io::Result<()> {
        // Not relaxed: the epoll driver checks again, so that a receive of our own is seen.
        self.stream().readable(false).await
    }

    /// Waits until a send would not block. Holds nothing; may be dropped.
    pub async fn writable(&self) -> io::Result<()> {
        self.stream().writable(false).await
    }

    /// Receives what is there; `WouldBlock` when nothing is, 0 at the end of the stream.
    pub fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        self.receive_with(room, 0)
    }

    fn receive_with(&self, room: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        let flags = flags | libc::MSG_DONTWAIT;
        loop {
            // SAFETY: `room` is writable for its whole length during the call.
            let received =
                unsafe { libc::recv(self.raw_fd(), room.as_mut_ptr().cast(), room.len(), flags) };
            match received {
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                received => return Ok(received as usize),
            }
        }
    }

    /// Waits and receives in one operation of the ring, which costs less than a wait and a receive, but
    /// holds a small buffer all the while. Empty at the end of the stream. Must not be dropped: bytes
    /// may be in it.
    ///
    /// # Errors
    /// `WouldBlock`: wait with [`Socket::readable`] instead. The worker's ring cannot do this, too many
    /// wait like this (512), or nothing moved for a second. When `watch` is stopped or
    /// interrupted, our receiving side is shut down, and the wait ends in whatever way.
    pub async fn receive_held(&self, watch: &Watch) -> io::Result<Buffer> {
        let Some(_held) = Held::take() else { return Err(io::ErrorKind::WouldBlock.into()) };
        watch.quiet_after(HELD_QUIET);
        // SAFETY: the reference lives for this call only, which copies the descriptor into the
        // operation; the future it returns does not touch the stream.
        let stream = unsafe { &mut **self.stream.get() };
        let mut receive = pin!(stream.read(Buffer::small()));
        let (mut shut, mut cancelled) = (false, false);
        let (received, buffer) = poll_fn(|cx| {
            let received = receive.as_mut().poll(cx);
            if received.is_pending() {
                if watch.is_halted(cx) && !std::mem::replace(&mut shut, true) {
                    let _ = self.borrow(|socket| socket.shutdown(Shutdown::Read));
                }
                if watch.is_quiet() && !std::mem::replace(&mut cancelled, true) {
                    cancel_receive(self.raw_fd());
                }
            }
            received
        })
        .await;
        match received {
            Ok(_) => Ok(buffer),
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the stream has ended, without receiving; `WouldBlock` when it is silent.
    pub fn peek(&self) -> io::Result<bool> {
        self.receive_with(&mut [0], libc::MSG_PEEK).map(|received| received == 0)
    }

    /// How many bytes a receive would find (`FIONREAD`).
    pub fn available(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: `bytes` is writable during the call, which writes one int.
        let got = unsafe { libc::ioctl(self.raw_fd(), libc::FIONREAD, &raw mut bytes) };
        if got == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
    }

    /// Sends as much as the kernel takes now, by a system call of its own; `WouldBlock` when none.
    pub fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        loop {
            // SAFETY: `bytes` is readable for its whole length during the call.
            let sent =
                unsafe { libc::send(self.raw_fd(), bytes.as_ptr().cast(), bytes.len(), FLAGS) };
            match sent {
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                sent => return Ok(sent as usize),
            }
        }
    }

    /// Sends through the ring, so that the sends of many sessions share one system call; waits until
    /// the kernel takes some bytes. Without a ring it does not wait: `WouldBlock` when it takes none.
    /// Must not be dropped: the result says how many bytes left. When `watch` is stopped or
    /// interrupted, the socket is shut down, and the send completes.
    pub async fn send(&self, buffer: Buffer, watch: &Watch) -> (io::Result<usize>, Buffer) {
        if !on_ring() {
            return (self.send_now(buffer.filled()), buffer);
        }
        // SAFETY: the reference lives for this call only, which copies the descriptor into the
        // operation; the future it returns does not touch the stream.
        let stream = unsafe { &mut **self.stream.get() };
        let mut send = pin!(stream.write(buffer));
        let mut shut = false;
        poll_fn(|cx| {
            let sent = send.as_mut().poll(cx);
            if sent.is_pending() && watch.is_halted(cx) && !std::mem::replace(&mut shut, true) {
                let _ = self.borrow(|socket| socket.shutdown(Shutdown::Both));
            }
            sent
        })
        .await
    }

    /// Whether what looks like the peer's end, before ours, was a reset whose error another operation has taken:
    /// the connection is gone as a whole (`TCP_INFO`). A peer that had ended and then reset what still came
    /// leaves EPIPE (`tcp_reset` in CLOSE_WAIT); all it said was said. Takes the pending error.
    pub fn was_reset(&self) -> bool {
        const TCP_CLOSE: u8 = 7;
        let (mut state, mut len) = (0u8, 1 as libc::socklen_t);
        // SAFETY: `state` is writable for the one byte that `len` says, and both outlive the call. The state
        // is the first byte of `struct tcp_info`.
        let got = unsafe {
            let state = (&raw mut state).cast();
            libc::getsockopt(self.raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, state, &raw mut len)
        };
        let ended_before = || {
            self.take_error().is_ok_and(|error| {
                error.is_some_and(|error| error.raw_os_error() == Some(libc::EPIPE))
            })
        };
        got == 0 && state == TCP_CLOSE && !ended_before()
    }

    /// Ends our side of the stream (FIN).
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.borrow(|socket| socket.shutdown(Shutdown::Write))
    }

    /// Makes the coming close a reset (`SO_LINGER` 0), so that a cut stream does not look finished.
    pub fn reset_on_close(&self) {
        let _ = self.borrow(|socket| socket.set_linger(Some(Duration::ZERO)));
    }

    /// The local address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.borrow(|socket| address(socket.local_addr()?))
    }

    /// Takes the pending error (`SO_ERROR`).
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.borrow(|socket| socket.take_error())
    }

    fn borrow<T>(&self, f: impl FnOnce(&socket2::Socket) -> io::Result<T>) -> io::Result<T> {
        // SAFETY: the descriptor is open as long as `self`; ManuallyDrop keeps it from being closed.
        let socket = ManuallyDrop::new(unsafe { socket2::Socket::from_raw_fd(self.raw_fd()) });
        f(&socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: `self` is being dropped, so the stream is taken once and never seen again.
        let stream = unsafe { ManuallyDrop::take(self.stream.get_mut()) };
        drop(stream);
    }
}

/// The IP address in a socket address; the other families have no place in a proxy.
pub(crate) fn address(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// A socket2 socket as a descriptor.
pub(crate) fn into_fd(socket: socket2::Socket) -> OwnedFd {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which we take.
    unsafe { OwnedFd::from_raw_fd(socket.into_raw_fd()) }
}
