//! Access records on their way to the control plane: a bounded file, written by the log's thread, read
//! by the link, shortened as the other side acknowledges.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Mutex,
};

use culvert_api::link::{Decoder, Record, encode};

/// Bytes that may wait; further records are dropped and counted. The file has twice as many at most.
const BYTES_MAX: u64 = 256 << 20;
/// Acknowledged bytes at the file's head beyond which it is written anew.
const HEAD_MAX: u64 = 8 << 20;
/// Bytes copied at once.
const COPIED: usize = 1 << 20;

/// Records that wait, of one boot.
pub struct Spool {
    /// Which boot's.
    pub boot: u64,
    path: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    /// Where the first record that is not acknowledged begins, and where the last one ends.
    start: u64,
    end: u64,
    /// Sequence and end of each that waits.
    waiting: VecDeque<(u64, u64)>,
    last: u64,
}

fn file_name(boot: u64) -> String {
    format!("records-{boot:016x}")
}

impl Spool {
    /// A new one.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(dir: &Path, boot: u64) -> io::Result<Self> {
        let path = dir.join(file_name(boot));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let inner = Inner { file, start: 0, end: 0, waiting: VecDeque::new(), last: 0 };
        Ok(Self { boot, path, inner: Mutex::new(inner) })
    }

    /// Those that other boots left in a folder. What a killed process wrote half is cut off.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn left(dir: &Path) -> io::Result<Vec<Self>> {
        let mut left = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("records-") && name.ends_with(".new"))
            {
                // A copy that a killed process did not finish.
                std::fs::remove_file(entry.path())?;
                continue;
            }
            let boot = name.to_str().and_then(|name| name.strip_prefix("records-"));
            let Some(boot) = boot.and_then(|boot| u64::from_str_radix(boot, 16).ok()) else {
                continue;
            };
            let path = entry.path();
            let bytes = std::fs::read(&path)?;
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            let mut inner = Inner { file, start: 0, end: 0, waiting: VecDeque::new(), last: 0 };
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(record)) = decoder.take::<Record>() {
                inner.end = decoder.position() as u64;
                inner.last = record.sequence;
                inner.waiting.push_back((record.sequence, inner.end));
            }
            left.push(Self { boot, path, inner: Mutex::new(inner) });
        }
        Ok(left)
    }

    /// Adds a record, after its number was told; `false` when there is no room, or the disk takes no more.
    pub fn push(&self, user: u64, json: &[u8], told: impl FnOnce(u64)) -> bool {
        let Ok(mut inner) = self.inner.lock() else { return false };
        let sequence = inner.last + 1;
        let mut frame = Vec::with_capacity(json.len() + 32);
        encode(&Record { sequence, json: json.to_vec(), user }, &mut frame);
        if inner.end - inner.start + frame.len() as u64 > BYTES_MAX {
            return false;
        }
        told(sequence);
        let end = inner.end;
        if inner.file.write_all_at(&frame, end).is_err() {
            return false;
        }
        inner.end += frame.len() as u64;
        inner.last = sequence;
        let end = inner.end;
        inner.waiting.push_back((sequence, end));
        true
    }

    /// The next records after one, at most so many.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn after(&self, sequence: u64, count: usize) -> io::Result<Vec<Record>> {
        let Ok(inner) = self.inner.lock() else { return Ok(Vec::new()) };
        let first = inner.waiting.partition_point(|(known, _)| *known <= sequence);
        if first == inner.waiting.len() {
            return Ok(Vec::new());
        }
        let from = if first == 0 { inner.start } else { inner.waiting[first - 1].1 };
        let last = (first + count).min(inner.waiting.len()) - 1;
        let mut bytes = vec![0; usize::try_from(inner.waiting[last].1 - from).unwrap_or(0)];
        inner.file.read_exact_at(&mut bytes, from)?;
        drop(inner);
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        Ok(std::iter::from_fn(|| decoder.take::<Record>().ok().flatten()).collect())
    }

    /// Records up to one are safe elsewhere.
    pub fn acknowledge(&self, sequence: u64) {
        let Ok(mut inner) = self.inner.lock() else { return };
        while let Some(&(known, end)) = inner.waiting.front()
            && known <= sequence
        {
            inner.start = end;
            inner.waiting.pop_front();
        }
        if inner.waiting.is_empty() {
            if inner.file.set_len(0).is_ok() {
                (inner.start, inner.end) = (0, 0);
            }
        } else if inner.start > HEAD_MAX && inner.start > inner.end - inner.start {
            // All in all no more is copied than was written. Without room for the copy it waits.
            let path = self.path.with_extension("new");
            if self.shorten(&mut inner, &path).is_err() {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Writes what waits to a new file.
    fn shorten(&self, inner: &mut Inner, path: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let mut bytes = vec![0; COPIED];
        let mut at = inner.start;
        while at < inner.end {
            let part = &mut bytes[..COPIED.min(usize::try_from(inner.end - at).unwrap_or(COPIED))];
            inner.file.read_exact_at(part, at)?;
            file.write_all_at(part, at - inner.start)?;
            at += part.len() as u64;
        }
        std::fs::rename(path, &self.path)?;
        let start = inner.start;
        inner.file = file;
        (inner.start, inner.end) = (0, inner.end - start);
        inner.waiting.iter_mut().for_each(|(_, end)| *end -= start);
        Ok(())
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.inner.lock().is_ok_and(|inner| inner.waiting.is_empty())
    }

    /// The last record that is acknowledged; 0 is none.
    pub fn acknowledged(&self) -> u64 {
        let Ok(inner) = self.inner.lock() else { return 0 };
        inner.waiting.front().map_or(inner.last, |(first, _)| first - 1)
    }

    /// Deletes an empty one.
    pub fn delete(&self) {
        if self.is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(spool: &Spool, after: u64) -> Vec<u64> {
        spool.after(after, 3).unwrap().iter().map(|record| record.sequence).collect()
    }

    #[test]
    fn records_wait_until_they_are_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path(), 5).unwrap();
        assert!((0..5).all(|index| spool.push(index, b"{}", drop)));
        assert_eq!(sequences(&spool, 0), [1, 2, 3]);
        spool.acknowledge(2);
        assert_eq!((sequences(&spool, 0), sequences(&spool, 3)), (vec![3, 4, 5], vec![4, 5]));
        drop(spool);
        // Acknowledgements are not written: what was not deleted comes again, and is known there.
        let mut bytes = std::fs::read(dir.path().join(file_name(5))).unwrap();
        bytes.truncate(bytes.len() - 1);
        std::fs::write(dir.path().join(file_name(5)), bytes).unwrap();
        let left = Spool::left(dir.path()).unwrap().remove(0);
        assert_eq!((left.boot, sequences(&left, 2)), (5, vec![3, 4]));
        left.acknowledge(4);
        assert!(left.is_empty());
        left.delete();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_has_no_room_is_refused_until_there_is_some() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path(), 5).unwrap();
        let json = vec![b'x'; 1 << 20];
        let kept = (0..).take_while(|_| spool.push(1, &json, drop)).count();
        assert_eq!(kept, 255);
        assert!(spool.push(1, b"{}", drop), "a small one has room");
        let length = || std::fs::metadata(dir.path().join(file_name(5))).unwrap().len();
        assert!(length() <= BYTES_MAX);
        spool.acknowledge(20);
        assert!(spool.push(1, &json, drop));
        // Numbers go on, whatever was refused.
        assert_eq!(sequences(&spool, 254), [255, 256, 257]);
        assert!(length() <= 2 * BYTES_MAX);
    }

    #[test]
    fn a_long_file_is_shortened() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path(), 5).unwrap();
        let json = vec![b'x'; 1 << 20];
        (0..12).for_each(|_| assert!(spool.push(1, &json, drop)));
        spool.acknowledge(10);
        assert!(std::fs::metadata(dir.path().join(file_name(5))).unwrap().len() < 3 << 20);
        assert!(spool.push(1, b"{}", drop));
        assert_eq!(sequences(&spool, 10), [11, 12, 13]);
    }
}
