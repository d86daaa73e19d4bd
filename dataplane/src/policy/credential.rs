//! Password hashes: bcrypt and argon2id, checked for their cost before any is computed.

use std::{path::Path, str::FromStr, sync::OnceLock};

use culvert_proto::Secret;

/// Cost of the hashes `culvert hash-password` makes, and of the one that stands in for unknown users.
pub(super) const BCRYPT_COST: u32 = 10;
/// Highest bcrypt cost that is taken: about 1.5 s of a core.
const BCRYPT_COST_MAX: u32 = 14;
/// bcrypt reads no more bytes of a password.
const BCRYPT_BYTES_MAX: usize = 72;
/// Highest argon2 memory in KiB, passes and lanes that are taken.
const ARGON2_MAX: (u32, u32, u32) = (256 * 1024, 16, 16);

/// A user's password hash, and a keyed hash of the password once it was found right.
#[derive(Debug)]
pub struct Credential {
    hash: Box<str>,
    remembered: OnceLock<blake3::Hash>,
}

/// Why a hash or a password is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// Not a hash we know.
    #[error("not a bcrypt or argon2id hash; make one with `culvert hash-password`")]
    Unknown,
    /// Its cost is too high.
    #[error(
        "the hash is too costly; bcrypt cost 14 and argon2id with 256 MiB, 16 passes are taken at most"
    )]
    Costly,
    /// The password cannot be hashed without losing a part of it.
    #[error("a password has 1 to 72 bytes and no NUL (bcrypt reads no more)")]
    Password,
}

/// The key under which verified passwords are remembered.
#[derive(Clone)]
pub struct RememberKey([u8; 32]);

impl RememberKey {
    /// A new random key, for this process only.
    pub fn random() -> Self {
        let mut key = [0; 32];
        // Without entropy nothing may be remembered under a guessable key.
        getrandom::fill(&mut key).expect("the kernel gives random bytes");
        Self(key)
    }

    /// The key kept in a file (0600), made when there is none.
    ///
    /// # Errors
    /// The file cannot be read or written, or is no key.
    pub fn load(path: &Path) -> std::io::Result<Self> {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        if let Ok(bytes) = std::fs::read(path) {
            return match bytes.try_into() {
                Ok(key) => Ok(Self(key)),
                Err(_) => {
                    Err(std::io::Error::other("not a key of 32 bytes; delete it to make a new one"))
                }
            };
        }
        let key = Self::random();
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(path)?.write_all(&key.0)?;
        Ok(key)
    }
}

impl RememberKey {
    /// A keyed hash of a login: user name, password hash and the password offered.
    pub(super) fn login(&self, name: &[u8], hash: &str, password: &Secret) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in [name, hash.as_bytes(), password.expose()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }
}

impl Credential {
    /// Checks the form of a hash and its cost.
    ///
    /// # Errors
    /// It is no hash we verify.
    pub fn new(hash: &str) -> Result<Self, CredentialError> {
        if hash.starts_with("$2") {
            let parts = bcrypt::HashParts::from_str(hash).map_err(|_| CredentialError::Unknown)?;
            if parts.get_cost() > BCRYPT_COST_MAX {
                return Err(CredentialError::Costly);
            }
        } else {
            let parsed = argon2::PasswordHash::new(hash).map_err(|_| CredentialError::Unknown)?;
            if parsed.algorithm.as_str() != "argon2id" || parsed.hash.is_none() {
                return Err(CredentialError::Unknown);
            }
            let params = argon2::Params::try_from(&parsed).map_err(|_| CredentialError::Unknown)?;
            let (memory, passes, lanes) = ARGON2_MAX;
            if params.m_cost() > memory || params.t_cost() > passes || params.p_cost() > lanes {
                return Err(CredentialError::Costly);
            }
        }
        Ok(Self { hash: hash.into(), remembered: OnceLock::new() })
    }

    /// The hash.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Whether `password` is the one that was found right before. Constant time, no hashing to speak
    /// of, for the worker.
    pub fn remembers(&self, key: &RememberKey, password: &Secret) -> bool {
        self.remembered.get().is_some_and(|known| *known == self.keyed(key, password))
    }

    /// Remembers a password that was found right.
    pub fn remember(&self, key: &RememberKey, password: &Secret) {
        let _ = self.remembered.set(self.keyed(key, password));
    }

    /// A digest of the password hash, to tell whether what was kept belongs to it.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(self.hash.as_bytes()).as_bytes()
    }

    /// The remembered hash, to be kept over a restart.
    pub fn remembered(&self) -> Option<[u8; 32]> {
        self.remembered.get().map(|hash| *hash.as_bytes())
    }

    /// Takes back what [`Credential::remembered`] gave, for the same hash and key.
    pub fn recall(&self, remembered: [u8; 32]) {
        let _ = self.remembered.set(blake3::Hash::from_bytes(remembered));
    }

    fn keyed(&self, key: &RememberKey, password: &Secret) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(&(self.hash.len() as u64).to_le_bytes());
        hasher.update(self.hash.as_bytes());
        hasher.update(password.expose());
        hasher.finalize()
    }
}

