//! Sets of targets and ports.

use std::{collections::HashSet, net::IpAddr};

use aho_corasick::AhoCorasick;
use culvert_api::policy::PortRange;
use culvert_api::policy::{check_pattern, listed_name, listed_suffix, pattern_set};
use culvert_proto::{Host, Target};
use ipnet::IpNet;
use prefix_trie::joint::set::JointPrefixSet;
use regex::RegexSet;

/// Sets up to this size are searched one by one.
const SMALL: usize = 8;

/// Targets given by names and addresses.
#[derive(Debug, Default)]
pub struct TargetSet {
    exact: Names,
    suffix: Names,
    keywords: Option<AhoCorasick>,
    patterns: Option<RegexSet>,
    nets: NetSet,
}

/// What a target set says of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The target is in the set.
    Yes,
    /// It is not.
    No,
    /// It is a name, not in the set by name, and the set has addresses: resolve it first.
    NeedsAddress,
}

/// What goes into a [`TargetSet`].
#[derive(Debug, Default, Clone, Copy)]
pub struct TargetLists<'a> {
    /// Exact names.
    pub domain: &'a [String],
    /// Names with all below them.
    pub domain_suffix: &'a [String],
    /// Parts of names.
    pub domain_keyword: &'a [String],
    /// Regular expressions.
    pub domain_regex: &'a [String],
    /// Addresses.
    pub cidr: &'a [IpNet],
}

/// An entry that cannot be compiled: its list and index, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadEntry {
    /// The list, such as `domain_regex`.
    pub list: &'static str,
    /// The entry.
    pub index: usize,
    /// Why.
    pub message: String,
}

impl TargetSet {
    /// Compiles several groups of lists into one set. Problems name the group by its position.
    pub fn compile<'a>(
        groups: impl IntoIterator<Item = (usize, TargetLists<'a>)>,
        problems: &mut Vec<(usize, BadEntry)>,
    ) -> Self {
        let (mut exact, mut suffix) = (Vec::new(), Vec::new());
        let (mut keywords, mut patterns, mut nets) = (Vec::new(), Vec::new(), Vec::new());
        for (group, lists) in groups {
            let mut bad =
                |list, index, message| problems.push((group, BadEntry { list, index, message }));
            for (index, text) in lists.domain.iter().enumerate() {
                match listed_name(text) {
                    Ok(name) => exact.push(name.as_str().into()),
                    Err(message) => bad("domain", index, message),
                }
            }
            for (index, text) in lists.domain_suffix.iter().enumerate() {
                match listed_suffix(text) {
                    Ok(name) => suffix.push(name.as_str().into()),
                    Err(message) => bad("domain_suffix", index, message),
                }
            }
            for (index, text) in lists.domain_keyword.iter().enumerate() {
                if text.is_empty() {
                    bad("domain_keyword", index, "an empty keyword matches every name".into());
                } else {
                    keywords.push(text.to_lowercase());
                }
            }
            for (index, text) in lists.domain_regex.iter().enumerate() {
                match check_pattern(text) {
                    Ok(()) => patterns.push(text.as_str()),
                    Err(message) => bad("domain_regex", index, message),
                }
            }
            nets.extend(lists.cidr.iter().copied());
        }
        let patterns = match pattern_set(&patterns) {
            Ok(patterns) => patterns,
            Err(message) => {
                problems.push((0, BadEntry { list: "domain_regex", index: 0, message }));
                None
            }
        };
        Self {
            exact: Names::new(exact),
            suffix: Names::new(suffix),
            // Building fails only past the automaton's size, which the entry bound keeps far away.
            keywords: (!keywords.is_empty()).then(|| AhoCorasick::new(&keywords).ok()).flatten(),
            patterns,
            nets: NetSet::new(nets),
        }
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty()
            && self.suffix.is_empty()
            && self.keywords.is_none()
            && self.patterns.is_none()
            && self.nets.is_empty()
    }

