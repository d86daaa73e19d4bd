//! Dialling one address without blocking the worker.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use socket2::{Domain, Protocol, SockAddr, Type};

use crate::{Socket, socket::into_fd};

/// How a connection is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectOptions {
    /// The local address to bind (the egress address). The port is chosen at connect, so that ports
    /// are shared between destinations (`IP_BIND_ADDRESS_NO_PORT`).
    pub bind: Option<IpAddr>,
    /// Firewall mark (`SO_MARK`; needs CAP_NET_ADMIN).
    pub mark: Option<u32>,
}

/// Connects to one address. Holds no data: dropping it closes the half-open socket. The deadline is
/// the caller's.
///
/// # Errors
/// What the kernel said: refused, unreachable, no local port left (EADDRNOTAVAIL) and so on.
pub async fn connect(address: SocketAddr, options: ConnectOptions) -> io::Result<Socket> {
    let (socket, pending) = start(address, options)?;
    let socket = Socket::from_fd(into_fd(socket))?;
    if pending {
        socket.writable().await?;
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
    }
    Ok(socket)
}

fn start(address: SocketAddr, options: ConnectOptions) -> io::Result<(socket2::Socket, bool)> {
    let domain = Domain::for_address(address);
    let socket =
        socket2::Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    if let Some(local) = options.bind {
        bind_address_no_port(&socket)?;
        socket.bind(&SockAddr::from(SocketAddr::new(local, 0)))?;
    }
    match socket.connect(&SockAddr::from(address)) {
        Ok(()) => Ok((socket, false)),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok((socket, true)),
        Err(error) => Err(error),
    }
}

/// ip(7): leave the choice of the port to `connect`, which knows the destination.
fn bind_address_no_port(socket: &socket2::Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` is readable for the size passed.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            std::mem::size_of_val(&on) as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_messages_are_not_held_back() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (socket, _) = start(address, ConnectOptions::default()).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && socket.nonblocking().unwrap());
    }
}
