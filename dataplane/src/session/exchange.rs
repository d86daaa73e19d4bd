//! One HTTP request forwarded and answered.

use std::cell::RefCell;

use culvert_proto::{Forward, Handshake, Outcome, http::Response};

use super::Session;
use crate::{
    end::{Cause, End, Stage},
    ledger::Direction,
    relay::{Leg, Until, relay},
    upstream::Dialled,
};

/// How an exchange went.
pub(super) struct Exchanged {
    pub(super) end: End,
    /// The response's status; 0 when there was none.
    pub(super) status: u16,
    /// The client may send another request.
    pub(super) client_stays: bool,
    /// The connection to the target may carry another.
    pub(super) upstream_stays: bool,
    /// The answer came before the request was all read.
    pub(super) unread: bool,
    /// Nothing was answered, and nobody was told: it may be sent once more.
    pub(super) again: bool,
}

impl Exchanged {
    fn over(end: End, status: u16) -> Self {
        Self {
            end,
            status,
            client_stays: false,
            upstream_stays: false,
            unread: false,
            again: false,
        }
    }
}

impl Session {
    /// Sends the request's head, relays its body and the response. With `again` a target that ends without
    /// a word is asked once more by the caller.
    pub(super) async fn exchange(
        &self,
        handshake: &mut dyn Handshake,
        forward: &Forward,
        dialled: &Dialled,
        again: bool,
    ) -> Exchanged {
        let timeouts = self.worker.snapshot().settings.timeouts;
        self.watch.stage_over();
        self.watch.silence(timeouts.idle, Cause::IdleTimeout.code());
        self.worker.counters.exchanges.add(1);

        let body = RefCell::new(forward.body.clone());
        let response = RefCell::new(Response::new(forward.exchange));
        let client =
            Leg::client(&self.client, self.early.take()).framed(&body).led_by(forward.head.clone());
        let upstream = Leg::upstream(&dialled.socket, Vec::new()).framed(&response);
        let allowance = self.allowance();
        let context = self.context(&allowance, timeouts.half_close);
        let relayed = relay(&client, &upstream, &context, Until::AnswerEnds).await;
        self.early.replace(client.take_early());

        let early = upstream.take_early();
        let response = response.replace(Response::new(forward.exchange));
        let status = response.status();
        if response.has_switched() && relayed.cause == Cause::Finished {
            // 101: from here on the two connections are a tunnel.
            let client = Leg::client(&self.client, self.early.take());
            let upstream = Leg::upstream(&dialled.socket, early);
            let end = Box::pin(self.relay(&client, &upstream)).await;
            if end.cause.cuts() {
                dialled.socket.reset_on_close();
            }
            return Exchanged::over(end, status);
        }
        let cause = self.stopped().unwrap_or(relayed.cause);
        if cause == Cause::Finished {
            let whole = relayed.up_ended && body.borrow().is_over();
            handshake.reply(Outcome::Connected { bound: dialled.address });
            return Exchanged {
                end: End::new(Stage::Relay, Cause::Finished),
                status,
                client_stays: response.client_keeps_alive() && whole && handshake.resume(),
                upstream_stays: response.upstream_keeps_alive() && whole && early.is_empty(),
                unread: !whole,
                again: false,
            };
        }
        dialled.socket.reset_on_close();
        if !response.has_started()
            && matches!(
                cause,
                Cause::UpstreamClosed | Cause::UpstreamReset | Cause::UpstreamMalformed
            )
        {
            if again && early.is_empty() && response.is_untouched() {
                let end = End::new(Stage::Relay, cause);
                return Exchanged { again, ..Exchanged::over(end, 0) };
            }
            // Nothing of an answer has reached the client: give it one.
            let told = self.tell(handshake, Outcome::Failed).await;
            let client_stays = told.is_ok() && body.borrow().is_over() && handshake.resume();
            let end = End::new(Stage::Dial, cause);
            let unread = told.is_ok() && !client_stays;
            return Exchanged { client_stays, unread, ..Exchanged::over(end, 502) };
        }
        Exchanged::over(End::new(Stage::Relay, cause), status)
    }

    /// Bytes moved so far, for a record's difference.
    pub(super) fn moved(&self) -> [u64; 2] {
        Direction::ALL.map(|direction| self.meter.done(direction))
    }
}
