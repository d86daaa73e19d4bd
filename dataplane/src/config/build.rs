//! From the file's keys to a configuration, with every problem named by its key.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use culvert_api::{
    Place, Problem,
    config::Tree,
    policy::{Access, Limits, Policy},
};
use culvert_proto::{Login, Protocol};
use culvert_rt::DriverChoice;

use super::{
    Config, Control, ListenerConfig, LogConfig,
    file::{self, AuthMethod, Driver, File, LogFormat, ProtocolName},
};
use crate::{
    policy::{Draft, OwnAddresses, ThrottleLimits, compile},
    settings::{AddressLimits, Settings, Timeouts},
};

/// Most workers that make sense.
const WORKERS_MAX: usize = 256;

pub(super) fn build(file: File, tree: &Tree) -> (Option<Config>, Vec<Problem>) {
    let mut builder = Builder { tree, problems: Vec::new() };
    builder.sections(&file);
    let listeners = builder.listeners(&file);
    let settings = settings(&file, &listeners);
    // The policy is compiled once here, so that `check` says what a start would say.
    let (draft, own) = (Draft::Whole(&file.policy), OwnAddresses::default());
    if let Err(problems) = compile(draft, settings.clone(), own, 0, None) {
        for problem in problems {
            builder.problem(format!("policy.{}", problem.key), problem.message);
        }
    }
    let workers = file.node.workers.0.unwrap_or_else(|| culvert_rt::available_cores().len());
    let state_dir = file.node.state_dir.clone();
    let config = Config {
        name: file.node.name,
        workers,
        driver: match file.node.driver {
            Driver::Auto => DriverChoice::Auto,
            Driver::IoUring => DriverChoice::IoUring,
            Driver::Epoll => DriverChoice::Epoll,
        },
        listeners,
        admin: file.admin.bind.0,
        resolver: file.dns.options(),
        settings,
        sessions: file.limits.sessions.0,
        drain: file.timeouts.drain.0,
        log: LogConfig {
            level: file.log.level,
            json: file.log.format == LogFormat::Json,
            file: place(&state_dir, file.log.file, "stderr"),
            access_file: place(&state_dir, file.log.access_file, "none"),
            rotate: file.log.rotate,
        },
        state_dir: Some(state_dir),
        policy: match &file.control {
            // Until the control plane says otherwise, nobody may do anything.
            Some(_) => Policy { default: Access::Deny, ..Policy::default() },
            None => file.policy,
        },
        control: file.control.as_ref().and_then(|control| control_of(control).ok()),
    };
    (Some(config), builder.problems)
}

/// Where the control plane is, or the key that is wrong and how.
fn control_of(control: &file::Control) -> Result<Control, (&'static str, &'static str)> {
    if let Some(path) = control.connect.strip_prefix("unix:").map(PathBuf::from)
        && path.is_absolute()
    {
        return Ok(Control::Unix(path));
    }
    let address = control.connect.strip_prefix("tls://").filter(|address| {
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        port.is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    });
    let Some(address) = address else {
        return Err((
            "control.connect",
            "unix:/path/to/control.sock on the control plane's host, else tls://host:8013",
        ));
    };
    match &control.identity {
        Some(identity) if identity.is_absolute() => {
            Ok(Control::Tls { address: address.to_owned(), identity: identity.clone() })
        }
        _ => Err((
            "control.identity",
            "the absolute path of the file that culvert-control node add wrote",
        )),
    }
}

/// A log's path, relative to the state directory; `None` for the word that stands for no file.
fn place(state_dir: &Path, path: PathBuf, none: &str) -> Option<PathBuf> {
    (path != Path::new(none)).then(|| state_dir.join(path))
}

fn settings(file: &File, listeners: &[ListenerConfig]) -> Settings {
    let timeouts = &file.timeouts;
    Settings {
        timeouts: Timeouts {
            handshake: timeouts.handshake.0,
            connect: timeouts.connect.0,
            idle: timeouts.idle.0,
            half_close: timeouts.half_close.0,
            lifetime: (!timeouts.lifetime.0.is_zero()).then_some(timeouts.lifetime.0),
        },
        address: AddressLimits {
            sessions: file.limits.sessions_per_address,
            new_sessions_per_second: file.limits.new_sessions_per_second_per_address,
        },
        node: Limits {
            up: file.limits.up,
            down: file.limits.down,
            burst: file.limits.burst,
            new_sessions_per_second: file.limits.new_sessions_per_second,
            ..Limits::default()
        },
        failures: ThrottleLimits {
            address: file.auth.failures_per_address,
            user: file.auth.failures_per_user,
        },
        prefer: file.dns.prefer,
        listeners: listeners.iter().map(|listener| Arc::new(listener.rules())).collect(),
    }
}

