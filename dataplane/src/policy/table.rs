//! A fixed table of counters by key, shared by all workers without a lock.
//!
//! An entry is one word of fingerprint, turn and count, changed by compare-and-swap, so finding a key
//! and counting it are one step, and one word of time. Keys are hashed with a random key and probed
//! linearly over a short window. An entry without holders and with its time past is free. Each key that
//! takes an entry begins another turn of it, so that who held it for a key before gives nothing back.

use std::{
    hash::Hash,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Release},
    },
};

const COUNT_BITS: u32 = 20;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const TURN_BITS: u32 = 12;
const KEY_SHIFT: u32 = COUNT_BITS + TURN_BITS;
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
    /// Fingerprint (32 bits, 0 is nobody's), turn (12 bits) and count (20 bits).
    word: AtomicU64,
    /// Until when the entry is in use, on the clock of [`super::bucket::clock`]; of one with holders no
    /// earlier than its first came.
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
    /// The entry's fingerprint and turn.
    turn: u64,
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
        self.hold_hash(self.hasher.hash_one(key), max, now)
    }

    /// Counts one holder of `key`; where there is no room, the key takes the place of the one that came
    /// first, whose holders are so no more ([`Held::is_current`]); `evicted` is told if one may have.
    ///
    /// # Errors
    /// Others took every place that was made.
    pub fn hold_or_evict(
        self: &Arc<Self>,
        key: impl Hash,
        now: u64,
        evicted: impl FnOnce(),
    ) -> Result<Held, TableError> {
        let hash = self.hasher.hash_one(key);
        let mut held = self.hold_hash(hash, u32::MAX, now);
        let mut has_evicted = false;
        for _ in 0..TRIES {
            if held.as_ref().err() != Some(&TableError::Full) {
                break;
            }
            self.displace(hash, now, |_| true);
            has_evicted = true;
            held = self.hold_hash(hash, u32::MAX, now);
        }
        if has_evicted {
            evicted();
        }
        held
    }

    fn hold_hash(self: &Arc<Self>, hash: u64, max: u32, now: u64) -> Result<Held, TableError> {
        for _ in 0..TRIES {
            let entry = self.find_or_claim(hash, now).ok_or(TableError::Full)?;
            let Entry { word, until } = &self.entries[entry];
            let mut current = word.load(Acquire);
            while current >> KEY_SHIFT == fingerprint(hash) {
                let count = current & COUNT_MASK;
                if count >= u64::from(max).min(COUNT_MASK - 1) {
                    return Err(TableError::Limit);
                }
                if count == 0 {
                    until.fetch_max(now, AcqRel);
                }
                match word.compare_exchange_weak(current, current + 1, AcqRel, Acquire) {
                    Ok(_) => {
                        let turn = current >> COUNT_BITS;
                        return Ok(Held { table: self.clone(), entry: entry as u32, turn });
                    }
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
            .filter(|word| word >> KEY_SHIFT == fingerprint(hash))
            .map(|word| word & COUNT_MASK)
            .sum()
    }

    /// Counts an event of `key` that costs `price` of a budget of `budget` nanoseconds; `false` when
    /// the budget is spent. A key that finds no room takes the place of the one that is free soonest.
    pub fn spend(&self, key: impl Hash, price: u64, budget: u64, now: u64) -> bool {
        let hash = self.hasher.hash_one(key);
        let entry = self
            .find_or_claim(hash, now)
            .or_else(|| self.displace(hash, now, |word| word & COUNT_MASK == 0));
        let Some(entry) = entry else { return true };
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
        self.window(hash)
            .find(|&entry| self.entries[entry].word.load(Acquire) >> KEY_SHIFT == fingerprint(hash))
    }

    fn find_or_claim(&self, hash: u64, now: u64) -> Option<usize> {
        for _ in 0..TRIES {
            if let Some(entry) = self.find(hash) {
                return Some(entry);
            }
            let free = self.window(hash).find_map(|entry| {
                let word = self.entries[entry].word.load(Acquire);
                let idle = word & COUNT_MASK == 0
                    && (word >> KEY_SHIFT == 0 || self.entries[entry].until.load(Acquire) <= now);
                idle.then_some((entry, word))
            });
            let (entry, word) = free?;
            if self.claim(entry, word, hash, now) {
                return Some(entry);
            }
        }
        None
    }

    /// Takes an entry over, unless another thread took one for the same key meanwhile.
    fn claim(&self, entry: usize, word: u64, hash: u64, now: u64) -> bool {
        let turn = (((word >> COUNT_BITS) + 1) & ((1 << TURN_BITS) - 1)) << COUNT_BITS;
        let claimed = fingerprint(hash) << KEY_SHIFT | turn;
        if self.entries[entry].word.compare_exchange(word, claimed, AcqRel, Acquire).is_err() {
            return false;
        }
        self.entries[entry].until.store(now, Release);
        let twice = self.window(hash).any(|other| {
            other != entry
                && self.entries[other].word.load(Acquire) >> KEY_SHIFT == fingerprint(hash)
        });
        if twice {
            // Someone may hold ours already; then both stay until they are free, and for that moment
            // the key has two counts.
            return self.entries[entry]
                .word
                .compare_exchange(claimed, turn, AcqRel, Acquire)
                .is_err();
        }
        true
    }

    /// Takes the entry whose time is the earliest, of those that may be taken, unless the key has one.
    fn displace(&self, hash: u64, now: u64, may_be_taken: impl Fn(u64) -> bool) -> Option<usize> {
        let taken = self.window(hash).filter_map(|entry| {
            let word = self.entries[entry].word.load(Acquire);
            may_be_taken(word).then(|| (self.entries[entry].until.load(Acquire), entry, word))
        });
        let (_, entry, word) = taken.min()?;
        // It may have come meanwhile; whoever comes from here on changes the word.
        if self.find(hash).is_some() {
            return None;
        }
        self.claim(entry, word, hash, now).then_some(entry)
    }
}

impl Held {
    fn word(&self) -> &AtomicU64 {
        &self.table.entries[self.entry as usize].word
    }

    /// Whether no other key has taken the place.
    pub fn is_current(&self) -> bool {
        self.word().load(Acquire) >> COUNT_BITS == self.turn
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let is_ours = |word: u64| word >> COUNT_BITS == self.turn && word & COUNT_MASK > 0;
        let less = |word: u64| is_ours(word).then(|| word - 1);
        let _ = self.word().fetch_update(AcqRel, Acquire, less);
    }
}

fn fingerprint(hash: u64) -> u64 {
    (hash & 0xffff_ffff).max(1)
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
    fn who_came_first_gives_way() {
        let table = Arc::new(Table::exact(2));
        let hold = |key: &str, now| {
            let mut has_evicted = false;
            (table.hold_or_evict(key, now, || has_evicted = true).unwrap(), has_evicted)
        };
        let (a, b) = (hold("a", 1).0, hold("b", 2).0);
        // One that goes and comes back has come later.
        drop(a);
        let a = hold("a", 3).0;
        let (c, has_evicted) = hold("c", 4);
        assert!(has_evicted && a.is_current() && !b.is_current() && c.is_current());
        // What was taken away is not given back.
        drop(b);
        assert_eq!((table.count("a"), table.count("b"), table.count("c")), (1, 0, 1));
        let (again, has_evicted) = hold("b", 5);
        assert!(has_evicted && !a.is_current() && c.is_current());
        drop(a);
        let (twice, has_evicted) = hold("b", 6);
        assert!(!has_evicted && again.is_current() && twice.is_current());
        assert_eq!((table.count("a"), table.count("b"), table.count("c")), (0, 2, 1));
    }

    /// However many come at once for one key, they take one place, and none takes it from another.
    #[test]
    fn many_that_come_for_one_key_take_one_place() {
        for round in 1..2000 {
            let table = Arc::new(Table::exact(2));
            let oldest = table.hold_or_evict("oldest", 1, || ()).unwrap();
            let newer = table.hold_or_evict("newer", 2, || ()).unwrap();
            let held: Vec<Held> = std::thread::scope(|scope| {
                let hold = || table.hold_or_evict("new", 3, || ()).unwrap();
                let threads = [(); 3].map(|()| scope.spawn(hold));
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(!oldest.is_current() && newer.is_current(), "round {round}");
            assert!(held.iter().all(Held::is_current), "round {round}");
            assert_eq!(table.count("new"), 3);
        }
    }

    #[test]
    fn places_that_are_taken_away_are_counted_right_over_threads() {
        let table = Arc::new(Table::exact(2));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let table = table.clone();
                scope.spawn(move || {
                    let mut held = std::collections::VecDeque::new();
                    for now in 1..50_000 {
                        held.extend(table.hold_or_evict((thread + now) % 5, now, || ()).ok());
                        if held.len() > 3 {
                            held.pop_front();
                        }
                    }
                });
            }
        });
        let counts: Vec<u64> = (0..5).map(|key| table.count(key)).collect();
        assert_eq!(counts, [0; 5]);
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
