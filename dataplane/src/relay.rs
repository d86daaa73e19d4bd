//! Moving bytes between two legs: one relay for every protocol.
//!
//! Two pumps run in one task, one a direction. A pump waits until its source is readable, asks the
//! allowance, takes a pooled buffer, receives, sends, gives the buffer back: it holds nothing while it
//! waits for data, and one buffer at most when its destination is slow, which is the back-pressure.
//! While messages follow each other closely it waits with a small buffer, which costs less. A
//! flow that keeps filling large buffers between two plain legs is moved to `splice(2)` and back when
//! it goes quiet. The end of one direction is passed on as such (FIN); a reset ends both, and whoever
//! owns the sockets passes it on as a reset.

mod allowance;
mod leg;
mod pump;

use std::{cell::Cell, time::Duration};

use culvert_rt::{Watch, join};

pub use allowance::Allowance;
pub use leg::Leg;
use pump::{Cut, Pump};

use crate::{
    end::Cause,
    ledger::{Direction, Meter},
};

/// When a relay is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Both directions have ended.
    BothEnd,
    /// The answer (the upstream leg's framed stream) has ended; the connections stay open.
    AnswerEnds,
}

/// What a relay needs of its session.
pub struct Context<'a> {
    /// What may end the session from outside.
    pub watch: &'a Watch,
    /// Where bytes are counted.
    pub meter: &'a Meter,
    /// What may still be moved.
    pub allowance: &'a Allowance<'a>,
    /// Silence allowed once a direction has ended.
    pub half_close: Duration,
}

/// How a relay went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relayed {
    /// Why it is over.
    pub cause: Cause,
    /// Whether the client's direction had come to its end (with [`Until::AnswerEnds`] it may not have).
    pub up_ended: bool,
    /// Whether a flow was moved to splice.
    pub spliced: bool,
}

/// What the two directions of a relay share.
struct Course<'a> {
    context: &'a Context<'a>,
    until: Until,
    /// The first failure.
    first: Cell<Option<Cause>>,
    /// A direction has ended in order.
    half_closed: Cell<bool>,
    spliced: Cell<bool>,
}

/// Relays until it is over.
pub async fn relay(
    client: &Leg<'_>,
    upstream: &Leg<'_>,
    context: &Context<'_>,
    until: Until,
) -> Relayed {
    let course = Course {
        context,
        until,
        first: Cell::new(None),
        half_closed: Cell::new(false),
        spliced: Cell::new(false),
    };
    let up = Pump { from: client, to: upstream, direction: Direction::Up, course: &course };
    let down = Pump { from: upstream, to: client, direction: Direction::Down, course: &course };
    let (up, down) = join(up.run(), down.run()).await;
    context.watch.clear_interrupt();
    // A target that answers and closes before it has read all of the request has answered.
    let answered = until == Until::AnswerEnds && down.is_ok();
    let cause = if answered { None } else { course.first.get() };
    Relayed {
        cause: cause.unwrap_or(Cause::Finished),
        up_ended: up.is_ok(),
        spliced: course.spliced.get(),
    }
}

impl Course<'_> {
    /// One direction has ended: pass it on, or end the other too.
    fn finish(&self, direction: Direction, end: Result<(), Cut>, to: &Leg<'_>) {
        let watch = self.context.watch;
        match end {
            // After a failure this end is no orderly one, and is not passed on as if it were.
            Ok(()) if self.until == Until::BothEnd && self.first.get().is_none() => {
                let _ = to.socket.shutdown_write();
                if !self.half_closed.replace(true) {
                    watch.silence(self.context.half_close, Cause::HalfCloseTimeout.code());
                }
            }
            Ok(()) | Err(Cut { cause: Cause::Finished, .. }) => {}
            Err(cut) => {
                self.first.set(self.first.get().or(Some(cut.cause)));
                if cut.destination {
                    watch.silence(self.context.half_close, Cause::HalfCloseTimeout.code());
                } else {
                    watch.interrupt(cut.cause.code());
                }
            }
        }
        if self.until == Until::AnswerEnds && direction == Direction::Down {
            // The answer may come before the request is all said; its rest is not read.
            watch.interrupt(Cause::Finished.code());
        }
    }
}
