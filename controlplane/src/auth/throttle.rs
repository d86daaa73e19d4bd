//! Failed logins by address and by user: counted before a password is looked at, so that parallel
//! guesses count as much as others.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Failures of one address, or of one user, within [`SPAN`].
const FAILURES: (u32, u32) = (10, 30);
/// How long a failure counts.
const SPAN: Duration = Duration::from_secs(300);
/// Keys remembered at once; the oldest go first.
const KEYS_MAX: usize = 50_000;

/// Users are known by a hash of their names, which may be as long as a request.
#[derive(Hash, PartialEq, Eq, Clone, Copy)]
enum Key {
    Address(IpAddr),
    User(u64),
    /// An address from which the user has logged in.
    Known(IpAddr, u64),
}

/// IPv6 clients have networks of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => std::net::Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// Remembers failed logins.
#[derive(Default)]
pub struct LoginThrottle {
    failures: Mutex<HashMap<Key, (u32, Instant)>>,
    names: RandomState,
}

impl LoginThrottle {
    /// Counts a try; `false` when too many failed: from the address, or of the user from addresses that are
    /// not the user's own. So nobody can lock out a user who has logged in here before, unless guesses come from
    /// so many networks that the oldest keys go.
    pub fn begin(&self, address: IpAddr, user: &str) -> bool {
        let Ok(mut failures) = self.failures.lock() else { return false };
        let now = Instant::now();
        if failures.len() >= KEYS_MAX {
            failures.retain(|_, (_, since)| now.duration_since(*since) < SPAN);
        }
        if failures.len() >= KEYS_MAX {
            // The oldest half makes room.
            let mut times: Vec<Instant> = failures.values().map(|(_, since)| *since).collect();
            times.sort_unstable();
            let middle = times[times.len() / 2];
            failures.retain(|_, (_, since)| *since > middle);
        }
        let (address, user) = (network(address), self.names.hash_one(user));
        let is_known = failures.contains_key(&Key::Known(address, user));
        let of_user = (!is_known).then_some((Key::User(user), FAILURES.1));
        for (key, max) in std::iter::once((Key::Address(address), FAILURES.0)).chain(of_user) {
            let (count, since) = failures.entry(key).or_insert((0, now));
            if now.duration_since(*since) >= SPAN {
                (*count, *since) = (0, now);
            }
            *count += 1;
            // A refused address costs no user anything.
            if *count > max {
                return false;
            }
        }
        true
    }

    /// A try was right.
    pub fn forgive(&self, address: IpAddr, user: &str) {
        let Ok(mut failures) = self.failures.lock() else { return };
        let (address, user) = (network(address), self.names.hash_one(user));
        failures.remove(&Key::Address(address));
        failures.remove(&Key::User(user));
        failures.insert(Key::Known(address, user), (0, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_end_and_a_right_one_begins_anew() {
        let throttle = LoginThrottle::default();
        let address = IpAddr::from([10, 0, 0, 1]);
        let allowed = (0..20).filter(|_| throttle.begin(address, "ann")).count();
        assert_eq!(allowed, 10);
        throttle.forgive(address, "ann");
        assert!(throttle.begin(address, "ann"));
        let of_one_user =
            (0..60u8).filter(|last| throttle.begin(IpAddr::from([10, 1, 0, *last]), "bob")).count();
        assert_eq!(of_one_user, 30);
        // Whoever guesses elsewhere does not lock out who was here before.
        for last in 0..60 {
            throttle.begin(IpAddr::from([10, 2, 0, last]), "ann");
        }
        assert!(throttle.begin(address, "ann") && !throttle.begin([10, 3, 0, 1].into(), "ann"));
    }
}
