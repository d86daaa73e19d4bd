//! SOCKS version 5: RFC 1928, with user name and password after RFC 1929.

mod client;
mod server;
mod udp;

pub use client::{ClientError, Reply, encode_greeting, encode_login, encode_request, parse_reply};
pub use server::Server;
pub use udp::{UdpHeader, UdpHeaderError};

use std::net::SocketAddr;

use crate::{Host, Outcome, Target};

pub(crate) const VERSION: u8 = 5;
/// Version of the login subnegotiation (RFC 1929 section 2).
pub(crate) const LOGIN_VERSION: u8 = 1;
pub(crate) const METHOD_NONE: u8 = 0x00;
pub(crate) const METHOD_PASSWORD: u8 = 0x02;
pub(crate) const METHOD_NO_ACCEPTABLE: u8 = 0xff;

const ATYP_IPV4: u8 = 1;
const ATYP_DOMAIN: u8 = 3;
const ATYP_IPV6: u8 = 4;

/// RFC 1928 section 6, in the order of their codes.
pub(crate) fn reply_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Connected { .. } => 0x00,
        Outcome::Failed | Outcome::LimitReached => 0x01,
        Outcome::Forbidden => 0x02,
        Outcome::NetworkUnreachable => 0x03,
        // "TTL expired" (0x06) is about routing; a silent host is an unreachable one.
        Outcome::HostUnreachable | Outcome::TimedOut => 0x04,
        Outcome::Refused => 0x05,
        Outcome::CommandUnsupported => 0x07,
        Outcome::AddressUnsupported => 0x08,
    }
}

/// Appends ATYP, address and port.
pub(crate) fn encode_address(target: &Target, out: &mut Vec<u8>) {
    match &target.host {
        Host::Ip(std::net::IpAddr::V4(ip)) => {
            out.push(ATYP_IPV4);
            out.extend_from_slice(&ip.octets());
        }
        Host::Ip(std::net::IpAddr::V6(ip)) => {
            out.push(ATYP_IPV6);
            out.extend_from_slice(&ip.octets());
        }
        Host::Name(name) => {
            let name = name.as_str().as_bytes();
            out.push(ATYP_DOMAIN);
            // A name has at most 253 bytes.
            out.push(name.len() as u8);
            out.extend_from_slice(name);
        }
    }
    out.extend_from_slice(&target.port.to_be_bytes());
}

/// What an address at the start of `bytes` is.
pub(crate) enum Address {
    /// More bytes are needed; at least this many in all.
    Short(usize),
    /// ATYP is none of the three.
    Unknown,
    /// No host name.
    Bad(usize),
    /// The target and the length of its encoding.
    Is(Target, usize),
}

/// Parses ATYP, address and port.
pub(crate) fn parse_address(bytes: &[u8]) -> Address {
    let need = match bytes {
        [] => return Address::Short(1),
        [ATYP_IPV4, ..] => 7,
        [ATYP_IPV6, ..] => 19,
        [ATYP_DOMAIN] => return Address::Short(2),
        [ATYP_DOMAIN, len, ..] => 2 + usize::from(*len) + 2,
        _ => return Address::Unknown,
    };
    let Some((encoded, _)) = bytes.split_at_checked(need) else { return Address::Short(need) };
    let (address, port) = encoded.split_at(need - 2);
    let port = u16::from_be_bytes([port[0], port[1]]);
    let host = match address {
        [ATYP_IPV4, a, b, c, d] => Ok(Host::ip([*a, *b, *c, *d].into())),
        [ATYP_IPV6, octets @ ..] => {
            let octets: [u8; 16] = octets.try_into().unwrap_or([0; 16]);
            Ok(Host::ip(octets.into()))
        }
        [_, _, name @ ..] => Host::parse(name),
        _ => return Address::Unknown,
    };
    match host {
        Ok(host) => Address::Is(Target { host, port }, need),
        Err(_) => Address::Bad(need),
    }
}

/// A reply or datagram header's address as a target.
pub(crate) fn bound(address: SocketAddr) -> Target {
    Target::from(address)
}
