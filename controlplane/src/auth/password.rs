//! Passwords, hashed off the event loop.

use std::{
    sync::{Arc, LazyLock, OnceLock},
    time::Duration,
};

use tokio::{sync::Semaphore, time::timeout};

use crate::auth::token::random;

/// bcrypt reads no more bytes of a password.
const BYTES_MAX: usize = 72;
/// Cost of new hashes, and of the one that stands in for unknown users.
const COST: u32 = 10;

/// Whether a password can be one.
///
/// # Errors
/// Why not.
pub fn check_password(password: &str) -> Result<(), &'static str> {
    if password.chars().count() < 8 {
        Err("a password has at least 8 characters")
    } else if password.len() > BYTES_MAX || password.contains('\0') {
        Err("a password has at most 72 bytes and no NUL (bcrypt reads no more)")
    } else {
        Ok(())
    }
}

/// Passwords that are hashed at once: half of the cores, so that no flood of logins takes them all.
static HASHING: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new((cores / 2).max(1)))
});

/// How long a turn is waited for.
const TURN: Duration = Duration::from_secs(6);

/// Runs what takes 50 ms of a core, on another thread and when its turn has come; `None` if that takes too long.
/// Who gives up waiting leaves the queue, and the place of what runs is free when that is done.
async fn hashing<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let place = timeout(TURN, HASHING.clone().acquire_owned()).await.ok()?.ok()?;
    let work = move || {
        let _place = place;
        work()
    };
    tokio::task::spawn_blocking(work).await.ok()
}

/// Hashes a password; 50 ms on another thread, once its turn has come; `None` if it did not.
pub async fn hash_password(password: String) -> Option<String> {
    hashing(move || bcrypt::hash(password, COST).ok()).await.flatten()
}

/// Verifies a password; without a hash it takes as long and is wrong. `None` if its turn did not come.
pub async fn verify_password(password: String, hash: Option<String>) -> Option<bool> {
    let verify = move || {
        let known = hash.is_some();
        static NOBODYS: OnceLock<String> = OnceLock::new();
        let nobodys = || bcrypt::hash("a password nobody has", COST).unwrap_or_default();
        let hash = hash.unwrap_or_else(|| NOBODYS.get_or_init(nobodys).clone());
        let whole = password.len() <= BYTES_MAX && !password.contains('\0');
        bcrypt::verify(&password, &hash).unwrap_or(false) && known && whole
    };
    hashing(verify).await
}

/// A password for a first login: 100 bits.
pub fn random_password() -> String {
    const LETTERS: &[u8] = b"abcdefghijkmnpqrstuvwxyz23456789";
    random::<20>().iter().map(|byte| LETTERS[usize::from(byte % 32)] as char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who waits for a turn and leaves holds up nobody.
    #[tokio::test]
    async fn few_are_hashed_at_once() {
        let guess = || verify_password("a guess".into(), None);
        let guesses = HASHING.available_permits() + 400;
        let mut guesses: Vec<_> = (0..guesses).map(|_| Box::pin(guess())).collect();
        for guess in &mut guesses {
            // All of them wait after this.
            assert!(timeout(Duration::ZERO, guess).await.is_err());
        }
        assert_eq!(HASHING.available_permits(), 0);
        drop(guesses);
        assert_eq!(timeout(Duration::from_secs(5), guess()).await, Ok(Some(false)));
    }

    #[test]
    fn passwords_are_bounded_by_characters_and_by_bytes() {
        for (password, fits) in [
            ("1234567", false),
            ("12345678", true),
            // More bytes than characters.
            ("ößößößö", false),
            ("ößößößöß", true),
            ("12345678\0", false),
        ] {
            assert_eq!(check_password(password).is_ok(), fits, "{password:?}");
        }
        assert!(
            check_password(&"x".repeat(72)).is_ok() && check_password(&"x".repeat(73)).is_err()
        );
        assert!(check_password(&"ö".repeat(37)).is_err());
    }
}
