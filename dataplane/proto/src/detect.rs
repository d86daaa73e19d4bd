//! Which protocol a client speaks, told from its first byte.

/// A protocol a listener may speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// SOCKS5 (RFC 1928).
    Socks5,
    /// SOCKS4 and 4a.
    Socks4,
    /// HTTP/1.1 proxy.
    Http,
}

impl Protocol {
    /// All protocols.
    pub const ALL: [Self; 3] = [Self::Socks5, Self::Socks4, Self::Http];

    /// The name in configuration, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Socks5 => "socks5",
            Self::Socks4 => "socks4",
            Self::Http => "http",
        }
    }
}

/// The protocol whose messages begin with `first`. SOCKS begins with its version; an HTTP method with
/// a letter (every registered method does).
pub fn detect(first: u8) -> Option<Protocol> {
    match first {
        5 => Some(Protocol::Socks5),
        4 => Some(Protocol::Socks4),
        // An empty line may stand before a request (RFC 9112 section 2.2).
        b'A'..=b'Z' | b'a'..=b'z' | b'\r' => Some(Protocol::Http),
        _ => None,
    }
}
