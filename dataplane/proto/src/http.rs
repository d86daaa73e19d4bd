//! HTTP/1.1 as a proxy sees it: RFC 9112 for the syntax, RFC 9110 for what may pass.
//!
//! Heads are parsed by `httparse` behind rules of our own that leave no message two readings: lines
//! end in CRLF, nothing is folded, a body has one length. Bodies pass through as they are framed; the
//! scanner only finds where they end.

mod body;
mod head;
mod response;
mod server;

pub use body::{Body, Chunks};
pub use response::{Exchange, Response};
pub use server::Server;

use crate::Outcome;

/// The status that tells a client how its request went.
pub(crate) fn status(outcome: Outcome) -> (u16, &'static str) {
    match outcome {
        Outcome::Connected { .. } => (200, "Connection established"),
        Outcome::Forbidden => (403, "Forbidden"),
        Outcome::NetworkUnreachable
        | Outcome::HostUnreachable
        | Outcome::Refused
        | Outcome::Failed => (502, "Bad Gateway"),
        Outcome::TimedOut => (504, "Gateway Timeout"),
        Outcome::CommandUnsupported | Outcome::AddressUnsupported => (501, "Not Implemented"),
        Outcome::LimitReached => (503, "Service Unavailable"),
    }
}

/// What a 502 is about, in the `Proxy-Status` field's words (RFC 9209 section 2.3).
pub(crate) fn proxy_status(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Connected { .. } => "",
        Outcome::Forbidden => "http_request_denied",
        Outcome::NetworkUnreachable | Outcome::HostUnreachable => "destination_ip_unroutable",
        Outcome::Refused => "connection_refused",
        Outcome::TimedOut => "connection_timeout",
        Outcome::LimitReached => "connection_limit_reached",
        Outcome::CommandUnsupported | Outcome::AddressUnsupported | Outcome::Failed => {
            "proxy_internal_error"
        }
    }
}
