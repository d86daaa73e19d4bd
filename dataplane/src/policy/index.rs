//! Which of many rules a request can match at all: by the names, networks, users, groups or clients one of
//! which each of them needs. The rules themselves decide, in their order.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use aho_corasick::AhoCorasick;
use culvert_api::policy::{When, pattern_set};
use culvert_proto::Host;
use ipnet::IpNet;
use prefix_trie::joint::map::JointPrefixMap;
use regex::RegexSet;

use super::{Query, TargetSet, snapshot::Rule};

/// So few rules are looked at one by one.
const FEW: usize = 32;

/// Rules by what they need; each by one kind of condition, that which tells most.
#[derive(Debug)]
pub(super) struct RuleIndex {
    /// Those that need nothing that is looked up.
    others: Vec<u32>,
    names: HashMap<Box<str>, Vec<u32>, ahash::RandomState>,
    /// All keywords as one, and the rule that each is of.
    keywords: Option<(AhoCorasick, Box<[u32]>)>,
    /// All expressions, likewise.
    patterns: Option<(RegexSet, Box<[u32]>)>,
    nets: JointPrefixMap<IpNet, Vec<u32>>,
    /// Those that need an address, for a name that is not resolved yet.
    unresolved: Vec<u32>,
    users: HashMap<Arc<str>, Vec<u32>, ahash::RandomState>,
    groups: HashMap<u64, Vec<u32>, ahash::RandomState>,
    clients: JointPrefixMap<IpNet, Vec<u32>>,
}

impl RuleIndex {
    /// An index of rules, if there are enough of them, each with its conditions as they were given.
    pub(super) fn new(rules: &[Rule], given: &[&When]) -> Option<Self> {
        (rules.len() > FEW).then(|| Self::of(rules, given))
    }

    fn of(rules: &[Rule], given: &[&When]) -> Self {
        let mut index = Self {
            others: Vec::new(),
            names: HashMap::default(),
            keywords: None,
            patterns: None,
            nets: JointPrefixMap::new(),
            unresolved: Vec::new(),
            users: HashMap::default(),
            groups: HashMap::default(),
            clients: JointPrefixMap::new(),
        };
        let all = |of: fn(&When) -> &[String]| -> (Vec<&str>, Vec<u32>) {
            let numbered = (0..).zip(given);
            numbered.flat_map(|(n, when)| of(when).iter().map(move |text| (&**text, n))).unzip()
        };
        let (keywords, owners) = all(|when| &when.domain_keyword);
        let keywords: Vec<String> = keywords.iter().map(|text| text.to_lowercase()).collect();
        // Empty ones, and what does not fit together, are told elsewhere, and no such policy is in force.
        if !keywords.is_empty()
            && let Ok(found) = AhoCorasick::new(&keywords)
        {
            index.keywords = Some((found, owners.into()));
        }
        let (patterns, owners) = all(|when| &when.domain_regex);
        if let Ok(Some(found)) = pattern_set(&patterns) {
            index.patterns = Some((found, owners.into()));
        }
        for (number, rule) in (0..).zip(rules) {
            index.add(number, rule);
        }
        index
    }

    fn add(&mut self, number: u32, rule: &Rule) {
        let is_found = |targets: &&TargetSet| {
            (!targets.has_keywords() || self.keywords.is_some())
                && (!targets.has_patterns() || self.patterns.is_some())
        };
        if let Some(targets) = rule.targets.as_ref().filter(is_found) {
            for name in targets.names() {
                self.names.entry(name.into()).or_default().push(number);
            }
            let mut has_nets = false;
            for net in targets.nets() {
                self.nets.entry(net).or_default().push(number);
                has_nets = true;
            }
            if has_nets {
                self.unresolved.push(number);
            }
        } else if let Some(users) = &rule.users {
            for user in users {
                self.users.entry(user.clone()).or_default().push(number);
            }
        } else if let Some(groups) = &rule.groups {
            for group in groups {
                self.groups.entry(*group).or_default().push(number);
            }
        } else if let Some(clients) = &rule.clients {
            for net in clients.iter() {
                self.clients.entry(net).or_default().push(number);
            }
        } else {
            self.others.push(number);
        }
    }

    /// The rules that a request may match, in their order; all others it does not match.
    pub(super) fn candidates(&self, query: Query<'_>, address: Option<IpAddr>) -> Candidates<'_> {
        let mut lists = vec![&*self.others];
        if let Host::Name(name) = &query.target.host {
            let name = name.as_str();
            let above = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
            let known = std::iter::once(name).chain(above).filter_map(|name| self.names.get(name));
            lists.extend(known.map(Vec::as_slice));
            if let Some((keywords, owners)) = &self.keywords {
                let found = keywords.find_overlapping_iter(name);
                lists.extend(found.map(|found| owner(owners, found.pattern().as_usize())));
            }
            // Whether any does is told sooner than which.
            if let Some((patterns, owners)) = &self.patterns
                && patterns.is_match(name)
            {
                lists.extend(patterns.matches(name).iter().map(|found| owner(owners, found)));
            }
        }
        lists.extend(self.clients.cover(&IpNet::from(query.client)).map(|(_, list)| &**list));
        match address {
            Some(address) => {
                lists.extend(self.nets.cover(&IpNet::from(address)).map(|(_, list)| &**list));
            }
            None => lists.push(&self.unresolved),
        }
        if let Some(user) = query.user {
            lists.extend(self.users.get(&user.name).map(Vec::as_slice));
            let groups = user.groups.iter().filter_map(|group| self.groups.get(group));
            lists.extend(groups.map(Vec::as_slice));
        }
        Candidates(lists)
    }
}

/// The rule that a keyword or an expression is of.
fn owner(owners: &[u32], found: usize) -> &[u32] {
    &owners[found..=found]
}

/// Numbers of rules in ascending order, each once.
pub(super) struct Candidates<'a>(Vec<&'a [u32]>);

impl Iterator for Candidates<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let next = self.0.iter().filter_map(|list| list.first()).min().copied()?;
        for list in &mut self.0 {
            // A rule may list a thing twice.
            while let [first, rest @ ..] = list
                && *first == next
            {
                *list = rest;
            }
        }
        Some(next as usize)
    }
}
