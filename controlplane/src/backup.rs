//! Backups: all tables as lines of JSON, the same from SQLite and from MySQL, so that one can be
//! restored into the other.

use std::io::{BufRead, Write};

use anyhow::Context;
use sea_orm::{
    ActiveModelTrait, ConnectionTrait, DatabaseBackend, DatabaseTransaction, EntityName,
    EntityTrait, FromQueryResult, IntoActiveModel, Iterable, ModelTrait, PaginatorTrait,
    PrimaryKeyToColumn, QueryOrder, Set, Statement, TransactionTrait,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::store::{ROWS, Store, entity, now};

/// Bytes of rows restored at once: MySQL takes 16 MiB in a statement.
const PART: usize = 1 << 20;
/// The first line's format.
const FORMAT: u64 = 1;
/// Nodes may have followed later generations than the backup's; the restored one is beyond them, and each of
/// several is another.
const AHEAD: i64 = 1_000_000_000;

/// Calls a macro with every table that is kept. What nodes tell anew is not.
macro_rules! tables {
    ($call:ident) => {
        $call!(
            head,
            user,
            bandwidth_limit,
            url_filter,
            whitelist,
            rule,
            setting,
            node,
            access_log,
            boot,
            node_usage,
            lease,
            traffic,
            usage,
            usage_reset,
            audit
        )
    };
}

/// Writes a backup.
///
/// # Errors
/// The database or the writer fails.
pub async fn write(store: &Store, mut to: impl Write) -> anyhow::Result<()> {
    // One transaction sees one state.
    let db = store.db().begin().await?;
    writeln!(to, "{}", json!({ "culvert": "backup", "format": FORMAT }))?;
    macro_rules! all {
        ($($table:ident),*) => { $(dump::<entity::$table::Entity>(&db, &mut to).await?;)* };
    }
    tables!(all);
    writeln!(to, "{}", json!({ "end": true }))?;
    db.commit().await?;
    to.flush()?;
    Ok(())
}

async fn dump<E>(db: &DatabaseTransaction, to: &mut impl Write) -> anyhow::Result<()>
where
    E: EntityTrait,
    E::Model: FromQueryResult + Serialize + Send + Sync,
{
    let table = E::default();
    let mut query = E::find();
    for key in E::PrimaryKey::iter() {
        query = query.order_by_asc(key.into_column());
    }
    let mut rows = query.stream(db).await?;
    while let Some(row) = rows.next().await.transpose()? {
        writeln!(to, "{}", json!({ "table": table.table_name(), "row": row }))?;
    }
    Ok(())
}

/// Restores a backup into a database without users.
///
/// # Errors
/// There are users, the backup is not whole or of another version, or the database fails; nothing has
/// changed then.
pub async fn restore(store: &Store, from: impl BufRead) -> anyhow::Result<()> {
    if entity::user::Entity::find().count(store.db()).await? > 0 {
        anyhow::bail!("this database has users already; restore into an empty one");
    }
    let db = store.db().begin().await?;
    entity::head::Entity::delete_many().exec(&db).await?;
    let mut lines = from.lines();
    let first: Value = serde_json::from_str(&lines.next().context("an empty file")??)
        .context("line 1: not a backup")?;
    if first["culvert"] != "backup" || first["format"] != FORMAT {
        anyhow::bail!("line 1: not a backup this version can read");
    }
    let mut whole = false;
    // Rows of one table, and the lines they come from.
    let (mut table, mut rows, mut first, mut bytes) = (String::new(), Vec::new(), 2, 0);
    for (index, line) in lines.enumerate() {
        let number = index + 2;
        let text = line?;
        let mut line: Value = serde_json::from_str(&text)
            .with_context(|| format!("line {number}: it is broken here"))?;
        anyhow::ensure!(!whole, "line {number}: there is more after the end");
        let next = line["table"].as_str().unwrap_or_default();
        if rows.len() == ROWS || bytes > PART || (next != table && !rows.is_empty()) {
            put_rows(&db, &table, std::mem::take(&mut rows))
                .await
                .with_context(|| format!("lines {first} to {}", number - 1))?;
            (first, bytes) = (number, 0);
        }
        if line["end"] == true {
            whole = true;
            continue;
        }
        next.clone_into(&mut table);
        bytes += text.len();
        rows.push(line["row"].take());
    }
    anyhow::ensure!(whole, "the backup is cut short");
    let head = entity::head::Entity::find().one(&db).await?.context("there is no generation")?;
    let mut head = head.into_active_model();
    head.generation = Set(beyond(head.generation.take().unwrap_or_default()));
    head.update(&db).await?;
    let is_mysql = db.get_database_backend() == DatabaseBackend::MySql;
    if !is_mysql {
        leave_out_numbers(&db).await?;
    }
    db.commit().await?;
    // There it cannot be part of a transaction.
    if is_mysql {
        let left_out = leave_out_numbers(store.db()).await;
        left_out.context("all is restored, but numbers of before may be given out again")?;
    }
    Ok(())
}

/// Beyond what was given out after the backup, also by what an earlier restore of it went on with.
fn beyond(last: i64) -> i64 {
    (last + AHEAD).max(now())
}

/// Numbers that were given out after the backup, or whose row was deleted before it, are not given out again:
/// what they moved would be another's.
async fn leave_out_numbers(db: &impl ConnectionTrait) -> anyhow::Result<()> {
    let backend = db.get_database_backend();
    for table in ["users", "nodes"] {
        let last = format!("SELECT COALESCE(MAX(id), 0) AS last FROM {table}");
        let row = db.query_one_raw(Statement::from_string(backend, last)).await?;
        let last: i64 = row.map_or(Ok(0), |row| row.try_get("", "last"))?;
        let next = beyond(last);
        let steps = match backend {
            DatabaseBackend::MySql => vec![format!("ALTER TABLE {table} AUTO_INCREMENT = {next}")],
            _ => vec![
                format!("DELETE FROM sqlite_sequence WHERE name = '{table}'"),
                format!("INSERT INTO sqlite_sequence (name, seq) VALUES ('{table}', {next})"),
            ],
        };
        for sql in steps {
            db.execute_raw(Statement::from_string(backend, sql)).await?;
        }
    }
    Ok(())
}

async fn put_rows(db: &DatabaseTransaction, table: &str, rows: Vec<Value>) -> anyhow::Result<()> {
    macro_rules! each {
        ($($table:ident),*) => {
            $(if table == entity::$table::Entity.table_name() {
                return put::<entity::$table::Entity>(db, rows).await;
            })*
        };
    }
    tables!(each);
    anyhow::bail!("unknown table {table:?}")
}

async fn put<E>(db: &DatabaseTransaction, rows: Vec<Value>) -> anyhow::Result<()>
where
    E: EntityTrait,
    E::Model: DeserializeOwned + ModelTrait<Entity = E> + IntoActiveModel<E::ActiveModel>,
    E::ActiveModel: Send,
{
    let row = |row: Value| -> anyhow::Result<E::ActiveModel> {
        let model: E::Model = serde_json::from_value(row)?;
        Ok(model.into_active_model().reset_all())
    };
    let rows = rows.into_iter().map(row).collect::<anyhow::Result<Vec<_>>>()?;
    E::insert_many(rows).exec_without_returning(db).await?;
    Ok(())
}
