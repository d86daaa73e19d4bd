//! Quotas over the fleet: each node may move what it was granted, so that all together never move more
//! than there is.
//!
//! What a user has used, plus what nodes were granted and have not reported yet, never exceeds the quota.
//! One node gets all of the rest; several get equal parts of it and ask for more when half of theirs is
//! gone. When nothing is left to grant, half of what the richest holds is taken back; it counts as granted
//! until that node has said what it still holds, and until then it is granted nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use culvert_api::link;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter,
    QuerySelect, QueryTrait, Set, TransactionTrait, sea_query::OnConflict,
};

use crate::{
    calendar::Calendar,
    store::{
        Boot, Command, ROWS, SILENT, Store,
        entity::{boot as boots, lease, node, node_usage, usage, user},
        lately, lock_users, now, retry,
    },
};

/// So little is not shared, in bytes.
const SMALL: i64 = 1 << 20;

/// What there is of a user's quota, in bytes.
#[derive(Debug, Default, Clone, Copy)]
struct Account {
    /// Neither used nor granted; below zero when the quota was lowered.
    free: i64,
    /// The sum this boot may reach, and the one it has reported.
    granted: i64,
    reported: i64,
    /// What others hold.
    others: i64,
    /// Which of the others that can be asked holds most, and how much.
    richest: Option<(Boot, i64)>,
}

impl Account {
    fn held(&self) -> i64 {
        (self.granted - self.reported).max(0)
    }

    /// This boot may hold so much.
    fn lease(&self, user: i64, held: i64) -> link::Lease {
        let limit = (self.reported + held).cast_unsigned();
        link::Lease { user: user.cast_unsigned(), limit, ..link::Lease::default() }
    }
}

/// The accounts of those of `users` who have a quota, as one boot sees them.
async fn accounts(
    db: &DatabaseTransaction,
    boot: Boot,
    users: &[i64],
) -> Result<BTreeMap<i64, Account>, DbErr> {
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
    let online = online(db).await?;
    let calendar = Calendar::load(db).await?;
    let fresh = now() - SILENT;
    let account = |user: user::Model| {
        let start = calendar.start(user.quota_period.as_deref());
        let used = used.get(&(user.id, start)).copied().unwrap_or(0);
        let sum = |of: Boot| sums.get(&(of, user.id)).copied().unwrap_or(0);
        let mut account = Account { reported: sum(boot), ..Account::default() };
        let mut richest = None;
        for row in leases.iter().filter(|row| row.user_id == user.id) {
            let of = (row.node_id, row.boot);
            let held = (row.granted - sum(of)).max(0);
            if of == boot {
                account.granted = row.granted;
                continue;
            }
            account.others += held;
            // One that may be gone is asked only if no other has any.
            let Some(can) = online.get(&of).map(|seen| *seen > fresh) else { continue };
            let richer = richest.is_none_or(|before| (can, held) > before);
            if held > 0 && richer {
                richest = Some((can, held));
                account.richest = Some((of, held));
            }
        }
        account.granted = account.granted.max(account.reported);
        let quota = user.quota_bytes.unwrap_or(i64::MAX);
        account.free = quota - used - account.held() - account.others;
        (user.id, account)
    };
    Ok(metered.into_iter().map(account).collect())
}

/// Boots that were heard of a moment ago, and are not over; and when.
async fn online(db: &impl ConnectionTrait) -> Result<BTreeMap<Boot, i64>, DbErr> {
    let revoked = node::Entity::find().filter(node::Column::Status.ne("active"));
    let revoked = revoked.select_only().column(node::Column::Id).into_query();
    let online = boots::Entity::find()
        .filter(lately(boots::Column::SeenAt))
        .filter(boots::Column::Ended.eq(false))
        .filter(boots::Column::NodeId.not_in_subquery(revoked));
    Ok(online
        .all(db)
        .await?
        .into_iter()
        .map(|row| ((row.node_id, row.boot), row.seen_at))
        .collect())
}

/// Grants what can be granted to a boot. Who gets nothing now, because others are to give some back
/// first, is not in the answer; whether any of these is.
///
/// # Errors
/// The database failed; nothing was granted then.
pub async fn grant(
    store: &Store,
    boot: Boot,
    users: &[u64],
) -> Result<(link::LeaseGrant, bool), DbErr> {
    let users: Vec<i64> = users.iter().map(|user| user.cast_signed()).collect();
    let (leases, wanted) = retry(|| async {
        let db = store.db().begin().await?;
        let granted = grant_once(&db, boot, &users).await?;
        db.commit().await?;
        Ok(granted)
    })
    .await?;
    let asks = !wanted.is_empty();
    if asks {
        let commands = wanted.into_iter().map(|(boot, user)| (boot, Command::TakeBack, user));
        store.command(commands.collect()).await?;
    }
    Ok((link::LeaseGrant { leases }, asks))
}

