//! From a policy as written to a snapshot, with every problem named, off the workers.

use std::{collections::HashMap, sync::Arc};

use culvert_api::{
    Place, Problem,
    policy::{self as api, Access, Policy, redirect_target},
};
use culvert_proto::Protocol;
use jiff::tz::TimeZone;

use super::{
    Credential, Directory, NetSet, OwnAddresses, Ports, Snapshot, TargetLists, TargetSet, Upstream,
    User, UserId, UserUse,
    index::RuleIndex,
    snapshot::{Action, Alive, Matchers, Rule, SHARDS, Shard, shard_of},
};
use crate::settings::Settings;

/// What is to be in force.
#[derive(Debug, Clone, Copy)]
pub enum Draft<'a> {
    /// A whole policy.
    Whole(&'a Policy),
    /// A change of what is in force, which costs what it changes.
    Change {
        /// The policy without its users, if it changed.
        policy: Option<&'a Policy>,
        /// Names of users that are gone, or have another name.
        gone: &'a [String],
        /// New and changed users.
        users: &'a [api::User],
    },
}

impl Draft<'_> {
    /// What is in force already; for other settings.
    pub const SAME: Self = Self::Change { policy: None, gone: &[], users: &[] };
}

/// Compiles a draft. What did not change since `previous` is shared with it: filters and rules, users' shards,
/// remembered passwords, and what users have in use. Nothing of `previous` is touched unless all is well;
/// then changed limits hold at once.
///
/// # Errors
/// All problems, with keys relative to the policy.
pub fn compile(
    draft: Draft<'_>,
    settings: Settings,
    own: OwnAddresses,
    generation: u64,
    previous: Option<&Snapshot>,
) -> Result<Snapshot, Vec<Problem>> {
    let mut compiler = Compiler { problems: Vec::new() };
    let nothing = Policy { default: Access::Deny, ..Policy::default() };
    let policy = match draft {
        Draft::Whole(policy) => Some(policy),
        Draft::Change { policy, .. } => policy,
    };
    let known = previous.map(|previous| previous.matchers.clone());
    let matchers = match (policy, known) {
        (None, Some(known)) => known,
        (policy, known) => {
            let policy = policy.unwrap_or(&nothing);
            let fingerprint = fingerprint_of_matchers(policy);
            let same = known.filter(|known| known.fingerprint == fingerprint);
            same.unwrap_or_else(|| compiler.matchers(policy, fingerprint))
        }
    };
    let empty = Directory::empty();
    let before = previous.map_or(&empty, |previous| &previous.directory);
    let directory = match draft {
        Draft::Whole(policy) => compiler.directory(&policy.user, before),
        Draft::Change { gone, users, .. } => compiler.changed(gone, users, before),
    };
    compiler.problems.extend(api::check_users_bound(directory.len()));

    if !compiler.problems.is_empty() {
        return Err(compiler.problems);
    }
    let apply = |user: &Arc<User>| user.shared.apply(&user.limits);
    match draft {
        Draft::Whole(_) => directory.users().for_each(apply),
        Draft::Change { users, .. } => {
            users.iter().filter_map(|user| directory.find(user.name.as_bytes())).for_each(apply);
        }
    }
    Ok(Snapshot {
        _alive: Alive::new(),
        generation,
        version: generation,
        directory,
        settings,
        matchers,
        own,
    })
}

struct Compiler {
    problems: Vec<Problem>,
}

impl Compiler {
    fn problem(&mut self, key: String, message: impl Into<String>) {
        self.problems.push(Problem::new(Place::Nowhere, key, message));
    }

    fn matchers(&mut self, policy: &Policy, fingerprint: blake3::Hash) -> Arc<Matchers> {
        self.problems.extend(policy.check());
        let direct = Arc::new(Upstream { name: "direct".into(), egress: None });
        let upstreams: HashMap<&str, Arc<Upstream>> = policy
            .upstream
            .iter()
            .map(|upstream| {
                let name = upstream.name.as_str();
                let egress = upstream.egress_address;
                (name, Arc::new(Upstream { name: name.into(), egress }))
            })
            .collect();
        let rules = policy.rule.iter().enumerate();
        let rules: Box<[Rule]> =
            rules.map(|(i, rule)| self.rule(i, rule, &upstreams, &direct)).collect();
        let given: Vec<&api::When> = policy.rule.iter().map(|rule| &rule.when).collect();
        Arc::new(Matchers {
            fingerprint,
            default: policy.default,
            deny_ports: policy.deny_ports.clone().into(),
            filters: policy.filter.len(),
            whitelist: policy.whitelist.clone().map(NetSet::new),
            allow_internal: NetSet::new(policy.allow_internal.clone()),
            black: self.filters(policy, Access::Deny),
            white: self.filters(policy, Access::Allow),
            index: RuleIndex::new(&rules, &given),
            rules,
            zone: self.zone(policy),
            direct,
        })
    }

