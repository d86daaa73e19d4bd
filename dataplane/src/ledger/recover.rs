//! What an earlier process that was killed had counted.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    Bytes,
    map::{HEAD, MAGIC, State, TOTALS, region_bytes},
};

/// Bytes of a slot and of a total in a file.
const SLOT: usize = 64;
const TOTAL: usize = 32;

/// The sums of a boot that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Which.
    pub boot: u64,
    /// Bytes by user.
    pub users: HashMap<u64, Bytes>,
    /// What is in no record: that of sessions which were cut by the end, or whose record was not written.
    pub sessions: Vec<Unrecorded>,
    /// Bytes that may have been moved beyond the sums.
    pub uncertain: u64,
    /// Where they come from.
    pub path: PathBuf,
}

/// Bytes that are in no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unrecorded {
    /// Whose.
    pub user: u64,
    /// How many.
    pub bytes: Bytes,
    /// The number under which the record may have been written after all; 0 is none.
    pub sequence: u64,
    /// Whether they were of a session that ran, not of one that had ended.
    pub ran: bool,
    /// How many more may have been moved.
    pub uncertain: u64,
}

/// Reads the ledgers that other boots left in a folder. Nothing is changed, so it can be done again;
/// a file is deleted once its sums are safe elsewhere.
///
/// # Errors
/// The folder cannot be read. A file that is no ledger is left alone, with a warning.
pub fn recover(dir: &Path) -> io::Result<Vec<Recovered>> {
    let mut recovered = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("ledger-") {
            continue;
        }
        match read(&entry.path()) {
            Ok(sums) => recovered.push(sums),
            Err(error) => {
                tracing::warn!(path = %entry.path().display(), %error, "not a ledger; left alone");
            }
        }
    }
    Ok(recovered)
}

fn read(path: &Path) -> io::Result<Recovered> {
    let bytes = fs::read(path)?;
    let word = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        word.map(u64::from_le_bytes).ok_or_else(|| io::Error::other("it is cut short"))
    };
    if word(0)? != MAGIC {
        // A process that was killed while it made the file had counted nothing.
        return Err(io::Error::other("it is of another version, or was never begun"));
    }
    let size =
        |at: usize| word(at).and_then(|word| usize::try_from(word).map_err(io::Error::other));
    let (boot, workers, slots) = (word(8)?, size(16)?, size(24)?);
    let fits = workers
        .checked_mul(region_bytes(slots.min(1 << 32)))
        .and_then(|length| length.checked_add(HEAD))
        .is_some_and(|length| length == bytes.len());
    if !fits {
        return Err(io::Error::other("it has another length than it says"));
    }
    let mut found = Recovered {
        boot,
        users: HashMap::new(),
        sessions: Vec::new(),
        uncertain: 0,
        path: path.to_owned(),
    };
    let pair = |at: usize| Ok::<Bytes, io::Error>([word(at)?, word(at + 8)?]);
    for worker in 0..workers {
        let start = HEAD + worker * region_bytes(slots);
        let first_total = start + slots * SLOT;
        let mut totals = Vec::new();
        for index in 0..TOTALS {
            let at = first_total + index * TOTAL;
            match word(at)? {
                0 => break,
                user => totals.push((user, pair(at + 8)?)),
            }
        }
        let of = |index: u32| usize::try_from(index).unwrap_or(usize::MAX);
        let slots = || (0..slots).map(|index| start + index * SLOT);
        // A total may have been written, in whole or in part: write it again, before more is added.
        for at in slots() {
            if let State::Closing(total) = State::read(word(at + 48)?)
                && let Some((_, bytes)) = totals.get_mut(of(total))
            {
                *bytes = sum(pair(at + 32)?, pair(at + 16)?);
            }
        }
        for at in slots() {
            let (state, sequence) = (State::read(word(at + 48)?), word(at + 56)?);
            let (total, ran) = match state {
                State::Free => continue,
                State::Live(total) | State::Resumed(total) => (total, true),
                State::Closing(total) | State::Owed(total) => (total, false),
            };
            let Some((user, bytes)) = totals.get_mut(of(total)) else { continue };
            let done = pair(at + 16)?;
            let mut uncertain = 0;
            if ran {
                *bytes = sum(*bytes, done);
                uncertain = pair(at)?.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n));
                found.uncertain = found.uncertain.wrapping_add(uncertain);
            }
            if matches!(state, State::Resumed(_)) && done == [0; 2] && uncertain == 0 {
                continue;
            }
            found.sessions.push(Unrecorded { user: *user, bytes: done, sequence, ran, uncertain });
        }
        for (user, bytes) in totals {
            let known = found.users.entry(user).or_default();
            *known = sum(*known, bytes);
        }
    }
    Ok(found)
}

fn sum(a: Bytes, b: Bytes) -> Bytes {
    [a[0].wrapping_add(b[0]), a[1].wrapping_add(b[1])]
}
