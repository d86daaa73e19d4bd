//! The decision: what a client asked for, and a permit for it.

use std::{
    cell::OnceCell,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use culvert_api::policy::{Access, Hours, Weekday};
use culvert_proto::{Host, Name, Protocol, Target};
use jiff::Timestamp;

use super::{
    Match, Ports, Snapshot, TargetSet, Upstream, User, embedded_v4, is_internal,
    snapshot::{Action, Matchers, Rule},
};

/// A request to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Who, when logged in.
    pub user: Option<&'a Arc<User>>,
    /// From where.
    pub client: IpAddr,
    /// By which protocol.
    pub protocol: Protocol,
    /// Where to.
    pub target: &'a Target,
    /// When it was made, in seconds since 1970: rules' times are about that.
    pub at: i64,
}

/// Names of a request that were resolved.
pub type Resolved = [(Name, Arc<[IpAddr]>)];

/// The answer to a request.
#[derive(Debug)]
pub enum Decision {
    /// It may be carried out as the permit says.
    Permit(Permit),
    /// Resolve this name and ask again.
    NeedsAddresses(Name),
    /// It may not.
    Denied(Denial),
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    /// The target port is in `deny_ports`.
    Port,
    /// A filter of the black list.
    Filter,
    /// A rule.
    Rule(Arc<str>),
    /// No rule matched, and the default is to deny.
    Default,
    /// The target is an internal address.
    Internal,
    /// The target is one of this node's own listeners.
    Own,
    /// The client's address is not in the whitelist.
    Client,
    /// The user is disabled, expired or gone.
    User,
    /// The user may not come from this address.
    Source,
}

impl Denial {
    /// The name in metrics and records.
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }

    /// All names, in the order of [`Denial::index`].
    pub const NAMES: [&'static str; 9] = [
        "port",
        "filter",
        "rule",
        "default",
        "internal",
        "own_listener",
        "client",
        "user",
        "source",
    ];

    /// The position of the name.
    pub fn index(&self) -> usize {
        match self {
            Self::Port => 0,
            Self::Filter => 1,
            Self::Rule(_) => 2,
            Self::Default => 3,
            Self::Internal => 4,
            Self::Own => 5,
            Self::Client => 6,
            Self::User => 7,
            Self::Source => 8,
        }
    }
}

/// Proof that policy allowed a request, and what may be dialled for it. Only
/// [`Snapshot::authorize`] makes one.
#[derive(Debug, Clone)]
pub struct Permit {
    generation: u64,
    version: u64,
    rule: Option<Arc<str>>,
    user: Option<Arc<User>>,
    upstream: Arc<Upstream>,
    addresses: Vec<SocketAddr>,
    at: i64,
}

impl Permit {
    /// When the request was made, in seconds since 1970.
    pub fn at(&self) -> i64 {
        self.at
    }

    /// The snapshot that allowed it.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What records call that snapshot.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The rule that decided; `None` is the default.
    pub fn rule(&self) -> Option<&Arc<str>> {
        self.rule.as_ref()
    }

    /// For whom.
    pub fn user(&self) -> Option<&Arc<User>> {
        self.user.as_ref()
    }

    /// Through what.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The addresses that may be dialled; at least one.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The local address to dial from: the user's, or the upstream's.
    pub fn egress(&self) -> Option<IpAddr> {
        self.user.as_ref().and_then(|user| user.egress).or(self.upstream.egress)
    }
}

/// What the policy says of one address of a target.
enum Verdict<'a> {
    Allow(Option<&'a Rule>, &'a Arc<Upstream>),
    Redirect(&'a Rule, &'a Target, &'a Arc<Upstream>),
    Deny(Denial),
    NeedsAddress,
}

impl Snapshot {
    /// Judges a request. A name is resolved only when a condition on addresses is met before anything
    /// decides, and before direct dialling; what is known of names is in `resolved`.
    pub fn authorize(&self, query: Query<'_>, resolved: &Resolved, now: i64) -> Decision {
        if let Some(denial) = self.judge_client(query, now) {
            return Decision::Denied(denial);
        }
        match &query.target.host {
            Host::Ip(ip) => self.decide(query, &[*ip], resolved),
            Host::Name(name) => match find(resolved, name) {
                Some(addresses) => self.decide(query, addresses, resolved),
                None => match self.judge(query, None) {
                    Verdict::Deny(denial) => Decision::Denied(denial),
                    Verdict::Redirect(rule, to, upstream) => {
                        self.redirect(query, rule, to, upstream, resolved)
                    }
                    Verdict::Allow(..) | Verdict::NeedsAddress => {
                        Decision::NeedsAddresses(name.clone())
                    }
                },
            },
        }
    }

