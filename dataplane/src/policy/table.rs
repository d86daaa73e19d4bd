//! A fixed table of counters by key, shared by all workers without a lock.
//!
//! An entry is one word of fingerprint and count, changed by compare-and-swap, so finding a key and
//! counting it are one step, and one word of time. Keys are hashed with a random key and probed
//! linearly over a short window. An entry without holders and with its time past is free.

use std::{
    hash::Hash,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed},
    },
};

const COUNT_BITS: u32 = 24;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
/// Entries a key may be found in.
const WINDOW: usize = 32;
/// Largest table in which every look-up sees all entries.
const EXACT_MAX: usize = 64;
/// Tries before contention on one entry is taken for a full table.
const TRIES: usize = 64;

/// Counters by key.
#[derive(Debug)]
pub struct Table {
    hasher: ahash::RandomState,
    entries: Box<[Entry]>,
}

#[derive(Debug, Default)]
struct Entry {
    /// Fingerprint (40 bits, never 0) and count (24 bits).
    word: AtomicU64,
    /// Until when the entry is in use, on the clock of [`super::bucket::clock`].
    until: AtomicU64,
}

/// Why a key was not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableError {
    /// It has as many holders as it may.
    Limit,
    /// There is no entry for it.
    Full,
}

/// One unit of a key's count, given back when dropped.
#[derive(Debug)]
pub struct Held {
    table: Arc<Table>,
    entry: u32,
}

impl Table {
    /// A table for about `keys` keys at a time.
    pub fn new(keys: usize) -> Self {
        Self::with_entries((keys.max(EXACT_MAX) * 2).next_power_of_two())
    }

    /// A table for at most exactly `keys` keys at a time; at most 64, as each look-up sees all.
    pub fn exact(keys: usize) -> Self {
        Self::with_entries(keys.clamp(1, EXACT_MAX))
    }

    fn with_entries(entries: usize) -> Self {
        let entries = (0..entries).map(|_| Entry::default()).collect();
        Self { hasher: ahash::RandomState::new(), entries }
    }

    /// Counts one holder of `key`, of at most `max`.
    ///
    /// # Errors
    /// The key has `max` holders, or the table has no room.
    pub fn hold(self: &Arc<Self>, key: impl Hash, max: u32, now: u64) -> Result<Held, TableError> {
        let hash = self.hasher.hash_one(key);
        for _ in 0..TRIES {
            let entry = self.find_or_claim(hash, now).ok_or(TableError::Full)?;
            let word = &self.entries[entry].word;
            let mut current = word.load(Acquire);
            while current >> COUNT_BITS == fingerprint(hash) {
                if current & COUNT_MASK >= u64::from(max).min(COUNT_MASK - 1) {
                    return Err(TableError::Limit);
                }
                match word.compare_exchange_weak(current, current + 1, AcqRel, Acquire) {
                    Ok(_) => return Ok(Held { table: self.clone(), entry: entry as u32 }),
                    Err(seen) => current = seen,
                }
            }
        }
        Err(TableError::Full)
    }

    /// How many holders a key has.
    pub fn count(&self, key: impl Hash) -> u64 {
        let hash = self.hasher.hash_one(key);
        self.window(hash)
            .map(|entry| self.entries[entry].word.load(Acquire))
            .filter(|word| word >> COUNT_BITS == fingerprint(hash))
            .map(|word| word & COUNT_MASK)
            .sum()
    }

    /// Counts an event of `key` that costs `price` of a budget of `budget` nanoseconds; `false` when
    /// the budget is spent. A key that finds no room takes the place of the one that is free soonest.
    pub fn spend(&self, key: impl Hash, price: u64, budget: u64, now: u64) -> bool {
        let hash = self.hasher.hash_one(key);
        let Some(entry) = self.find_or_claim(hash, now).or_else(|| self.displace(hash)) else {
            return true;
        };
        let spend = |until: u64| {
            let after = until.max(now) + price;
            (after <= now + budget).then_some(after)
        };
        self.entries[entry].until.fetch_update(AcqRel, Acquire, spend).is_ok()
    }

    /// Takes an event back.
    pub fn refund(&self, key: impl Hash, price: u64) {
        if let Some(entry) = self.find(self.hasher.hash_one(key)) {
            let refund = |until: u64| Some(until.saturating_sub(price));
            let _ = self.entries[entry].until.fetch_update(AcqRel, Acquire, refund);
        }
    }

    fn window(&self, hash: u64) -> impl Iterator<Item = usize> {
        let len = self.entries.len();
        // The fingerprint takes the low bits; the place is told by the others.
        let start = (hash >> 40) as usize;
        let span = if len <= EXACT_MAX { len } else { WINDOW };
        (0..span).map(move |i| (start + i) % len)
    }