    fn zone(&mut self, policy: &Policy) -> TimeZone {
        let Some(name) = &policy.timezone else { return TimeZone::UTC };
        TimeZone::get(name).unwrap_or_else(|_| {
            let message = format!("no zone `{name}`; a name such as UTC or Europe/Berlin");
            self.problem("timezone".into(), message);
            TimeZone::UTC
        })
    }

    /// The filters of one kind, gathered by their ports: usually one set for all.
    fn filters(&mut self, policy: &Policy, action: Access) -> Box<[(Ports, TargetSet)]> {
        let mut by_ports: HashMap<(Ports, bool), Vec<(usize, TargetLists<'_>)>> = HashMap::new();
        for (i, filter) in policy.filter.iter().enumerate() {
            if filter.action == action {
                let lists = TargetLists {
                    domain: &filter.domain,
                    domain_suffix: &filter.domain_suffix,
                    domain_keyword: &filter.domain_keyword,
                    domain_regex: &filter.domain_regex,
                    cidr: &filter.cidr,
                };
                // Ports alone mean every target; they do not mix with filters that name some.
                let key = (Ports::new(&filter.port), lists.is_empty());
                by_ports.entry(key).or_default().push((i, lists));
            }
        }
        let mut sets = Vec::new();
        for ((ports, _), group) in by_ports {
            let mut bad = Vec::new();
            sets.push((ports, TargetSet::compile(group, &mut bad)));
            for (i, bad) in bad {
                self.problem(format!("filter[{i}].{}[{}]", bad.list, bad.index), bad.message);
            }
        }
        sets.into()
    }

    fn rule(
        &mut self,
        i: usize,
        rule: &api::Rule,
        upstreams: &HashMap<&str, Arc<Upstream>>,
        direct: &Arc<Upstream>,
    ) -> Rule {
        let when = &rule.when;
        let lists = TargetLists {
            domain: &when.domain,
            domain_suffix: &when.domain_suffix,
            domain_keyword: &when.domain_keyword,
            domain_regex: &when.domain_regex,
            cidr: &when.cidr,
        };
        let mut bad = Vec::new();
        let targets = TargetSet::compile([(i, lists)], &mut bad);
        for (i, bad) in bad {
            self.problem(format!("rule[{i}].when.{}[{}]", bad.list, bad.index), bad.message);
        }
        let to = rule.to.as_deref().and_then(|to| match redirect_target(to) {
            Ok(target) => Some(target),
            Err(message) => {
                self.problem(format!("rule[{i}].to"), message);
                None
            }
        });
        let upstream =
            rule.upstream.as_deref().and_then(|name| upstreams.get(name)).unwrap_or(direct).clone();
        let name = if rule.name.is_empty() { format!("#{}", i + 1) } else { rule.name.clone() };
        let protocol =
            |name: &String| Protocol::ALL.into_iter().find(|protocol| protocol.name() == name);
        Rule {
            name: name.into(),
            users: given(&when.user).map(|users| users.iter().map(|u| u.as_str().into()).collect()),
            groups: given(&when.group)
                .map(|groups| groups.iter().map(|name| stable_hash(name)).collect()),
            clients: given(&when.client).map(|nets| NetSet::new(nets.to_vec())),
            protocols: given(&when.protocol)
                .map(|names| names.iter().filter_map(protocol).collect()),
            targets: (!lists.is_empty()).then_some(targets),
            ports: Ports::new(&when.port),
            time: given(&when.time).map(Into::into),
            weekdays: given(&when.weekday).map(Into::into),
            action: Action::of(rule.action, to, upstream),
        }
    }

    /// The users of before, without those that are gone and with those that are new.
    fn changed(&mut self, gone: &[String], users: &[api::User], before: &Directory) -> Directory {
        self.problems.extend(api::check_users(users));
        let mut shards = before.shards.clone();
        for name in gone {
            Arc::make_mut(&mut shards[shard_of(name.as_bytes())]).remove(name.as_bytes());
        }
        for (i, user) in users.iter().enumerate() {
            let name = user.name.as_bytes();
            if let Some(compiled) = self.user(i, user, before.find(name)) {
                Arc::make_mut(&mut shards[shard_of(name)]).insert(compiled);
            }
        }
        Directory { shards }
    }

    fn directory(&mut self, users: &[api::User], previous: &Directory) -> Directory {
        self.problems.extend(api::check_users(users));
        let mut by_shard: Vec<Vec<(usize, &api::User)>> = vec![Vec::new(); SHARDS];
        for (i, user) in users.iter().enumerate() {
            by_shard[shard_of(user.name.as_bytes())].push((i, user));
        }
        let shards = by_shard.iter().zip(&previous.shards).map(|(users, before)| {
            let unchanged = users.len() == before.len()
                && users.iter().all(|(_, user)| {
                    before
                        .get(user.name.as_bytes())
                        .is_some_and(|known| known.fingerprint == fingerprint(user))
                });
            if unchanged { before.clone() } else { Arc::new(self.shard(users, before)) }
        });
        Directory { shards: shards.collect() }
    }

    fn shard(&mut self, users: &[(usize, &api::User)], before: &Shard) -> Shard {
        let mut shard = Shard::with_capacity(users.len());
        for (i, user) in users {
            let known = before.get(user.name.as_bytes());
            if let Some(compiled) = self.user(*i, user, known) {
                shard.insert(compiled);
            }
        }
        shard
    }

    fn user(&mut self, i: usize, user: &api::User, known: Option<&Arc<User>>) -> Option<User> {
        // The same hash keeps what was remembered of its password; a new one forgets.
        let credential = match known {
            Some(known) if known.credential.hash() == user.password_hash => {
                known.credential.clone()
            }
            _ => match Credential::new(&user.password_hash) {
                Ok(credential) => Arc::new(credential),
                Err(error) => {
                    self.problem(format!("user[{i}].password_hash"), error.to_string());
                    return None;
                }
            },
        };
        let limits = user.limits.clone();
        let id = UserId(user.id.unwrap_or_else(|| stable_hash(&user.name)));
        Some(User {
            id,
            name: user.name.as_str().into(),
            credential,
            status: user.status,
            expires: user.expires.map(|time| time.unix_timestamp()),
            groups: user.groups.iter().map(|name| stable_hash(name)).collect(),
            sources: limits.source_addresses.clone().map(NetSet::new),
            egress: limits.egress_address,
            shared: known
                .filter(|known| known.id == id)
                .map_or_else(|| Arc::new(UserUse::new(id)), |known| known.shared.clone()),
            fingerprint: fingerprint(user),
            limits,
        })
    }
}

impl TargetLists<'_> {
    fn is_empty(&self) -> bool {
        self.domain.is_empty()
            && self.domain_suffix.is_empty()
            && self.domain_keyword.is_empty()
            && self.domain_regex.is_empty()
            && self.cidr.is_empty()
    }
}

