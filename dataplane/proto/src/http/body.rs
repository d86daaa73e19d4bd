//! Where a message body ends (RFC 9112 section 6).

use crate::{
    Decoded, Framing, Malformed, Payload,
    limits::{CHUNK_EXTENSION_MAX, TRAILERS_MAX},
};

/// A body's framing and how much of it has passed. Bytes pass unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// So many bytes are still to come; 0 means that there is none.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
    /// Everything until the stream ends.
    UntilClose,
}

impl Body {
    /// No body.
    pub const NONE: Self = Self::Length(0);

    /// Whether all of it has passed.
    pub fn is_over(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => chunks.state == ChunkState::Over,
            Self::UntilClose => false,
        }
    }

    /// How many bytes of `input` belong to the body.
    ///
    /// # Errors
    /// The chunks are malformed.
    pub fn advance(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        match self {
            Self::Length(left) => {
                let used = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= used as u64;
                Ok(used)
            }
            Self::Chunked(chunks) => chunks.advance(input),
            Self::UntilClose => Ok(input.len()),
        }
    }
}

impl Framing for Body {
    fn decode(&mut self, input: &mut [u8]) -> Result<Decoded, Malformed> {
        let used = self.advance(input)?;
        Ok(Decoded { used, payload: Payload::Input(0..used), end: self.is_over() })
    }

    fn end_of_input(&mut self) -> Result<(), Malformed> {
        match self {
            Self::UntilClose => Ok(()),
            body if body.is_over() => Ok(()),
            _ => Err(Malformed::Truncated),
        }
    }

    fn is_over(&self) -> bool {
        Self::is_over(self)
    }
}

/// A scanner of chunked bodies (RFC 9112 section 7.1), strict: sizes of 1 to 15 hexadecimal digits,
/// CRLF line ends, bounded extensions and trailers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    state: ChunkState,
    /// Bytes left of a chunk's data, or the size being read.
    left: u64,
    /// Bytes of the present line or section, for its bound.
    seen: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChunkState {
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
    Over,
}

impl Chunks {
    /// A body of chunks, from its start.
    pub fn new() -> Self {
        Self { state: ChunkState::Size, left: 0, seen: 0 }
    }

    fn advance(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        let mut used = 0;
        while used < input.len() && self.state != ChunkState::Over {
            if self.state == ChunkState::Data {
                let rest = input.len() - used;
                let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest);
                self.left -= taken as u64;
                used += taken;
                if self.left == 0 {
                    self.state = ChunkState::DataCr;
                }
            } else {
                self.state = self.step(input[used])?;
                used += 1;
            }
        }
        Ok(used)
    }

    fn step(&mut self, byte: u8) -> Result<ChunkState, Malformed> {
        use ChunkState::*;
        match (self.state, byte) {
            (Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => self.size_digit(byte),
            (Size, b';') if self.seen > 0 => self.enter(Extension),
            (Size, b'\r') if self.seen > 0 => Ok(SizeLf),
            (Extension, b'\r') => Ok(SizeLf),
            (Extension, b'\t' | b' '..=b'~' | 0x80..) => self.count(Extension, CHUNK_EXTENSION_MAX),
            (SizeLf, b'\n') if self.left == 0 => self.enter(TrailerStart),
            (SizeLf, b'\n') => self.enter(Data),
            (DataCr, b'\r') => Ok(DataLf),
            (DataLf, b'\n') => self.enter(Size),
            (TrailerStart, b'\r') => Ok(EndLf),
            // A folded line would start so; it is no trailer.
            (TrailerStart, b' ' | b'\t') => Err(Malformed::Syntax),
            (TrailerStart | Trailer, b'\t' | b' '..=b'~' | 0x80..) => {
                self.count(Trailer, TRAILERS_MAX)
            }
            (Trailer, b'\r') => Ok(TrailerLf),
            (TrailerLf, b'\n') => Ok(TrailerStart),
            (EndLf, b'\n') => Ok(Over),
            _ => Err(Malformed::Syntax),
        }
    }

    fn size_digit(&mut self, byte: u8) -> Result<ChunkState, Malformed> {
        // 15 digits cannot overflow 64 bits.
        if self.seen == 15 {
            return Err(Malformed::Length);
        }
        let digit = (byte as char).to_digit(16).ok_or(Malformed::Syntax)?;
        self.left = self.left << 4 | u64::from(digit);
        self.seen += 1;
        Ok(ChunkState::Size)
    }

    fn enter(&mut self, state: ChunkState) -> Result<ChunkState, Malformed> {
        self.seen = 0;
        Ok(state)
    }

    fn count(&mut self, state: ChunkState, max: usize) -> Result<ChunkState, Malformed> {
        self.seen += 1;
        if self.seen > max { Err(Malformed::TooLarge) } else { Ok(state) }
    }
}

impl Default for Chunks {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(input: &[u8], step: usize) -> Result<Option<usize>, Malformed> {
        let mut body = Body::Chunked(Chunks::new());
        let mut total = 0;
        for piece in input.chunks(step) {
            let used = body.advance(piece)?;
            total += used;
            if body.is_over() {
                return Ok(Some(total));
            }
            assert_eq!(used, piece.len());
        }
        Ok(None)
    }

    #[test]
    fn finds_the_end_at_every_split() {
        for body in [
            &b"0\r\n\r\n"[..],
            b"5\r\nhello\r\n0\r\n\r\n",
            b"A;name=value\r\n0123456789\r\n1\r\n\n\r\n000\r\nTrailer: x\r\nOther: y\r\n\r\n",
        ] {
            let message = [body, b"GET / HTTP/1.1\r\n"].concat();
            for step in 1..message.len() {
                assert_eq!(scan(&message, step), Ok(Some(body.len())));
            }
        }
    }

    #[test]
    fn refuses_what_another_reader_could_read_differently() {
        for body in [
            &b"\r\n"[..],
            b"5\nhello\r\n",
            b" 5\r\n",
            b"5 \r\n",
            b"0x5\r\n",
            b"+5\r\n",
            b"-1\r\n",
            b"5\r\nhelloX",
            b"5\r\nhello\n0\r\n",
            b"5;a\nb\r\n",
            b"5;\0\r\n",
            b";\r\n",
            b"g\r\n",
            b"0\r\n folded\r\n\r\n",
            b"0\r\nA: b\n\r\n",
            b"5\rX",
            b"1000000000000000\r\n",
            b"0\r\n\rX",
            b"5\r\nhello\r\r\n",
        ] {
            for step in 1..=body.len() {
                assert!(scan(body, step).is_err(), "{:?}", String::from_utf8_lossy(body));
            }
        }
    }

    #[test]
    fn extensions_and_trailers_are_bounded() {
        let extension = [b"1;".to_vec(), vec![b'x'; CHUNK_EXTENSION_MAX + 1]].concat();
        assert_eq!(scan(&extension, 100), Err(Malformed::TooLarge));
        let trailers = [b"0\r\n".to_vec(), b"a: b\r\n".repeat(2049)].concat();
        assert_eq!(scan(&trailers, 100), Err(Malformed::TooLarge));
    }

    #[test]
    fn a_body_cut_short_is_an_error() {
        assert!(Body::Length(1).end_of_input().is_err());
        assert!(Body::Chunked(Chunks::new()).end_of_input().is_err());
        assert!(Body::Length(0).end_of_input().is_ok());
        assert!(Body::UntilClose.end_of_input().is_ok());
    }
}
