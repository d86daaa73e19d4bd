//! What a policy must satisfy beyond its types. Names, regular expressions and hashes are checked by
//! the node's compiler, which understands them.

use std::collections::HashSet;

use super::{
    DEVICES_MAX, FILTER_ENTRIES_MAX, Policy, RULES_MAX, Rule, RuleAction, USERS_MAX, Upstream,
    UpstreamKind, User,
};
use crate::{Place, Problem};

/// All problems of users but their number; keys are such as `user[3].name`.
pub fn check_users(users: &[User]) -> Vec<Problem> {
    let mut checker = Checker::default();
    checker.users(users);
    checker.problems
}

/// Whether so many users are too many.
pub fn check_users_bound(users: usize) -> Option<Problem> {
    let mut checker = Checker::default();
    checker.bound("user", users, USERS_MAX);
    checker.problems.pop()
}

impl Policy {
    /// All problems of a policy but those of its users ([`check_users`]); keys are relative to it, such as
    /// `filter[3].port`.
    pub fn check(&self) -> Vec<Problem> {
        let mut checker = Checker::default();
        let entries: usize = self.filter.iter().map(|filter| filter.entries()).sum();
        checker.bound("filter", entries, FILTER_ENTRIES_MAX);
        checker.bound("rule", self.rule.len(), RULES_MAX);
        checker.filters(self);
        checker.upstreams(&self.upstream);
        checker.rules(self);
        checker.problems
    }
}

#[derive(Default)]
struct Checker {
    problems: Vec<Problem>,
}

impl Checker {
    fn problem(&mut self, key: String, message: impl Into<String>) {
        self.problems.push(Problem::new(Place::Nowhere, key, message));
    }

    fn bound(&mut self, key: &str, count: usize, max: usize) {
        if count > max {
            self.problem(key.to_owned(), format!("{count} entries; at most {max} are taken"));
        }
    }

    fn users(&mut self, users: &[User]) {
        let mut names = HashSet::new();
        for (i, user) in users.iter().enumerate() {
            let name = &user.name;
            if name.is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
                let message = "a user name has 1 to 255 bytes and no control characters";
                self.problem(format!("user[{i}].name"), message);
            }
            if name.contains(':') {
                let message = "a user name has no colon: Basic login ends it there (RFC 7617)";
                self.problem(format!("user[{i}].name"), message);
            }
            if !names.insert(name) {
                self.problem(format!("user[{i}].name"), format!("`{name}` is there twice"));
            }
            self.limits(i, user);
        }
    }

    fn limits(&mut self, i: usize, user: &User) {
        let limits = &user.limits;
        let key = |name: &str| format!("user[{i}].limits.{name}");
        let zero = "0 would stop the user altogether; set status = \"disabled\" for that";
        for (name, value) in [("up", limits.up), ("down", limits.down)] {
            if value.is_some_and(|rate| rate.0 == 0) {
                self.problem(key(name), zero);
            }
        }
        for (name, value) in [
            ("sessions", limits.sessions),
            ("new_sessions_per_second", limits.new_sessions_per_second),
            ("devices", limits.devices),
        ] {
            if value == Some(0) {
                self.problem(key(name), zero);
            }
        }
        if limits.devices.is_some_and(|devices| devices > DEVICES_MAX) {
            self.problem(key("devices"), format!("at most {DEVICES_MAX} can be told apart"));
        }
    }

    fn filters(&mut self, policy: &Policy) {
        for (i, filter) in policy.filter.iter().enumerate() {
            if filter.entries() == 0 && filter.port.is_empty() {
                let message = "an empty filter; name domains, addresses or ports";
                self.problem(format!("filter[{i}]"), message);
            }
        }
    }

    fn upstreams(&mut self, upstreams: &[Upstream]) {
        let mut names = HashSet::new();
        for (i, upstream) in upstreams.iter().enumerate() {
            if upstream.name.is_empty() || !names.insert(&upstream.name) {
                let message = "each upstream has a name of its own";
                self.problem(format!("upstream[{i}].name"), message);
            }
            if upstream.kind != UpstreamKind::Direct {
                let message = "this version dials directly only; use type = \"direct\"";
                self.problem(format!("upstream[{i}].type"), message);
            }
        }
    }

    fn rules(&mut self, policy: &Policy) {
        for (i, rule) in policy.rule.iter().enumerate() {
            let key = |name: &str| format!("rule[{i}].{name}");
            match (rule.action, &rule.to) {
                (RuleAction::Redirect, None) => {
                    self.problem(key("to"), "a redirect needs to = \"host:port\"");
                }
                (RuleAction::Allow | RuleAction::Deny, Some(_)) => {
                    self.problem(key("to"), "only action = \"redirect\" goes elsewhere");
                }
                _ => {}
            }
            self.rule_upstream(i, rule, &policy.upstream);
            for protocol in &rule.when.protocol {
                if !["socks5", "socks4", "http"].contains(&protocol.as_str()) {
                    let message = format!("`{protocol}` is not socks5, socks4 or http");
                    self.problem(key("when.protocol"), message);
                }
            }
        }
    }

    fn rule_upstream(&mut self, i: usize, rule: &Rule, upstreams: &[Upstream]) {
        let Some(name) = &rule.upstream else { return };
        if rule.action == RuleAction::Deny {
            self.problem(format!("rule[{i}].upstream"), "a rule that denies goes nowhere");
        }
        if !upstreams.iter().any(|upstream| upstream.name == *name) {
            let message = format!("no [[policy.upstream]] is named `{name}`");
            self.problem(format!("rule[{i}].upstream"), message);
        }
    }
}

impl super::Filter {
    fn entries(&self) -> usize {
        self.domain.len()
            + self.domain_suffix.len()
            + self.domain_keyword.len()
            + self.domain_regex.len()
            + self.cidr.len()
    }

    /// Adds what another names, which has the same action and ports.
    pub fn absorb(&mut self, other: Self) {
        self.domain.extend(other.domain);
        self.domain_suffix.extend(other.domain_suffix);
        self.domain_keyword.extend(other.domain_keyword);
        self.domain_regex.extend(other.domain_regex);
        self.cidr.extend(other.cidr);
    }
}
