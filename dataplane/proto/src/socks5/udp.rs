//! The header of a relayed datagram (RFC 1928 section 7).

use super::{Address, encode_address, parse_address};
use crate::Target;

/// Where a datagram goes or comes from, and where its payload begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpHeader {
    /// DST.ADDR and DST.PORT.
    pub target: Target,
    /// Bytes of header; payload follows.
    pub len: usize,
}

/// Why a datagram is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UdpHeaderError {
    /// FRAG is not 0; fragments are not reassembled and must be dropped.
    #[error("a fragment")]
    Fragment,
    /// The header is cut off or its address is none.
    #[error("a broken header")]
    Broken,
}

impl UdpHeader {
    /// Parses the header of a datagram.
    ///
    /// # Errors
    /// The datagram must be dropped.
    pub fn parse(datagram: &[u8]) -> Result<Self, UdpHeaderError> {
        let [_, _, fragment, address @ ..] = datagram else { return Err(UdpHeaderError::Broken) };
        if *fragment != 0 {
            return Err(UdpHeaderError::Fragment);
        }
        match parse_address(address) {
            Address::Is(target, len) => Ok(Self { target, len: 3 + len }),
            _ => Err(UdpHeaderError::Broken),
        }
    }

    /// Appends the header of a datagram from `source`.
    pub fn encode(source: &Target, out: &mut Vec<u8>) {
        out.extend_from_slice(&[0, 0, 0]);
        encode_address(source, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for target in ["1.2.3.4:5", "[::1]:80", "a.example:53"] {
            let target = Target::parse(target.as_bytes()).unwrap();
            let mut datagram = Vec::new();
            UdpHeader::encode(&target, &mut datagram);
            let len = datagram.len();
            datagram.extend_from_slice(b"payload");
            assert_eq!(UdpHeader::parse(&datagram), Ok(UdpHeader { target, len }));
        }
    }

    #[test]
    fn fragments_and_short_headers_are_dropped() {
        let whole = [0, 0, 0, 1, 1, 2, 3, 4, 0, 80];
        for len in 0..whole.len() {
            assert_eq!(UdpHeader::parse(&whole[..len]), Err(UdpHeaderError::Broken));
        }
        for fragment in 1..=255 {
            let datagram = [0, 0, fragment, 1, 1, 2, 3, 4, 0, 80];
            assert_eq!(UdpHeader::parse(&datagram), Err(UdpHeaderError::Fragment));
        }
    }
}
