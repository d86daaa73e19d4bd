//! Who may use the API: tokens, passwords, throttled logins.

mod password;
mod seal;
mod throttle;
mod token;
mod totp;

pub use password::{check_password, hash_password, random_password, verify_password};
pub use seal::Seal;
pub use throttle::LoginThrottle;
pub use token::{Claims, RefreshToken, Tokens, secret_file, secret_file_with};
pub use totp::{new_secret, step_of, text_of};
