//! The state directory: one node's at a time, and what it remembers of logins.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use crate::policy::{RememberKey, Snapshot};

/// A digest of the password hash, and what is remembered of the password.
const REMEMBERED_ENTRY: usize = 32 + 32;

fn remembered_path(state_dir: &Path) -> PathBuf {
    state_dir.join("remembered-logins")
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
}

/// Takes back what was kept, for users whose password hash is still the same.
pub(super) fn recall(snapshot: &Snapshot, state_dir: Option<&Path>) {
    let Some(bytes) = state_dir.and_then(|dir| std::fs::read(remembered_path(dir)).ok()) else {
        return;
    };
    let known: HashMap<[u8; 32], [u8; 32]> = bytes
        .chunks_exact(REMEMBERED_ENTRY)
        .filter_map(|entry| {
            let (digest, remembered) = entry.split_at(32);
            Some((digest.try_into().ok()?, remembered.try_into().ok()?))
        })
        .collect();
    for user in snapshot.directory.users() {
        if let Some(remembered) = known.get(&user.credential.digest()) {
            user.credential.recall(*remembered);
        }
    }
}

/// Two nodes in one folder would take each other's sockets and files. The lock lasts as long as the
/// process.
fn lock(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("lock");
    let file = std::fs::File::create(&path)
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    file.try_lock().map_err(|_| {
        anyhow::anyhow!("{}: another node runs in this folder; set node.state_dir", path.display())
    })?;
    std::mem::forget(file);
    Ok(())
}

pub(super) fn remember_key(state_dir: Option<&Path>) -> anyhow::Result<RememberKey> {
    let Some(dir) = state_dir else { return Ok(RememberKey::random()) };
    std::fs::create_dir_all(dir).map_err(|error| {
        anyhow::anyhow!(
            "{}: {error}; set node.state_dir to a folder this user may write",
            dir.display()
        )
    })?;
    lock(dir)?;
    let path = dir.join("credential.key");
    RememberKey::load(&path).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

/// Keeps which passwords were found right, as keyed hashes, so that a restart hashes none again.
pub(super) fn keep_remembered(state_dir: &Path, snapshot: &Snapshot) {
    let path = remembered_path(state_dir);
    let mut bytes = Vec::new();
    for user in snapshot.directory.users() {
        if let Some(remembered) = user.credential.remembered() {
            bytes.extend_from_slice(&user.credential.digest());
            bytes.extend_from_slice(&remembered);
        }
    }
    if let Err(error) = write_private(&path, &bytes) {
        tracing::warn!(path = %path.display(), %error, "remembered logins are not kept");
    }
}
