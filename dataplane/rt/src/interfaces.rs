//! The addresses of this host's interfaces (`getifaddrs(3)`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// All addresses of all interfaces; empty when the kernel does not tell.
pub fn local_addresses() -> Vec<IpAddr> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is writable; on success it is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Vec::new();
    }
    let mut addresses = Vec::new();
    let mut entry = list;
    while !entry.is_null() {
        // SAFETY: `entry` is a node of the list getifaddrs made, which lives until it is freed.
        let node = unsafe { &*entry };
        // SAFETY: the address of a node is null or points to a socket address of its family.
        addresses.extend(unsafe { ip_of(node.ifa_addr) });
        entry = node.ifa_next;
    }
    // SAFETY: `list` came from getifaddrs and is not used afterwards.
    unsafe { libc::freeifaddrs(list) };
    addresses
}

/// # Safety
/// `address` is null or points to a socket address that is as long as its family says.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: not null, so by the contract the family can be read, and then what it says.
    unsafe {
        match i32::from((*address).sa_family) {
            libc::AF_INET => {
                let v4 = &*address.cast::<libc::sockaddr_in>();
                Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                let v6 = &*address.cast::<libc::sockaddr_in6>();
                Some(Ipv6Addr::from(v6.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there() {
        assert!(local_addresses().contains(&Ipv4Addr::LOCALHOST.into()));
    }
}
