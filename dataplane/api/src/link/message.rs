//! The messages. Numbers of fields are never used again for something else.

use prost::{Message, Oneof};

/// From the node.
#[derive(Clone, PartialEq, Message)]
pub struct Up {
    /// What is said; `None` is something a later version says.
    #[prost(oneof = "up::Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub body: Option<up::Body>,
}

/// Bodies of [`Up`].
pub mod up {
    use super::*;

    /// What a node says.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Body {
        /// The first message.
        #[prost(message, tag = "1")]
        Hello(Hello),
        /// A generation is in force.
        #[prost(message, tag = "2")]
        Applied(Applied),
        /// A generation cannot be followed; the one before stays.
        #[prost(message, tag = "3")]
        Refused(Refused),
        /// Every 5 s.
        #[prost(message, tag = "4")]
        Heartbeat(Heartbeat),
        /// What users have moved.
        #[prost(message, tag = "5")]
        Report(Report),
        /// Ended sessions.
        #[prost(message, tag = "6")]
        Records(Records),
        /// Users whose lease ends soon.
        #[prost(message, tag = "7")]
        LeaseRequest(LeaseRequest),
        /// The sessions that run.
        #[prost(message, tag = "8")]
        Live(Live),
        /// What would be decided.
        #[prost(message, tag = "9")]
        Explained(Explained),
    }
}

impl From<up::Body> for Up {
    fn from(body: up::Body) -> Self {
        Self { body: Some(body) }
    }
}

/// To the node.
#[derive(Clone, PartialEq, Message)]
pub struct Down {
    /// What is said; `None` is something a later version says.
    #[prost(oneof = "down::Body", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub body: Option<down::Body>,
}

/// Bodies of [`Down`].
pub mod down {
    use super::*;

    /// What the control plane says.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Body {
        /// The answer to a hello.
        #[prost(message, tag = "1")]
        Welcome(Welcome),
        /// A whole policy and directory.
        #[prost(message, tag = "2")]
        Snapshot(Snapshot),
        /// What changed since the generation before.
        #[prost(message, tag = "3")]
        Delta(Delta),
        /// A report is in the database.
        #[prost(message, tag = "4")]
        ReportAck(ReportAck),
        /// Records are in the database.
        #[prost(message, tag = "5")]
        RecordAck(RecordAck),
        /// Bytes users may move.
        #[prost(message, tag = "6")]
        LeaseGrant(LeaseGrant),
        /// Do something.
        #[prost(message, tag = "7")]
        Command(Command),
        /// What would be decided?
        #[prost(message, tag = "8")]
        Explain(Explain),
    }
}

impl From<down::Body> for Down {
    fn from(body: down::Body) -> Self {
        Self { body: Some(body) }
    }
}

/// Who the node is and what it speaks.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// Its name.
    #[prost(string, tag = "1")]
    pub node: String,
    /// A random number of this start.
    #[prost(fixed64, tag = "2")]
    pub boot: u64,
    /// The lowest version of the link it speaks.
    #[prost(uint32, tag = "3")]
    pub version_min: u32,
    /// The highest.
    #[prost(uint32, tag = "4")]
    pub version: u32,
    /// The generation of its copy; 0 is none.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// The program's version.
    #[prost(string, tag = "6")]
    pub program: String,
    /// The last command that came to this boot; 0 is none.
    #[prost(uint64, tag = "7")]
    pub command: u64,
}

/// The node is known.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The version that is spoken from now on.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Why the node may not stay; empty if it may.
    #[prost(string, tag = "2")]
    pub refusal: String,
}

/// A whole policy and directory.
#[derive(Clone, PartialEq, Message)]
pub struct Snapshot {
    /// Its number.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// The policy without its users, JSON.
    #[prost(bytes = "vec", tag = "2")]
    pub policy: Vec<u8>,
    /// All users.
    #[prost(message, repeated, tag = "3")]
    pub users: Vec<User>,
}

/// What changed.
#[derive(Clone, PartialEq, Message)]
pub struct Delta {
    /// The generation it is added to.
    #[prost(uint64, tag = "1")]
    pub base: u64,
    /// The generation it leads to.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The policy without its users, JSON; empty if it is the same.
    #[prost(bytes = "vec", tag = "3")]
    pub policy: Vec<u8>,
    /// New and changed users.
    #[prost(message, repeated, tag = "4")]
    pub upserts: Vec<User>,
    /// Numbers of users that are gone.
    #[prost(uint64, repeated, tag = "5")]
    pub deletes: Vec<u64>,
}

