//! One direction of a relay.

use std::{io, time::Duration};

use culvert_proto::Payload;
use culvert_rt::{
    BUFFER_LARGE, BUFFER_SMALL, Buffer, PIPE_BYTES, Pipe, Stopped, sleep, take_turns,
};

use super::{Context, Course, Leg, Until};
use crate::{end::Cause, ledger::Direction};

/// Why a direction was cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) cause: Cause,
    /// The destination failed. What it had said before can still be read, so the other direction goes
    /// on until it sees the end by itself.
    pub(super) destination: bool,
}

impl Cut {
    fn stopped(stopped: Stopped) -> Self {
        Self { cause: Cause::of_code(stopped.0), destination: false }
    }
}

/// Full large buffers in a row after which a flow is moved to splice.
const FULL_BEFORE_SPLICE: u8 = 4;
/// Small messages that each follow a movement closely, before they are awaited with a buffer at hand.
const BRISK_BEFORE_HELD: u8 = 8;
/// Less than this from one splice is lean.
const SPLICE_LEAN: usize = 512 * 1024;
/// After a lean splice the flow rests so long, in which a fast sender fills the socket again; a slow one
/// is late by no more than that.
const SPLICE_REST: Duration = Duration::from_millis(1);
/// A splice that moves less, after a rest, says that the flow is slow.
const SPLICE_SLOW: usize = 32 * 1024;
/// Slow splices in a row after which a flow goes back to copying.
const SLOW_BEFORE_COPY: u8 = 4;

pub(super) struct Pump<'a> {
    pub(super) from: &'a Leg<'a>,
    pub(super) to: &'a Leg<'a>,
    pub(super) direction: Direction,
    pub(super) course: &'a Course<'a>,
}

/// How the next bytes are moved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through a small buffer.
    Small,
    /// Through a large buffer; so many in a row were full.
    Large(u8),
    /// By splice; 0 after a good one, else one more than the slow ones in a row.
    Splice(u8),
}

/// Whether the direction goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    On,
    Ended,
}