    /// Whether a target, of which `address` is known if anything is, belongs to the set.
    pub fn matches(&self, host: &Host, address: Option<IpAddr>) -> Match {
        if let Host::Name(name) = host
            && self.matches_name(name.as_str())
        {
            return Match::Yes;
        }
        match address {
            _ if self.nets.is_empty() => Match::No,
            Some(address) if self.nets.contains(address) => Match::Yes,
            Some(_) => Match::No,
            None => Match::NeedsAddress,
        }
    }

    /// Whether a target is in the set by its names or networks alone.
    pub(super) fn is_listed(&self) -> bool {
        self.keywords.is_none() && self.patterns.is_none()
    }

    /// The names of the set, exact ones and those with all below them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.exact.iter().chain(self.suffix.iter())
    }

    /// The networks of the set.
    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.nets.iter()
    }

    fn matches_name(&self, name: &str) -> bool {
        self.exact.contains(name)
            || self.suffix.contains_parent_of(name)
            || self.keywords.as_ref().is_some_and(|keywords| keywords.is_match(name))
            || self.patterns.as_ref().is_some_and(|patterns| patterns.is_match(name))
    }
}

/// Names, searched by hash or one by one.
#[derive(Debug)]
enum Names {
    Few(Vec<Box<str>>),
    Many(HashSet<Box<str>, ahash::RandomState>),
}

impl Default for Names {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Names {
    fn new(names: Vec<Box<str>>) -> Self {
        if names.len() <= SMALL {
            Self::Few(names)
        } else {
            Self::Many(names.into_iter().collect())
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Few(names) if names.is_empty())
    }

    fn iter(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Few(names) => Box::new(names.iter().map(|name| &**name)),
            Self::Many(names) => Box::new(names.iter().map(|name| &**name)),
        }
    }

    fn contains(&self, name: &str) -> bool {
        match self {
            Self::Few(names) => names.iter().any(|known| **known == *name),
            Self::Many(names) => names.contains(name),
        }
    }

    /// Whether `name` or a domain above it is in the set.
    fn contains_parent_of(&self, name: &str) -> bool {
        match self {
            Self::Few(names) => names.iter().any(|known| is_below(name, known)),
            Self::Many(names) => {
                let below = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
                std::iter::once(name).chain(below).any(|parent| names.contains(parent))
            }
        }
    }
}

/// Whether `name` is `parent` or a domain below it.
fn is_below(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Addresses.
#[derive(Debug)]
pub enum NetSet {
    /// Searched one by one.
    Few(Vec<IpNet>),
    /// Searched by prefix.
    Many(JointPrefixSet<IpNet>),
}

impl Default for NetSet {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl NetSet {
    /// Makes a set.
    pub fn new(nets: Vec<IpNet>) -> Self {
        let nets = nets.into_iter().map(canonical_net);
        if nets.len() <= SMALL { Self::Few(nets.collect()) } else { Self::Many(nets.collect()) }
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Few(nets) if nets.is_empty())
    }

    pub(super) fn iter(&self) -> Box<dyn Iterator<Item = IpNet> + '_> {
        match self {
            Self::Few(nets) => Box::new(nets.iter().copied()),
            Self::Many(nets) => Box::new(nets.iter()),
        }
    }

    /// Whether an address (in canonical form) is in the set.
    pub fn contains(&self, address: IpAddr) -> bool {
        match self {
            Self::Few(nets) => nets.iter().any(|net| net.contains(&address)),
            Self::Many(nets) => nets.get_lpm(&IpNet::from(address)).is_some(),
        }
    }
}

/// Host bits cleared; a net of mapped IPv4 addresses as the IPv4 net it means.
fn canonical_net(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && v6.prefix_len() >= 96
        && let Ok(net) = ipnet::Ipv4Net::new(v4, v6.prefix_len() - 96)
    {
        return IpNet::V4(net.trunc());
    }
    net.trunc()
}

/// Ports; empty means any.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports(Vec<(u16, u16)>);