/// Verifies a password against a hash; takes tens of milliseconds of a core.
pub(super) fn verify(hash: &str, password: &Secret) -> bool {
    let password = password.expose();
    if hash.starts_with("$2") {
        // bcrypt would compare the first 72 bytes only, and repeats the password with a NUL between.
        let whole = password.len() <= BCRYPT_BYTES_MAX && !password.contains(&0);
        let same = bcrypt::verify(password, hash).unwrap_or(false);
        return whole && same;
    }
    let Ok(parsed) = argon2::PasswordHash::new(hash) else { return false };
    use argon2::PasswordVerifier;
    argon2::Argon2::default().verify_password(password, &parsed).is_ok()
}

/// A hash nobody's password has, of the usual cost: what an unknown user is checked against.
pub(super) fn dummy_hash() -> &'static str {
    static DUMMY: OnceLock<String> = OnceLock::new();
    DUMMY.get_or_init(|| {
        bcrypt::hash("a password nobody has", BCRYPT_COST)
            .unwrap_or_else(|_| "$2b$10$".to_owned() + &"A".repeat(53))
    })
}

/// Hashes a password for a configuration.
///
/// # Errors
/// The password is empty, too long or has a NUL.
pub fn hash_password(password: &[u8]) -> Result<String, CredentialError> {
    let fits = (1..=BCRYPT_BYTES_MAX).contains(&password.len()) && !password.contains(&0);
    if !fits {
        return Err(CredentialError::Password);
    }
    bcrypt::hash(password, BCRYPT_COST).map_err(|_| CredentialError::Password)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &[u8]) -> Secret {
        Secret::new(text)
    }

    #[test]
    fn a_hashed_password_is_verified_whole() {
        let hash = bcrypt::hash("correct", 4).unwrap();
        assert!(verify(&hash, &secret(b"correct")));
        for wrong in [&b"correct\0"[..], b"correct\0correct", b"Correct", b"", b"correct "] {
            assert!(!verify(&hash, &secret(wrong)), "{wrong:?}");
        }
        let long = [b'x'; 80];
        let hash = bcrypt::hash(long, 4).unwrap();
        assert!(!verify(&hash, &secret(&long)), "beyond 72 bytes nothing would be compared");
        assert!(verify(&bcrypt::hash(&long[..72], 4).unwrap(), &secret(&long[..72])));
    }

    #[test]
    fn passwords_bcrypt_would_cut_are_not_hashed() {
        assert_eq!(hash_password(&[b'x'; 73]), Err(CredentialError::Password));
        assert_eq!(hash_password(b"a\0b"), Err(CredentialError::Password));
        assert_eq!(hash_password(b""), Err(CredentialError::Password));
        assert!(hash_password(&[b'x'; 72]).unwrap().starts_with("$2b$10$"));
    }

    #[test]
    fn hashes_are_checked_before_they_cost_anything() {
        let error = |hash: &str| Credential::new(hash).err();
        let salt = "C6UzMDM.H6dfI/f/IKcEeO7oc6YF/OQjL5cV6LJMVP8h3YLyYyEBe";
        assert_eq!(error(&format!("$2b$10${salt}")), None);
        assert_eq!(error(&format!("$2b$31${salt}")), Some(CredentialError::Costly));
        assert_eq!(error("$2b$10$short"), Some(CredentialError::Unknown));
        assert_eq!(error("plain"), Some(CredentialError::Unknown));
        let argon = |params: &str| {
            error(&format!("$argon2id$v=19${params}$c29tZXNhbHQ$dBCSOOq18FRNnD5xFLEQeA"))
        };
        assert_eq!(argon("m=19456,t=2,p=1"), None);
        assert_eq!(argon("m=4194304,t=2,p=1"), Some(CredentialError::Costly));
    }

    #[test]
    fn only_the_same_password_is_remembered() {
        let key = RememberKey::random();
        let credential = Credential::new(&bcrypt::hash("p", 4).unwrap()).unwrap();
        assert!(!credential.remembers(&key, &secret(b"p")));
        credential.remember(&key, &secret(b"p"));
        assert!(credential.remembers(&key, &secret(b"p")));
        assert!(!credential.remembers(&key, &secret(b"p\0")));
        assert!(!credential.remembers(&RememberKey::random(), &secret(b"p")));
        let again = Credential::new(credential.hash()).unwrap();
        again.recall(credential.remembered().unwrap());
        assert!(again.remembers(&key, &secret(b"p")));
    }
}