struct Builder<'a> {
    tree: &'a Tree,
    problems: Vec<Problem>,
}

impl Builder<'_> {
    fn problem(&mut self, key: impl Into<String>, message: impl Into<String>) {
        let key = key.into();
        self.problems.push(Problem::new(self.tree.place(&key), key, message));
    }

    fn sections(&mut self, file: &File) {
        if let Some(control) = &file.control {
            if self.tree.has("policy") {
                let message = "a node follows [control] or [policy], not both; remove one";
                self.problem("control", message);
            }
            if let Err((key, message)) = control_of(control) {
                self.problem(key, message);
            }
        }
        if file.node.workers.0.is_some_and(|workers| workers > WORKERS_MAX) {
            self.problem("node.workers", format!("at most {WORKERS_MAX}; \"auto\" is one a core"));
        }
        for (key, span) in [
            ("timeouts.handshake", file.timeouts.handshake),
            ("timeouts.connect", file.timeouts.connect),
            ("timeouts.idle", file.timeouts.idle),
            ("timeouts.half_close", file.timeouts.half_close),
            ("dns.timeout", file.dns.timeout),
        ] {
            if span.0.is_zero() {
                self.problem(key, "0 would end every session; no deadline is infinite here");
            }
        }
        if file.limits.sessions_per_address == 0 {
            self.problem("limits.sessions_per_address", "0 would turn every client away");
        }
        let system = file.dns.servers == ["system"];
        for (i, text) in file.dns.servers.iter().enumerate() {
            if !system && file::server(text).is_none() {
                let message =
                    format!("`{text}` is not an address; use [\"system\"] alone, or addresses");
                self.problem(format!("dns.servers[{i}]"), message);
            }
        }
        // A filter takes any word for the name of a module, and would then be silent.
        let known = file.log.level.split(',').all(|part| {
            let level = part.rsplit('=').next().unwrap_or_default();
            level.parse::<tracing::Level>().is_ok()
        });
        if !known || tracing_subscriber::EnvFilter::try_new(&file.log.level).is_err() {
            let message = format!("`{}` is not error, warn, info, debug or trace", file.log.level);
            self.problem("log.level", message);
        }
        // The admin interface listens beside the others.
        if let Some(admin) = file.admin.bind.0.filter(|admin| admin.port() != 0)
            && file.listener.iter().any(|listener| listener.bind == admin)
        {
            self.problem("admin.bind", format!("{admin} is a listener's address too"));
        }
    }

    fn listeners(&mut self, file: &File) -> Vec<ListenerConfig> {
        if file.listener.is_empty() {
            let message = "no listener; add [[listener]] with bind = \"127.0.0.1:1082\"";
            self.problems.push(Problem::new(Place::Nowhere, "listener", message));
        }
        let mut seen = HashSet::new();
        let mut listeners = Vec::new();
        for (i, listener) in file.listener.iter().enumerate() {
            let key = |name: &str| format!("listener[{i}].{name}");
            if listener.bind.port() != 0 && !seen.insert(listener.bind) {
                self.problem(key("bind"), format!("{} is bound twice", listener.bind));
            }
            let mut protocols = Vec::new();
            for (j, protocol) in listener.protocols.iter().enumerate() {
                match protocol {
                    ProtocolName::Socks5 => protocols.push(Protocol::Socks5),
                    ProtocolName::Socks4 => protocols.push(Protocol::Socks4),
                    ProtocolName::Http => protocols.push(Protocol::Http),
                    ProtocolName::Websocket => self.problem(
                        key(&format!("protocols[{j}]")),
                        "this version speaks socks5, socks4 and http",
                    ),
                }
            }
            if listener.protocols.is_empty() {
                self.problem(key("protocols"), "no protocol; name socks5, socks4 or http");
            }
            let login = self.login(i, listener, file);
            if !login.allows_none() && protocols.contains(&Protocol::Socks4) {
                let message = "SOCKS4 has no passwords; add \"none\" to auth, or leave socks4 out";
                self.problem(key("protocols"), message);
            }
            listeners.push(ListenerConfig {
                name: if listener.name.is_empty() {
                    listener.bind.to_string()
                } else {
                    listener.name.clone()
                },
                bind: listener.bind,
                protocols,
                login,
                allow: listener.allow.clone(),
            });
        }
        listeners
    }

    fn login(&mut self, i: usize, listener: &file::Listener, file: &File) -> Login {
        let password = listener.auth.contains(&AuthMethod::Password);
        let none = listener.auth.contains(&AuthMethod::None);
        let open = none
            && !listener.bind.ip().is_loopback()
            && listener.allow.is_none()
            && file.policy.whitelist.is_none();
        if open {
            let message = "an open proxy: anyone could use it; set listener.allow or policy.whitelist, \
                           bind to loopback, or drop \"none\"";
            self.problem(format!("listener[{i}].auth"), message);
        }
        match (password, none) {
            (true, true) => Login::Either,
            (false, true) => Login::None,
            (true, false) => Login::Password,
            (false, false) => {
                self.problem(format!("listener[{i}].auth"), "name \"password\", \"none\" or both");
                Login::Password
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_api::config::Format;

    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let none = Vec::<(String, String)>::new();
        match Config::parse(text, Format::Toml, none, &[]) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_listener_is_all_it_takes() {
        assert_eq!(problems("[[listener]]\nbind = '127.0.0.1:1082'\n"), [""; 0]);
        assert!(problems("")[0].starts_with("listener: no listener"));
    }

    #[test]
    fn no_configuration_is_an_open_proxy_by_accident() {
        let open = "[[listener]]\nbind = '0.0.0.0:1082'\nauth = ['none']\n";
        assert!(problems(open)[0].starts_with("line 3: listener[0].auth: an open proxy"));
        for allowed in [
            "[[listener]]\nbind = '0.0.0.0:1082'\nauth = ['none']\nallow = ['10.0.0.0/8']\n",
            "[[listener]]\nbind = '0.0.0.0:1082'\nauth = ['none']\n[policy]\nwhitelist = ['10.0.0.0/8']\n",
            "[[listener]]\nbind = '127.0.0.1:1082'\nauth = ['none']\n",
            "[[listener]]\nbind = '0.0.0.0:1082'\nauth = ['password']\n",
        ] {
            assert_eq!(problems(allowed), [""; 0], "{allowed}");
        }
    }

    #[test]
    fn every_problem_is_told_in_the_order_of_its_line() {
        let text = "[node]\nworkers = 1000\n[[listener]]\nbind = '127.0.0.1:1'\nprotocols = ['websocket']\n\
            auth = []\n[timeouts]\nidle = '0'\n[log]\nlevel = 'a=b=c'\n[control]\nconnect = 'x'\n\
            [policy]\n[[policy.user]]\nname = 'ann'\npassword_hash = 'plain'\n";
        let starts = [
            "line 2: node.workers: ",
            "line 5: listener[0].protocols[0]: ",
            "line 6: listener[0].auth: ",
            "line 8: timeouts.idle: ",
            "line 10: log.level: ",
            "line 11: control: ",
            "line 12: control.connect: ",
            "line 16: policy.user[0].password_hash: ",
        ];
        let problems = problems(text);
        assert_eq!(problems.len(), starts.len(), "{problems:#?}");
        for (problem, start) in problems.iter().zip(starts) {
            assert!(problem.starts_with(start), "{problem} should start with {start}");
        }
    }

    const EXAMPLE: &str = include_str!("../../culvert.example.toml");

    #[test]
    fn the_example_is_right_and_names_every_key() {
        assert_eq!(problems(EXAMPLE), [""; 0]);
        let read: File =
            culvert_api::config::Tree::parse(EXAMPLE, Format::Toml).unwrap().read().unwrap();
        let tree = serde_json::to_value(&read).unwrap();
        let mut missing = Vec::new();
        missing_keys(&tree, &mut missing);
        assert_eq!(missing, [""; 0], "keys the example does not explain");
    }

    /// Keys that the example does not set: they read as null, or are not in the text.
    fn missing_keys(value: &serde_json::Value, missing: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (key, value) in map {
                    let set = EXAMPLE.lines().any(|line| {
                        let line = line.trim_start();
                        line.starts_with(&format!("{key} ="))
                            || line.starts_with('[') && line.contains(key.as_str())
                    });
                    if !set {
                        missing.push(key.clone());
                    }
                    missing_keys(value, missing);
                }
            }
            serde_json::Value::Array(values) => {
                values.iter().for_each(|value| missing_keys(value, missing))
            }
            _ => {}
        }
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let read: File =
            culvert_api::config::Tree::parse(EXAMPLE, Format::Toml).unwrap().read().unwrap();
        // Where there is no default, there is an example.
        let (limits, default) = (read.limits.clone(), File::default());
        let default = File {
            listener: read.listener.clone(),
            policy: read.policy.clone(),
            limits: file::Limits {
                up: limits.up,
                down: limits.down,
                burst: limits.burst,
                new_sessions_per_second: limits.new_sessions_per_second,
                ..default.limits
            },
            ..default
        };
        assert_eq!(read, default);
    }

    #[test]
    fn socks4_wants_no_password() {
        let text = "[[listener]]\nbind = '127.0.0.1:1'\nprotocols = ['socks4']\n";
        assert!(problems(text)[0].contains("SOCKS4 has no passwords"));
    }
}
