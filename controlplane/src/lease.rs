//! Quotas over the fleet: each node may move what it was granted, so that all together never move more
//! than there is.
//!
//! What a user has used, plus what nodes were granted and have not reported yet, never exceeds the quota.
//! One node gets all of the rest; several share it and ask for more when half of theirs is gone. When
//! nothing is left to grant but others hold some, half of that is taken back; it counts as granted until
//! they have said what they still hold.

use std::collections::{BTreeSet, HashMap};

use culvert_api::link;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, PaginatorTrait,
    QueryFilter, Set, TransactionTrait, sea_query::Expr, sea_query::OnConflict,
};

use crate::{
    calendar::Calendar,
    store::{
        Store,
        entity::{command, lease, node, node_usage, usage, user},
        now, retry,
    },
};

/// So little is not shared, in bytes.
const SMALL: i64 = 1 << 20;

/// A boot of a node.
pub type Boot = (i64, i64);

/// What there is of a user's quota, in bytes.
#[derive(Debug, Default, Clone, Copy)]
struct Account {
    /// Neither used nor granted; below zero when the quota was lowered.
    free: i64,
    /// The sum this boot may reach, and the one it has reported.
    granted: i64,
    reported: i64,
    /// What others hold, and what of that can be taken back now.
    others: i64,
    reachable: i64,
}

impl Account {
    fn held(&self) -> i64 {
        (self.granted - self.reported).max(0)
    }

    /// This boot may hold so much.
    fn lease(&self, user: i64, held: i64) -> link::Lease {
        let limit = (self.reported + held).cast_unsigned();
        link::Lease { user: user.cast_unsigned(), limit, spent: false }
    }
}

/// The accounts of those of `users` who have a quota, as one boot sees them. Nobody else grants of them
/// until the transaction ends.
async fn accounts(
    db: &DatabaseTransaction,
    boot: Boot,
    users: &BTreeSet<i64>,
) -> Result<HashMap<i64, Account>, DbErr> {
    user::Entity::update_many()
        .col_expr(user::Column::UpdatedAt, Expr::col(user::Column::UpdatedAt))
        .filter(user::Column::Id.is_in(users.iter().copied()))
        .exec(db)
        .await?;
    let metered = user::Entity::find()
        .filter(user::Column::Id.is_in(users.iter().copied()))
        .filter(user::Column::QuotaBytes.is_not_null());
    let metered = metered.all(db).await?;
    let ids: Vec<i64> = metered.iter().map(|user| user.id).collect();
    let used = usage::Entity::find().filter(usage::Column::UserId.is_in(ids.iter().copied()));
    let used: HashMap<(i64, i64), i64> = used
        .all(db)
        .await?
        .into_iter()
        .map(|row| ((row.user_id, row.period), row.up + row.down))
        .collect();
    let leases = lease::Entity::find().filter(lease::Column::UserId.is_in(ids.iter().copied()));
    let leases = leases.all(db).await?;
    let boots: BTreeSet<i64> = leases.iter().map(|row| row.boot).chain([boot.1]).collect();
    let sums: HashMap<(Boot, i64), i64> = node_usage::Entity::find()
        .filter(node_usage::Column::Boot.is_in(boots))
        .filter(node_usage::Column::UserId.is_in(ids))
        .all(db)
        .await?
        .into_iter()
        .map(|row| (((row.node_id, row.boot), row.user_id), row.up + row.down))
        .collect();
    let connected: BTreeSet<Boot> = connected(db).await?;
    let calendar = Calendar::load(db).await?;
    let account = |user: user::Model| {
        let start = calendar.start(user.quota_period.as_deref());
        let used = used.get(&(user.id, start)).copied().unwrap_or(0);
        let sum = |of: Boot| sums.get(&(of, user.id)).copied().unwrap_or(0);
        let mut account = Account { reported: sum(boot), ..Account::default() };
        for row in leases.iter().filter(|row| row.user_id == user.id) {
            let of = (row.node_id, row.boot);
            let held = (row.granted - sum(of)).max(0);
            if of == boot {
                account.granted = row.granted;
            } else {
                account.others += held;
                account.reachable += if connected.contains(&of) { held } else { 0 };
            }
        }
        account.granted = account.granted.max(account.reported);
        let quota = user.quota_bytes.unwrap_or(i64::MAX);
        account.free = quota - used - account.held() - account.others;
        (user.id, account)
    };
    Ok(metered.into_iter().map(account).collect())
}

async fn connected(db: &impl ConnectionTrait) -> Result<BTreeSet<Boot>, DbErr> {
    let nodes = node::Entity::find().filter(node::Column::Connected.eq(true));
    Ok(nodes.all(db).await?.into_iter().map(|node| (node.id, node.boot)).collect())
}

/// Grants what can be granted to a boot. Who gets nothing now, because others are to give some back
/// first, is not in the answer; whether any of those is.
///
/// # Errors
/// The database failed; nothing was granted then.
pub async fn grant(
    store: &Store,
    boot: Boot,
    users: &[u64],
) -> Result<(link::LeaseGrant, bool), DbErr> {
    let users: BTreeSet<i64> = users.iter().map(|user| user.cast_signed()).collect();
    retry(|| async {
        let db = store.db().begin().await?;
        let granted = grant_once(&db, boot, &users).await?;
        db.commit().await?;
        Ok(granted)
    })
    .await
}