/// One user.
#[derive(Clone, PartialEq, Message)]
pub struct User {
    /// Number; never used again.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// bcrypt or argon2id.
    #[prost(string, tag = "3")]
    pub password_hash: String,
    /// May not log in.
    #[prost(bool, tag = "4")]
    pub disabled: bool,
    /// Groups.
    #[prost(string, repeated, tag = "5")]
    pub groups: Vec<String>,
    /// From when on the user may not log in, in seconds since 1970.
    #[prost(int64, optional, tag = "6")]
    pub expires: Option<i64>,
    /// Bytes a second to targets.
    #[prost(uint64, optional, tag = "7")]
    pub up: Option<u64>,
    /// Bytes a second to clients.
    #[prost(uint64, optional, tag = "8")]
    pub down: Option<u64>,
    /// Bytes at once after a pause.
    #[prost(uint64, optional, tag = "9")]
    pub burst: Option<u64>,
    /// Sessions at once.
    #[prost(uint32, optional, tag = "10")]
    pub sessions: Option<u32>,
    /// New sessions a second.
    #[prost(uint32, optional, tag = "11")]
    pub new_sessions_per_second: Option<u32>,
    /// Client addresses at once.
    #[prost(uint32, optional, tag = "12")]
    pub devices: Option<u32>,
    /// Where clients may come from; empty is anywhere.
    #[prost(string, repeated, tag = "13")]
    pub source_addresses: Vec<String>,
    /// The local address to dial from; empty is any.
    #[prost(string, tag = "14")]
    pub egress_address: String,
    /// Whether bytes may be moved only on a lease.
    #[prost(bool, tag = "15")]
    pub metered: bool,
    /// A further client address takes the place of the one that came first.
    #[prost(bool, tag = "16")]
    pub evict_oldest: bool,
}

/// A generation is in force on every worker.
#[derive(Clone, PartialEq, Message)]
pub struct Applied {
    /// Which.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
}

/// A generation cannot be followed.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// Which.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Every reason.
    #[prost(string, repeated, tag = "2")]
    pub reasons: Vec<String>,
}

/// How the node is.
#[derive(Clone, PartialEq, Message)]
pub struct Heartbeat {
    /// Sessions that run.
    #[prost(uint64, tag = "1")]
    pub sessions: u64,
    /// CPU time of the process in microseconds.
    #[prost(uint64, tag = "2")]
    pub cpu_us: u64,
    /// Resident memory in bytes.
    #[prost(uint64, tag = "3")]
    pub memory: u64,
    /// Bytes moved to targets since the start.
    #[prost(uint64, tag = "4")]
    pub up: u64,
    /// Bytes moved to clients since the start.
    #[prost(uint64, tag = "5")]
    pub down: u64,
    /// Whether it takes sessions.
    #[prost(bool, tag = "6")]
    pub ready: bool,
    /// Seconds since its start.
    #[prost(uint64, tag = "7")]
    pub uptime: u64,
}

/// What users have moved during one boot, in all since its begin.
#[derive(Clone, PartialEq, Message)]
pub struct Report {
    /// The boot; an earlier one's last report comes after a crash.
    #[prost(fixed64, tag = "1")]
    pub boot: u64,
    /// One more each time.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    /// Users whose sums changed since what was acknowledged.
    #[prost(message, repeated, tag = "3")]
    pub users: Vec<Usage>,
    /// No more will come of this boot.
    #[prost(bool, tag = "4")]
    pub last: bool,
    /// Bytes a killed process may have moved beyond the sums.
    #[prost(uint64, tag = "5")]
    pub uncertain: u64,
}

/// One user's sums.
#[derive(Clone, PartialEq, Message)]
pub struct Usage {
    /// The user.
    #[prost(uint64, tag = "1")]
    pub user: u64,
    /// Bytes to targets.
    #[prost(uint64, tag = "2")]
    pub up: u64,
    /// Bytes to clients.
    #[prost(uint64, tag = "3")]
    pub down: u64,
    /// What is left of the user's lease after some was taken back: the sum that may be reached.
    #[prost(uint64, optional, tag = "4")]
    pub held: Option<u64>,
}

/// A report, and all before it, will never be asked for again.
#[derive(Clone, PartialEq, Message)]
pub struct ReportAck {
    /// The boot.
    #[prost(fixed64, tag = "1")]
    pub boot: u64,
    /// The report.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
}

/// Ended sessions in the order they were written.
#[derive(Clone, PartialEq, Message)]
pub struct Records {
    /// The boot.
    #[prost(fixed64, tag = "1")]
    pub boot: u64,
    /// The records.
    #[prost(message, repeated, tag = "2")]
    pub records: Vec<Record>,
}

