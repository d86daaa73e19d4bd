//! From the database to what nodes follow: whole snapshots, and what changed since a generation.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::{Arc, PoisonError},
};

use culvert_api::{
    link::{self, Down, FRAME_MAX, down, encode},
    policy::Policy,
};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    TransactionTrait,
};
use tokio::sync::{Mutex, Semaphore};

use crate::{
    calendar::Calendar,
    http::Problem,
    store::{
        Store,
        entity::{bandwidth_limit, change, rule, url_filter, usage, user, whitelist},
    },
};

/// Changed users beyond which a whole snapshot is sent.
const DELTA_MAX: usize = 20_000;
/// Generations whose news are kept; nodes of further ones have theirs read for each.
const NEWS_MAX: usize = 64;
/// News read at once: the whole, and a change.
const READING: usize = 2;
/// Users read by one query.
const PART: usize = 5_000;

/// What brings a node from one generation to a later one; the same for all that have the one.
pub struct News {
    /// Where it leads.
    pub generation: u64,
    /// Whose quotas may be others now; `None` is all.
    pub metered: Option<Vec<u64>>,
    /// The message for the node, encoded.
    pub frame: Vec<u8>,
}

/// Tells many nodes the same news.
pub struct Publisher {
    store: Store,
    /// By the generation a node has; 0 is none.
    news: std::sync::Mutex<HashMap<u64, Slot>>,
    /// Who reads: the database has others to answer.
    reading: Semaphore,
}

/// News that are there, or read by whoever has the lock: others who come with the same generation wait for
/// these, and nobody else.
type Slot = Arc<Mutex<Option<Arc<News>>>>;

impl Publisher {
    /// For a database.
    pub fn new(store: Store) -> Self {
        Self { store, news: std::sync::Mutex::default(), reading: Semaphore::new(READING) }
    }

    /// What a node is to be told that has a generation; 0 is none.
    ///
    /// # Errors
    /// The database fails.
    pub async fn news(&self, known: u64) -> Result<Arc<News>, DbErr> {
        if known > 0 {
            let slot = self.slot(known);
            let mut news = slot.lock().await;
            if let Some(news) = self.fresh(&news) {
                return Ok(news);
            }
            let reading = self.reading.acquire().await;
            let delta = delta(&self.store, known).await?;
            drop(reading);
            if let Some(delta) = delta {
                let metered = delta.upserts.iter().filter(|user| user.metered).map(|user| user.id);
                let (generation, metered) = (delta.generation, Some(metered.collect()));
                if let Some(frame) = frame(down::Body::Delta(delta)) {
                    return Ok(news.insert(Arc::new(News { generation, metered, frame })).clone());
                }
            }
        }
        let slot = self.slot(0);
        let mut news = slot.lock().await;
        if let Some(news) = self.fresh(&news) {
            return Ok(for_node(news, known));
        }
        let _reading = self.reading.acquire().await;
        let whole = snapshot(&self.store).await?;
        let generation = whole.generation;
        let frame = frame(down::Body::Snapshot(whole)).unwrap_or_else(|| {
            // They keep what they have.
            tracing::error!(
                generation,
                "users, filters and rules are more than the {FRAME_MAX} bytes that nodes take; remove some"
            );
            Vec::new()
        });
        let whole = news.insert(Arc::new(News { generation, metered: None, frame }));
        Ok(for_node(whole.clone(), known))
    }

    /// Where the news for a generation are, or will be. Those that nobody reads and that are old are forgotten.
    fn slot(&self, known: u64) -> Slot {
        let mut slots = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot.try_lock().is_ok_and(|news| self.fresh(&news).is_some())
        });
        if slots.len() >= NEWS_MAX && known > 0 {
            return Slot::default();
        }
        slots.entry(known).or_default().clone()
    }

    /// News that lead to the present generation.
    fn fresh(&self, news: &Option<Arc<News>>) -> Option<Arc<News>> {
        let present = self.store.known_generation();
        news.as_ref().filter(|news| news.generation >= present).cloned()
    }
}

/// News that could not be put into a message leave a node where it is.
fn for_node(news: Arc<News>, known: u64) -> Arc<News> {
    if !news.frame.is_empty() {
        return news;
    }
    Arc::new(News { generation: known, metered: None, frame: Vec::new() })
}

fn json(policy: &Policy) -> Vec<u8> {
    serde_json::to_vec(policy).unwrap_or_default()
}

/// A message's frame; `None` if it is longer than nodes take.
fn frame(body: down::Body) -> Option<Vec<u8>> {
    let mut frame = Vec::new();
    encode(&Down::from(body), &mut frame);
    (frame.len() <= FRAME_MAX).then_some(frame)
}