async fn grant_once(
    db: &DatabaseTransaction,
    boot: Boot,
    users: &BTreeSet<i64>,
) -> Result<(link::LeaseGrant, bool), DbErr> {
    let accounts = accounts(db, boot, users).await?;
    let nodes = node::Entity::find()
        .filter(node::Column::Connected.eq(true))
        .filter(node::Column::Status.eq("active"))
        .count(db)
        .await?;
    let nodes = i64::try_from(nodes).unwrap_or(i64::MAX).max(1);
    let (mut leases, mut rows, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (&user, account) in &accounts {
        if account.free > 0 {
            let more = (account.free / nodes).max(SMALL).min(account.free);
            leases.push(account.lease(user, account.held() + more));
            rows.push(lease::ActiveModel {
                node_id: Set(boot.0),
                boot: Set(boot.1),
                user_id: Set(user),
                granted: Set(account.granted + more),
                updated_at: Set(now()),
            });
        } else if account.reachable > account.held() {
            wanted.push(user);
        } else {
            // Nothing more to come, or no less than the others have.
            let spent = account.reachable == 0;
            leases.push(link::Lease { spent, ..account.lease(user, account.held()) });
        }
    }
    if !rows.is_empty() {
        let key = [lease::Column::NodeId, lease::Column::Boot, lease::Column::UserId];
        let over = OnConflict::columns(key)
            .update_columns([lease::Column::Granted, lease::Column::UpdatedAt])
            .to_owned();
        lease::Entity::insert_many(rows).on_conflict(over).exec_without_returning(db).await?;
    }
    if !wanted.is_empty() {
        let ask = |user: &i64| command::ActiveModel {
            node_id: Set(0),
            kind: Set("take_back".into()),
            argument: Set(*user),
            at: Set(now()),
            ..Default::default()
        };
        command::Entity::insert_many(wanted.iter().map(ask)).exec_without_returning(db).await?;
    }
    Ok((link::LeaseGrant { leases }, !wanted.is_empty()))
}

/// What a boot is to hold from now on: half, for others who have nothing.
///
/// # Errors
/// The database failed.
pub async fn take_back(store: &Store, boot: Boot, user: u64) -> Result<link::LeaseGrant, DbErr> {
    lower(store, boot, [user.cast_signed()].into(), |account| match account.held() / 2 {
        // Not from who has less than the others.
        _ if account.held() < account.others => account.held(),
        small if small < SMALL / 4 => 0,
        half => half,
    })
    .await
}

/// What a boot is to hold from now on of quotas that were lowered.
///
/// # Errors
/// The database failed.
pub async fn trim(store: &Store, boot: Boot) -> Result<link::LeaseGrant, DbErr> {
    let of_boot = lease::Entity::find()
        .filter(lease::Column::NodeId.eq(boot.0))
        .filter(lease::Column::Boot.eq(boot.1));
    let users = of_boot.all(store.db()).await?.into_iter().map(|row| row.user_id).collect();
    lower(store, boot, users, |account| account.held() + account.free.min(0)).await
}

async fn lower(
    store: &Store,
    boot: Boot,
    users: BTreeSet<i64>,
    keep: impl Fn(&Account) -> i64,
) -> Result<link::LeaseGrant, DbErr> {
    if users.is_empty() {
        return Ok(link::LeaseGrant::default());
    }
    let accounts = retry(|| async {
        let db = store.db().begin().await?;
        let accounts = accounts(&db, boot, &users).await?;
        db.commit().await?;
        Ok(accounts)
    })
    .await?;
    let lower = |(user, account): (i64, Account)| {
        let keep = keep(&account).max(0);
        (keep < account.held()).then(|| account.lease(user, keep))
    };
    Ok(link::LeaseGrant { leases: accounts.into_iter().filter_map(lower).collect() })
}

/// A report says what is left of leases of which some was taken back, or that a boot is over.
///
/// # Errors
/// The database failed.
pub async fn told(db: &DatabaseTransaction, boot: Boot, said: &link::Report) -> Result<(), DbErr> {
    let of_boot = sea_orm::Condition::all()
        .add(lease::Column::NodeId.eq(boot.0))
        .add(lease::Column::Boot.eq(boot.1));
    if said.last {
        lease::Entity::delete_many().filter(of_boot).exec(db).await?;
        return Ok(());
    }
    for usage in &said.users {
        let Some(held) = usage.held.map(u64::cast_signed) else { continue };
        lease::Entity::update_many()
            .col_expr(lease::Column::Granted, held.into())
            .filter(of_boot.clone())
            .filter(lease::Column::UserId.eq(usage.user.cast_signed()))
            .filter(lease::Column::Granted.gt(held))
            .exec(db)
            .await?;
    }
    Ok(())
}

/// Deletes leases that nobody will ever account for: of nodes that were revoked, and of boots that have
/// been gone for a day.
///
/// # Errors
/// The database failed.
pub async fn clean(db: &impl ConnectionTrait, before: i64) -> Result<(), DbErr> {
    let nodes = node::Entity::find().all(db).await?;
    let gone = nodes
        .iter()
        .filter(|node| node.status != "active" || node.seen_at.is_none_or(|seen| seen < before));
    let gone: Vec<i64> = gone.map(|node| node.id).collect();
    lease::Entity::delete_many().filter(lease::Column::NodeId.is_in(gone)).exec(db).await?;
    let boots: Vec<i64> = nodes.iter().map(|node| node.boot).collect();
    lease::Entity::delete_many()
        .filter(lease::Column::Boot.is_not_in(boots))
        .filter(lease::Column::UpdatedAt.lt(before))
        .exec(db)
        .await?;
    Ok(())
}
