//! Which of many rules a request can match at all: by the names, networks, users, groups or clients one of
//! which each of them needs. The rules themselves decide, in their order.

use std::{
    collections::{BTreeMap, HashMap},
    iter::Peekable,
    net::IpAddr,
    sync::Arc,
    vec,
};

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
    /// All keywords as one, and the rules that each is of.
    keywords: Option<(AhoCorasick, Box<[Vec<u32>]>)>,
    /// All expressions as one, or as few as take them, and the rule that each is of.
    patterns: Vec<(RegexSet, Box<[u32]>)>,
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
        (rules.len() > FEW).then(|| Self::of(rules, given)).flatten()
    }

    /// `None` if there are more keywords than one automaton holds: then rules are looked at one by one.
    fn of(rules: &[Rule], given: &[&When]) -> Option<Self> {
        let mut index = Self {
            others: Vec::new(),
            names: HashMap::default(),
            keywords: None,
            patterns: Vec::new(),
            nets: JointPrefixMap::new(),
            unresolved: Vec::new(),
            users: HashMap::default(),
            groups: HashMap::default(),
            clients: JointPrefixMap::new(),
        };
        let mut keywords: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        let mut patterns = Vec::new();
        for (number, when) in (0..).zip(given) {
            for keyword in &when.domain_keyword {
                keywords.entry(keyword.to_lowercase()).or_default().push(number);
            }
            patterns.extend(when.domain_regex.iter().map(|pattern| (pattern.as_str(), number)));
        }
        if !keywords.is_empty() {
            let found = AhoCorasick::new(keywords.keys()).ok()?;
            index.keywords = Some((found, keywords.into_values().collect()));
        }
        index.add_patterns(&patterns);
        for (number, rule) in (0..).zip(rules) {
            index.add(number, rule);
        }
        Some(index)
    }

    /// One set takes so many bytes of expressions; what does not fit is halved.
    fn add_patterns(&mut self, patterns: &[(&str, u32)]) {
        let (texts, owners): (Vec<&str>, Vec<u32>) = patterns.iter().copied().unzip();
        match pattern_set(&texts) {
            Ok(Some(set)) => self.patterns.push((set, owners.into())),
            // One that does not fit alone is a problem, and this policy never in force.
            Err(_) if patterns.len() > 1 => {
                let (first, second) = patterns.split_at(patterns.len() / 2);
                self.add_patterns(first);
                self.add_patterns(second);
            }
            _ => {}
        }
    }

    fn add(&mut self, number: u32, rule: &Rule) {
        let targets = rule.targets.as_ref();
        if let Some(targets) = targets.filter(|targets| targets.is_listed()) {
            self.add_targets(number, targets);
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
        } else if let Some(targets) = targets {
            self.add_targets(number, targets);
        } else {
            self.others.push(number);
        }
    }

    fn add_targets(&mut self, number: u32, targets: &TargetSet) {
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
    }

    /// The rules that a request may match, in their order; all others it does not match.
    pub(super) fn candidates(&self, query: Query<'_>, address: Option<IpAddr>) -> Candidates<'_> {
        let (mut lists, mut found) = (vec![&*self.others], Vec::new());
        if let Host::Name(name) = &query.target.host {
            let name = name.as_str();
            let above = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
            let known = std::iter::once(name).chain(above).filter_map(|name| self.names.get(name));
            lists.extend(known.map(Vec::as_slice));
            self.find_parts(name, &mut found);
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
        Candidates { lists, found: found.into_iter().peekable() }
    }

    /// The rules of keywords and expressions that are in a name, in their order.
    fn find_parts(&self, name: &str, rules: &mut Vec<u32>) {
        if let Some((keywords, owners)) = &self.keywords {
            let found = keywords.find_overlapping_iter(name);
            let mut found: Vec<usize> = found.map(|found| found.pattern().as_usize()).collect();
            found.sort_unstable();
            found.dedup();
            rules.extend(found.into_iter().flat_map(|keyword| &owners[keyword]));
        }
        for (patterns, owners) in &self.patterns {
            // Whether any does is told sooner than which.
            if patterns.is_match(name) {
                rules.extend(patterns.matches(name).iter().map(|found| owners[found]));
            }
        }
        rules.sort_unstable();
        rules.dedup();
    }
}

/// Numbers of rules in ascending order, each once.
pub(super) struct Candidates<'a> {
    lists: Vec<&'a [u32]>,
    found: Peekable<vec::IntoIter<u32>>,
}

impl Iterator for Candidates<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let listed = self.lists.iter().filter_map(|list| list.first()).copied();
        let next = listed.chain(self.found.peek().copied()).min()?;
        self.found.next_if_eq(&next);
        for list in &mut self.lists {
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