    /// What does not depend on the target.
    pub fn judge_client(&self, query: Query<'_>, now: i64) -> Option<Denial> {
        if !self.admits(query.client) {
            return Some(Denial::Client);
        }
        let user = query.user?;
        if !user.is_active(now) {
            return Some(Denial::User);
        }
        (!user.comes_from(query.client)).then_some(Denial::Source)
    }

    /// Judges each address; those that the first allowed one's rule allows too may be dialled.
    fn decide(&self, query: Query<'_>, addresses: &[IpAddr], resolved: &Resolved) -> Decision {
        let mut denied = None;
        let mut permit: Option<Permit> = None;
        for &ip in addresses {
            let ip = ip.to_canonical();
            let address = SocketAddr::new(ip, query.target.port);
            // What denies an IPv4 address denies the ways that lead to it through IPv6.
            let inner =
                embedded_v4(ip).and_then(|inner| self.denied_by_target(query, inner.into()));
            match inner.map_or_else(|| self.judge(query, Some(ip)), Verdict::Deny) {
                Verdict::Redirect(rule, to, upstream) if permit.is_none() => {
                    return self.redirect(query, rule, to, upstream, resolved);
                }
                Verdict::Allow(rule, upstream) => match self.refuse_dial(address) {
                    Some(denial) => denied = denied.or(Some(denial)),
                    None => {
                        let name = rule.map(|rule| rule.name.clone());
                        let permit = permit
                            .get_or_insert_with(|| self.permit(query, name.clone(), upstream));
                        if permit.rule == name {
                            permit.addresses.push(address);
                        }
                    }
                },
                Verdict::Deny(denial) => denied = denied.or(Some(denial)),
                Verdict::Redirect(..) | Verdict::NeedsAddress => {}
            }
        }
        match permit {
            Some(permit) => Decision::Permit(permit),
            None => Decision::Denied(denied.unwrap_or(Denial::Default)),
        }
    }

    fn permit(&self, query: Query<'_>, rule: Option<Arc<str>>, upstream: &Arc<Upstream>) -> Permit {
        Permit {
            generation: self.generation,
            version: self.version,
            rule,
            user: query.user.cloned(),
            upstream: upstream.clone(),
            addresses: Vec::with_capacity(1),
            at: query.at,
        }
    }

    /// A redirect was named by the operator, so internal targets are fine; our own listeners are not.
    fn redirect(
        &self,
        query: Query<'_>,
        rule: &Rule,
        to: &Target,
        upstream: &Arc<Upstream>,
        resolved: &Resolved,
    ) -> Decision {
        let addresses = match &to.host {
            Host::Ip(ip) => std::slice::from_ref(ip),
            Host::Name(name) => match find(resolved, name) {
                Some(addresses) => addresses,
                None => return Decision::NeedsAddresses(name.clone()),
            },
        };
        let mut permit = self.permit(query, Some(rule.name.clone()), upstream);
        let dialled = addresses.iter().map(|ip| SocketAddr::new(ip.to_canonical(), to.port));
        permit.addresses.extend(dialled.filter(|address| !self.own.contains(*address)));
        if permit.addresses.is_empty() {
            Decision::Denied(Denial::Own)
        } else {
            Decision::Permit(permit)
        }
    }

    /// What denies an address as such: a filter, or a rule that names targets.
    fn denied_by_target(&self, query: Query<'_>, address: IpAddr) -> Option<Denial> {
        if self.filter(query.target, Some(address)) == Match::Yes {
            return Some(Denial::Filter);
        }
        let (rule, _) = self.matchers.first_rule(query, Some(address))?;
        let denies = matches!(rule.action, Action::Deny) && rule.targets.is_some();
        denies.then(|| Denial::Rule(rule.name.clone()))
    }

    fn refuse_dial(&self, address: SocketAddr) -> Option<Denial> {
        if self.own.contains(address) {
            return Some(Denial::Own);
        }
        // This host's own addresses, too: from here they are reached past what keeps others out.
        let internal = is_internal(address.ip()) || self.own.is_here(address.ip());
        let allowed = || self.matchers.allow_internal.contains(address.ip());
        (internal && !allowed()).then_some(Denial::Internal)
    }

    /// Ports, filters, rules, default, in that order.
    fn judge<'a>(&'a self, query: Query<'_>, address: Option<IpAddr>) -> Verdict<'a> {
        if self.matchers.deny_ports.contains(&query.target.port) {
            return Verdict::Deny(Denial::Port);
        }
        match self.filter(query.target, address) {
            Match::Yes => return Verdict::Deny(Denial::Filter),
            Match::NeedsAddress => return Verdict::NeedsAddress,
            Match::No => {}
        }
        match self.matchers.first_rule(query, address) {
            Some((_, Match::NeedsAddress)) => Verdict::NeedsAddress,
            Some((rule, _)) => match &rule.action {
                Action::Allow(upstream) => Verdict::Allow(Some(rule), upstream),
                Action::Deny => Verdict::Deny(Denial::Rule(rule.name.clone())),
                Action::Redirect(to, upstream) => Verdict::Redirect(rule, to, upstream),
            },
            None => match self.matchers.default {
                Access::Allow => Verdict::Allow(None, &self.matchers.direct),
                Access::Deny => Verdict::Deny(Denial::Default),
            },
        }
    }

