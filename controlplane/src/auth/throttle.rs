//! Failed logins by address and by user: counted before a password is looked at, so that parallel
//! guesses count as much as others.

use std::{
    collections::HashMap,
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

#[derive(Hash, PartialEq, Eq, Clone)]
enum Key {
    Address(IpAddr),
    User(String),
}

impl Key {
    /// IPv6 clients have networks of 64 bits.
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V6(address) => {
                let network = address.to_bits() >> 64 << 64;
                Self::Address(std::net::Ipv6Addr::from_bits(network).into())
            }
            address => Self::Address(address),
        }
    }
}

/// Remembers failed logins.
#[derive(Default)]
pub struct LoginThrottle {
    failures: Mutex<HashMap<Key, (u32, Instant)>>,
}

impl LoginThrottle {
    /// Counts a try; `false` when too many failed.
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
        let keys = [(Key::of(address), FAILURES.0), (Key::User(user.to_owned()), FAILURES.1)];
        for (key, max) in keys {
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
        failures.remove(&Key::of(address));
        failures.remove(&Key::User(user.to_owned()));
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
    }
}
