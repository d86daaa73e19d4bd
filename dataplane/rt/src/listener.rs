//! Listening sockets: bound once by the node, one a worker (SO_REUSEPORT), accepted by readiness.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{FromRawFd, OwnedFd},
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, Type};

use crate::{Socket, sleep, socket::into_fd};

/// Length of the accept queue asked of the kernel (it takes the smaller of this and `somaxconn`).
const BACKLOG: i32 = 4096;
/// Wait after an accept failed for want of descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Whether another program listens on an address, which SO_REUSEPORT would hide: two would share the
/// clients between them.
///
/// # Errors
/// What a plain bind says, above all that the address is in use.
pub fn probe_listener(address: SocketAddr, only_v6: bool) -> io::Result<()> {
    let kind = Type::STREAM.cloexec();
    let socket = socket2::Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // Connections that linger from before do not count.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.bind(&SockAddr::from(address))
}

/// Binds one listening socket with SO_REUSEPORT and SO_REUSEADDR. TCP_NODELAY is set here: accepted
/// sockets inherit it, so it holds from the first byte. With `only_v6` an IPv6 socket takes no IPv4 clients.
pub fn bind_listener(address: SocketAddr, only_v6: bool) -> io::Result<OwnedFd> {
    let socket = socket2::Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    Ok(into_fd(socket))
}

/// A worker's duplicate of a listening socket.
pub struct Listener {
    socket: Socket,
    /// Given up for a moment when descriptors run out, so that one client can be accepted and closed
    /// instead of waiting in the queue for ever.
    spare: RefCell<Option<OwnedFd>>,
}

/// A client that was accepted.
pub struct Accepted {
    /// The connection, non-blocking and close-on-exec.
    pub fd: OwnedFd,
    /// The client's address; an IPv4 client of an IPv6 socket shows as IPv4.
    pub peer: SocketAddr,
}

impl Listener {
    /// Takes a listening socket into the calling worker's driver.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: Socket::from_fd(fd)?, spare: RefCell::new(spare()) })
    }

    /// Waits until a client is in the queue. Holds nothing; may be dropped.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Accepts one client, `None` when the queue is empty.
    pub fn accept(&self) -> io::Result<Option<Accepted>> {
        match accept4(self.socket.raw_fd()) {
            Ok(accepted) => Ok(Some(accepted)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(None),
                // The client is gone already (accept(2) lists these as passing).
                Some(
                    libc::ECONNABORTED
                    | libc::EINTR
                    | libc::EPROTO
                    | libc::ENETDOWN
                    | libc::EHOSTDOWN
                    | libc::EHOSTUNREACH
                    | libc::ENETUNREACH
                    | libc::ENOPROTOOPT
                    | libc::EOPNOTSUPP
                    | libc::ENONET,
                ) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// After [`Listener::accept`] failed: closes one waiting client by means of the spare descriptor,
    /// then waits a moment, so that a worker without descriptors neither spins nor lets clients hang.
    pub async fn back_off(&self) {
        drop(self.spare.take());
        drop(accept4(self.socket.raw_fd()));
        self.spare.replace(spare());
        sleep(BACK_OFF).await;
    }

    /// The bound address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

fn spare() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

fn accept4(listener: i32) -> io::Result<Accepted> {
    let mut fd = -1;
    // SAFETY: the closure writes at most `len` bytes of address into `storage` and reports success
    // only when the kernel did.
    let (_, peer) = unsafe {
        SockAddr::try_init(|storage, len| {
            fd = libc::accept4(
                listener,
                storage.cast(),
                len,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            );
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        })
    }?;
    // SAFETY: accept4 succeeded, so `fd` is open and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let peer = peer.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    Ok(Accepted { fd, peer: canonical(peer) })
}

/// IPv4 in IPv6 (`::ffff:a.b.c.d`) as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}
