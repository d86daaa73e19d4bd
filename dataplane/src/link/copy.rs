//! The node's copy of the policy, with which it starts when the control plane is away.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use culvert_api::{
    ByteCount, ByteRate,
    link::{Decoder, Delta, Down, Snapshot, User, down, encode},
    policy::{self as api, Policy},
};

/// Changes appended to the file before it is written anew.
const APPENDED_MAX: usize = 64;

/// A policy and its users.
#[derive(Clone)]
pub(super) struct Copy {
    path: PathBuf,
    /// 0 is none.
    pub(super) generation: u64,
    policy: Vec<u8>,
    users: Arc<BTreeMap<u64, User>>,
    /// What is to be added to the file; `None` writes it anew.
    change: Option<Vec<u8>>,
    appended: usize,
}

impl Copy {
    /// Reads the file of a state directory. What a killed process wrote half is passed over.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let mut copy = Self {
            path: dir.join("snapshot"),
            generation: 0,
            policy: Vec::new(),
            users: Arc::default(),
            change: None,
            appended: 0,
        };
        let bytes = match std::fs::read(&copy.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(copy),
            Err(error) => return Err(error),
        };
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        while let Ok(Some(Down { body: Some(body) })) = decoder.take::<Down>() {
            let next = match body {
                down::Body::Snapshot(snapshot) => Self::of_snapshot(&copy, snapshot),
                down::Body::Delta(delta) => Self::with(&copy, delta),
                _ => continue,
            };
            match next {
                Ok(next) => copy = next,
                Err(_) => break,
            }
        }
        // Whatever the file ends with, the next change writes it anew.
        copy.appended = APPENDED_MAX;
        Ok(copy)
    }

    /// A whole snapshot in its place.
    pub(super) fn of_snapshot(&self, snapshot: Snapshot) -> Result<Self, String> {
        let next = Self {
            path: self.path.clone(),
            generation: snapshot.generation,
            policy: snapshot.policy,
            users: Arc::new(snapshot.users.into_iter().map(|user| (user.id, user)).collect()),
            change: None,
            appended: 0,
        };
        next.check()?;
        Ok(next)
    }

    /// The same with a change.
    pub(super) fn with(&self, delta: Delta) -> Result<Self, String> {
        if delta.base != self.generation {
            return Err(format!(
                "a change of generation {}, but {} is in force",
                delta.base, self.generation
            ));
        }
        let mut change = Vec::new();
        encode(&Down { body: Some(down::Body::Delta(delta.clone())) }, &mut change);
        let mut next = self.clone();
        next.generation = delta.generation;
        if !delta.policy.is_empty() {
            next.policy = delta.policy;
        }
        let users = Arc::make_mut(&mut next.users);
        for id in delta.deletes {
            users.remove(&id);
        }
        users.extend(delta.upserts.into_iter().map(|user| (user.id, user)));
        next.appended = self.appended + 1;
        next.change = (next.appended < APPENDED_MAX).then_some(change);
        next.check()?;
        Ok(next)
    }

    fn check(&self) -> Result<(), String> {
        serde_json::from_slice::<Policy>(&self.policy)
            .map(drop)
            .map_err(|error| format!("this version does not understand the policy: {error}"))
    }

    /// As the node compiles it.
    pub(super) fn policy(&self) -> Policy {
        let mut policy: Policy = serde_json::from_slice(&self.policy).unwrap_or_default();
        policy.user = self.users.values().map(user).collect();
        policy
    }

    /// The file is not what it should be: the next change writes it anew.
    pub(super) fn write_anew(&mut self) {
        self.appended = APPENDED_MAX;
    }

    /// Writes it to the file.
    ///
    /// # Errors
    /// The disk takes no more.
    pub(super) fn keep(&self) -> io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        options.mode(0o600);
        if let Some(change) = &self.change {
            return options.append(true).open(&self.path)?.write_all(change);
        }
        let whole = Snapshot {
            generation: self.generation,
            policy: self.policy.clone(),
            users: self.users.values().cloned().collect(),
        };
        let mut bytes = Vec::new();
        encode(&Down { body: Some(down::Body::Snapshot(whole)) }, &mut bytes);
        let new = self.path.with_extension("new");
        let mut file = options.write(true).create(true).truncate(true).open(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(new, &self.path)
    }
}

fn user(user: &User) -> api::User {
    let rate = |rate: Option<u64>| rate.map(ByteRate);
    let networks = user.source_addresses.iter().map(|text| text.parse().ok());
    api::User {
        id: Some(user.id),
        name: user.name.clone(),
        password_hash: user.password_hash.clone(),
        status: if user.disabled { api::Status::Disabled } else { api::Status::Active },
        groups: user.groups.clone(),
        expires: user.expires.and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok()),
        limits: api::Limits {
            up: rate(user.up),
            down: rate(user.down),
            burst: user.burst.map(ByteCount),
            sessions: user.sessions,
            new_sessions_per_second: user.new_sessions_per_second,
            devices: user.devices,
            // One that cannot be read must not open the door: then none is.
            source_addresses: (!user.source_addresses.is_empty())
                .then(|| networks.collect::<Option<Vec<_>>>().unwrap_or_default()),
            egress_address: user.egress_address.parse().ok(),
            metered: user.metered,
        },
    }
}
