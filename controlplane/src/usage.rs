//! What users have moved: quota periods, and reports applied exactly once.

use std::collections::{BTreeSet, HashMap};

use culvert_api::link;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseBackend, DatabaseTransaction, DbErr,
    EntityTrait, IntoActiveModel, QueryFilter, QueryResult, Set, Statement, TransactionTrait,
    sea_query::OnConflict,
};
use time::OffsetDateTime;

use crate::{
    calendar::{Calendar, TOTAL},
    store::{
        Actor, Change, ROWS, Store,
        entity::{access_log, boot, node_usage, usage, user},
        held, now, retry,
    },
};

const SECOND: i64 = 1_000_000;

/// Begins to count for the quotas of a user's period or, of all users, for those of periods that depend on the
/// zone: what was moved in the present period is already part of it, as far as minutes are kept, and but for
/// what was moved before the last reset.
///
/// # Errors
/// The database failed.
pub async fn begin(db: &DatabaseTransaction, user: Option<(i64, &str)>) -> Result<(), DbErr> {
    let calendar = Calendar::load(db).await?;
    let of_zone = ["day", "week", "month"];
    let (periods, whose) = match &user {
        Some((id, period)) => (std::slice::from_ref(period), format!(" AND u.id = {id}")),
        None => (&of_zone[..], String::new()),
    };
    let resets =
        |of: &str| format!("COALESCE((SELECT {of} FROM usage_resets r WHERE r.user_id = u.id), 0)");
    let (start, rows, [up, down]) = match periods {
        ["total"] => (
            TOTAL.to_string(),
            "user_usage t ON t.user_id = u.id AND t.period = 0".to_owned(),
            ["up", "down"].map(|way| {
                resets(&format!("SUM(CASE WHEN r.period = {TOTAL} THEN r.{way} ELSE 0 END)"))
            }),
        ),
        periods => {
            let starts = periods.iter().map(|period| (period, calendar.start(Some(period))));
            let earliest = starts.clone().map(|(_, start)| start).min().unwrap_or_default();
            let cases: String =
                starts.map(|(period, start)| format!(" WHEN '{period}' THEN {start}")).collect();
            let start = format!("CASE u.quota_period{cases} END");
            let rows = format!(
                "traffic_logs t ON t.user_id = u.id AND t.at >= {earliest} AND t.at >= {start} AND t.at >= {}",
                resets("MAX(r.at)")
            );
            (start, rows, ["0".to_owned(), "0".to_owned()])
        }
    };
    let backend = db.get_database_backend();
    let over = match backend {
        DatabaseBackend::MySql => "ON DUPLICATE KEY UPDATE up = VALUES(up), down = VALUES(down)",
        _ => "ON CONFLICT (user_id, period) DO UPDATE SET up = excluded.up, down = excluded.down",
    };
    let sql = format!(
        "INSERT INTO user_usage (user_id, period, up, down) \
         SELECT u.id, {start}, COALESCE(SUM(t.up), 0) - {up}, COALESCE(SUM(t.down), 0) - {down} \
         FROM users u LEFT JOIN {rows} \
         WHERE u.quota_bytes IS NOT NULL AND u.quota_period IN ('{}'){whose} GROUP BY u.id {over}",
        periods.join("', '")
    );
    db.execute_raw(Statement::from_string(backend, sql)).await.map(drop)
}

/// The sums of rows, both ways, given as what follows FROM.
///
/// # Errors
/// The database failed.
pub async fn sums(db: &impl ConnectionTrait, rows: &str) -> Result<[i64; 2], DbErr> {
    // MySQL's sums are decimals.
    let sql = format!(
        "SELECT CAST(COALESCE(SUM(up), 0) AS SIGNED) AS up, \
         CAST(COALESCE(SUM(down), 0) AS SIGNED) AS down FROM {rows}"
    );
    let row = db.query_one_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
    let Some(row) = row else { return Ok([0; 2]) };
    Ok([row.try_get("", "up")?, row.try_get("", "down")?])
}

