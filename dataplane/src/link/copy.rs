//! The node's copy of the policy, with which it starts when the control plane is away.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use culvert_api::{
    ByteCount, ByteRate,
    link::{Decoder, Delta, Down, Snapshot, User, down, encode},
    policy::{self as api, Policy},
};

use crate::policy::Draft;

/// Changes appended to the file before it is written anew.
const APPENDED_MAX: usize = 64;

/// A policy and its users.
pub(super) struct Copy {
    path: PathBuf,
    /// 0 is none.
    pub(super) generation: u64,
    policy: Vec<u8>,
    users: BTreeMap<u64, User>,
    /// Changes in the file after the whole.
    appended: usize,
}

/// What leads from a copy to the next one.
pub(super) struct Change {
    said: Said,
    /// Without its users; `None` is the same.
    policy: Option<Policy>,
    gone: Vec<String>,
    users: Vec<api::User>,
}

enum Said {
    Whole(Snapshot),
    Part(Delta),
}

impl Change {
    /// As the node compiles it.
    pub(super) fn draft(&self) -> Draft<'_> {
        match (&self.said, &self.policy) {
            (Said::Whole(_), Some(policy)) => Draft::Whole(policy),
            (_, policy) => {
                Draft::Change { policy: policy.as_ref(), gone: &self.gone, users: &self.users }
            }
        }
    }
}

fn parse(policy: &[u8]) -> Result<Policy, String> {
    serde_json::from_slice(policy)
        .map_err(|error| format!("this version does not understand the policy: {error}"))
}

impl Copy {
    /// When the file was last written; `None` if there is none.
    pub(super) fn written(&self) -> Option<SystemTime> {
        std::fs::metadata(&self.path).and_then(|data| data.modified()).ok()
    }

