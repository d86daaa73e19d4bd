//! Secrets in the database: sealed with a key that is not in it.

use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::token::{fingerprint, random};

/// Seals and opens. Control planes of one database share the key.
pub struct Seal {
    key: LessSafeKey,
    known_by: String,
}

impl Seal {
    /// With a key; `None` if it is shorter than 32 bytes. What is beyond them is not used.
    pub fn new(key: &[u8]) -> Option<Self> {
        let known_by = fingerprint("culvert seal.key fingerprint", key.get(..32)?);
        let key = UnboundKey::new(&CHACHA20_POLY1305, key.get(..32)?).ok()?;
        Some(Self { key: LessSafeKey::new(key), known_by })
    }

    /// What tells its key from others, and nothing of it.
    pub fn known_by(&self) -> String {
        self.known_by.clone()
    }

    /// Seals a secret for one purpose, which it is opened with again.
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> Option<String> {
        let nonce = random::<NONCE_LEN>();
        let mut sealed = secret.to_vec();
        let aad = Aad::from(purpose.as_bytes());
        let unique = Nonce::assume_unique_for_key(nonce);
        self.key.seal_in_place_append_tag(unique, aad, &mut sealed).ok()?;
        Some(BASE64_STANDARD_NO_PAD.encode([&nonce[..], &sealed].concat()))
    }

    /// Opens what was sealed for the purpose with this key.
    pub fn open(&self, purpose: &str, sealed: &str) -> Option<Vec<u8>> {
        let bytes = BASE64_STANDARD_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut sealed = sealed.to_vec();
        let opened =
            self.key.open_in_place(nonce, Aad::from(purpose.as_bytes()), &mut sealed).ok()?;
        Some(opened.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_and_purpose_only() {
        let seal = Seal::new(&[1; 32]).unwrap();
        let sealed = seal.seal("totp 7", b"secret").unwrap();
        assert_ne!(sealed, seal.seal("totp 7", b"secret").unwrap());
        assert_eq!(seal.open("totp 7", &sealed).unwrap(), b"secret");
        assert_eq!(seal.open("totp 8", &sealed), None);
        assert_eq!(Seal::new(&[2; 32]).unwrap().open("totp 7", &sealed), None);
        assert_eq!(seal.open("totp 7", "x"), None);
        assert!(Seal::new(&[1; 31]).is_none());
    }
}
