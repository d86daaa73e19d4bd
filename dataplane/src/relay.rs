//! Moving bytes between two legs: one relay for every protocol.
//!
//! Two pumps run in one task, one a direction. A pump waits until its source is readable, asks the
//! allowance, takes a pooled buffer, receives, sends, gives the buffer back: it holds nothing while it
//! waits for data, and one buffer at most when its destination is slow, which is the back-pressure. A
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
    pub allowance: &'a Allowance,
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

/// Relays until it is over.
pub async fn relay(
    client: &Leg<'_>,
    upstream: &Leg<'_>,
    context: &Context<'_>,
    until: Until,
) -> Relayed {
    let first = Cell::new(None);
    let spliced = Cell::new(false);
    let ended = Cell::new(false);
    let pump = |from, to, direction| Pump { from, to, direction, context, spliced: &spliced };
    let pass_on = until == Until::BothEnd;
    let up = async {
        let end = pump(client, upstream, Direction::Up).run().await;
        finish(context, &first, &ended, end, pass_on, upstream);
        end
    };
    let down = async {
        let end = pump(upstream, client, Direction::Down).run().await;
        finish(context, &first, &ended, end, pass_on, client);
        if until == Until::AnswerEnds {
            // The answer may come before the request is all said; its rest is not read.
            context.watch.interrupt(Cause::Finished.code());
        }
        end
    };
    let (up, down) = join(up, down).await;
    context.watch.clear_interrupt();
    // A target that answers and closes before it has read all of the request has answered.
    let answered = until == Until::AnswerEnds && down.is_ok();
    Relayed {
        cause: if answered { Cause::Finished } else { first.get().unwrap_or(Cause::Finished) },
        up_ended: up.is_ok(),
        spliced: spliced.get(),
    }
}

/// One direction has ended: pass it on, or end the other too.
fn finish(
    context: &Context<'_>,
    first: &Cell<Option<Cause>>,
    ended: &Cell<bool>,
    end: Result<(), Cut>,
    pass_on: bool,
    to: &Leg<'_>,
) {
    match end {
        // After a failure this end is no orderly one, and is not passed on as if it were.
        Ok(()) if pass_on && first.get().is_none() => {
            let _ = to.socket.shutdown_write();
            if !ended.replace(true) {
                context.watch.silence(context.half_close, Cause::HalfCloseTimeout.code());
            }
        }
        Ok(()) | Err(Cut { cause: Cause::Finished, .. }) => {}
        Err(cut) => {
            first.set(first.get().or(Some(cut.cause)));
            if cut.destination {
                context.watch.silence(context.half_close, Cause::HalfCloseTimeout.code());
            } else {
                context.watch.interrupt(cut.cause.code());
            }
        }
    }
}