/// Says at once what a node would say of a policy.
///
/// # Errors
/// 422 with the first problem.
pub fn check(policy: &Policy) -> Result<(), Problem> {
    refuse(policy.check().into_iter().chain(policy.check_targets()))
}

/// The first of what a node would say, if it would say anything.
///
/// # Errors
/// 422 with it.
pub fn refuse(problems: impl IntoIterator<Item = culvert_api::Problem>) -> Result<(), Problem> {
    match problems.into_iter().next() {
        None => Ok(()),
        Some(problem) => Err(Problem::invalid(problem.to_string())),
    }
}

/// The members of a group; everybody without a name.
///
/// # Errors
/// The database fails.
pub async fn members(db: &impl ConnectionTrait, group: &str) -> Result<Vec<i64>, DbErr> {
    let users = user::Entity::find()
        .select_only()
        .column(user::Column::Id)
        .column(user::Column::Groups)
        .into_tuple::<(i64, String)>()
        .all(db)
        .await?;
    let belongs = |(id, groups): (i64, String)| {
        let groups: Vec<String> = serde_json::from_str(&groups).unwrap_or_default();
        (group.is_empty() || groups.iter().any(|name| name == group)).then_some(id)
    };
    Ok(users.into_iter().filter_map(belongs).collect())
}

/// A whole snapshot.
async fn snapshot(store: &Store) -> Result<link::Snapshot, DbErr> {
    let db = store.db().begin().await?;
    let generation = generation(&db).await?;
    let policy = json(&policy(&db).await?);
    let rates = Rates::load(&db).await?;
    let mut users = Vec::new();
    let mut after = 0;
    loop {
        let part = user::Entity::find()
            .filter(user::Column::Id.gt(after))
            .order_by_asc(user::Column::Id)
            .limit(PART as u64)
            .all(&db)
            .await?;
        let Some(last) = part.last() else { break };
        after = last.id;
        users.extend(of_nodes(&db, &rates, part).await?);
    }
    db.commit().await?;
    Ok(link::Snapshot { generation, policy, users })
}

/// What changed since a generation; `None` when a whole snapshot is the shorter way.
async fn delta(store: &Store, base: u64) -> Result<Option<link::Delta>, DbErr> {
    let db = store.db().begin().await?;
    let generation = generation(&db).await?;
    let changes = change::Entity::find()
        .filter(change::Column::Generation.gt(base.cast_signed()))
        .limit(2 * DELTA_MAX as u64)
        .all(&db)
        .await?;
    let oldest =
        change::Entity::find().order_by_asc(change::Column::Generation).limit(1).one(&db).await?;
    if changes.len() >= 2 * DELTA_MAX {
        return Ok(None);
    }
    // Changes are kept for a while only.
    let known = oldest.is_some_and(|oldest| oldest.generation.cast_unsigned() <= base + 1);
    let ids: BTreeSet<i64> = changes.iter().map(|change| change.user_id).collect();
    if (!known && generation != base) || ids.len() > DELTA_MAX || generation < base {
        return Ok(None);
    }
    let policy = if ids.contains(&0) { json(&policy(&db).await?) } else { Vec::new() };
    let ids: Vec<i64> = ids.into_iter().filter(|id| *id > 0).collect();
    let rates = Rates::load(&db).await?;
    let (mut upserts, mut deletes) = (Vec::new(), Vec::new());
    for part in ids.chunks(PART) {
        let rows = user::Entity::find().filter(user::Column::Id.is_in(part.iter().copied()));
        let rows = rows.all(&db).await?;
        let there: BTreeSet<i64> = rows.iter().map(|row| row.id).collect();
        deletes.extend(part.iter().filter(|id| !there.contains(id)).map(|id| id.cast_unsigned()));
        upserts.extend(of_nodes(&db, &rates, rows).await?);
    }
    db.commit().await?;
    Ok(Some(link::Delta { base, generation, policy, upserts, deletes }))
}

async fn generation(db: &impl ConnectionTrait) -> Result<u64, DbErr> {
    let head = crate::store::entity::head::Entity::find().one(db).await?;
    Ok(head.map_or(0, |head| head.generation.cast_unsigned()))
}

/// Says before an edit of expressions is committed whether a node would take all of them together. Beside
/// the event loop: that takes a while.
///
/// # Errors
/// 422 with the first problem, or the database fails.
pub async fn check_together(db: &impl ConnectionTrait) -> Result<(), Problem> {
    let policy = policy(db).await?;
    let checked = tokio::task::spawn_blocking(move || policy.check_together()).await;
    refuse(checked.map_err(|_| Problem::invalid("the expressions could not be checked"))?)
}