/// Applies a report; one that was applied before changes nothing. Nodes are told of users whose quota it
/// spent: then it is an edit, and holds up others. Returns these users.
///
/// # Errors
/// The database failed; nothing was applied then.
pub async fn apply(store: &Store, node: i64, said: &link::Report) -> Result<Vec<i64>, DbErr> {
    let apply = || async {
        loop {
            let db = store.db().begin().await?;
            let spent = apply_once(&db, node, said).await?;
            if spent.is_empty() {
                db.commit().await?;
                return Ok(spent);
            }
            // Once more, under the lock of edits, which comes before all others.
            db.rollback().await?;
            let actor = Actor { name: "system:quota".into(), address: String::new() };
            let edit = store.edit(actor).await?;
            let spent = apply_once(edit.db(), node, said).await?;
            if !spent.is_empty() {
                // With the sums: else nobody would be told by a control plane that is killed in between.
                let change = Change::new("user.quota_spent", format!("{spent:?}"));
                edit.commit(change.users(spent.iter().copied())).await?;
                return Ok(spent);
            }
            // A quota was raised meanwhile.
        }
    };
    retry(apply).await
}

async fn apply_once(
    db: &DatabaseTransaction,
    node: i64,
    said: &link::Report,
) -> Result<Vec<i64>, DbErr> {
    let sequence = said.sequence.cast_signed();
    let key = (node, said.boot.cast_signed());
    // The row's lock first: what is read afterwards is what the report before left.
    let backend = db.get_database_backend();
    let over = match backend {
        DatabaseBackend::MySql => "ON DUPLICATE KEY UPDATE uncertain = uncertain",
        _ => "ON CONFLICT (node_id, boot) DO UPDATE SET uncertain = uncertain",
    };
    let sql = format!(
        "INSERT INTO boots (node_id, boot, sequence, uncertain, ended, seen_at, command) \
         VALUES ({node}, {}, -1, 0, FALSE, {}, 0) {over}",
        key.1,
        now()
    );
    db.execute_raw(Statement::from_string(backend, sql)).await?;
    let known = boot::Entity::find_by_id(key).one(db).await?;
    let Some(known) = known.filter(|known| known.sequence < sequence) else {
        return Ok(Vec::new());
    };
    let mut row = known.into_active_model();
    row.sequence = Set(sequence);
    row.uncertain = Set(said.uncertain.cast_signed());
    if said.last {
        row.ended = Set(true);
    }
    row.update(db).await?;

    let mut users = said.users.clone();
    users.sort_by_key(|usage| usage.user);
    let calendar = Calendar::hold(db).await?;
    let minute = now() / (60 * SECOND) * (60 * SECOND);
    let mut quotas = HashMap::new();
    let (mut sums, mut minutes, mut periods) = (Vec::new(), Vec::new(), Vec::new());
    for part in users.chunks(ROWS) {
        let ids: Vec<i64> = part.iter().map(|usage| usage.user.cast_signed()).collect();
        let before: HashMap<i64, (i64, i64)> = node_usage::Entity::find()
            .filter(node_usage::Column::NodeId.eq(node))
            .filter(node_usage::Column::Boot.eq(key.1))
            .filter(node_usage::Column::UserId.is_in(ids.iter().copied()))
            .all(db)
            .await?
            .into_iter()
            .map(|row| (row.user_id, (row.up, row.down)))
            .collect();
        quotas.extend(hold_quotas(db, &calendar, &ids).await?);
        for usage in part {
            let id = usage.user.cast_signed();
            let (up, down) = (usage.up.cast_signed(), usage.down.cast_signed());
            let (up_before, down_before) = before.get(&id).copied().unwrap_or_default();
            // Sums of a boot only grow.
            let (more_up, more_down) = ((up - up_before).max(0), (down - down_before).max(0));
            if more_up == 0 && more_down == 0 {
                continue;
            }
            sums.push([node, key.1, id, more_up, more_down]);
            minutes.push([minute, id, node, more_up, more_down]);
            periods.push([id, 0, more_up, more_down]);
            if let Some((start, _)) = quotas.get(&id).filter(|(start, _)| *start > 0) {
                periods.push([id, *start, more_up, more_down]);
            }
        }
    }
    // Table after table, and each by user, as whoever else changes them: nobody waits in a circle.
    add(db, "node_usage", "node_id, boot, user_id", &sums).await?;
    add(db, "traffic_logs", "at, user_id, node_id", &minutes).await?;
    add(db, "user_usage", "user_id, period", &periods).await?;
    let mut spent = Vec::new();
    let moved: Vec<i64> =
        sums.iter().map(|row| row[2]).filter(|id| quotas.contains_key(id)).collect();
    for part in moved.chunks(ROWS) {
        let used = usage::Entity::find()
            .filter(usage::Column::UserId.is_in(part.iter().copied()))
            .all(db)
            .await?;
        let is_spent = |row: &usage::Model| {
            let quota = quotas.get(&row.user_id).filter(|(start, _)| *start == row.period);
            quota.is_some_and(|(_, quota)| row.up + row.down >= *quota)
        };
        spent.extend(used.iter().filter(|row| is_spent(row)).map(|row| row.user_id));
    }
    crate::lease::told(db, key, said).await?;
    Ok(spent)
}

