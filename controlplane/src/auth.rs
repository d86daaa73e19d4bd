//! Who may use the API: tokens, passwords, throttled logins.

mod password;
mod throttle;
mod token;

pub use password::{check_password, hash_password, random_password, verify_password};
pub use throttle::LoginThrottle;
pub use token::{Claims, RefreshToken, Tokens, secret_file, secret_file_with};
