//! The control link: what a node and the control plane say to each other.
//!
//! A stream of frames: length (u32, little endian), CRC-32 of the payload, payload. The payload is a
//! protobuf message, [`Up`] from the node or [`Down`] to it, so fields may be added between versions;
//! whoever does not know a message skips it. The conditions of a policy travel as JSON that refuses
//! unknown keys: a node must not follow a policy of which it understands a part.

mod frame;
mod message;

pub use frame::{Decoder, FRAME_MAX, FrameError, encode};
pub use message::{
    Applied, Command, Delta, Down, Explain, Explained, Heartbeat, Hello, Lease, LeaseGrant,
    LeaseRequest, Live, LiveSession, Record, RecordAck, Records, Refused, Report, ReportAck,
    Snapshot, Up, Usage, User, Welcome, command, down, up,
};

/// The link's version: the highest this program speaks.
pub const VERSION: u32 = 1;
/// The lowest.
pub const VERSION_MIN: u32 = 1;