    /// Reads the file of a state directory. What a killed process wrote half is passed over.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let mut copy = Self {
            path: dir.join("snapshot"),
            generation: 0,
            policy: Vec::new(),
            users: BTreeMap::new(),
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
            let change = match body {
                down::Body::Snapshot(snapshot) => copy.whole(snapshot),
                down::Body::Delta(delta) => copy.part(delta),
                _ => continue,
            };
            match change {
                Ok(change) => drop(copy.apply(change)),
                Err(_) => break,
            }
        }
        // Whatever the file ends with, the next change writes it anew.
        copy.write_anew();
        Ok(copy)
    }

    /// A whole snapshot in its place.
    pub(super) fn whole(&self, snapshot: Snapshot) -> Result<Change, String> {
        let mut policy = parse(&snapshot.policy)?;
        policy.user = snapshot.users.iter().map(user).collect();
        let (gone, users) = (Vec::new(), Vec::new());
        Ok(Change { said: Said::Whole(snapshot), policy: Some(policy), gone, users })
    }

    /// A change of it.
    pub(super) fn part(&self, delta: Delta) -> Result<Change, String> {
        if delta.base != self.generation {
            return Err(format!(
                "a change of generation {}, but {} is in force",
                delta.base, self.generation
            ));
        }
        let policy = match &delta.policy[..] {
            [] => None,
            policy => Some(parse(policy)?),
        };
        let deleted = delta.deletes.iter().filter_map(|id| self.users.get(id));
        let renamed = delta
            .upserts
            .iter()
            .filter_map(|user| self.users.get(&user.id).filter(|known| known.name != user.name));
        let gone = deleted.chain(renamed).map(|user| user.name.clone()).collect();
        let users = delta.upserts.iter().map(user).collect();
        Ok(Change { said: Said::Part(delta), policy, gone, users })
    }

    /// Takes a change over; gives what is to be appended to the file, `None` if it is to be written anew.
    pub(super) fn apply(&mut self, change: Change) -> Option<Vec<u8>> {
        match change.said {
            Said::Whole(snapshot) => {
                self.generation = snapshot.generation;
                self.policy = snapshot.policy;
                self.users = snapshot.users.into_iter().map(|user| (user.id, user)).collect();
                self.appended = 0;
                None
            }
            Said::Part(delta) => {
                self.appended += 1;
                let appended = (self.appended < APPENDED_MAX).then(|| {
                    let mut bytes = Vec::new();
                    encode(&Down { body: Some(down::Body::Delta(delta.clone())) }, &mut bytes);
                    bytes
                });
                self.generation = delta.generation;
                if !delta.policy.is_empty() {
                    self.policy = delta.policy;
                }
                for id in delta.deletes {
                    self.users.remove(&id);
                }
                self.users.extend(delta.upserts.into_iter().map(|user| (user.id, user)));
                appended
            }
        }
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

    /// Writes it to the file: what is to be appended, or all of it.
    ///
    /// # Errors
    /// The disk takes no more.
    pub(super) fn keep(&mut self, appended: Option<&[u8]>) -> io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        options.mode(0o600);
        if let Some(appended) = appended {
            return options.append(true).open(&self.path)?.write_all(appended);
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
        std::fs::rename(new, &self.path)?;
        self.appended = 0;
        Ok(())
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
            evict_oldest: user.evict_oldest,
            // One that cannot be read must not open the door: then none is.
            source_addresses: (!user.source_addresses.is_empty())
                .then(|| networks.collect::<Option<Vec<_>>>().unwrap_or_default()),
            egress_address: user.egress_address.parse().ok(),
            metered: user.metered,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(id: u64, name: &str) -> User {
        User { id, name: name.into(), ..User::default() }
    }

    fn delta(base: u64, upsert: User, deletes: &[u64]) -> Delta {
        let (upserts, deletes) = (vec![upsert], deletes.to_vec());
        Delta { base, generation: base + 1, upserts, deletes, ..Delta::default() }
    }

    fn follow(copy: &mut Copy, delta: Delta) {
        let change = copy.part(delta).unwrap();
        let appended = copy.apply(change);
        copy.keep(appended.as_deref()).unwrap();
    }

    fn names(copy: &Copy) -> Vec<&str> {
        copy.users.values().map(|user| &*user.name).collect()
    }

    /// A copy of three users, of which one came, one went and one was renamed after the whole.
    fn written(dir: &Path) -> Copy {
        let mut copy = Copy::open(dir).unwrap();
        let users = vec![named(1, "ann"), named(2, "bob")];
        let whole = Snapshot { generation: 7, policy: b"{}".to_vec(), users };
        let change = copy.whole(whole).unwrap();
        let appended = copy.apply(change);
        copy.keep(appended.as_deref()).unwrap();
        follow(&mut copy, delta(7, named(3, "cid"), &[]));
        follow(&mut copy, delta(8, named(1, "anna"), &[2]));
        copy
    }

    #[test]
    fn a_copy_is_read_as_it_was_left() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let copy = written(folder.path());
        let read = Copy::open(folder.path()).unwrap();
        assert_eq!((read.generation, names(&read)), (9, vec!["anna", "cid"]));
        assert_eq!(names(&copy), names(&read));
        // It has everybody's hashes.
        let mode = std::fs::metadata(folder.path().join("snapshot")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(copy.part(delta(7, named(4, "dan"), &[])).is_err(), "of another generation");
    }

    /// Wherever a process was killed while it wrote: what was whole before counts.
    #[test]
    fn a_torn_copy_is_read_as_far_as_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path());
        let file = folder.path().join("snapshot");
        let bytes = std::fs::read(&file).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for length in 0..=bytes.len() {
            std::fs::write(&file, &bytes[..length]).unwrap();
            let mut copy = Copy::open(folder.path()).unwrap();
            seen.insert(copy.generation);
            let expected = match copy.generation {
                0 => vec![],
                7 => vec!["ann", "bob"],
                8 => vec!["ann", "bob", "cid"],
                9 => vec!["anna", "cid"],
                other => panic!("{other}"),
            };
            assert_eq!(names(&copy), expected);
            // The next change writes all of it anew, whatever the file ends with.
            if copy.generation == 8 {
                follow(&mut copy, delta(8, named(5, "eve"), &[]));
                let read = Copy::open(folder.path()).unwrap();
                assert_eq!((read.generation, names(&read)), (9, vec!["ann", "bob", "cid", "eve"]));
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 7, 8, 9]);
        // Noise is no policy.
        std::fs::write(&file, [0xff; 4096]).unwrap();
        assert_eq!(Copy::open(folder.path()).unwrap().generation, 0);
    }
}
