//! Frames of the link, without IO.

use prost::Message;

/// Longest payload in bytes: a snapshot of several hundred thousand users.
pub const FRAME_MAX: usize = 128 << 20;
/// Length and checksum.
const HEAD: usize = 8;

/// Why a stream of frames cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The other side means another protocol, or more than can be.
    #[error("a frame of {0} bytes; at most {FRAME_MAX}")]
    Long(usize),
    /// Bytes were changed on the way.
    #[error("a frame with a wrong checksum")]
    Checksum,
    /// The payload is no message.
    #[error("a frame that is no message")]
    Message,
}

/// Appends a message as a frame.
pub fn encode(message: &impl Message, to: &mut Vec<u8>) {
    let start = to.len();
    to.extend_from_slice(&[0; HEAD]);
    // A vector takes whatever it is given.
    let _ = message.encode(to);
    let payload = &to[start + HEAD..];
    let (length, checksum) = (payload.len() as u32, crc32fast::hash(payload));
    to[start..start + 4].copy_from_slice(&length.to_le_bytes());
    to[start + 4..start + HEAD].copy_from_slice(&checksum.to_le_bytes());
}

/// Takes messages out of received bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    used: usize,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.used > 0 {
            self.bytes.drain(..self.used);
            self.used = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// The stream is broken and cannot be followed further.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.bytes[self.used..];
        let Some((head, rest)) = rest.split_at_checked(HEAD) else { return Ok(None) };
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = word(0) as usize;
        if length > FRAME_MAX {
            return Err(FrameError::Long(length));
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        if crc32fast::hash(payload) != word(4) {
            return Err(FrameError::Checksum);
        }
        let message = M::decode(payload).map_err(|_| FrameError::Message)?;
        self.used += HEAD + length;
        Ok(Some(message))
    }

    /// Bytes that were received and not taken yet.
    pub fn waiting(&self) -> usize {
        self.bytes.len() - self.used
    }

    /// Bytes since the last [`Decoder::push`] (or what it left) that were taken as messages.
    pub fn position(&self) -> usize {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{ReportAck, down};

    fn ack(sequence: u64) -> crate::link::Down {
        let body = down::Body::ReportAck(ReportAck { boot: 7, sequence });
        crate::link::Down { body: Some(body) }
    }

    #[test]
    fn messages_come_whole_whatever_the_pieces() {
        let mut bytes = Vec::new();
        (1..=3).for_each(|sequence| encode(&ack(sequence), &mut bytes));
        for size in 1..bytes.len() {
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                while let Some(message) = decoder.take::<crate::link::Down>().unwrap() {
                    got.push(message);
                }
            }
            assert_eq!(got, [ack(1), ack(2), ack(3)]);
        }
    }

    #[test]
    fn broken_streams_are_told() {
        let take = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            decoder.take::<crate::link::Down>()
        };
        let mut bytes = Vec::new();
        encode(&ack(1), &mut bytes);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert_eq!(take(&bytes), Err(FrameError::Checksum));
        assert_eq!(take(&[0xff; 8]), Err(FrameError::Long(u32::MAX as usize)));
        let payload = [0xff; 4];
        let mut bytes = 4u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        bytes.extend_from_slice(&payload);
        assert_eq!(take(&bytes), Err(FrameError::Message));
    }

    /// The bytes of version 1, which every later version must read.
    #[test]
    fn a_golden_frame_is_read() {
        let mut bytes = Vec::new();
        encode(&ack(300), &mut bytes);
        // Field 4, 12 bytes: boot 7 (fixed64), sequence 300 (varint).
        let payload = [0x22, 12, 0x09, 7, 0, 0, 0, 0, 0, 0, 0, 0x10, 0xac, 0x02];
        assert_eq!(bytes[8..], payload, "{bytes:x?}");
        assert_eq!(bytes[..4], [payload.len() as u8, 0, 0, 0]);
    }
}
