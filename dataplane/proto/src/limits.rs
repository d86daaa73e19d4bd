//! Bounds of the protocols, each with the memory it implies for one session.

/// Longest HTTP head in bytes. A session that sends one holds that much until the head is complete.
pub const HTTP_HEAD_MAX: usize = 64 * 1024;
/// Most fields in an HTTP head.
pub const HTTP_FIELDS_MAX: usize = 100;
/// Longest chunk extension in bytes.
pub const CHUNK_EXTENSION_MAX: usize = 256;
/// Longest trailer section in bytes.
pub const TRAILERS_MAX: usize = 8 * 1024;
/// Longest user id in a SOCKS4 request in bytes (the protocol names no bound).
pub const SOCKS4_USER_MAX: usize = 255;
/// Longest host name in bytes (RFC 1035 section 2.3.4, without the root's dot).
pub const NAME_MAX: usize = 253;
/// Longest label of a host name in bytes.
pub const LABEL_MAX: usize = 63;
/// How often one HTTP connection may offer credentials before it is closed.
pub const HTTP_LOGINS_MAX: u32 = 4;
