//! Culvert's data plane: thread-per-core workers that accept SOCKS5, SOCKS4 and HTTP clients, judge
//! them by an immutable policy, dial and relay.
//!
//! [`node`] owns the sockets and starts the [`worker`]s; a worker runs [`session`]s; a session asks the
//! [`policy`] for a permit, an [`upstream`] for a connection, and a [`relay`] to move the bytes, which
//! the [`ledger`] counts. The program is [`cli`].

pub mod admin;
pub mod cli;
pub mod config;
pub mod end;
pub mod ledger;
pub mod link;
pub mod log;
pub mod node;
pub mod policy;
pub mod relay;
pub mod session;
pub mod settings;
pub mod telemetry;
pub mod upstream;
pub mod worker;
