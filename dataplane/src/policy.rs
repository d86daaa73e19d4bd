//! Who may do what: the immutable snapshot, its compiler, and the one function that makes permits.
//!
//! A [`Snapshot`] is compiled off the workers and published through an `ArcSwap`; workers read it and
//! never wait. What must be counted over all workers (rates, sessions, devices, failed logins) lies in
//! atomics beside it and survives a new snapshot. Nothing here opens a socket.

mod authorize;
mod bucket;
mod compile;
mod credential;
mod index;
mod internal;
mod login;
mod snapshot;
mod table;
mod target;
mod user;

pub use authorize::{Decision, Denial, Permit, Query, Resolved};
pub use bucket::{Bucket, Grant, UNITS_MIN, clock};
pub use compile::{Draft, compile};
pub use credential::{Credential, CredentialError, RememberKey, hash_password};
pub use internal::{embedded_v4, is_internal};
pub use login::{Limits as ThrottleLimits, LoginError, LoginPool, LoginTicket, Throttles, Whose};
pub use snapshot::{Directory, OwnAddresses, Snapshot, Upstream, snapshots_alive};
pub use table::{Held, Table, TableError, client_key};
pub use target::{Match, NetSet, Ports, TargetLists, TargetSet};
pub use user::{Admission, AdmissionError, User, UserId, UserUse};
