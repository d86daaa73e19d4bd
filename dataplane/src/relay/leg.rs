//! One side of a relay: a socket, what was read of it too early, and what its stream is wrapped in.

use std::{cell::Cell, cell::RefCell};

use culvert_proto::Framing;
use culvert_rt::Socket;

use crate::end::Cause;

/// One side of a relay.
pub struct Leg<'a> {
    /// The connection.
    pub socket: &'a Socket,
    /// Bytes that were received before the relay began, or left when a framed stream ended.
    early: Cell<Vec<u8>>,
    /// Bytes of our own that go to the other side first, such as a request's head.
    lead: Cell<Vec<u8>>,
    framing: Option<&'a RefCell<dyn Framing + 'static>>,
    causes: Causes,
}

/// What is said of a side that fails.
#[derive(Debug, Clone, Copy)]
pub(super) struct Causes {
    pub(super) closed: Cause,
    pub(super) reset: Cause,
    pub(super) malformed: Cause,
}

impl<'a> Leg<'a> {
    /// The client's leg.
    pub fn client(socket: &'a Socket, early: Vec<u8>) -> Self {
        let causes = Causes {
            closed: Cause::ClientClosed,
            reset: Cause::ClientReset,
            malformed: Cause::ClientMalformed,
        };
        Self { socket, early: Cell::new(early), lead: Cell::default(), framing: None, causes }
    }

    /// The upstream leg.
    pub fn upstream(socket: &'a Socket, early: Vec<u8>) -> Self {
        let causes = Causes {
            closed: Cause::UpstreamClosed,
            reset: Cause::UpstreamReset,
            malformed: Cause::UpstreamMalformed,
        };
        Self { socket, early: Cell::new(early), lead: Cell::default(), framing: None, causes }
    }

    /// The same leg with its stream wrapped.
    pub fn framed(self, framing: &'a RefCell<dyn Framing + 'static>) -> Self {
        Self { framing: Some(framing), ..self }
    }

    /// The same leg, led by bytes of our own.
    pub fn led_by(self, lead: Vec<u8>) -> Self {
        self.lead.set(lead);
        self
    }

    pub(super) fn take_lead(&self) -> Vec<u8> {
        self.lead.take()
    }

    pub(super) fn framing(&self) -> Option<&'a RefCell<dyn Framing + 'static>> {
        self.framing
    }

    pub(super) fn causes(&self) -> Causes {
        self.causes
    }

    /// Whether there are early bytes.
    pub(super) fn has_early(&self) -> bool {
        let early = self.early.take();
        let has = !early.is_empty();
        self.early.set(early);
        has
    }

    /// Takes the early bytes.
    pub fn take_early(&self) -> Vec<u8> {
        self.early.take()
    }

    /// Leaves bytes for whoever comes next.
    pub(super) fn leave(&self, bytes: &[u8]) {
        self.early.set(bytes.to_vec());
    }
}