impl Pump<'_> {
    /// Moves bytes until the direction ends, and passes the end on.
    ///
    /// # Errors
    /// Why it was cut.
    pub(super) async fn run(&self) -> Result<(), Cut> {
        let mut end = self.pump().await;
        if end.is_ok() && self.course.until == Until::AnswerEnds && self.direction == Direction::Up
        {
            end = Box::pin(self.await_answer()).await;
        }
        self.course.finish(self.direction, end, self.to);
        end
    }

    fn context(&self) -> &Context<'_> {
        self.course.context
    }

    async fn pump(&self) -> Result<(), Cut> {
        // What a step needs is boxed: a relay that waits holds none of it.
        Box::pin(self.send_own(&self.from.take_lead())).await?;
        if Box::pin(self.early()).await? == Flow::Ended || self.is_over() {
            return Ok(());
        }
        let mut way = Way::Small;
        let mut brisk = 0;
        loop {
            if brisk >= BRISK_BEFORE_HELD && way == Way::Small && self.is_plain() {
                brisk = 0;
                if Box::pin(self.exchange_briskly(&mut way)).await? == Flow::Ended {
                    return Ok(());
                }
            }
            self.ready(way).await?;
            brisk = if self.context().watch.is_brisk() { brisk.saturating_add(1) } else { 0 };
            let flow = match way {
                Way::Splice(lean) => Box::pin(self.splice(lean, &mut way)).await?,
                _ => Box::pin(self.copy(&mut way)).await?,
            };
            if flow == Flow::Ended {
                return Ok(());
            }
        }
    }

    /// Waits until there is something to receive. A flow on splice that came up short rests a moment
    /// first: then a few wake-ups carry what many would have.
    async fn ready(&self, way: Way) -> Result<(), Cut> {
        if let Way::Splice(lean) = way
            && lean > 0
        {
            self.context().watch.guard(sleep(SPLICE_REST)).await.map_err(Cut::stopped)?;
        }
        let ready = self.context().watch.guard(self.from.socket.readable()).await;
        ready.map_err(Cut::stopped)?.map_err(|_| self.source_failed())
    }

    /// The request is all said. A client that leaves before the answer has come ends both; one that
    /// says more has begun another request.
    async fn await_answer(&self) -> Result<(), Cut> {
        while !self.from.has_early() {
            match self.context().watch.guard(self.from.socket.readable()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(self.source_failed()),
                Err(stopped) if Cause::of_code(stopped.0) == Cause::Finished => break,
                Err(stopped) => return Err(Cut::stopped(stopped)),
            }
            match self.from.socket.peek() {
                Ok(false) => break,
                Ok(true) => {
                    return Err(Cut { cause: self.from.causes().closed, destination: false });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(self.source_failed()),
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.from.framing().is_some_and(|framing| framing.borrow().is_over())
    }

    fn source_failed(&self) -> Cut {
        Cut { cause: self.from.causes().reset, destination: false }
    }

    fn destination_failed(&self) -> Cut {
        Cut { cause: self.to.causes().reset, destination: true }
    }

    /// The kernel has taken bytes for the destination.
    fn moved(&self, bytes: usize) {
        let covered = self.context().allowance.moved(bytes);
        self.context().meter.moved(self.direction, bytes, covered);
        self.context().watch.touch();
    }

    /// How many bytes may be received now, of `want`.
    async fn reserve(&self, want: usize) -> Result<usize, Cut> {
        let allowance = self.context().allowance;
        if allowance.is_open(self.direction) {
            return Ok(want);
        }
        // A flow with a rate asks for what is there, not for what its buffer could take.
        let want = match allowance.has_rate(self.direction) {
            true => self.from.socket.available().clamp(1, want),
            false => want,
        };
        let granted = allowance.reserve(self.direction, want, self.context().watch).await;
        granted.map_err(Cut::stopped)
    }

    /// Forwards what was read before the relay began.
    async fn early(&self) -> Result<Flow, Cut> {
        if self.is_over() {
            return Ok(Flow::Ended);
        }
        let early = self.from.take_early();
        let mut rest = &early[..];
        while !rest.is_empty() {
            let buffer = self.allowed(&mut rest).await?;
            if self.forward(buffer).await? == Flow::Ended {
                let mut left = self.from.take_early();
                left.extend_from_slice(rest);
                self.from.leave(&left);
                return Ok(Flow::Ended);
            }
        }
        Ok(Flow::On)
    }

    /// While messages follow each other closely: each is awaited with a buffer at hand, which saves an
    /// operation and a system call a message.
    async fn exchange_briskly(&self, way: &mut Way) -> Result<Flow, Cut> {
        let watch = self.context().watch;
        while *way == Way::Small && self.is_plain() {
            let received = self.from.socket.receive_held(watch).await;
            if let Some(stopped) = watch.halted() {
                return Err(Cut::stopped(stopped));
            }
            let buffer = match received {
                Ok(buffer) if buffer.is_empty() => return self.end_of_input(),
                Ok(buffer) => buffer,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flow::On),
                Err(_) => return Err(self.source_failed()),
            };
            *way = self.next_way(*way, buffer.len(), buffer.capacity());
            // What has come is paid for before it goes on.
            let mut unpaid = buffer.len();
            while unpaid > 0 {
                let allowance = self.context().allowance;
                let paid = allowance.reserve(self.direction, unpaid, watch).await;
                unpaid -= paid.map_err(Cut::stopped)?;
            }
            self.send(buffer).await?;
        }
        Ok(Flow::On)
    }

    async fn copy(&self, way: &mut Way) -> Result<Flow, Cut> {
        let want = if *way == Way::Small { BUFFER_SMALL } else { BUFFER_LARGE };
        // First the leave, which may take a while, then the buffer.
        let mut granted = self.reserve(want).await?;
        let large = if granted > BUFFER_SMALL { Buffer::large() } else { None };
        let mut buffer = large.unwrap_or_else(Buffer::small);
        let capacity = buffer.capacity();
        if granted > capacity {
            self.context().allowance.unused(self.direction, granted - capacity);
            granted = capacity;
        }
        let received = match self.from.socket.receive(&mut buffer.room()[..granted]) {
            Ok(received) => received,
            Err(error) => {
                self.context().allowance.unused(self.direction, granted);
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(Flow::On),
                    _ => Err(self.source_failed()),
                };
            }
        };
        self.context().allowance.unused(self.direction, granted - received);
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
                if self.is_plain() { Way::Splice(0) } else { way }
            }
            Way::Large(full) if received == capacity => Way::Large(full + 1),
            Way::Large(_) => Way::Large(0),
            way => way,
        }
    }

    /// Whether bytes pass as they are.
    fn is_plain(&self) -> bool {
        self.from.framing().is_none() && self.to.framing().is_none()
    }

    fn end_of_input(&self) -> Result<Flow, Cut> {
        match self.from.framing() {
            Some(framing) if framing.borrow_mut().end_of_input().is_err() => {
                Err(Cut { cause: self.from.causes().closed, destination: false })
            }
            // Both ends in order leave nothing either; before ours it was a reset.
            _ if !self.course.half_closed.get() && self.from.socket.was_reset() => {
                Err(self.source_failed())
            }
            _ => Ok(Flow::Ended),
        }
    }

    /// Sends what was received, unwrapped if the source is framed.
    async fn forward(&self, buffer: Buffer) -> Result<Flow, Cut> {
        match self.from.framing() {
            None => self.send(buffer).await.map(|()| Flow::On),
            Some(framing) => {
                let mut buffer = buffer;
                while !buffer.is_empty() {
                    let decoded =
                        framing.borrow_mut().decode(buffer.filled_mut()).map_err(|_| Cut {
                            cause: self.from.causes().malformed,
                            destination: false,
                        })?;
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
    async fn send_own(&self, bytes: &[u8]) -> Result<(), Cut> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let buffer = self.allowed(&mut rest).await?;
            self.send(buffer).await?;
        }
        Ok(())
    }

    /// As many bytes from the head of `rest` as may be moved now.
    async fn allowed(&self, rest: &mut &[u8]) -> Result<Buffer, Cut> {
        let (allowance, watch) = (self.context().allowance, self.context().watch);
        let want = rest.len().min(BUFFER_SMALL);
        let granted = allowance.reserve(self.direction, want, watch).await;
        let (now, later) = rest.split_at(granted.map_err(Cut::stopped)?);
        let mut buffer = Buffer::small();
        buffer.room()[..now.len()].copy_from_slice(now);
        buffer.fill(now.len());
        *rest = later;
        Ok(buffer)
    }

    async fn send(&self, buffer: Buffer) -> Result<(), Cut> {
        self.send_part(buffer).await.map(drop)
    }

    /// Sends the filled part; the buffer comes back for the rest of its room.
    async fn send_part(&self, mut buffer: Buffer) -> Result<Buffer, Cut> {
        let meter = self.context().meter;
        while !buffer.is_empty() {
            meter.pending(self.direction, buffer.len());
            let (sent, back) = self.to.socket.send(buffer, self.context().watch).await;
            buffer = back;
            match sent {
                Ok(sent) => {
                    self.moved(sent);
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
    async fn blocked(&self, error: &io::Error) -> Result<(), Cut> {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                let ready = self.context().watch.guard(self.to.socket.writable()).await;
                ready.map_err(Cut::stopped)?.map_err(|_| self.destination_failed())
            }
            io::ErrorKind::Interrupted => Ok(()),
            // A send that was ended by a shutdown of ours fails too; the reason is the stop.
            _ => match self.context().watch.halted() {
                Some(stopped) => Err(Cut::stopped(stopped)),
                None => Err(self.destination_failed()),
            },
        }
    }

    /// Moves bytes through a pipe without copying them.
    async fn splice(&self, lean: u8, way: &mut Way) -> Result<Flow, Cut> {
        // First the leave, which may take a while, then the pipe.
        let granted = self.reserve(PIPE_BYTES).await?;
        let pipe = if self.is_plain() { Pipe::take() } else { None };
        let Some(mut pipe) = pipe else {
            self.context().allowance.unused(self.direction, granted);
            *way = Way::Large(0);
            return self.copy(way).await;
        };
        let filled = pipe.fill_from(self.from.socket, granted);
        let unused = granted - filled.as_ref().unwrap_or(&0);
        self.context().allowance.unused(self.direction, unused);
        let flow = match filled {
            Ok(0) => self.end_of_input()?,
            Ok(filled) => {
                self.course.spliced.set(true);
                *way = match lean {
                    _ if filled >= SPLICE_LEAN => Way::Splice(0),
                    // Lean, but not slow: rest before the next.
                    _ if filled >= SPLICE_SLOW => Way::Splice(1),
                    SLOW_BEFORE_COPY.. => Way::Small,
                    lean => Way::Splice(lean + 1),
                };
                Flow::On
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Flow::On,
            Err(_) => return Err(self.source_failed()),
        };
        let meter = self.context().meter;
        while !pipe.is_empty() {
            meter.pending(self.direction, pipe.len());
            match pipe.drain_to(self.to.socket) {
                Ok(moved) => self.moved(moved),
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
