//! The control plane's configuration: a file, the environment over it, flags over both.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use culvert_api::{
    Place, Problem, Span,
    config::{Format, Tree},
};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Variables begin with this: `CULVERT_CTL_<SECTION>_<KEY>`.
const ENVIRONMENT: &str = "CULVERT_CTL";

/// All keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The API and the page.
    pub server: Server,
    /// The database.
    pub database: Database,
    /// What is kept in files.
    pub state: State,
    /// The control link.
    pub link: Link,
    /// Tokens.
    pub auth: Auth,
    /// Keys that are not in files.
    pub keys: Keys,
    /// The log.
    pub log: Log,
}

/// The API and the page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Where it listens.
    pub bind: SocketAddr,
    /// Where browsers find it; with `https` cookies are for TLS only.
    pub public_url: String,
    /// Proxies in front whose `X-Forwarded-For` tells the client's address.
    pub trusted_proxies: Vec<IpNet>,
    /// The files of a certificate chain and its key, PEM; read again when they change. Empty: plain HTTP.
    pub tls: Tls,
}

/// A certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// The chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Tls {
    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        !self.certificate.as_os_str().is_empty()
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 8012)),
            public_url: String::new(),
            trusted_proxies: Vec::new(),
            tls: Tls::default(),
        }
    }
}

/// The database.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// `mysql://user:password@host/name`, or empty: SQLite in the state directory.
    pub url: String,
    /// Most connections.
    pub pool: u32,
}

impl Default for Database {
    fn default() -> Self {
        Self { url: String::new(), pool: 16 }
    }
}

/// What is kept in files: the database of SQLite, keys, the first admin's password.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// The folder.
    pub dir: PathBuf,
}

impl Default for State {
    fn default() -> Self {
        let systemd = std::env::var_os("STATE_DIRECTORY").map(PathBuf::from);
        Self { dir: systemd.unwrap_or_else(|| PathBuf::from("/var/lib/culvert-control")) }
    }
}

/// The control link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// The Unix socket nodes of this host connect to; empty: `control.sock` in the state directory.
    pub unix: PathBuf,
    /// Where nodes of other hosts connect over mutual TLS; none: only those of this host.
    #[serde(deserialize_with = "address_or_empty", serialize_with = "empty_or_address")]
    pub bind: Option<SocketAddr>,
    /// User ids that may connect to it beside our own and root; empty: whom its permissions let in.
    pub allow_uids: Vec<u32>,
}

fn address_or_empty<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    let address = text.parse().map(Some);
    address.map_err(|_| serde::de::Error::custom("address:port, such as 0.0.0.0:8013, or empty"))
}

fn empty_or_address<S: Serializer>(
    address: &Option<SocketAddr>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&address.map(|address| address.to_string()).unwrap_or_default())
}

/// Keys that are given, best by the environment, instead of kept in the state directory: each control plane of
/// one database has the same. What is empty is in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Keys {
    /// Signs access tokens: base64 of 32 bytes or more.
    pub jwt: Key,
    /// Seals secrets in the database: the same.
    pub seal: Key,
    /// Vouches for nodes: a private key as PEM.
    pub link_authority: Key,
}

/// A key; never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Key(String);

impl Key {
    /// The text, if it is given.
    pub fn text(&self) -> Option<&str> {
        Some(&*self.0).filter(|text| !text.is_empty())
    }

    /// The bytes, if it is given as base64 of enough.
    ///
    /// # Errors
    /// It is not.
    pub fn bytes(&self) -> Result<Option<Vec<u8>>, &'static str> {
        let Some(text) = self.text() else { return Ok(None) };
        let bytes = BASE64_STANDARD.decode(text.trim()).ok().filter(|bytes| bytes.len() >= 32);
        bytes.map(Some).ok_or("base64 of 32 bytes or more, such as `openssl rand -base64 32` makes")
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "***" })
    }
}

/// Tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// How long an access token is good.
    pub access_token: Span,
    /// How long a refresh token is good.
    pub refresh_token: Span,
}