/// A hash of all that is not of users.
fn fingerprint_of_matchers(policy: &Policy) -> blake3::Hash {
    let Policy {
        default,
        allow_internal,
        deny_ports,
        whitelist,
        timezone,
        user: _,
        filter,
        rule,
        upstream,
    } = policy;
    let parts = (default, allow_internal, deny_ports, whitelist, timezone, filter, rule, upstream);
    let mut hasher = blake3::Hasher::new();
    // A hasher takes everything, and no map among these has a key that is no text.
    let _ = serde_json::to_writer(&mut hasher, &parts);
    hasher.finalize()
}

fn given<T>(list: &[T]) -> Option<&[T]> {
    (!list.is_empty()).then_some(list)
}

/// A hash that is the same in every process and version.
fn stable_hash(text: &str) -> u64 {
    let hash = blake3::hash(text.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default())
}

/// A hash of everything about a user, good within this process.
fn fingerprint(user: &api::User) -> u64 {
    let hasher = ahash::RandomState::with_seeds(0x63, 0x75, 0x6c, 0x76);
    let limits = &user.limits;
    hasher.hash_one((
        (
            user.id,
            &user.name,
            &user.password_hash,
            user.status == api::Status::Active,
            &user.groups,
        ),
        user.expires.map(|time| time.unix_timestamp()),
        (limits.up.map(|rate| rate.0), limits.down.map(|rate| rate.0), limits.burst.map(|b| b.0)),
        (limits.sessions, limits.new_sessions_per_second, limits.devices, limits.evict_oldest),
        limits.metered,
        (&limits.source_addresses, limits.egress_address),
    ))
}

#[cfg(test)]
mod tests;