    fn find(&self, hash: u64) -> Option<usize> {
        self.window(hash).find(|&entry| {
            self.entries[entry].word.load(Acquire) >> COUNT_BITS == fingerprint(hash)
        })
    }

    fn find_or_claim(&self, hash: u64, now: u64) -> Option<usize> {
        for _ in 0..TRIES {
            if let Some(entry) = self.find(hash) {
                return Some(entry);
            }
            let free = self.window(hash).find_map(|entry| {
                let word = self.entries[entry].word.load(Acquire);
                let idle = word & COUNT_MASK == 0
                    && (word == 0 || self.entries[entry].until.load(Acquire) <= now);
                idle.then_some((entry, word))
            });
            let (entry, word) = free?;
            if self.claim(entry, word, hash) {
                return Some(entry);
            }
        }
        None
    }

    /// Takes an entry over, unless another thread took one for the same key meanwhile.
    fn claim(&self, entry: usize, word: u64, hash: u64) -> bool {
        let claimed = fingerprint(hash) << COUNT_BITS;
        if self.entries[entry].word.compare_exchange(word, claimed, AcqRel, Acquire).is_err() {
            return false;
        }
        self.entries[entry].until.store(0, Relaxed);
        let twice = self.window(hash).any(|other| {
            other != entry
                && self.entries[other].word.load(Acquire) >> COUNT_BITS == fingerprint(hash)
        });
        if twice {
            // Someone may hold ours already; then both stay until they are free, and for that moment
            // the key has two counts.
            return self.entries[entry].word.compare_exchange(claimed, 0, AcqRel, Acquire).is_err();
        }
        true
    }

    fn displace(&self, hash: u64) -> Option<usize> {
        let idle = self.window(hash).filter_map(|entry| {
            let word = self.entries[entry].word.load(Acquire);
            (word & COUNT_MASK == 0).then(|| (self.entries[entry].until.load(Acquire), entry, word))
        });
        let (_, entry, word) = idle.min()?;
        self.claim(entry, word, hash).then_some(entry)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.table.entries[self.entry as usize].word.fetch_sub(1, AcqRel);
    }
}

fn fingerprint(hash: u64) -> u64 {
    (hash & 0xff_ffff_ffff).max(1)
}

/// A client address as limits count it: IPv6 by its /64, which is what one customer has.
pub fn client_key(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => (u128::from(ip) & !u128::from(u64::MAX)).to_be_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_over_threads() {
        let table = Arc::new(Table::new(1000));
        let held: usize = std::thread::scope(|scope| {
            let hold = |_| {
                let table = table.clone();
                scope.spawn(move || {
                    let held: Vec<_> =
                        (0..400).filter_map(|_| table.hold(7, 500, 1).ok()).collect();
                    let count = held.len();
                    std::mem::forget(held);
                    count
                })
            };
            let threads: Vec<_> = (0..4).map(hold).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(held, 500);
        assert_eq!(table.count(7), 500);
    }

    #[test]
    fn entries_are_given_back() {
        let table = Arc::new(Table::exact(2));
        let a = table.hold("a", 10, 1).unwrap();
        let again = table.hold("a", 10, 1).unwrap();
        let b = table.hold("b", 10, 1).unwrap();
        assert_eq!(table.hold("c", 10, 1).unwrap_err(), TableError::Full);
        drop((a, again));
        let c = table.hold("c", 10, 1).unwrap();
        assert_eq!(table.hold("a", 10, 1).unwrap_err(), TableError::Full);
        drop((b, c));
        assert!(table.hold("a", 1, 1).is_ok());
    }

    #[test]
    fn budgets_are_spent_and_come_back() {
        let table = Table::new(100);
        let spent = |now| (0..100).filter(|_| table.spend("x", 12, 120, now)).count();
        assert_eq!(spent(1_000), 10);
        table.refund("x", 12);
        assert_eq!(spent(1_000), 1);
        assert_eq!(spent(1_000 + 24), 2);
    }

    #[test]
    fn many_keys_do_not_grow_it() {
        let table = Table::new(1_000);
        for key in 0..200_000 {
            assert!(table.spend(key, 1, 10, 5));
        }
        assert_eq!(table.entries.len(), 2048);
    }

    #[test]
    fn an_ipv6_client_is_its_network() {
        let key = |text: &str| client_key(text.parse().unwrap());
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_ne!(key("10.0.0.1"), key("10.0.0.2"));
    }
}