/// The quotas of those users who have one, each with the start of its period; nobody changes them until the
/// transaction ends.
async fn hold_quotas(
    db: &DatabaseTransaction,
    calendar: &Calendar,
    ids: &[i64],
) -> Result<Vec<(i64, (i64, i64))>, DbErr> {
    let ids = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let backend = db.get_database_backend();
    let sql = format!(
        "SELECT id, quota_period, quota_bytes FROM users WHERE id IN ({ids}) AND quota_bytes IS NOT NULL \
         ORDER BY id{}",
        held(backend)
    );
    let rows = db.query_all_raw(Statement::from_string(backend, sql)).await?;
    let quota = |row: &QueryResult| {
        let period: Option<String> = row.try_get("", "quota_period")?;
        let start = calendar.start(period.as_deref());
        Ok((row.try_get("", "id")?, (start, row.try_get("", "quota_bytes")?)))
    };
    rows.iter().map(quota).collect()
}

/// Adds bytes to rows, making those that are missing. All values are numbers.
async fn add<const N: usize>(
    db: &DatabaseTransaction,
    table: &str,
    key: &str,
    rows: &[[i64; N]],
) -> Result<(), DbErr> {
    let row = |row: &[i64; N]| {
        let values: Vec<String> = row.iter().map(ToString::to_string).collect();
        format!("({})", values.join(","))
    };
    let backend = db.get_database_backend();
    let over = match backend {
        DatabaseBackend::MySql => {
            "ON DUPLICATE KEY UPDATE up = up + VALUES(up), down = down + VALUES(down)".to_owned()
        }
        _ => format!(
            "ON CONFLICT ({key}) DO UPDATE SET up = up + excluded.up, down = down + excluded.down"
        ),
    };
    for part in rows.chunks(ROWS) {
        let values = part.iter().map(row).collect::<Vec<_>>().join(",");
        let sql = format!("INSERT INTO {table} ({key}, up, down) VALUES {values} {over}");
        db.execute_raw(Statement::from_string(backend, sql)).await?;
    }
    Ok(())
}

/// Stores records; those that are there already change nothing. Returns the last sequence.
///
/// # Errors
/// The database failed; nothing was stored then.
pub async fn store_records(store: &Store, node: i64, said: &link::Records) -> Result<u64, DbErr> {
    let boot = said.boot.cast_signed();
    let mut rows: Vec<access_log::ActiveModel> =
        said.records.iter().filter_map(|record| row_of(node, boot, record)).collect();
    name_users(store, &mut rows).await?;
    let key = [access_log::Column::NodeId, access_log::Column::Boot, access_log::Column::Sequence];
    for part in rows.chunks(ROWS) {
        // Each part by itself: what is there already is passed over when they come again.
        let insert = || async {
            let over = OnConflict::columns(key).do_nothing_on(key).to_owned();
            let insert = access_log::Entity::insert_many(part.iter().cloned()).on_conflict(over);
            insert.exec_without_returning(store.db()).await
        };
        retry(insert).await?;
    }
    Ok(said.records.iter().map(|record| record.sequence).max().unwrap_or(0))
}

