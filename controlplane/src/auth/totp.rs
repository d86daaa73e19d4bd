//! The second factor: codes of an authenticator app (RFC 6238: SHA-1, 6 digits, 30 s).

use totp_rs::{Algorithm, Secret, TOTP};

use super::token::random;

/// Seconds a code is for.
const STEP: u64 = 30;
/// Codes of so many steps before and after are taken: clocks differ.
const SKEW: u64 = 1;

/// A new secret, 160 bits.
pub fn new_secret() -> Vec<u8> {
    random::<20>().to_vec()
}

/// The secret as people type it (base32).
pub fn text_of(secret: &[u8]) -> String {
    Secret::Raw(secret.to_vec()).to_encoded().to_string()
}

/// The step whose code was given, at a time in seconds since 1970. A step is to be taken once only.
pub fn step_of(secret: &[u8], code: &str, now: u64) -> Option<i64> {
    let totp = TOTP::new(Algorithm::SHA1, 6, 0, STEP, secret.to_vec()).ok()?;
    let present = now / STEP;
    (present.saturating_sub(SKEW)..=present + SKEW)
        .find(|step| totp.check(code, step * STEP))
        .and_then(|step| i64::try_from(step).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6238 appendix B, its last six digits.
    #[test]
    fn codes_are_those_of_the_rfc() {
        let secret = b"12345678901234567890";
        for (time, code) in [(59, "287082"), (1_111_111_109, "081804"), (20_000_000_000, "353130")]
        {
            let step = i64::try_from(time / 30).unwrap();
            assert_eq!(step_of(secret, code, time), Some(step));
            assert_eq!(step_of(secret, code, time + 30), Some(step));
            assert_eq!(step_of(secret, code, time + 90), None);
        }
        assert_eq!(step_of(secret, "", 59), None);
        assert_eq!(text_of(secret), "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ");
    }
}
