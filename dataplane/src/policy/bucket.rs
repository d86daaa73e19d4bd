//! A token bucket that many threads take from without a lock.
//!
//! It is a virtual schedule (the GCRA of ITU-T I.371): one atomic holds the time at which everything
//! granted so far will have been paid for. Whoever asks is given a place in the schedule at once and
//! told how long to wait for it, so grants are first come, first served over all cores, and a flow
//! with one request at a time gets its equal share.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Nanoseconds since the process first asked; the buckets' clock.
pub fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    // Starts well after zero, so that a burst can lie before it. 580 years fit.
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + EPOCH
}

const EPOCH: u64 = 3_600_000_000_000;
const SECOND: u64 = 1_000_000_000;
/// How long the queue may become before only the smallest grants are made.
const QUEUE: u64 = SECOND / 2;
/// The smallest grant.
pub const UNITS_MIN: u64 = 1_000;

/// A rate and a burst, in units (bytes, sessions) a second. A rate of 0 limits nothing.
#[derive(Debug, Default)]
pub struct Bucket {
    rate: AtomicU64,
    burst: AtomicU64,
    /// When all that was granted will have been paid for.
    paid: AtomicU64,
}

/// Leave to move some units, after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Units; never 0 unless none were wanted.
    pub units: u64,
    /// How long to wait first.
    pub pause: Duration,
}

impl Bucket {
    /// A bucket with a rate and a burst.
    pub fn new(rate: u64, burst: u64) -> Self {
        let bucket = Self::default();
        bucket.set(rate, burst);
        bucket
    }

    /// Changes rate and burst; holds from the next request on. What was granted at another rate is
    /// forgotten.
    pub fn set(&self, rate: u64, burst: u64) {
        self.burst.store(burst, Relaxed);
        if self.rate.swap(rate, Relaxed) != rate {
            self.paid.store(0, Relaxed);
        }
    }

    /// Whether nothing is limited.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.rate.load(Relaxed) == 0
    }

    /// Asks for up to `want` units at `now`. Grants a fiftieth of a second's worth at most and less
    /// the longer the queue is (but never less than [`UNITS_MIN`]), so that flows take turns and none
    /// waits long.
    pub fn reserve(&self, want: u64, now: u64) -> Grant {
        let rate = self.rate.load(Relaxed);
        if rate == 0 {
            return Grant { units: want, pause: Duration::ZERO };
        }
        let earliest = now - cost(self.burst.load(Relaxed), rate).min(EPOCH / 2);
        let mut grant = Grant { units: 0, pause: Duration::ZERO };
        let _ = self.paid.fetch_update(Relaxed, Relaxed, |paid| {
            let start = paid.max(earliest);
            let queue = start.saturating_sub(now);
            let room = units(QUEUE.saturating_sub(queue) / 16, rate);
            grant.units = want.min(room.min(rate / 50).max(UNITS_MIN));
            let after = start + cost(grant.units, rate);
            // What is granted may move when all of it is paid for, less the burst.
            grant.pause = Duration::from_nanos(after.saturating_sub(now));
            Some(after)
        });
        grant
    }

    /// The rate, to notice that it changed while waiting.
    pub fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// Takes one unit if it is there right now.
    pub fn try_take(&self, now: u64) -> bool {
        let rate = self.rate.load(Relaxed);
        if rate == 0 {
            return true;
        }
        let earliest = now - cost(self.burst.load(Relaxed), rate).min(EPOCH / 2);
        let take = |paid: u64| {
            let after = paid.max(earliest) + cost(1, rate);
            (after <= now).then_some(after)
        };
        self.paid.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// Gives back units that were granted and not used.
    pub fn give_back(&self, units: u64) {
        let rate = self.rate.load(Relaxed);
        if rate > 0 && units > 0 {
            let price = cost(units, rate);
            let _ =
                self.paid.fetch_update(Relaxed, Relaxed, |paid| Some(paid.saturating_sub(price)));
        }
    }
}

/// What units cost in nanoseconds.
fn cost(units: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(units) * u128::from(SECOND) / u128::from(rate)).unwrap_or(u64::MAX / 4)
}

/// How many units a time is worth.
fn units(nanoseconds: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(nanoseconds) * u128::from(rate) / u128::from(SECOND))
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs flows against a bucket in simulated time; returns what each moved by `end`.
    fn simulate(bucket: &Bucket, flows: usize, want: u64, end: u64) -> Vec<u64> {
        let mut moved = vec![0; flows];
        let mut ready = vec![EPOCH; flows];
        let mut held = vec![0; flows];
        loop {
            let flow = (0..flows).min_by_key(|&flow| ready[flow]).unwrap();
            let now = ready[flow];
            if now >= EPOCH + end {
                return moved;
            }
            moved[flow] += held[flow];
            let grant = bucket.reserve(want, now);
            held[flow] = grant.units;
            // The scheduler is a little late, as a real one is.
            ready[flow] = now + grant.pause.as_nanos() as u64 + 50_000;
        }
    }

    #[test]
    fn ten_seconds_at_ten_megabit_are_exact_and_fair() {
        for flows in [1, 2, 10, 100] {
            let bucket = Bucket::new(1_250_000, 125_000);
            let moved = simulate(&bucket, flows, 256 * 1024, 10 * SECOND);
            let total: u64 = moved.iter().sum();
            assert!((12_125_000..=12_900_000).contains(&total), "{flows} flows: {total}");
            let squares: f64 = moved.iter().map(|&m| (m as f64).powi(2)).sum();
            let jain = (total as f64).powi(2) / (flows as f64 * squares);
            assert!(jain >= 0.95, "{flows} flows: {jain}");
        }
    }

    #[test]
    fn the_first_second_stays_within_the_burst() {
        let bucket = Bucket::new(1_250_000, 125_000);
        let first: u64 = simulate(&bucket, 4, 65_536, SECOND).iter().sum();
        assert!(first <= 1_250_000 + 125_000, "{first}");
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let bucket = Bucket::new(1_000_000, 0);
        let now = EPOCH;
        let one = bucket.reserve(10_000, now);
        bucket.give_back(one.units);
        assert_eq!(bucket.reserve(10_000, now), one);
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let bucket = Bucket::new(1_000, 100);
        simulate(&bucket, 50, 65_536, SECOND);
        bucket.set(10_000_000, 1_000_000);
        let total: u64 = simulate(&bucket, 1, 65_536, 2 * SECOND).iter().sum();
        assert!(total > 10_000_000, "{total}");
    }

    #[test]
    fn events_are_counted() {
        let bucket = Bucket::new(5, 5);
        let taken = |now| (0..100).filter(|_| bucket.try_take(now)).count();
        assert_eq!(taken(EPOCH), 5);
        assert_eq!(taken(EPOCH + SECOND), 5);
        assert_eq!(taken(EPOCH + 10 * SECOND), 5);
        assert_eq!(taken(EPOCH + 10 * SECOND + SECOND / 5), 1);
    }
}