/// The record of a session that was cut by the end of its node says whose it was by number only.
async fn name_users(store: &Store, rows: &mut [access_log::ActiveModel]) -> Result<(), DbErr> {
    let unnamed = |row: &access_log::ActiveModel| {
        let id = *row.user_id.as_ref();
        (id > 0 && row.user_name.as_ref().is_empty()).then_some(id)
    };
    let ids: BTreeSet<i64> = rows.iter().filter_map(unnamed).collect();
    let ids: Vec<i64> = ids.into_iter().collect();
    for part in ids.chunks(ROWS) {
        let found = user::Entity::find().filter(user::Column::Id.is_in(part.iter().copied()));
        let names: HashMap<i64, String> =
            found.all(store.db()).await?.into_iter().map(|user| (user.id, user.name)).collect();
        for row in rows.iter_mut() {
            if let Some(name) = unnamed(row).and_then(|id| names.get(&id)) {
                row.user_name = Set(name.clone());
            }
        }
    }
    Ok(())
}

fn row_of(node: i64, boot: i64, record: &link::Record) -> Option<access_log::ActiveModel> {
    let body: serde_json::Value = serde_json::from_slice(&record.json).ok()?;
    let text = |key: &str, length: usize| -> String {
        body[key].as_str().unwrap_or_default().chars().take(length).collect()
    };
    let number = |key: &str| body[key].as_u64().unwrap_or(0).cast_signed();
    let at = OffsetDateTime::parse(
        body["time"].as_str().unwrap_or_default(),
        &time::format_description::well_known::Rfc3339,
    );
    Some(access_log::ActiveModel {
        node_id: Set(node),
        boot: Set(boot),
        sequence: Set(record.sequence.cast_signed()),
        at: Set(at.map_or_else(
            |_| now(),
            |began| {
                let took = (body["duration_ms"].as_f64().unwrap_or(0.0) * 1000.0) as i64;
                i64::try_from(began.unix_timestamp_nanos() / 1000)
                    .unwrap_or_default()
                    .saturating_add(took)
            },
        )),
        user_id: Set(record.user.cast_signed()),
        user_name: Set(text("user", 255)),
        client: Set(text("client", 64)),
        target: Set(text("target", 300)),
        ended: Set(text("end", 32)),
        bytes_up: Set(number("bytes_up")),
        bytes_down: Set(number("bytes_down")),
        body: Set(String::from_utf8_lossy(&record.json).into_owned()),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{new_store, servers};

    /// The change is there with the sums, whoever is killed afterwards.
    #[tokio::test]
    async fn a_spent_quota_is_told_with_its_report() {
        for server in servers() {
            let (store, _folder) = new_store(server.as_deref()).await;
            let mut row = crate::app::new_user("ann", "", "user");
            row.quota_bytes = Set(Some(100));
            row.quota_period = Set(Some("total".into()));
            let ann = row.insert(store.db()).await.unwrap().id;
            let report = |sequence: u64| link::Report {
                boot: 1,
                sequence,
                users: vec![link::Usage { user: ann as u64, up: 60, down: 60, held: None }],
                ..link::Report::default()
            };
            let generation = store.generation().await.unwrap();
            assert_eq!(apply(&store, 1, &report(1)).await.unwrap(), [ann]);
            assert_eq!(store.generation().await.unwrap(), generation + 1);
            assert_eq!(store.known_generation(), generation as u64 + 1);
            // Nothing more was moved, so there is nothing more to be told.
            assert_eq!(apply(&store, 1, &report(2)).await.unwrap(), [0; 0]);
            assert_eq!(store.generation().await.unwrap(), generation + 1);
            assert_eq!(sums(store.db(), "user_usage WHERE period = 0").await.unwrap(), [60, 60]);
        }
    }
}
