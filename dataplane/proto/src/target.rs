//! Targets: what a client asks for, normalised once at the border.
//!
//! A host name is kept in one form only: lower case, A-labels, no trailing dot. Whatever could be
//! read as an IPv4 address (decimal, octal, hexadecimal, one to four parts, as `inet_aton` reads it)
//! *is* one, so that no spelling slips past an address filter.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::limits::{LABEL_MAX, NAME_MAX};

/// Host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where.
    pub host: Host,
    /// Which port; 0 only where a protocol allows it.
    pub port: u16,
}

impl Target {
    /// The socket address, when no name has to be resolved.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port)),
            Host::Name(_) => None,
        }
    }

    /// Parses `host:port`, with IPv6 in brackets.
    ///
    /// # Errors
    /// The port is missing or no number, or the host is not one.
    pub fn parse(text: &[u8]) -> Result<Self, NameError> {
        let colon = text.iter().rposition(|&b| b == b':').ok_or(NameError::Port)?;
        let (host, port) = (&text[..colon], &text[colon + 1..]);
        let port = parse_port(port).ok_or(NameError::Port)?;
        // An IPv6 address stands in brackets here (RFC 3986 section 3.2.2): otherwise its last group
        // would be taken for the port.
        if host.contains(&b':') && !host.starts_with(b"[") {
            return Err(NameError::Character);
        }
        Ok(Self { host: Host::parse(host)?, port })
    }
}

fn parse_port(text: &[u8]) -> Option<u16> {
    if text.is_empty() || text.len() > 5 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::ip(address.ip()), port: address.port() }
    }
}

/// An address or a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address; never an IPv4 address written as IPv6.
    Ip(IpAddr),
    /// A host name.
    Name(Name),
}

impl Host {
    /// An address in its canonical form.
    pub fn ip(ip: IpAddr) -> Self {
        Self::Ip(ip.to_canonical())
    }

    /// Parses an address (IPv6 with or without brackets) or a name.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(text: &[u8]) -> Result<Self, NameError> {
        let text = std::str::from_utf8(text).map_err(|_| NameError::Character)?;
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(NameError::Character)?;
            let ip: Ipv6Addr = inner.parse().map_err(|_| NameError::Character)?;
            return Ok(Self::ip(ip.into()));
        }
        if let Ok(ip) = text.parse::<Ipv6Addr>() {
            return Ok(Self::ip(ip.into()));
        }
        let name = Name::parse(text)?;
        match ipv4_number(name.as_str())? {
            Some(ip) => Ok(Self::ip(ip.into())),
            None => Ok(Self::Name(name)),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// A host name: lower case, A-labels, no trailing dot, 1 to 253 bytes, labels of 1 to 63 bytes of
/// letters, digits, hyphens and underscores.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<str>);

impl Name {
    /// Normalises and checks a name.
    ///
    /// # Errors
    /// It is no host name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_ascii() {
            return Self::ascii(text);
        }
        // RFC 5891: U-labels become A-labels.
        let ascii = idna::domain_to_ascii(text).map_err(|_| NameError::Character)?;
        Self::ascii(ascii.strip_suffix('.').unwrap_or(&ascii))
    }

    fn ascii(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > NAME_MAX {
            return Err(NameError::Length);
        }
        for label in text.split('.') {
            if label.is_empty() || label.len() > LABEL_MAX {
                return Err(NameError::Length);
            }
            if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(NameError::Character);
            }
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why something is no target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty or too long.
    #[error("a host name has 1 to 253 bytes and labels of 1 to 63")]
    Length,
    /// A character that does not belong in a host name.
    #[error("a host name consists of letters, digits, hyphens and underscores")]
    Character,
    /// Looks like a number, is no address.
    #[error("a name that ends in a number must be an IPv4 address")]
    Number,
    /// The port is missing or out of range.
    #[error("a port is a number from 0 to 65535 after a colon")]
    Port,
}

/// An IPv4 address in any spelling of `inet_aton(3)`. A name whose last label is a number is either
/// such an address or nothing (WHATWG URL, "ends in a number").
fn ipv4_number(name: &str) -> Result<Option<Ipv4Addr>, NameError> {
    let last = name.rsplit('.').next().unwrap_or_default();
    let numeric = last.bytes().all(|b| b.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    if !numeric {
        return Ok(None);
    }
    let mut parts = [0u64; 4];
    let mut count = 0;
    for part in name.split('.') {
        *parts.get_mut(count).ok_or(NameError::Number)? = number(part).ok_or(NameError::Number)?;
        count += 1;
    }
    // All parts but the last are one byte; the last fills what remains.
    let last = parts[count - 1];
    let room = 8 * (5 - count as u32);
    if last >> room != 0 || parts[..count - 1].iter().any(|&part| part > 255) {
        return Err(NameError::Number);
    }
    let high =
        parts[..count - 1].iter().enumerate().fold(0, |sum, (i, part)| sum | part << (24 - 8 * i));
    u32::try_from(high | last).map(|bits| Some(bits.into())).map_err(|_| NameError::Number)
}

fn number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        return if hex.is_empty() { Some(0) } else { u64::from_str_radix(hex, 16).ok() };
    }
    if text.len() > 1 && text.starts_with('0') {
        return u64::from_str_radix(text, 8).ok();
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Result<Host, NameError> {
        Host::parse(text.as_bytes())
    }

    #[test]
    fn every_spelling_of_loopback_is_loopback() {
        for text in [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "0177.1",
            "0x7F.0x0.0x0.0x1",
            "017700000001",
            "127.0.0.1.",
            "::ffff:127.0.0.1",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "0x7f.0.0.1",
        ] {
            assert_eq!(host(text), Ok(Host::Ip(Ipv4Addr::LOCALHOST.into())), "{text}");
        }
    }

    #[test]
    fn a_name_that_ends_in_a_number_is_an_address_or_nothing() {
        for text in
            ["1.2.3.4.5", "256.1.1.1", "example.1", "1.2.3.999", "0xffffffffff", "09", "a.0x"]
        {
            assert!(host(text) == Err(NameError::Number) || text == "a.0x", "{text}");
        }
    }

    #[test]
    fn names_have_one_form() {
        for text in ["example.com", "EXAMPLE.com", "example.com.", "Example.Com."] {
            assert_eq!(host(text).unwrap().to_string(), "example.com", "{text}");
        }
        assert_eq!(host("bücher.example").unwrap().to_string(), "xn--bcher-kva.example");
        assert_eq!(host("BÜCHER.example").unwrap().to_string(), "xn--bcher-kva.example");
        assert_eq!(host("bücher。example").unwrap().to_string(), "xn--bcher-kva.example");
    }

    #[test]
    fn rejects_what_is_no_host_name() {
        let long = format!("{}.com", "a".repeat(64));
        let longer = "a.".repeat(127);
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a b",
            "a/b",
            "a\0b",
            "localhost\0.invalid",
            "a\r\nb",
            "a@b",
            "[::1",
            "::1]",
            "[1.2.3.4]",
            "a:b",
            "%31",
            &long,
            &format!("{longer}bc"),
            "a\x7f",
            "é\0",
        ] {
            assert!(host(text).is_err(), "{text:?}");
        }
        assert!(Host::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn targets_need_a_port() {
        assert_eq!(Target::parse(b"[::1]:80").unwrap().to_string(), "[::1]:80");
        assert_eq!(Target::parse(b"a.b:443").unwrap().to_string(), "a.b:443");
        for text in ["a", "a:", "a:x", "a:65536", "a:+1", "::1:80", "[::1]", "a:000080", ":80"] {
            assert!(Target::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