    /// Whether the black list has the target and the white list does not.
    pub fn filter(&self, target: &Target, address: Option<IpAddr>) -> Match {
        match in_lists(&self.matchers.black, target, address) {
            Match::No => Match::No,
            black => match in_lists(&self.matchers.white, target, address) {
                Match::Yes => Match::No,
                Match::NeedsAddress => Match::NeedsAddress,
                Match::No => black,
            },
        }
    }
}

fn in_lists(lists: &[(Ports, TargetSet)], target: &Target, address: Option<IpAddr>) -> Match {
    let mut result = Match::No;
    for (ports, targets) in lists {
        if !ports.matches(target) {
            continue;
        }
        // A filter of ports alone concerns every target.
        if targets.is_empty() {
            return Match::Yes;
        }
        match targets.matches(&target.host, address) {
            Match::Yes => return Match::Yes,
            Match::NeedsAddress => result = Match::NeedsAddress,
            Match::No => {}
        }
    }
    result
}

impl Matchers {
    /// The first rule that matches, or that may once the name is resolved.
    fn first_rule(&self, query: Query<'_>, address: Option<IpAddr>) -> Option<(&Rule, Match)> {
        let local = OnceCell::new();
        let local = || *local.get_or_init(|| self.local(query.at));
        let judged = |rule: &Rule| rule.matches(query, address, &local);
        let is_met = |(_, judged): &(&Rule, Match)| *judged != Match::No;
        match &self.index {
            None => self.rules.iter().map(|rule| (rule, judged(rule))).find(is_met),
            Some(index) => {
                let rules = index.candidates(query, address).map(|number| &self.rules[number]);
                rules.map(|rule| (rule, judged(rule))).find(is_met)
            }
        }
    }

    /// The day of the week and the minute of the day, in the policy's zone.
    fn local(&self, at: i64) -> (Weekday, u16) {
        let local = Timestamp::from_second(at).unwrap_or_default().to_zoned(self.zone.clone());
        let day = usize::from(local.weekday().to_monday_zero_offset().unsigned_abs());
        let minute = u16::from(local.hour().unsigned_abs()) * 60;
        (Weekday::ALL[day % 7], minute + u16::from(local.minute().unsigned_abs()))
    }
}

impl Rule {
    pub(super) fn matches(
        &self,
        query: Query<'_>,
        address: Option<IpAddr>,
        local: &dyn Fn() -> (Weekday, u16),
    ) -> Match {
        let others = self.ports.matches(query.target)
            && met(&self.users, |users| {
                query.user.is_some_and(|user| users.iter().any(|name| *name == user.name))
            })
            && met(&self.groups, |groups| {
                query
                    .user
                    .is_some_and(|user| groups.iter().any(|group| user.groups.contains(group)))
            })
            && met(&self.clients, |clients| clients.contains(query.client))
            && met(&self.protocols, |protocols| protocols.contains(&query.protocol))
            && self.is_time(local);
        match &self.targets {
            _ if !others => Match::No,
            Some(targets) => targets.matches(&query.target.host, address),
            None => Match::Yes,
        }
    }
}

impl Rule {
    /// Whether it is the day and the time of day; what goes over midnight is of the day it began on.
    fn is_time(&self, local: &dyn Fn() -> (Weekday, u16)) -> bool {
        let is_day = |day: Weekday| met(&self.weekdays, |days| days.contains(&day));
        match &self.time {
            None => self.weekdays.is_none() || is_day(local().0),
            Some(parts) => {
                let (day, minute) = local();
                let began = |hours: &Hours| {
                    let is_after_midnight = hours.first > hours.end && minute < hours.end;
                    if is_after_midnight { day.before() } else { day }
                };
                parts.iter().any(|hours| hours.contains(minute) && is_day(began(hours)))
            }
        }
    }
}

/// A condition that is not given is met.
fn met<T>(condition: &Option<T>, test: impl FnOnce(&T) -> bool) -> bool {
    condition.as_ref().is_none_or(test)
}

fn find<'a>(resolved: &'a Resolved, name: &Name) -> Option<&'a [IpAddr]> {
    resolved.iter().find(|(known, _)| known == name).map(|(_, addresses)| &**addresses)
}
