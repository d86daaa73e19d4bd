//! What the two planes share: values with units, configuration text as a tree with positions, and the
//! policy a file or the control plane gives a node.
//!
//! Nothing here reads a file, a socket or the clock.

#![forbid(unsafe_code)]

pub mod config;
pub mod link;
pub mod policy;
mod problem;
mod units;

pub use problem::{Place, Problem};
pub use units::{ByteCount, ByteRate, Span, Throttle};
