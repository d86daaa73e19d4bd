//! One direction of a relay.

use std::{cell::Cell, io};

use culvert_proto::Payload;
use culvert_rt::{BUFFER_SMALL, Buffer, PIPE_BYTES, Pipe, Socket, take_turns};

use super::{Context, Leg};
use crate::{end::Cause, ledger::Direction};

/// Full large buffers in a row after which a flow is moved to splice.
const FULL_BEFORE_SPLICE: u8 = 4;
/// Less than this from one splice is lean.
const SPLICE_LEAN: usize = 64 * 1024;
/// Lean splices in a row after which a flow goes back to copying.
const LEAN_BEFORE_COPY: u8 = 2;

pub(super) struct Pump<'a> {
    pub(super) from: &'a Leg<'a>,
    pub(super) to: &'a Leg<'a>,
    pub(super) direction: Direction,
    pub(super) context: &'a Context<'a>,
    pub(super) spliced: &'a Cell<bool>,
}

/// How the next bytes are moved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through a small buffer.
    Small,
    /// Through a large buffer; so many in a row were full.
    Large(u8),
    /// By splice; so many in a row were lean.
    Splice(u8),
}

/// Whether the direction goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    On,
    Ended,
}

impl Pump<'_> {
    /// Moves bytes until the direction ends.
    ///
    /// # Errors
    /// Why it was cut.
    pub(super) async fn run(&self) -> Result<(), Cause> {
        self.send_own(&self.from.take_lead()).await?;
        if self.early().await? == Flow::Ended || self.is_over() {
            return Ok(());
        }
        let mut way = Way::Small;
        loop {
            self.wait(self.from.socket.readable()).await?.map_err(|e| self.from_failed(&e))?;
            let flow = match way {
                Way::Splice(lean) => self.splice(lean, &mut way).await?,
                _ => self.copy(&mut way).await?,
            };
            if flow == Flow::Ended {
                return Ok(());
            }
            self.context.watch.touch();
        }
    }

    fn is_over(&self) -> bool {
        self.from.framing().is_some_and(|framing| framing.borrow().is_over())
    }

    /// Waits, unless the session is stopped.
    async fn wait(
        &self,
        ready: impl Future<Output = io::Result<()>>,
    ) -> Result<io::Result<()>, Cause> {
        self.context.watch.guard(ready).await.map_err(|stopped| Cause::of_code(stopped.0))
    }

    fn from_failed(&self, _: &io::Error) -> Cause {
        self.from.causes().reset
    }

    fn to_failed(&self, _: &io::Error) -> Cause {
        self.to.causes().reset
    }

    /// How many bytes may be received now, of `want`.
    async fn reserve(&self, want: usize) -> Result<usize, Cause> {
        let allowance = self.context.allowance;
        if !allowance.is_limited(self.direction) {
            return Ok(want);
        }
        // A limited flow asks for what is there, not for what its buffer could take.
        let want = self.from.socket.available().clamp(1, want);
        let granted = allowance.reserve(self.direction, want, self.context.watch).await;
        granted.map_err(|stopped| Cause::of_code(stopped.0))
    }

    /// Forwards what was read before the relay began.
    async fn early(&self) -> Result<Flow, Cause> {
        if self.is_over() {
            return Ok(Flow::Ended);
        }
        let early = self.from.take_early();
        let mut rest = &early[..];
        while !rest.is_empty() {
            let want = rest.len().min(BUFFER_SMALL);
            let allowance = self.context.allowance;
            let granted = allowance
                .reserve(self.direction, want, self.context.watch)
                .await
                .map_err(|stopped| Cause::of_code(stopped.0))?;
            let mut buffer = Buffer::small();
            buffer.room()[..granted].copy_from_slice(&rest[..granted]);
            buffer.fill(granted);
            rest = &rest[granted..];
            if self.forward(buffer).await? == Flow::Ended {
                let mut left = self.from.take_early();
                left.extend_from_slice(rest);
                self.from.leave(&left);
                return Ok(Flow::Ended);
            }
        }
        Ok(Flow::On)
    }

    async fn copy(&self, way: &mut Way) -> Result<Flow, Cause> {
        let mut buffer = match way {
            Way::Small => Buffer::small(),
            _ => Buffer::large().unwrap_or_else(Buffer::small),
        };
        let capacity = buffer.capacity();
        let granted = self.reserve(capacity).await?;
        let received = match self.from.socket.receive(&mut buffer.room()[..granted]) {
            Ok(received) => received,
            Err(error) => {
                self.context.allowance.unused(self.direction, granted);
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(Flow::On),
                    _ => Err(self.from_failed(&error)),
                };
            }
        };
        self.context.allowance.unused(self.direction, granted - received);
        if received == 0 {
            return self.end_of_input();
        }
        *way = self.next_way(*way, received, capacity);
        buffer.fill(received);
        let flow = self.forward(buffer).await?;
        take_turns().await;
        Ok(flow)
    }

    fn next_way(&self, way: Way, received: usize, capacity: usize) -> Way {
        match way {
            Way::Small if received == capacity => Way::Large(0),
            Way::Large(_) if received <= BUFFER_SMALL => Way::Small,
            Way::Large(full) if received == capacity && full + 1 >= FULL_BEFORE_SPLICE => {
                if self.may_splice() { Way::Splice(0) } else { way }
            }
            Way::Large(full) if received == capacity => Way::Large(full + 1),
            Way::Large(_) => Way::Large(0),
            way => way,
        }
    }

    fn may_splice(&self) -> bool {
        self.from.framing().is_none()
            && self.to.framing().is_none()
            && !self.context.allowance.is_limited(self.direction)
    }

    fn end_of_input(&self) -> Result<Flow, Cause> {
        match self.from.framing() {
            Some(framing) if framing.borrow_mut().end_of_input().is_err() => {
                Err(self.from.causes().closed)
            }
            _ => Ok(Flow::Ended),
        }
    }

    /// Sends what was received, unwrapped if the source is framed.
    async fn forward(&self, buffer: Buffer) -> Result<Flow, Cause> {
        match self.from.framing() {
            None => self.send(buffer).await.map(|()| Flow::On),
            Some(framing) => {
                let mut buffer = buffer;
                while !buffer.is_empty() {
                    let decoded = framing
                        .borrow_mut()
                        .decode(buffer.filled_mut())
                        .map_err(|_| self.from.causes().malformed)?;
                    let start = buffer.range().start;
                    let rest = start + decoded.used..buffer.range().end;
                    match decoded.payload {
                        Payload::None => {}
                        Payload::Input(range) => {
                            buffer.keep(start + range.start, start + range.end);
                            buffer = self.send_part(buffer).await?;
                        }
                        Payload::Own(bytes) => self.send_own(&bytes).await?,
                    }
                    buffer.keep(rest.start, rest.end);
                    if decoded.end {
                        self.from.leave(buffer.filled());
                        return Ok(Flow::Ended);
                    }
                }
                Ok(Flow::On)
            }
        }
    }

    /// Sends bytes of our own, such as a rewritten head.
    async fn send_own(&self, bytes: &[u8]) -> Result<(), Cause> {
        for piece in bytes.chunks(BUFFER_SMALL) {
            let mut buffer = Buffer::small();
            buffer.room()[..piece.len()].copy_from_slice(piece);
            buffer.fill(piece.len());
            self.send(buffer).await?;
        }
        Ok(())
    }

    async fn send(&self, buffer: Buffer) -> Result<(), Cause> {
        self.send_part(buffer).await.map(drop)
    }

    /// Sends the filled part; the buffer comes back for the rest of its room.
    async fn send_part(&self, mut buffer: Buffer) -> Result<Buffer, Cause> {
        let meter = self.context.meter;
        while !buffer.is_empty() {
            meter.pending(self.direction, buffer.len());
            let (sent, back) = self.to.socket.send(buffer).await;
            buffer = back;
            match sent {
                Ok(sent) => {
                    meter.moved(self.direction, sent);
                    buffer.consume(sent);
                }
                Err(error) => {
                    meter.pending(self.direction, 0);
                    self.blocked(&error).await?;
                }
            }
        }
        Ok(buffer)
    }

    /// After a send that took nothing: waits for room, or says how the destination failed.
    async fn blocked(&self, error: &io::Error) -> Result<(), Cause> {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                let ready = self.wait(self.to.socket.writable()).await?;
                ready.map_err(|error| self.to_failed(&error))
            }
            io::ErrorKind::Interrupted => Ok(()),
            _ => Err(self.to_failed(error)),
        }
    }

    /// Moves bytes through a pipe without copying them.
    async fn splice(&self, lean: u8, way: &mut Way) -> Result<Flow, Cause> {
        let pipe = if self.may_splice() { Pipe::take() } else { None };
        let Some(mut pipe) = pipe else {
            *way = Way::Large(0);
            return self.copy(way).await;
        };
        let from: &Socket = self.from.socket;
        let flow = match pipe.fill_from(from, PIPE_BYTES) {
            Ok(0) => Flow::Ended,
            Ok(filled) => {
                self.spliced.set(true);
                *way = match lean + 1 {
                    _ if filled >= SPLICE_LEAN => Way::Splice(0),
                    LEAN_BEFORE_COPY => Way::Small,
                    lean => Way::Splice(lean),
                };
                Flow::On
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Flow::On,
            Err(error) => return Err(self.from_failed(&error)),
        };
        let meter = self.context.meter;
        while !pipe.is_empty() {
            meter.pending(self.direction, pipe.len());
            match pipe.drain_to(self.to.socket) {
                Ok(moved) => meter.moved(self.direction, moved),
                Err(error) => {
                    meter.pending(self.direction, 0);
                    self.blocked(&error).await?;
                }
            }
        }
        pipe.give_back();
        take_turns().await;
        Ok(flow)
    }
}