/// The policy without its users.
async fn policy(db: &impl ConnectionTrait) -> Result<Policy, DbErr> {
    let mut policy = Policy::default();
    let filters = url_filter::Entity::find().filter(url_filter::Column::Enabled.eq(true));
    let filters = filters.order_by_asc(url_filter::Column::Id).all(db).await?;
    // One that is left out might be the one that refuses: rather nothing new than that.
    let unreadable = |reason: String| DbErr::Custom(format!("a row that is no policy: {reason}"));
    // Many rows, but few that differ in more than what they name.
    let mut alike: HashMap<(&str, &str), usize> = HashMap::new();
    for row in &filters {
        let filter = crate::http::filter_of(row).map_err(unreadable)?;
        match alike.entry((&row.action, &row.ports)) {
            Entry::Occupied(known) => policy.filter[*known.get()].absorb(filter),
            Entry::Vacant(place) => {
                place.insert(policy.filter.len());
                policy.filter.push(filter);
            }
        }
    }
    let rules = rule::Entity::find().filter(rule::Column::Enabled.eq(true));
    let rules = rules.order_by_asc(rule::Column::Position).order_by_asc(rule::Column::Id);
    let rules = rules.all(db).await?;
    let rules = rules.iter().map(crate::http::rule_of).collect::<Result<_, _>>();
    policy.rule = rules.map_err(unreadable)?;
    let clients = whitelist::Entity::find().all(db).await?;
    let clients = clients.iter().map(|row| row.cidr.parse::<ipnet::IpNet>());
    let clients = clients.collect::<Result<Vec<_>, _>>();
    let clients = clients.map_err(|error| unreadable(error.to_string()))?;
    policy.whitelist = (!clients.is_empty()).then_some(clients);
    crate::http::settings_of(db).await?.apply(&mut policy);
    Ok(policy)
}

/// All rates.
struct Rates(HashMap<(String, String), bandwidth_limit::Model>);

impl Rates {
    async fn load(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        let rows = bandwidth_limit::Entity::find().all(db).await?;
        Ok(Self(
            rows.into_iter().map(|row| ((row.kind.clone(), row.subject.clone()), row)).collect(),
        ))
    }

    fn get(&self, kind: &str, subject: &str) -> Option<&bandwidth_limit::Model> {
        self.0.get(&(kind.to_owned(), subject.to_owned()))
    }

    /// A user's own, else the highest of the groups', else the default.
    fn of(&self, user: i64, groups: &[String]) -> [Option<u64>; 3] {
        let own = self.get("user", &user.to_string());
        let of_groups = || {
            let rows: Vec<_> = groups.iter().filter_map(|name| self.get("group", name)).collect();
            let most = |of: fn(&bandwidth_limit::Model) -> Option<i64>| {
                // No limit is the highest.
                let values: Option<Vec<i64>> = rows.iter().map(|row| of(row)).collect();
                values.and_then(|values| values.into_iter().max())
            };
            (!rows.is_empty())
                .then(|| [most(|row| row.up), most(|row| row.down), most(|row| row.burst)])
        };
        let own = own.map(|row| [row.up, row.down, row.burst]);
        let default = || self.get("default", "").map(|row| [row.up, row.down, row.burst]);
        let rates = own.or_else(of_groups).or_else(default).unwrap_or_default();
        rates.map(|rate| rate.map(i64::cast_unsigned))
    }
}

/// Users as nodes know them. Those whose quota is spent may not log in.
async fn of_nodes(
    db: &impl ConnectionTrait,
    rates: &Rates,
    rows: Vec<user::Model>,
) -> Result<Vec<link::User>, DbErr> {
    let calendar = Calendar::load(db).await?;
    let metered: Vec<i64> =
        rows.iter().filter(|row| row.quota_bytes.is_some()).map(|row| row.id).collect();
    let used: HashMap<(i64, i64), i64> = if metered.is_empty() {
        HashMap::new()
    } else {
        usage::Entity::find()
            .filter(usage::Column::UserId.is_in(metered))
            .all(db)
            .await?
            .into_iter()
            .map(|row| ((row.user_id, row.period), row.up + row.down))
            .collect()
    };
    let of_node = |row: user::Model| {
        let groups: Vec<String> = serde_json::from_str(&row.groups).unwrap_or_default();
        let [up, down, burst] = rates.of(row.id, &groups);
        let period = calendar.start(row.quota_period.as_deref());
        let spent = row
            .quota_bytes
            .is_some_and(|quota| used.get(&(row.id, period)).is_some_and(|used| *used >= quota));
        let small =
            |value: Option<i64>| value.map(|value| u32::try_from(value).unwrap_or(u32::MAX));
        link::User {
            id: row.id.cast_unsigned(),
            disabled: row.status != "active" || !row.proxy_access || spent,
            expires: row.expires_at.map(|at| at.div_euclid(1_000_000)),
            name: row.name,
            password_hash: row.password_hash,
            groups,
            up,
            down,
            burst,
            sessions: small(row.sessions),
            new_sessions_per_second: small(row.new_sessions_per_second),
            devices: small(row.devices),
            evict_oldest: row.evict_oldest,
            source_addresses: serde_json::from_str(&row.source_addresses).unwrap_or_default(),
            egress_address: row.egress_address.unwrap_or_default(),
            metered: row.quota_bytes.is_some(),
        }
    };
    Ok(rows.into_iter().map(of_node).collect())
}

