//! The client side's messages, for `culvert client`, upstreams and load generators.

use super::{
    Address, LOGIN_VERSION, METHOD_NONE, METHOD_PASSWORD, VERSION, encode_address, parse_address,
};
use crate::{Command, Credentials, Target};

/// Why a server's answer ends the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The answer is no SOCKS5.
    #[error("the server does not speak SOCKS5")]
    Version,
    /// User name or password have no bytes, or more than 255.
    #[error("user name and password have 1 to 255 bytes")]
    Credentials,
    /// The server refused, with its reply code.
    #[error("the proxy refused: {}", reply_text(*.0))]
    Refused(u8),
}

/// RFC 1928 section 6.
fn reply_text(code: u8) -> &'static str {
    match code {
        0x01 => "general failure",
        0x02 => "not allowed by its rules",
        0x03 => "network unreachable",
        0x04 => "host unreachable",
        0x05 => "connection refused by the target",
        0x06 => "TTL expired",
        0x07 => "command not supported",
        0x08 => "address type not supported",
        _ => "unknown reply code",
    }
}

/// The greeting: one method.
pub fn encode_greeting(login: bool) -> [u8; 3] {
    [VERSION, 1, if login { METHOD_PASSWORD } else { METHOD_NONE }]
}

/// The login message.
///
/// # Errors
/// A length RFC 1929 cannot carry.
pub fn encode_login(credentials: &Credentials) -> Result<Vec<u8>, ClientError> {
    let (user, password) = (&credentials.user, credentials.password.expose());
    let len = |bytes: &[u8]| {
        u8::try_from(bytes.len()).ok().filter(|&len| len > 0).ok_or(ClientError::Credentials)
    };
    let mut message = vec![LOGIN_VERSION, len(user)?];
    message.extend_from_slice(user);
    message.push(len(password)?);
    message.extend_from_slice(password);
    Ok(message)
}

/// The request message. A forwarded HTTP request is no SOCKS command and goes as CONNECT.
pub fn encode_request(command: &Command, target: &Target) -> Vec<u8> {
    let code = match command {
        Command::Connect | Command::Forward(_) => 1,
        Command::Bind => 2,
        Command::Associate => 3,
    };
    let mut message = vec![VERSION, code, 0];
    encode_address(target, &mut message);
    message
}

/// A successful reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// BND.ADDR and BND.PORT.
    pub bound: Target,
    /// Bytes of the reply; what follows is payload.
    pub len: usize,
}

/// Parses a reply at the start of `bytes`; `None` when it is not complete.
///
/// # Errors
/// The server refused, or does not speak SOCKS5.
pub fn parse_reply(bytes: &[u8]) -> Result<Option<Reply>, ClientError> {
    match bytes {
        [version, ..] if *version != VERSION => Err(ClientError::Version),
        [_, code, ..] if *code != 0 => Err(ClientError::Refused(*code)),
        [_, _, _, address @ ..] => match parse_address(address) {
            Address::Short(_) => Ok(None),
            Address::Is(bound, len) => Ok(Some(Reply { bound, len: 3 + len })),
            Address::Unknown | Address::Bad(_) => Err(ClientError::Version),
        },
        _ => Ok(None),
    }
}