impl Default for Auth {
    fn default() -> Self {
        use std::time::Duration;
        Self {
            access_token: Span(Duration::from_secs(900)),
            refresh_token: Span(Duration::from_secs(7 * 86_400)),
        }
    }
}

/// The log, to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// error | warn | info | debug | trace.
    pub level: String,
    /// text | json.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

impl Config {
    /// Reads a file, or the defaults without one, with the environment over it.
    ///
    /// # Errors
    /// Every problem found.
    pub fn load(path: Option<&Path>, flags: &[String]) -> Result<Self, Vec<Problem>> {
        let problem = |message: String| vec![Problem::new(Place::Nowhere, "", message)];
        let mut tree = match path {
            None => Tree::empty(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| problem(format!("{}: {error}", path.display())))?;
                let extension = path.extension().and_then(|text| text.to_str()).unwrap_or("");
                let format = Format::of_extension(extension).ok_or_else(|| {
                    problem(format!("{}: name it .toml, .yaml, .yml or .json", path.display()))
                })?;
                Tree::parse(&text, format)?
            }
        };
        let mut problems = tree.overlay(ENVIRONMENT, std::env::vars());
        problems.extend(tree.overlay_flags(flags));
        match tree.read::<Self>() {
            Ok(config) => {
                config.check(&tree, &mut problems);
                if problems.is_empty() { Ok(config) } else { Err(problems) }
            }
            Err(more) => {
                problems.extend(more);
                Err(problems)
            }
        }
    }

    fn check(&self, tree: &Tree, problems: &mut Vec<Problem>) {
        let mut say = |key: &str, message: &str| {
            problems.push(Problem::new(tree.place(key), key, message));
        };
        for (key, given) in [("keys.jwt", &self.keys.jwt), ("keys.seal", &self.keys.seal)] {
            if let Err(wanted) = given.bytes() {
                say(key, wanted);
            }
        }
        let url = &self.database.url;
        let known = ["mysql://", "sqlite://", "sqlite::"].iter().any(|kind| url.starts_with(kind));
        if !url.is_empty() && !known {
            say(
                "database.url",
                "mysql://user:password@host/name or sqlite:///path; empty is SQLite",
            );
        }
        let parameters = url.split_once('?').map_or("", |(_, parameters)| parameters);
        for (name, file) in parameters.split('&').filter_map(|pair| pair.split_once('=')) {
            if ["sslca", "sslcert", "sslkey"].contains(&&*name.replace('-', ""))
                && file.starts_with('/')
                && let Err(error) = std::fs::File::open(file)
            {
                say("database.url", &format!("{name}: the certificate file {file}: {error}"));
            }
        }
        let tls = &self.server.tls;
        if tls.is_set() == tls.key.as_os_str().is_empty() {
            say("server.tls", "certificate and key are given both or not at all");
        }
        if !(1..=1000).contains(&self.database.pool) {
            say("database.pool", "1 to 1000");
        }
        if self.auth.access_token.0.is_zero() || self.auth.refresh_token.0.is_zero() {
            say("auth", "0 would end every token at once");
        }
    }

    /// The database's URL, also when none is given.
    pub fn database_url(&self) -> String {
        match self.database.url.as_str() {
            "" => crate::store::sqlite_url(&self.state.dir),
            url => url.to_owned(),
        }
    }

    /// The link's socket.
    pub fn link_path(&self) -> PathBuf {
        match self.link.unix.as_os_str().is_empty() {
            true => crate::link::socket_path(&self.state.dir),
            false => self.link.unix.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_shows_every_key_and_its_default() {
        let example = include_str!("../control.example.toml");
        let read: Config = Tree::parse(example, Format::Toml).unwrap().read().unwrap();
        let default = Config::default();
        assert_eq!(read, Config { state: State { dir: read.state.dir.clone() }, ..default });
        let keys = serde_json::to_value(&read).unwrap();
        for (section, keys) in keys.as_object().unwrap() {
            for key in keys.as_object().unwrap().keys() {
                let set = example.lines().any(|line| line.starts_with(&format!("{key} =")));
                assert!(set, "{section}.{key} is not in the example");
            }
        }
    }
}
