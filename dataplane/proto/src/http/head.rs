//! What request and response heads share: finding their end, strict lines, fields that may pass.

use std::mem::MaybeUninit;

use httparse::Header;

use super::{Body, Chunks};
use crate::{
    Malformed,
    limits::{HTTP_FIELDS_MAX, HTTP_HEAD_MAX},
};

/// Room for the parsed fields of a head.
pub(super) type Slots<'a> = [MaybeUninit<Header<'a>>; HTTP_FIELDS_MAX];

/// Empty room for fields.
pub(super) fn slots<'a>() -> Slots<'a> {
    [const { MaybeUninit::uninit() }; HTTP_FIELDS_MAX]
}

/// Collects a head across reads; each byte is looked at once.
#[derive(Debug, Default)]
pub(super) struct Collector {
    bytes: Vec<u8>,
}

impl Collector {
    /// Takes bytes up to the end of the head; returns how many, and whether the head is complete.
    pub(super) fn take(&mut self, input: &[u8]) -> Result<(usize, bool), Malformed> {
        // The end may straddle the border, so the search goes back three bytes.
        let searched = self.bytes.len().saturating_sub(3);
        let before = self.bytes.len();
        let room = HTTP_HEAD_MAX - before;
        self.bytes.extend_from_slice(&input[..input.len().min(room)]);
        let end = self.bytes[searched..].windows(4).position(|window| window == b"\r\n\r\n");
        match end {
            Some(at) => {
                let end = searched + at + 4;
                self.bytes.truncate(end);
                Ok((end - before, true))
            }
            None if input.len() >= room => Err(Malformed::TooLarge),
            None => Ok((input.len(), false)),
        }
    }

    /// The bytes so far.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The complete head; the collector is empty again.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Forgets what was collected.
    pub(super) fn skip(&mut self, len: usize) {
        self.bytes.drain(..len);
    }
}

/// Every line ends in CRLF. (`httparse` refuses a CR without LF, folding, and space before a colon,
/// but takes an LF without CR.)
pub(super) fn check_lines(head: &[u8]) -> Result<(), Malformed> {
    let bare =
        head.iter().enumerate().any(|(i, &b)| b == b'\n' && (i == 0 || head[i - 1] != b'\r'));
    if bare || matches!(head.first(), Some(b'\r' | b'\n')) {
        return Err(Malformed::Syntax);
    }
    Ok(())
}

/// An error of `httparse` in our words.
pub(super) fn syntax(error: httparse::Error) -> Malformed {
    match error {
        httparse::Error::TooManyHeaders => Malformed::TooLarge,
        _ => Malformed::Syntax,
    }
}

/// What the fields of a head say about the message.
#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    /// Content-Length.
    pub(super) length: Option<u64>,
    /// Transfer-Encoding is `chunked`.
    pub(super) chunked: bool,
    /// Host, once.
    pub(super) host: Option<&'a [u8]>,
    /// Options of all Connection and Proxy-Connection fields.
    pub(super) connection: Vec<&'a [u8]>,
    /// Upgrade.
    pub(super) upgrade: bool,
    /// Proxy-Authorization, once.
    pub(super) credentials: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    /// Reads the fields that matter.
    ///
    /// # Errors
    /// The message could be read in two ways.
    pub(super) fn read(headers: &[Header<'a>]) -> Result<Self, Malformed> {
        let mut fields = Self::default();
        for header in headers {
            let name = header.name;
            if name.eq_ignore_ascii_case("content-length") {
                set(&mut fields.length, content_length(header.value)?)?;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if fields.chunked || !trim(header.value).eq_ignore_ascii_case(b"chunked") {
                    return Err(Malformed::Ambiguous);
                }
                fields.chunked = true;
            } else if name.eq_ignore_ascii_case("host") {
                set(&mut fields.host, trim(header.value))?;
            } else if name.eq_ignore_ascii_case("proxy-authorization") {
                set(&mut fields.credentials, trim(header.value))?;
            } else if name.eq_ignore_ascii_case("upgrade") {
                fields.upgrade = true;
            } else if name.eq_ignore_ascii_case("connection")
                || name.eq_ignore_ascii_case("proxy-connection")
            {
                fields.connection.extend(options(header.value));
            }
        }
        // RFC 9112 section 6.1: both at once is how requests are smuggled.
        if fields.chunked && fields.length.is_some() {
            return Err(Malformed::Ambiguous);
        }
        // An option that names a field the message's reading depends on would remove it.
        let essential: [&[u8]; 3] = [b"content-length", b"transfer-encoding", b"host"];
        if essential.iter().any(|name| fields.has_option(name)) {
            return Err(Malformed::Ambiguous);
        }
        Ok(fields)
    }

    /// Whether a connection option is present.
    pub(super) fn has_option(&self, name: &[u8]) -> bool {
        self.connection.iter().any(|option| option.eq_ignore_ascii_case(name))
    }

    /// Whether the peer wants to go on after this message (RFC 9112 section 9.3).
    pub(super) fn keeps_alive(&self, version: u8) -> bool {
        if self.has_option(b"close") {
            return false;
        }
        version > 0 || self.has_option(b"keep-alive")
    }

    /// How a body announced by these fields ends, if one is announced.
    pub(super) fn body(&self) -> Option<Body> {
        if self.chunked {
            return Some(Body::Chunked(Chunks::new()));
        }
        self.length.map(Body::Length)
    }

    /// Whether a field goes on to the other side (RFC 9110 section 7.6.1).
    pub(super) fn passes(&self, name: &str) -> bool {
        const HOP_BY_HOP: [&str; 11] = [
            "connection",
            "proxy-connection",
            "keep-alive",
            "proxy-authenticate",
            "proxy-authorization",
            "proxy-authentication-info",
            "te",
            "trailer",
            "upgrade",
            "x-proxy-username",
            "x-proxy-password",
        ];
        !HOP_BY_HOP.iter().any(|hop| name.eq_ignore_ascii_case(hop))
            && !self.has_option(name.as_bytes())
    }
}

fn set<T>(slot: &mut Option<T>, value: T) -> Result<(), Malformed> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Malformed::Ambiguous),
    }
}

fn content_length(value: &[u8]) -> Result<u64, Malformed> {
    let value = trim(value);
    // 18 digits cannot overflow; a list, a sign or a space is another reading.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::Ambiguous);
    }
    Ok(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}

fn options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&b| b == b',').map(trim).filter(|option| !option.is_empty())
}

/// Without the white space around it (SP and HTAB).
pub(super) fn trim(value: &[u8]) -> &[u8] {
    let is_space = |b: &u8| *b == b' ' || *b == b'\t';
    let start = value.iter().position(|b| !is_space(b)).unwrap_or(value.len());
    let end = value.iter().rposition(|b| !is_space(b)).map_or(start, |last| last + 1);
    &value[start..end]
}

/// Appends one field line.
pub(super) fn push_field(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}
