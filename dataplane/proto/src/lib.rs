//! Proxy protocols as state machines: bytes in, bytes and decisions out.
//!
//! Two seams. A [`Handshake`] is one server side of a proxy protocol, driven by whoever owns the
//! socket. A [`Framing`] is what a byte stream is wrapped in afterwards. Neither reads a socket, knows
//! the time or panics on any input; every length is bounded by a constant in [`limits`].

#![forbid(unsafe_code)]

pub mod detect;
mod framing;
mod handshake;
pub mod http;
pub mod limits;
pub mod socks4;
pub mod socks5;
mod target;

pub use detect::{Protocol, detect};
pub use framing::{Decoded, Framing, Payload};
pub use handshake::{
    Command, Credentials, Forward, Handshake, Login, Malformed, Next, Outcome, Refusal, Request,
    Secret, Verdict,
};
pub use target::{Host, Name, NameError, Target};
