//! Whether names, regular expressions and targets can be compiled: what a node's compiler would say,
//! for whoever writes policies without one.

use std::net::IpAddr;

use super::{Access, Policy};
use crate::{Place, Problem};

/// Size of one compiled expression in bytes, as nodes allow it.
const PATTERN_MAX: usize = 256 << 10;
/// Size of expressions that are searched for together.
const PATTERNS_MAX: usize = 10 << 20;

impl Policy {
    /// All names, expressions and redirects that no node would take; keys are relative to the policy.
    pub fn check_targets(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut say = |key: String, result: Result<(), String>| {
            if let Err(message) = result {
                problems.push(Problem::new(Place::Nowhere, key, message));
            }
        };
        for (i, filter) in self.filter.iter().enumerate() {
            let lists = [
                ("domain", &filter.domain),
                ("domain_suffix", &filter.domain_suffix),
                ("domain_keyword", &filter.domain_keyword),
                ("domain_regex", &filter.domain_regex),
            ];
            for (name, list) in lists {
                for text in list {
                    say(format!("filter[{i}].{name}"), check(name, text));
                }
            }
        }
        for (i, rule) in self.rule.iter().enumerate() {
            let lists = [
                ("domain", &rule.when.domain),
                ("domain_suffix", &rule.when.domain_suffix),
                ("domain_keyword", &rule.when.domain_keyword),
                ("domain_regex", &rule.when.domain_regex),
            ];
            for (name, list) in lists {
                for text in list {
                    say(format!("rule[{i}].when.{name}"), check(name, text));
                }
            }
            if let Some(to) = &rule.to {
                say(format!("rule[{i}].to"), check_target(to));
            }
            for protocol in &rule.when.protocol {
                let known = ["socks5", "socks4", "http"].contains(&protocol.as_str());
                let message = format!("`{protocol}` is not socks5, socks4 or http");
                say(format!("rule[{i}].when.protocol"), if known { Ok(()) } else { Err(message) });
            }
        }
        problems
    }

    /// Expressions that are too large together, though each by itself is not.
    pub fn check_together(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut say = |key: String, patterns: Vec<&str>| {
            if let Err(message) = pattern_set(&patterns) {
                problems.push(Problem::new(Place::Nowhere, key, message));
            }
        };
        // A node gathers filters further, by their ports: what fits in all fits in parts.
        for action in [Access::Deny, Access::Allow] {
            let same = self.filter.iter().filter(|filter| filter.action == action);
            let patterns = same.flat_map(|filter| &filter.domain_regex).map(String::as_str);
            say("filter.domain_regex".into(), patterns.collect());
        }
        for (i, rule) in self.rule.iter().enumerate() {
            let patterns = rule.when.domain_regex.iter().map(String::as_str);
            say(format!("rule[{i}].when.domain_regex"), patterns.collect());
        }
        problems
    }
}

fn check(list: &str, text: &str) -> Result<(), String> {
    match list {
        "domain" => check_name(text),
        "domain_suffix" => {
            check_name(text.strip_prefix("*.").unwrap_or(text.trim_start_matches('.')))
        }
        "domain_keyword" if text.is_empty() => Err("an empty keyword matches every name".into()),
        "domain_keyword" => Ok(()),
        _ => check_pattern(text),
    }
}

fn check_name(text: &str) -> Result<(), String> {
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("`{text}` is an address, which no name is; list it as cidr"));
    }
    let text = text.strip_suffix('.').unwrap_or(text);
    let ascii = if text.is_ascii() {
        text.to_owned()
    } else {
        // RFC 5891: U-labels become A-labels.
        idna::domain_to_ascii(text).map_err(|_| format!("`{text}` is no host name"))?
    };
    let label = |label: &str| {
        let letters = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(letters)
    };
    let ascii = ascii.strip_suffix('.').unwrap_or(&ascii);
    let fits = ascii.len() <= 253 && ascii.split('.').all(label);
    if fits { Ok(()) } else { Err(format!("`{text}` is no host name")) }
}

fn check_target(text: &str) -> Result<(), String> {
    let bad = || format!("`{text}` is no host:port");
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let port = port.parse::<u16>().ok().filter(|port| *port > 0);
    port.ok_or_else(bad)?;
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().map(drop).map_err(|_| bad()),
        None if host.parse::<std::net::Ipv4Addr>().is_ok() => Ok(()),
        None => check_name(host).map_err(|_| bad()),
    }
}

/// Expressions that are searched for together, each of which is good by itself; `None` without any.
///
/// # Errors
/// They are too large together.
pub fn pattern_set(patterns: &[&str]) -> Result<Option<regex::RegexSet>, String> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let set = regex::RegexSetBuilder::new(patterns)
        .case_insensitive(true)
        .size_limit(PATTERNS_MAX)
        .dfa_size_limit(PATTERNS_MAX)
        .nest_limit(32)
        .build();
    set.map(Some).map_err(|_| "the expressions are too large together; use fewer".to_owned())
}

/// Each expression is checked by itself, so that the one at fault is named.
///
/// # Errors
/// It is none, or too large.
pub fn check_pattern(pattern: &str) -> Result<(), String> {
    let built = regex::RegexBuilder::new(pattern)
        .size_limit(PATTERN_MAX)
        .dfa_size_limit(PATTERN_MAX)
        .nest_limit(32)
        .build();
    match built {
        Ok(_) => Ok(()),
        Err(regex::Error::CompiledTooBig(_)) => {
            Err("the expression is too large; use fewer or smaller repetitions".to_owned())
        }
        Err(error) => {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            Err(last.strip_prefix("error: ").unwrap_or(last).to_owned())
        }
    }
}