/// One ended session or HTTP exchange.
#[derive(Clone, PartialEq, Message)]
pub struct Record {
    /// Unique within the boot.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// The same that the access log has, JSON.
    #[prost(bytes = "vec", tag = "2")]
    pub json: Vec<u8>,
    /// The user; 0 is nobody.
    #[prost(uint64, tag = "3")]
    pub user: u64,
}

/// Records up to one are in the database.
#[derive(Clone, PartialEq, Message)]
pub struct RecordAck {
    /// The boot.
    #[prost(fixed64, tag = "1")]
    pub boot: u64,
    /// The last record.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
}

/// Asks for leases.
#[derive(Clone, PartialEq, Message)]
pub struct LeaseRequest {
    /// The users.
    #[prost(uint64, repeated, tag = "1")]
    pub users: Vec<u64>,
}

/// What users may move.
#[derive(Clone, PartialEq, Message)]
pub struct LeaseGrant {
    /// The users.
    #[prost(message, repeated, tag = "1")]
    pub leases: Vec<Lease>,
}

/// What one user may move.
#[derive(Clone, PartialEq, Message)]
pub struct Lease {
    /// The user.
    #[prost(uint64, tag = "1")]
    pub user: u64,
    /// The sum of this boot, both directions together, that may be reached.
    #[prost(uint64, tag = "2")]
    pub limit: u64,
    /// The quota has nothing more to grant.
    #[prost(bool, tag = "3")]
    pub spent: bool,
    /// No more than this is to be held, which grants nothing. The node answers with what it still holds
    /// ([`Usage::held`]), and asks for no more before that is acknowledged.
    #[prost(bool, tag = "4")]
    pub taken_back: bool,
}

/// A request that nobody has made: what would be decided?
#[derive(Clone, PartialEq, Message)]
pub struct Explain {
    /// For the answer.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The user's name; empty is nobody.
    #[prost(string, tag = "2")]
    pub user: String,
    /// The client's address.
    #[prost(string, tag = "3")]
    pub client: String,
    /// socks5, socks4 or http.
    #[prost(string, tag = "4")]
    pub protocol: String,
    /// `host:port`.
    #[prost(string, tag = "5")]
    pub target: String,
}

/// The decision.
#[derive(Clone, PartialEq, Message)]
pub struct Explained {
    /// Which question it answers.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Why the question cannot be answered; empty if it is.
    #[prost(string, tag = "2")]
    pub problem: String,
    /// Whether the request would be let through.
    #[prost(bool, tag = "3")]
    pub allowed: bool,
    /// Why not; empty if it would.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// The rule that decides; empty is the default, or what comes before the rules.
    #[prost(string, tag = "5")]
    pub rule: String,
    /// What would be dialled.
    #[prost(string, repeated, tag = "6")]
    pub addresses: Vec<String>,
    /// The generation that decides.
    #[prost(uint64, tag = "7")]
    pub generation: u64,
    /// Whether the black list has the target, whoever asks.
    #[prost(bool, tag = "8")]
    pub filtered: bool,
}

/// The sessions that run.
#[derive(Clone, PartialEq, Message)]
pub struct Live {
    /// All of them.
    #[prost(message, repeated, tag = "1")]
    pub sessions: Vec<LiveSession>,
}

/// One session that runs.
#[derive(Clone, PartialEq, Message)]
pub struct LiveSession {
    /// Unique within the boot.
    #[prost(fixed64, tag = "1")]
    pub id: u64,
    /// The user; 0 is nobody.
    #[prost(uint64, tag = "2")]
    pub user: u64,
    /// The same that the node's `/sessions` has, JSON.
    #[prost(bytes = "vec", tag = "3")]
    pub json: Vec<u8>,
}

/// Something to do.
#[derive(Clone, PartialEq, Message)]
pub struct Command {
    /// What; `None` is something a later version asks for.
    #[prost(oneof = "command::Kind", tags = "1, 2, 3")]
    pub kind: Option<command::Kind>,
    /// Its number; later ones have higher numbers, until a database is replaced.
    #[prost(uint64, tag = "4")]
    pub id: u64,
}

/// Kinds of [`Command`].
pub mod command {
    use prost::Oneof;

    /// What is to be done.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        /// End a session.
        #[prost(fixed64, tag = "1")]
        EndSession(u64),
        /// End all sessions of a user.
        #[prost(uint64, tag = "2")]
        EndUser(u64),
        /// Take no more sessions, let the others end, exit.
        #[prost(bool, tag = "3")]
        Drain(bool),
    }
}
