//! Addresses that belong to the inside: a proxy must not be a way to them unless the operator says so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether an address is loopback, private, link-local (with the metadata services), shared, multicast,
/// reserved or otherwise no public unicast address (IANA special-purpose registries, RFC 6890), in any
/// of the forms IPv6 can carry an IPv4 address in.
pub fn is_internal(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => is_internal_v4(ip),
        IpAddr::V6(ip) => is_internal_v6(ip),
    }
}

/// A metadata service at an address that looks public.
const AZURE_METADATA: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

fn is_internal_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    matches!(
        (a, b, c),
        (0 | 10 | 127, ..)                  // this network, private, loopback
            | (100, 64..=127, _)            // shared address space, RFC 6598
            | (169, 254, _)                 // link local, metadata services
            | (172, 16..=31, _)             // private
            | (192, 0, 0)                   // IETF protocol assignments
            | (192, 0, 2)                   // documentation
            | (192, 88, 99)                 // 6to4 relay anycast
            | (192, 168, _)                 // private
            | (198, 18..=19, _)             // benchmarking
            | (198, 51, 100)                // documentation
            | (203, 0, 113)                 // documentation
            | (224..=255, ..) // multicast, reserved, broadcast
    ) || ip == AZURE_METADATA
}

/// The IPv4 address that an IPv6 address leads to by a translator or a tunnel: NAT64, 6to4.
pub fn embedded_v4(ip: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(ip) = ip else { return None };
    match ip.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
        }
        _ => None,
    }
}

fn is_internal_v6(ip: Ipv6Addr) -> bool {
    let segments = ip.segments();
    let embedded = |high: u16, low: u16| {
        is_internal_v4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
    };
    match segments {
        // ::, ::1, ::ffff:a.b.c.d, ::a.b.c.d (deprecated)
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => embedded(high, low),
        // NAT64, RFC 6052; local-use NAT64 (64:ff9b:1::/48) is never public
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => true,
        // IPv4-translated, RFC 2765
        [0, 0, 0, 0, 0xffff, 0, high, low] => embedded(high, low),
        // 6to4, RFC 3056
        [0x2002, high, low, ..] => embedded(high, low),
        // Teredo, RFC 4380: the client's address is inverted in the last 32 bits
        [0x2001, 0, _, _, _, _, high, low] => embedded(!high, !low),
        // ISATAP interface identifiers, RFC 5214
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => {
            embedded(high, low) || !is_global_v6(segments)
        }
        _ => !is_global_v6(segments),
    }
}

/// 2000::/3 is the global unicast space; documentation and benchmarking ranges lie inside it.
fn is_global_v6(segments: [u16; 8]) -> bool {
    let documentation = matches!(segments, [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..]);
    let benchmarking = matches!(segments, [0x2001, 2, 0, ..]);
    let orchid = matches!(segments, [0x2001, 0x10..=0x2f, ..]);
    segments[0] & 0xe000 == 0x2000 && !documentation && !benchmarking && !orchid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inside_is_inside_in_every_form() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "2001:0:4136:e378:8000:63bf:80ff:fffe",
            "::ffff:0:127.0.0.1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001:db8::1",
            "100::1",
            "fe80::5efe:127.0.0.1",
            "2a00::5efe:10.0.0.1",
            "5f00::1",
        ] {
            assert!(is_internal(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn the_outside_is_outside() {
        for text in [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "169.253.1.1",
            "192.167.0.1",
            "198.17.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450:4001::200e",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(!is_internal(text.parse().unwrap()), "{text}");
        }
    }
}
