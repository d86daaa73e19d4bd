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
    use crate::link::*;

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

    /// The bytes of version 1, which every later version must read and still mean the same by.
    #[test]
    fn golden_messages_are_read_and_written() {
        let golden = include_str!("golden.txt");
        let mut lines = golden.lines();
        let mut check = |name: &str, bytes: Vec<u8>| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(lines.next(), Some(&*format!("{name} {hex}")), "the wire has changed");
        };
        for (name, message) in ups() {
            let bytes = message.encode_to_vec();
            assert_eq!(Up::decode(&bytes[..]).unwrap(), message);
            check(name, bytes);
        }
        for (name, message) in downs() {
            let bytes = message.encode_to_vec();
            assert_eq!(Down::decode(&bytes[..]).unwrap(), message);
            check(name, bytes);
        }
        assert_eq!(lines.next(), None);
        let mut frame = Vec::new();
        encode(&ack(300), &mut frame);
        assert_eq!(frame[..8], [14, 0, 0, 0, 0xe2, 0x62, 0x03, 0x23], "{frame:x?}");
    }

    /// What a later version says more is passed over.
    #[test]
    fn later_versions_are_understood() {
        // A body that is not known, and a field that is not.
        let unknown = [0xfa, 0x07, 2, 0x08, 1];
        assert_eq!(Down::decode(&unknown[..]).unwrap().body, None);
        let mut bytes = ack(300).encode_to_vec();
        bytes[1] += 3;
        bytes.extend([0xf8, 0x07, 1]);
        assert_eq!(Down::decode(&bytes[..]).unwrap(), ack(300));
    }

    fn ups() -> Vec<(&'static str, Up)> {
        let hello = Hello {
            node: "edge-1".into(),
            boot: 7,
            version_min: 1,
            version: 2,
            generation: 300,
            program: "0.1.0".into(),
            command: 302,
        };
        let usage = Usage { user: 5, up: 1000, down: 2000, held: Some(9000) };
        let report = Report { boot: 7, sequence: 3, users: vec![usage], last: true, uncertain: 17 };
        let record = Record { sequence: 4, json: b"{}".to_vec(), user: 5 };
        let live = LiveSession { id: 1 << 48, user: 5, json: b"{}".to_vec() };
        let beat =
            Heartbeat { sessions: 1, cpu_us: 2, memory: 3, up: 4, down: 5, ready: true, uptime: 6 };
        let explained = Explained {
            id: 1,
            problem: "p".into(),
            allowed: true,
            reason: "rule".into(),
            rule: "work".into(),
            addresses: vec!["192.0.2.1:80".into()],
            generation: 300,
            filtered: true,
        };
        let refused = Refused { generation: 300, reasons: vec!["no".into()] };
        let bodies = [
            ("hello", up::Body::Hello(hello)),
            ("applied", up::Body::Applied(Applied { generation: 300 })),
            ("refused", up::Body::Refused(refused)),
            ("heartbeat", up::Body::Heartbeat(beat)),
            ("report", up::Body::Report(report)),
            ("records", up::Body::Records(Records { boot: 7, records: vec![record] })),
            ("lease_request", up::Body::LeaseRequest(LeaseRequest { users: vec![5, 300] })),
            ("live", up::Body::Live(Live { sessions: vec![live] })),
            ("explained", up::Body::Explained(explained)),
        ];
        bodies.map(|(name, body)| (name, Up::from(body))).into()
    }

    fn downs() -> Vec<(&'static str, Down)> {
        let user = User {
            id: 5,
            name: "ann".into(),
            password_hash: "$2b$".into(),
            disabled: true,
            groups: vec!["staff".into()],
            expires: Some(1_800_000_000),
            up: Some(1),
            down: Some(2),
            burst: Some(3),
            sessions: Some(4),
            new_sessions_per_second: Some(5),
            devices: Some(6),
            source_addresses: vec!["10.0.0.0/8".into()],
            egress_address: "192.0.2.1".into(),
            metered: true,
            evict_oldest: true,
        };
        let snapshot =
            Snapshot { generation: 300, policy: b"{}".to_vec(), users: vec![user.clone()] };
        let delta = Delta {
            base: 300,
            generation: 301,
            policy: b"{}".to_vec(),
            upserts: vec![user],
            deletes: vec![6, 7],
        };
        let lease = Lease { user: 5, limit: 9000, spent: true, taken_back: true };
        let explain = Explain {
            id: 1,
            user: "ann".into(),
            client: "192.0.2.7".into(),
            protocol: "socks5".into(),
            target: "a.example:443".into(),
        };
        let welcome = Welcome { version: 1, refusal: "no".into() };
        let command = |kind| down::Body::Command(Command { kind: Some(kind), id: 301 });
        let bodies = [
            ("welcome", down::Body::Welcome(welcome)),
            ("snapshot", down::Body::Snapshot(snapshot)),
            ("delta", down::Body::Delta(delta)),
            ("report_ack", down::Body::ReportAck(ReportAck { boot: 7, sequence: 300 })),
            ("record_ack", down::Body::RecordAck(RecordAck { boot: 7, sequence: 300 })),
            ("lease_grant", down::Body::LeaseGrant(LeaseGrant { leases: vec![lease] })),
            ("end_session", command(command::Kind::EndSession(9))),
            ("end_user", command(command::Kind::EndUser(9))),
            ("drain", command(command::Kind::Drain(true))),
            ("explain", down::Body::Explain(explain)),
        ];
        bodies.map(|(name, body)| (name, Down::from(body))).into()
    }
}