/// Leases, and of which boots some of which users' are wanted back.
type Granted = (Vec<link::Lease>, Vec<(Boot, i64)>);

async fn grant_once(db: &DatabaseTransaction, boot: Boot, users: &[i64]) -> Result<Granted, DbErr> {
    // Nobody else grants of these until this is over.
    lock_users(db, users.iter().copied()).await?;
    let (mut leases, mut rows, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    let known = boots::Entity::find_by_id(boot).one(db).await?;
    if known.is_some_and(|known| known.ended) {
        // Nobody would ever account for it.
        return Ok((leases, wanted));
    }
    let shares = i64::try_from(online(db).await?.len()).unwrap_or(i64::MAX).max(1);
    for (user, account) in accounts(db, boot, users).await? {
        if account.free > 0 {
            let more = (account.free / shares).max(SMALL).min(account.free);
            leases.push(account.lease(user, account.held() + more));
            rows.push(lease::ActiveModel {
                node_id: Set(boot.0),
                boot: Set(boot.1),
                user_id: Set(user),
                granted: Set(account.granted + more),
                updated_at: Set(now()),
            });
            continue;
        }
        match account.richest {
            Some((richest, most)) if most > account.held() => wanted.push((richest, user)),
            // No less than the others have, or nothing more to come. Others that have been silent may
            // still bring something back.
            _ => leases.push(link::Lease {
                spent: account.others == 0,
                ..account.lease(user, account.held())
            }),
        }
    }
    if !rows.is_empty() {
        let key = [lease::Column::NodeId, lease::Column::Boot, lease::Column::UserId];
        let over = OnConflict::columns(key)
            .update_columns([lease::Column::Granted, lease::Column::UpdatedAt])
            .to_owned();
        lease::Entity::insert_many(rows).on_conflict(over).exec_without_returning(db).await?;
    }
    Ok((leases, wanted))
}

/// What a boot is to hold from now on of a user's quota: half, for others who have nothing.
///
/// # Errors
/// The database failed.
pub async fn take_back(store: &Store, boot: Boot, user: u64) -> Result<link::LeaseGrant, DbErr> {
    lower(store, boot, &[user.cast_signed()], |account| match account.held() / 2 {
        small if small < SMALL / 4 => 0,
        half => half,
    })
    .await
}

/// What a boot is to hold from now on of quotas that were lowered: of those of `users`, or of all.
///
/// # Errors
/// The database failed.
pub async fn trim(
    store: &Store,
    boot: Boot,
    users: Option<&[u64]>,
) -> Result<link::LeaseGrant, DbErr> {
    let users = match users {
        Some(users) => users.iter().map(|user| user.cast_signed()).collect(),
        None => {
            let of_boot = lease::Entity::find()
                .filter(lease::Column::NodeId.eq(boot.0))
                .filter(lease::Column::Boot.eq(boot.1));
            let of_boot = of_boot.select_only().column(lease::Column::UserId);
            of_boot.into_tuple::<i64>().all(store.db()).await?
        }
    };
    lower(store, boot, &users, |account| account.held() + account.free.min(0)).await
}

async fn lower(
    store: &Store,
    boot: Boot,
    users: &[i64],
    keep: impl Fn(&Account) -> i64,
) -> Result<link::LeaseGrant, DbErr> {
    let mut leases = Vec::new();
    for part in users.chunks(ROWS) {
        // One transaction sees one state.
        let read = || async {
            let db = store.db().begin().await?;
            let accounts = accounts(&db, boot, part).await?;
            db.commit().await?;
            Ok(accounts)
        };
        let accounts = retry(read).await?;
        leases.extend(accounts.into_iter().filter_map(|(user, account)| {
            let keep = keep(&account).max(0);
            let lease = link::Lease { taken_back: true, ..account.lease(user, keep) };
            (keep < account.held()).then_some(lease)
        }));
    }
    Ok(link::LeaseGrant { leases })
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
    let sql = format!(
        "DELETE FROM leases WHERE node_id IN (SELECT id FROM nodes WHERE status <> 'active') OR NOT EXISTS \
         (SELECT 1 FROM boots WHERE boots.node_id = leases.node_id AND boots.boot = leases.boot \
         AND boots.seen_at >= {before})"
    );
    db.execute_unprepared(&sql).await.map(drop)
}

#[cfg(test)]
mod tests;
