//! What a byte stream is wrapped in: HTTP bodies today, WebSocket frames, TLS and tunnel streams to come.

use std::ops::Range;

use crate::Malformed;

/// Where decoded payload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing to forward yet.
    None,
    /// A part of the input, possibly changed in place.
    Input(Range<usize>),
    /// Bytes of the framing's own, such as a rewritten head.
    Own(Vec<u8>),
}

/// What one call of [`Framing::decode`] made of its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Input bytes taken; the rest is to be offered again, after the payload was forwarded.
    pub used: usize,
    /// What to forward.
    pub payload: Payload,
    /// The framed stream ends here. Bytes not used belong to whatever follows.
    pub end: bool,
}

/// One side of a framed stream.
pub trait Framing {
    /// Takes bytes off the wire. Uses at least one byte of a non-empty input, or ends.
    ///
    /// # Errors
    /// The bytes break the framing; the stream cannot go on.
    fn decode(&mut self, input: &mut [u8]) -> Result<Decoded, Malformed>;

    /// The peer ended its side.
    ///
    /// # Errors
    /// The stream must not end here: what was forwarded is incomplete.
    fn end_of_input(&mut self) -> Result<(), Malformed>;

    /// Whether the framed stream has come to its end, so that nothing more is to be read for it.
    fn is_over(&self) -> bool {
        false
    }

    /// Appends to `wire` what carries `payload`. Pass-through framings need no change.
    fn encode(&mut self, payload: &[u8], wire: &mut Vec<u8>) {
        wire.extend_from_slice(payload);
    }

    /// Appends to `wire` what ends our side.
    fn close(&mut self, wire: &mut Vec<u8>) {
        let _ = wire;
    }
}
