//! The access record: one for each session, or for each HTTP exchange of it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use culvert_proto::{Protocol, Request, Target};
use serde::{Serialize, Serializer};

use super::Session;
use crate::{
    end::{End, Side, Stage},
    ledger::Owed,
    policy::{Denial, Permit, User},
};

/// One access record, as queued by a worker and written by the log's thread.
#[derive(Debug)]
pub struct Record {
    time: SystemTime,
    session: u64,
    exchange: u32,
    listener: Arc<str>,
    protocol: Option<Protocol>,
    client: SocketAddr,
    user: Option<Arc<User>>,
    command: &'static str,
    target: Option<Target>,
    pub(super) address: Option<SocketAddr>,
    rule: Option<Arc<str>>,
    denial: Option<&'static str>,
    generation: u64,
    bytes: [u64; 2],
    begun: Instant,
    handshake: Duration,
    dial: Duration,
    total: Duration,
    pub(super) status: u16,
    end: Option<End>,
    /// Keeps `bytes` in the ledger until the record is written.
    owed: Option<Owed>,
}

impl Record {
    /// The record of a request.
    pub(super) fn begin(session: &Session, request: &Request) -> Self {
        let mut record = Self::nothing(session);
        record.command = request.command.name();
        record.target = Some(request.target.clone());
        let requested = session.times.requested.get();
        if session.live.exchanges() == 0 {
            let requested = requested.unwrap_or(record.begun);
            record.handshake = requested.duration_since(session.times.accepted);
        } else {
            record.begun = requested.unwrap_or_else(Instant::now);
            record.time = SystemTime::now();
        }
        record
    }

    /// The record of a session that came to no request.
    pub(super) fn nothing(session: &Session) -> Self {
        Self {
            time: session.times.wall,
            session: session.live.id,
            exchange: session.live.exchanges(),
            listener: session.listener.name.clone(),
            protocol: session.protocol.get(),
            client: session.peer,
            user: session.user(),
            command: "none",
            target: None,
            address: None,
            rule: None,
            denial: None,
            generation: 0,
            bytes: [0; 2],
            begun: session.times.accepted,
            handshake: Duration::ZERO,
            dial: Duration::ZERO,
            total: Duration::ZERO,
            status: 0,
            end: None,
            owed: None,
        }
    }

    /// The user's number; 0 is nobody.
    pub fn user_id(&self) -> u64 {
        self.user.as_ref().map_or(0, |user| user.id.0)
    }

    /// The record is about to be written under this number.
    pub fn recorded_as(&self, sequence: u64) {
        if let Some(owed) = &self.owed {
            owed.recorded_as(sequence);
        }
    }

    pub(super) fn permitted(&mut self, permit: &Permit) {
        self.rule = permit.rule().cloned();
        self.generation = permit.version();
    }

    pub(super) fn denied(&mut self, denial: Denial) {
        self.denial = Some(denial.name());
        if let Denial::Rule(rule) = denial {
            self.rule = Some(rule);
        }
    }

    pub(super) fn dialled(&mut self, started: Instant) {
        self.dial = started.elapsed();
    }

    /// Completes the record and queues it for the log.
    pub(super) fn finish(mut self, session: &Session, end: End) {
        let after = session.moved();
        let before = session.recorded.replace(after);
        self.bytes = [after[0] - before[0], after[1] - before[1]];
        self.owed = session.meter.record();
        self.total = self.begun.elapsed();
        self.end = Some(end);
        session.worker.log(self);
    }
}

/// The JSON line of a record.
impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Line<'a> {
            time: String,
            session: u64,
            exchange: u32,
            listener: &'a str,
            protocol: Option<&'static str>,
            client: SocketAddr,
            user: Option<&'a str>,
            command: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            target: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            address: Option<SocketAddr>,
            #[serde(skip_serializing_if = "Option::is_none")]
            rule: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            denied: Option<&'static str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            status: Option<u16>,
            generation: u64,
            bytes_up: u64,
            bytes_down: u64,
            handshake_ms: f64,
            dial_ms: f64,
            duration_ms: f64,
            end: &'static str,
            side: &'static str,
            stage: &'static str,
        }
        let ms = |duration: Duration| duration.as_micros() as f64 / 1e3;
        Line {
            time: time::OffsetDateTime::from(self.time)
                .format(&time::format_description::well_known::Rfc3339)
                .unwrap_or_default(),
            session: self.session,
            exchange: self.exchange,
            listener: &self.listener,
            protocol: self.protocol.map(Protocol::name),
            client: self.client,
            user: self.user.as_ref().map(|user| &*user.name),
            command: self.command,
            target: self.target.as_ref().map(ToString::to_string),
            address: self.address,
            rule: self.rule.as_deref(),
            denied: self.denial,
            status: (self.status > 0).then_some(self.status),
            generation: self.generation,
            bytes_up: self.bytes[0],
            bytes_down: self.bytes[1],
            handshake_ms: ms(self.handshake),
            dial_ms: ms(self.dial),
            duration_ms: ms(self.total),
            end: self.end.map_or("unknown", |end| end.cause.name()),
            side: self.end.map_or("proxy", |end| match end.side {
                Side::Client => "client",
                Side::Upstream => "upstream",
                Side::Proxy => "proxy",
            }),
            stage: self.end.map_or("handshake", |end| match end.stage {
                Stage::Handshake => "handshake",
                Stage::Login => "login",
                Stage::Policy => "policy",
                Stage::Dial => "dial",
                Stage::Relay => "relay",
            }),
        }
        .serialize(serializer)
    }
}