#[cfg(test)]
mod tests {
    use sea_orm::Set;

    use super::*;
    use crate::store::{
        Actor, Change,
        tests::{new_store, servers},
    };

    /// Whoever reads the whole for a node that comes holds up none that follows.
    #[tokio::test]
    async fn what_has_changed_does_not_wait_for_the_whole() {
        for server in servers() {
            let (store, _folder) = new_store(server.as_deref()).await;
            let publisher = Publisher::new(store.clone());
            let known = publisher.news(0).await.unwrap().generation;
            let actor = Actor { name: "test".into(), address: String::new() };
            let edit = store.edit(actor).await.unwrap();
            edit.commit(Change::new("test", "").policy()).await.unwrap();
            let whole = publisher.slot(0);
            let _reading = whole.lock().await;
            assert_eq!(publisher.news(known).await.unwrap().generation, known + 1);
        }
    }

    #[tokio::test]
    async fn filters_that_differ_by_what_they_name_are_one() {
        for server in servers() {
            let (store, _folder) = new_store(server.as_deref()).await;
            let rows = [
                ("deny", "domain", "a.example", "[]"),
                ("deny", "domain_suffix", "b.example", "[]"),
                ("deny", "cidr", "192.0.2.0/24", "[\"443\"]"),
                ("deny", "domain", "c.example", "[]"),
                ("allow", "domain", "d.example", "[]"),
            ];
            for (action, kind, value, ports) in rows {
                let row = url_filter::ActiveModel {
                    action: Set(action.into()),
                    kind: Set(kind.into()),
                    value: Set(value.into()),
                    ports: Set(ports.into()),
                    enabled: Set(true),
                    comment: Set(String::new()),
                    created_at: Set(0),
                    ..Default::default()
                };
                url_filter::Entity::insert(row).exec(store.db()).await.unwrap();
            }
            let filters = policy(store.db()).await.unwrap().filter;
            assert_eq!(filters.len(), 3);
            assert_eq!(filters[0].domain, ["a.example", "c.example"]);
            assert_eq!(filters[0].domain_suffix, ["b.example"]);
            assert_eq!((filters[1].cidr.len(), filters[1].port.len()), (1, 1));
            assert_eq!(filters[2].action, culvert_api::policy::Access::Allow);
        }
    }

    #[test]
    fn what_nodes_would_not_take_is_not_sent() {
        let snapshot = |bytes: usize| {
            down::Body::Snapshot(link::Snapshot { policy: vec![0; bytes], ..Default::default() })
        };
        assert!(frame(snapshot(1)).is_some() && frame(snapshot(FRAME_MAX)).is_none());
    }

    #[test]
    fn a_users_rates_are_their_own_then_the_groups_then_the_default() {
        let row = |kind: &str, subject: &str, [up, down, burst]: [Option<i64>; 3]| {
            let row = bandwidth_limit::Model {
                id: 0,
                kind: kind.into(),
                subject: subject.into(),
                up,
                down,
                burst,
                updated_at: 0,
            };
            ((row.kind.clone(), row.subject.clone()), row)
        };
        let rates = Rates(HashMap::from([
            row("user", "7", [Some(1), None, None]),
            row("group", "slow", [Some(10), Some(20), Some(5)]),
            row("group", "fast", [Some(100), None, Some(2)]),
            row("default", "", [Some(3), Some(4), None]),
        ]));
        let of = |user: i64, groups: &[&str]| {
            let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
            rates.of(user, &groups)
        };
        assert_eq!(of(7, &["slow"]), [Some(1), None, None]);
        assert_eq!(of(8, &["slow"]), [Some(10), Some(20), Some(5)]);
        assert_eq!(of(8, &["slow", "fast", "none"]), [Some(100), None, Some(5)]);
        assert_eq!(of(8, &["none"]), [Some(3), Some(4), None]);
        assert_eq!(Rates(HashMap::new()).of(8, &[]), [None; 3]);
    }
}