impl Ports {
    /// Makes a set, in one canonical order.
    pub fn new(ranges: &[PortRange]) -> Self {
        let mut ranges: Vec<_> = ranges.iter().map(|range| (range.first, range.last)).collect();
        ranges.sort_unstable();
        ranges.dedup();
        Self(ranges)
    }

    /// Whether every port matches.
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a port matches.
    pub fn matches(&self, target: &Target) -> bool {
        self.is_any() || self.0.iter().any(|&(first, last)| (first..=last).contains(&target.port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(lists: TargetLists<'_>) -> TargetSet {
        let mut problems = Vec::new();
        let set = TargetSet::compile([(0, lists)], &mut problems);
        assert_eq!(problems, []);
        set
    }

    fn host(text: &str) -> Host {
        Host::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn suffixes_match_whole_labels() {
        let many: Vec<String> = (0..20).map(|i| format!("d{i}.example")).collect();
        for extra in [Vec::new(), many] {
            let suffixes: Vec<String> =
                [vec!["Blocked.com".into(), "*.wild.org".into()], extra].concat();
            let set = set(TargetLists { domain_suffix: &suffixes, ..TargetLists::default() });
            for (name, expected) in [
                ("blocked.com", Match::Yes),
                ("a.b.blocked.com", Match::Yes),
                ("A.BLOCKED.COM.", Match::Yes),
                ("notblocked.com", Match::No),
                ("blocked.com.evil", Match::No),
                ("com", Match::No),
                ("x.wild.org", Match::Yes),
            ] {
                assert_eq!(set.matches(&host(name), None), expected, "{name}");
            }
        }
    }

    #[test]
    fn addresses_wait_for_resolution() {
        let nets: Vec<IpNet> =
            vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let many = (0..20).map(|i| format!("192.0.{i}.0/24").parse().unwrap());
        for extra in [Vec::new(), many.collect()] {
            let nets = [nets.clone(), extra].concat();
            let set = set(TargetLists { cidr: &nets, ..TargetLists::default() });
            assert_eq!(set.matches(&host("a.example"), None), Match::NeedsAddress);
            assert_eq!(set.matches(&host("a.example"), Some([10, 1, 2, 3].into())), Match::Yes);
            assert_eq!(set.matches(&host("a.example"), Some([11, 1, 2, 3].into())), Match::No);
            let v6: IpAddr = "2001:db8::1".parse().unwrap();
            assert_eq!(set.matches(&Host::ip(v6), Some(v6)), Match::Yes);
        }
    }

    #[test]
    fn keywords_and_expressions_are_found_anywhere() {
        let (keywords, patterns) = (vec!["Track".to_owned()], vec![r"^ad\d+\.".to_owned()]);
        let set = set(TargetLists {
            domain_keyword: &keywords,
            domain_regex: &patterns,
            ..TargetLists::default()
        });
        for (name, expected) in
            [("a.tracker.net", Match::Yes), ("ad12.x", Match::Yes), ("bad12.x", Match::No)]
        {
            assert_eq!(set.matches(&host(name), None), expected, "{name}");
        }
    }

    #[test]
    fn bad_entries_are_named() {
        let (names, patterns) = (
            vec!["ok.example".to_owned(), "no way".to_owned()],
            vec!["(a{1,1000}){1,1000}".to_owned(), "(".to_owned(), "fine".to_owned()],
        );
        let mut problems = Vec::new();
        let started = std::time::Instant::now();
        let lists =
            TargetLists { domain: &names, domain_regex: &patterns, ..TargetLists::default() };
        TargetSet::compile([(7, lists)], &mut problems);
        assert!(started.elapsed().as_millis() < 1000, "a bomb must not take long");
        let places: Vec<_> =
            problems.iter().map(|(group, bad)| (*group, bad.list, bad.index)).collect();
        assert_eq!(places, [(7, "domain", 1), (7, "domain_regex", 0), (7, "domain_regex", 1)]);
    }
}
