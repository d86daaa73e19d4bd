//! Logins that are not remembered: a bounded pool of threads that hash, and throttles on failures.

use std::{
    net::IpAddr,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering::Relaxed},
    thread,
};

use crossbeam::channel::{Sender, TrySendError, bounded};
use culvert_api::Throttle;
use culvert_proto::Secret;

use super::{Credential, RememberKey, Table, User, client_key, credential};

/// Logins that may wait for the pool; one more is refused (and counted as `busy`).
pub(super) const LOGINS_WAITING_MAX: usize = 1024;
/// Addresses, and users, whose failures are remembered at once.
const THROTTLED_MAX: usize = 50_000;

/// Where the answer to a login goes: called once, from a thread of the pool.
pub type LoginTicket = Box<dyn FnOnce(bool) + Send>;

/// Whose password is offered.
pub enum Whose {
    /// A user's.
    User(Arc<Credential>),
    /// Nobody's, under a name that is not known: it is checked against a user's all the same, so that it
    /// takes as long, and is wrong.
    Nobody(Option<Arc<Credential>>),
}

struct Job {
    whose: Whose,
    password: Secret,
    ticket: LoginTicket,
}

/// Threads that verify passwords beside the workers.
#[derive(Clone)]
pub struct LoginPool {
    queue: Sender<Job>,
    key: Arc<RememberKey>,
}

/// Why a login was not even looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginError {
    /// Too many logins wait.
    Busy,
    /// Too many failed from this address, or of this user.
    Throttled,
}

impl LoginPool {
    /// Starts the pool's threads, at a lower priority than the workers.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn start(threads: usize, key: RememberKey) -> std::io::Result<Self> {
        let (queue, jobs) = bounded::<Job>(LOGINS_WAITING_MAX);
        let key = Arc::new(key);
        for i in 0..threads.max(1) {
            let (jobs, key) = (jobs.clone(), key.clone());
            thread::Builder::new().name(format!("login-{i}")).spawn(move || {
                culvert_rt::lower_priority();
                for job in jobs {
                    job.run(&key);
                }
            })?;
        }
        Ok(Self { queue, key })
    }

    /// Whether a password was found right before, for the worker.
    pub fn remembers(&self, credential: &Credential, password: &Secret) -> bool {
        credential.remembers(&self.key, password)
    }

    /// Tells one login from another: by user, credential and password, under the pool's key.
    pub fn login_key(&self, name: &[u8], user: Option<&User>, password: &Secret) -> [u8; 32] {
        self.key.login(name, user.map_or("", |user| user.credential.hash()), password)
    }

    /// Asks for a password to be verified.
    ///
    /// # Errors
    /// The queue is full; the ticket is dropped.
    pub fn verify(
        &self,
        whose: Whose,
        password: Secret,
        ticket: LoginTicket,
    ) -> Result<(), LoginError> {
        match self.queue.try_send(Job { whose, password, ticket }) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(LoginError::Busy),
        }
    }
}

impl Job {
    fn run(self, key: &RememberKey) {
        // A guess may have waited behind the right one of the same user.
        let right = match &self.whose {
            Whose::User(credential) if credential.remembers(key, &self.password) => true,
            Whose::User(credential) => {
                let right = credential::verify(credential.hash(), &self.password);
                if right {
                    credential.remember(key, &self.password);
                }
                right
            }
            Whose::Nobody(alike) => {
                let hash = alike.as_ref().map_or(credential::dummy_hash(), |alike| alike.hash());
                credential::verify(hash, &self.password);
                false
            }
        };
        (self.ticket)(right);
    }
}

/// Failed logins by address and by user, shared by all workers.
#[derive(Debug)]
pub struct Throttles {
    addresses: Table,
    users: Table,
    /// Whether it was said that logins are throttled.
    seen: AtomicBool,
}

impl Default for Throttles {
    fn default() -> Self {
        Self::new()
    }
}

impl Throttles {
    /// Nothing has failed.
    pub fn new() -> Self {
        Self {
            addresses: Table::new(THROTTLED_MAX),
            users: Table::new(THROTTLED_MAX),
            seen: AtomicBool::new(false),
        }
    }

    /// Counts a try before it is checked, so that parallel guesses count as much as others.
    ///
    /// # Errors
    /// Too many failed.
    pub fn begin(
        &self,
        limits: Limits,
        client: IpAddr,
        user: &[u8],
        now: u64,
    ) -> Result<(), LoginError> {
        let address = client_key(client);
        if !spend(&self.addresses, limits.address, address, now) {
            self.warn();
            return Err(LoginError::Throttled);
        }
        if !spend(&self.users, limits.user, user, now) {
            refund(&self.addresses, limits.address, address);
            self.warn();
            return Err(LoginError::Throttled);
        }
        Ok(())
    }

