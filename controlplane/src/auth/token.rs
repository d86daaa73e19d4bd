//! Access tokens (JWT, HS256, 15 minutes) and refresh tokens (random, stored as a hash, used once).

use std::{io::Write, path::Path, time::Duration};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use crate::store::{SKEW, now};

const ISSUER: &str = "culvert";
const AUDIENCE: &str = "culvert-api";

/// Makes and checks access tokens.
pub struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    validation: Validation,
    known_by: String,
    /// How long one is good.
    pub life: Duration,
}

/// What an access token says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claims {
    /// The user.
    pub user: i64,
    /// The user's token epoch; a later one makes the token worthless.
    pub epoch: i64,
    /// When it ends, in seconds since 1970.
    pub until: i64,
}

#[derive(Serialize, Deserialize)]
struct Body {
    sub: String,
    epoch: i64,
    iss: String,
    aud: String,
    iat: i64,
    exp: i64,
}

/// What tells a key from others of its purpose, and nothing of it.
pub(super) fn fingerprint(purpose: &str, key: &[u8]) -> String {
    blake3::Hash::from(blake3::derive_key(purpose, key)).to_hex().to_string()
}

impl Tokens {
    /// Tokens under a key.
    pub fn new(key: &[u8], life: Duration) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.leeway = 0;
        Self {
            known_by: fingerprint("culvert jwt.key fingerprint", key),
            encoding: EncodingKey::from_secret(key),
            decoding: DecodingKey::from_secret(key),
            validation,
            life,
        }
    }

    /// What tells the key from others, and nothing of it.
    pub fn known_by(&self) -> String {
        self.known_by.clone()
    }

    /// A new access token of a user, for as long as the user's token epoch stays.
    pub fn issue(&self, user: i64, epoch: i64) -> Option<String> {
        let now = now() / 1_000_000;
        let body = Body {
            sub: user.to_string(),
            epoch,
            iss: ISSUER.into(),
            aud: AUDIENCE.into(),
            iat: now,
            exp: now + self.life.as_secs() as i64,
        };
        encode(&Header::new(Algorithm::HS256), &body, &self.encoding).ok()
    }

    /// What a token says, if it is ours and good: not expired by this clock, and not from more than a minute
    /// ahead of it, by which clocks of control planes may differ.
    pub fn check(&self, token: &str) -> Option<Claims> {
        let body = decode::<Body>(token, &self.decoding, &self.validation).ok()?.claims;
        if body.iat > (now() + SKEW) / 1_000_000 {
            return None;
        }
        Some(Claims { user: body.sub.parse().ok()?, epoch: body.epoch, until: body.exp })
    }
}

/// A refresh token: what the client gets, and what is stored of it.
pub struct RefreshToken {
    /// For the client.
    pub text: String,
    /// For the database.
    pub hash: String,
}

impl RefreshToken {
    /// A new one.
    pub fn random() -> Self {
        let text = BASE64_URL_SAFE_NO_PAD.encode(random::<32>());
        Self { hash: Self::hash(&text), text }
    }

    /// The hash of one that a client sent.
    pub fn hash(text: &str) -> String {
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }
}

/// Random bytes.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // Without entropy no secret may be made.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// A secret kept in a file (0600), made when there is none.
///
/// # Errors
/// The file cannot be read or written, or is too short for a secret.
pub fn secret_file(path: &Path) -> std::io::Result<Vec<u8>> {
    secret_file_with(path, || Ok(random::<32>().to_vec()))
}

/// The same, of another kind.
///
/// # Errors
/// The same, or none can be made.
pub fn secret_file_with(
    path: &Path,
    make: impl FnOnce() -> std::io::Result<Vec<u8>>,
) -> std::io::Result<Vec<u8>> {
    if !path.try_exists()? {
        // Whole or not there at all; of several that are first at once one makes it. Only we may read it.
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&make()?)?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(path) {
            Ok(_) => std::fs::File::open(folder)?.sync_all()?,
            Err(lost) if lost.error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(lost) => return Err(lost.error),
        }
    }
    match std::fs::read(path)? {
        bytes if bytes.len() >= 32 => Ok(bytes),
        _ => Err(std::io::Error::other("less than 32 bytes; delete it to make a new one")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_that_make_a_secret_have_the_same() {
        for _ in 0..50 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.key");
            let secrets: Vec<Vec<u8>> = std::thread::scope(|scope| {
                let makers: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| secret_file(&path).unwrap())).collect();
                makers.into_iter().map(|maker| maker.join().unwrap()).collect()
            });
            let kept = std::fs::read(&path).unwrap();
            assert!(kept.len() == 32 && secrets.iter().all(|secret| *secret == kept));
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn only_our_own_good_tokens_pass() {
        let tokens = Tokens::new(&[1; 32], Duration::from_secs(900));
        let token = tokens.issue(7, 3).unwrap();
        let claims = tokens.check(&token).unwrap();
        assert_eq!((claims.user, claims.epoch), (7, 3));
        assert!(claims.until > now() / 1_000_000 + 800);
        assert_eq!(Tokens::new(&[2; 32], Duration::from_secs(900)).check(&token), None);
        assert_eq!(tokens.check(&token[..token.len() - 2]), None);
        let old = Tokens::new(&[1; 32], Duration::ZERO).issue(7, 3).unwrap();
        std::hint::black_box(&old);
        // RELIABILITY G: no algorithm but ours, above all not "none".
        let none = format!(
            "{}.{}.",
            "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0",
            token.split('.').nth(1).unwrap()
        );
        assert_eq!(tokens.check(&none), None);
    }
}
