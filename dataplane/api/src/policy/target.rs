//! Whether names, regular expressions and targets can be compiled: what a node's compiler would say,
//! for whoever writes policies without one.

use culvert_proto::{Host, Name, Target};

use super::{Access, Policy};
use crate::{Place, Problem};

/// Size of one compiled expression in bytes, as nodes allow it.
const PATTERN_MAX: usize = 256 << 10;
/// Size of expressions that are searched for together.
const PATTERNS_MAX: usize = 10 << 20;

impl Policy {
    /// All names, expressions and redirects that no node would take; keys are relative to the policy.
    /// Nodes read them by the same functions.
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
                say(format!("rule[{i}].to"), redirect_target(to).map(drop));
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
        "domain" => listed_name(text).map(drop),
        "domain_suffix" => listed_suffix(text).map(drop),
        "domain_keyword" if text.is_empty() => Err("an empty keyword matches every name".into()),
        "domain_keyword" => Ok(()),
        _ => check_pattern(text),
    }
}

/// A name of a list, in the form that clients' names have.
///
/// # Errors
/// It is none, or could be read as an address.
pub fn listed_name(text: &str) -> Result<Name, String> {
    match Host::parse(text.as_bytes()) {
        Ok(Host::Name(name)) => Ok(name),
        Ok(Host::Ip(_)) => {
            Err(format!("`{text}` is an address, which no name is; list it as cidr"))
        }
        Err(error) => Err(format!("`{text}` is no host name: {error}")),
    }
}

/// The same of a name with all below it, which may begin with a dot or `*.`.
///
/// # Errors
/// The same.
pub fn listed_suffix(text: &str) -> Result<Name, String> {
    listed_name(text.strip_prefix("*.").unwrap_or(text.trim_start_matches('.')))
}

/// Where a rule leads.
///
/// # Errors
/// It is not `host:port`.
pub fn redirect_target(text: &str) -> Result<Target, String> {
    match Target::parse(text.as_bytes()) {
        Ok(target) if target.port > 0 => Ok(target),
        Ok(_) => Err(format!("`{text}` is not host:port: nobody listens on port 0")),
        Err(error) => Err(format!("`{text}` is not host:port: {error}")),
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