    fn warn(&self) {
        if !self.seen.swap(true, Relaxed) {
            tracing::warn!(
                "logins are refused unchecked after too many failures (auth.failures_per_address, \
                 auth.failures_per_user); see culvert_auth_total{{result=\"throttled\"}}"
            );
        }
    }

    /// Takes a try back: it succeeded, or was not checked.
    pub fn forgive(&self, limits: Limits, client: IpAddr, user: &[u8]) {
        refund(&self.addresses, limits.address, client_key(client));
        refund(&self.users, limits.user, user);
    }
}

/// Failures allowed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From one address.
    pub address: Throttle,
    /// Of one user.
    pub user: Throttle,
}

fn price(throttle: Throttle) -> (u64, u64) {
    let budget = throttle.span.as_nanos() as u64;
    (budget / u64::from(throttle.events.max(1)), budget)
}

fn spend(table: &Table, throttle: Throttle, key: impl std::hash::Hash, now: u64) -> bool {
    let (price, budget) = price(throttle);
    throttle.events == 0 || table.spend(key, price, budget, now)
}

fn refund(table: &Table, throttle: Throttle, key: impl std::hash::Hash) {
    if throttle.events > 0 {
        table.refund(key, price(throttle).0);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[test]
    fn a_login_is_verified_and_then_remembered() {
        let pool = LoginPool::start(1, RememberKey::random()).unwrap();
        let credential = Arc::new(Credential::new(&bcrypt::hash("p", 4).unwrap()).unwrap());
        let ask = |whose: Whose, password: &[u8]| {
            let (sender, receiver) = mpsc::channel();
            let ticket = Box::new(move |right| sender.send(right).unwrap());
            pool.verify(whose, Secret::new(password), ticket).unwrap();
            receiver.recv_timeout(Duration::from_secs(30)).unwrap()
        };
        let user = || Whose::User(credential.clone());
        assert!(!ask(Whose::Nobody(None), b"p"));
        // Right for somebody else.
        assert!(!ask(Whose::Nobody(Some(credential.clone())), b"p"));
        assert!(!ask(user(), b"q"));
        assert!(!pool.remembers(&credential, &Secret::new(b"p")));
        assert!(ask(user(), b"p"));
        assert!(pool.remembers(&credential, &Secret::new(b"p")));
        assert!(ask(user(), b"p") && !ask(Whose::Nobody(Some(credential.clone())), b"p"));
    }

    #[test]
    fn one_login_too_many_is_refused() {
        let pool = LoginPool::start(1, RememberKey::random()).unwrap();
        let (hold, held) = mpsc::channel::<()>();
        let (sender, answers) = mpsc::channel();
        let ask = |ticket: LoginTicket| pool.verify(Whose::Nobody(None), Secret::new(b"p"), ticket);
        let begun = sender.clone();
        ask(Box::new(move |_| {
            begun.send(()).unwrap();
            held.recv().unwrap();
        }))
        .unwrap();
        // The only thread is at work from here on.
        answers.recv_timeout(Duration::from_secs(30)).unwrap();
        let waiting = (0..LOGINS_WAITING_MAX + 10).map(|_| ask(Box::new(|_| ())));
        let refused: Vec<_> = waiting.filter_map(Result::err).collect();
        assert_eq!(refused, [LoginError::Busy; 10]);
        hold.send(()).unwrap();
    }

    #[test]
    fn failures_are_throttled_by_address_and_user() {
        let throttles = Throttles::new();
        let every =
            |events, minutes: u64| Throttle { events, span: Duration::from_secs(60 * minutes) };
        let limits = Limits { address: every(10, 2), user: every(100, 2) };
        let now = super::super::clock();
        let begin = |client: [u8; 4], user: &str, now| {
            throttles.begin(limits, client.into(), user.as_bytes(), now).is_ok()
        };
        assert_eq!((0..1000).filter(|_| begin([10, 0, 0, 1], "ann", now)).count(), 10);
        assert!(begin([10, 0, 0, 2], "ann", now), "another address may still log in");
        throttles.forgive(limits, [10, 0, 0, 1].into(), b"ann");
        assert!(begin([10, 0, 0, 1], "ann", now));
        let guesses = (0..=255).flat_map(|a| (0..4).map(move |b| [10, 1, a, b]));
        let allowed = guesses.filter(|&client| begin(client, "bob", now)).count();
        assert_eq!(allowed, 100);
        let later = now + 13_000_000_000;
        assert!(begin([10, 0, 0, 1], "ann", later), "one comes back after 12 s");
    }
}
