//! The database: SQLite or MySQL/MariaDB behind the same entities.
//!
//! Every change by a person goes through [`Store::edit`]: one transaction that changes rows, counts the
//! generation up if nodes are to know, and writes the audit log. So does what nodes are to be told of a report;
//! what else nodes say (sums, leases, records, sessions, heartbeats) does not.
//!
//! Transactions take the locks of rows in one order, or two of them would wait for each other: `head`, `boots`,
//! `settings`, `users`, minutes (`traffic_logs`), sums (`user_usage`), `leases`; those of one table by user.

pub mod entity;
mod schema;
#[cfg(test)]
pub mod tests;

use std::{
    path::Path,
    sync::atomic::{AtomicI64, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use sea_orm::{
    ColumnTrait, ConnectOptions, ConnectionTrait, Database, DatabaseBackend, DatabaseConnection,
    DatabaseTransaction, DbErr, EntityTrait, QueryFilter, RuntimeErr, Set, Statement,
    TransactionTrait,
    sea_query::{Expr, OnConflict},
    sqlx::mysql::MySqlDatabaseError,
};
use sea_orm_migration::MigratorTrait;
use serde::Serialize;
use tokio::sync::watch;

/// Tries of a transaction that met another's lock.
const TRIES: u32 = 8;
/// Characters of a change's subject that are kept.
const SUBJECT: usize = 300;
/// The only row of `head`.
const HEAD: i64 = 1;

/// A database and who waits for its changes.
#[derive(Clone)]
pub struct Store {
    db: DatabaseConnection,
    changed: watch::Sender<i64>,
}

/// Who changes something, from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// A user's name, `cli:` and who ran the command line, or `system:` and the part; users' names have no colon.
    pub name: String,
    /// The client's address; empty if it is not known or there is none.
    pub address: String,
}

/// What an edit is to leave in the audit log, and which nodes are to know of it.
#[derive(Debug, Default)]
pub struct Change {
    action: &'static str,
    subject: String,
    old: String,
    new: String,
    users: Vec<i64>,
    policy: bool,
}

impl Change {
    /// A change of something, by its action (`user.update`) and what it was done to.
    pub fn new(action: &'static str, subject: impl ToString) -> Self {
        Self { action, subject: subject.to_string(), ..Self::default() }
    }

    /// How it was.
    #[must_use]
    pub fn old(mut self, old: &impl Serialize) -> Self {
        self.old = serde_json::to_string(old).unwrap_or_default();
        self
    }

    /// How it is.
    #[must_use]
    pub fn new_value(mut self, new: &impl Serialize) -> Self {
        self.new = serde_json::to_string(new).unwrap_or_default();
        self
    }

    /// Nodes are to know a user anew.
    #[must_use]
    pub fn user(mut self, id: i64) -> Self {
        self.users.push(id);
        self
    }

    /// The same of several.
    #[must_use]
    pub fn users(mut self, ids: impl IntoIterator<Item = i64>) -> Self {
        self.users.extend(ids);
        self
    }

    /// Nodes are to know the policy anew.
    #[must_use]
    pub fn policy(mut self) -> Self {
        self.policy = true;
        self
    }
}

/// What can be asked of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End a session.
    EndSession,
    /// End all sessions of a user.
    EndUser,
    /// Take no more sessions, let the others end, exit.
    Drain,
    /// Hold less of a user's quota.
    TakeBack,
}

/// A boot of a node: the node's number, and the boot's.
pub type Boot = (i64, i64);

impl Command {
    const ALL: [Self; 4] = [Self::EndSession, Self::EndUser, Self::Drain, Self::TakeBack];

    fn name(self) -> &'static str {
        match self {
            Self::EndSession => "end_session",
            Self::EndUser => "end_user",
            Self::Drain => "drain",
            Self::TakeBack => "take_back",
        }
    }

    /// The command of a row; `None` is one of a later version.
    pub fn of(row: &entity::command::Model) -> Option<Self> {
        Self::ALL.into_iter().find(|command| command.name() == row.kind)
    }

    /// A row for whichever control plane has the boot of a node; 0 is all nodes, or all boots of one.
    pub fn row(self, (node, boot): Boot, argument: i64) -> entity::command::ActiveModel {
        entity::command::ActiveModel {
            node_id: Set(node),
            boot: Set(boot),
            kind: Set(self.name().to_owned()),
            argument: Set(argument),
            at: Set(now()),
            ..Default::default()
        }
    }
}

/// Microseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Whether a column has a part, in whichever case: SQLite knows that of ASCII only.
pub fn has_part(column: impl ColumnTrait, part: &str) -> Expr {
    let mut pattern = String::with_capacity(part.len() + 2);
    pattern.push('%');
    for letter in part.chars() {
        if matches!(letter, '%' | '_' | '!') {
            pattern.push('!');
        }
        pattern.push(letter);
    }
    pattern.push('%');
    let terms = [Expr::col(column.as_column_ref()), Expr::val(pattern)];
    Expr::cust_with_exprs("LOWER(?) LIKE LOWER(?) ESCAPE '!'", terms)
}

/// How far clocks of control planes of one database may differ, in microseconds.
pub const SKEW: i64 = 60_000_000;
/// What tells of itself every 5 s and was silent so long is gone, in microseconds.
pub const SILENT: i64 = 20_000_000;

/// Whether a time, of whichever control plane's clock, was a moment ago.
pub fn lately(at: impl ColumnTrait) -> Expr {
    let now = now();
    at.between(now - SILENT - SKEW, now + SKEW)
}

/// The same of a time that was read.
pub fn was_lately(at: i64) -> bool {
    let ago = now() - at;
    (-SKEW..SILENT + SKEW).contains(&ago)
}

/// Where SQLite's file lies in a state directory.
pub fn sqlite_url(state_dir: &Path) -> String {
    format!("sqlite://{}?mode=rwc", state_dir.join("culvert.db").display())
}

impl Store {
    /// Connects to `sqlite://…` or `mysql://…`.
    ///
    /// # Errors
    /// The database cannot be reached.
    pub async fn connect(url: &str, pool: u32) -> Result<Self, DbErr> {
        let mut options = ConnectOptions::new(url);
        options
            .max_connections(if url.starts_with("sqlite:") { 4 } else { pool })
            .acquire_timeout(Duration::from_secs(3))
            .connect_timeout(Duration::from_secs(3))
            .sqlx_logging(false);
        if url.starts_with("sqlite:") {
            // Acknowledged means on the disk.
            options.map_sqlx_sqlite_opts(|options| {
                options
                    .journal_mode(sea_orm::sqlx::sqlite::SqliteJournalMode::Wal)
                    .synchronous(sea_orm::sqlx::sqlite::SqliteSynchronous::Full)
                    .foreign_keys(true)
                    // A log that a long reader has let grow is cut again.
                    .pragma("journal_size_limit", "67108864")
                    .busy_timeout(Duration::from_secs(3))
            });
        }
        // After a failover the old primary may still be there, and only read.
        options.map_sqlx_mysql_before_acquire(|_, connection| {
            let made = now() - i64::try_from(connection.age.as_micros()).unwrap_or(i64::MAX);
            Box::pin(async move { Ok(made > ONLY_READ_AT.load(Relaxed)) })
        });
        // Of those that open a new SQLite file at once one makes its log, and the others are not kept waiting
        // for it but turned away.
        let db = retry(|| Database::connect(options.clone())).await?;
        Ok(Self { db, changed: watch::Sender::new(0) })
    }

    /// Brings the schema up to date; may be run again.
    ///
    /// # Errors
    /// The database fails.
    pub async fn migrate(&self) -> Result<(), DbErr> {
        // Another control plane, or a command, may be about the same. A migration goes on where it was.
        retry_if(is_made_by_another, || schema::Migrator::up(&self.db, None)).await?;
        let head = entity::head::ActiveModel { id: Set(HEAD), generation: Set(1) };
        entity::head::Entity::insert(head)
            .on_conflict(
                OnConflict::column(entity::head::Column::Id)
                    .do_nothing_on([entity::head::Column::Id])
                    .to_owned(),
            )
            .exec_without_returning(&self.db)
            .await?;
        self.changed.send_replace(self.generation().await?);
        Ok(())
    }

    /// Whether a job that is done once in a period, in microseconds, by one of the control planes, is ours
    /// now. It counts as done from then on.
    ///
    /// # Errors
    /// The database fails.
    pub async fn takes(&self, job: &str, period: i64) -> Result<bool, DbErr> {
        use entity::setting::{ActiveModel, Column, Entity};
        let (name, now) = (format!("job.{job}"), now());
        let Some(done) = Entity::find_by_id(&name).one(&self.db).await? else {
            let row = ActiveModel { name: Set(name), value: Set(now.to_string()) };
            return match Entity::insert(row).exec_without_returning(&self.db).await {
                Err(error) if is_duplicate(&error) => Ok(false),
                inserted => inserted.map(|_| true),
            };
        };
        if done.value.parse().is_ok_and(|at: i64| (at..at + period).contains(&now)) {
            return Ok(false);
        }
        let taken = Entity::update_many()
            .col_expr(Column::Value, now.to_string().into())
            .filter(Column::Name.eq(&name))
            .filter(Column::Value.eq(done.value))
            .exec(&self.db)
            .await?;
        Ok(taken.rows_affected > 0)
    }

    /// For reading.
    pub fn db(&self) -> &DatabaseConnection {
        &self.db
    }

    /// The name of the database's kind.
    pub fn backend(&self) -> &'static str {
        match self.db.get_database_backend() {
            DatabaseBackend::Sqlite => "sqlite",
            _ => "mysql",
        }
    }

    /// The generation that nodes should have.
    ///
    /// # Errors
    /// The database fails.
    pub async fn generation(&self) -> Result<i64, DbErr> {
        let head = entity::head::Entity::find_by_id(HEAD).one(&self.db).await?;
        Ok(head.map_or(0, |head| head.generation))
    }

    /// Tells of new generations made by this process, and of what [`Store::look`] finds.
    pub fn watch(&self) -> watch::Receiver<i64> {
        self.changed.subscribe()
    }

    /// The newest generation this process knows of.
    pub fn known_generation(&self) -> u64 {
        self.changed.borrow().cast_unsigned()
    }

    /// Looks whether another control plane made a generation.
    ///
    /// # Errors
    /// The database fails.
    pub async fn look(&self) -> Result<(), DbErr> {
        let generation = self.generation().await?;
        self.announce(Some(generation));
        Ok(())
    }

    /// Tells this process of a generation, if there is one.
    pub fn announce(&self, generation: Option<i64>) {
        let Some(generation) = generation else { return };
        self.changed.send_if_modified(|known| {
            let newer = generation > *known;
            *known = generation.max(*known);
            newer
        });
    }

    /// Begins an edit. It holds the head row's lock, so that edits happen one after the other and
    /// generations are in the order of commits.
    ///
    /// # Errors
    /// The database failed, or others held the lock for too long.
    pub async fn edit(&self, actor: Actor) -> Result<Edit<'_>, DbErr> {
        Ok(Edit { store: self, transaction: self.lock().await?, actor })
    }

    async fn lock(&self) -> Result<DatabaseTransaction, DbErr> {
        let lock = format!("UPDATE head SET generation = generation WHERE id = {HEAD}");
        let begin = || async {
            let transaction = self.db.begin().await?;
            self.run(&transaction, lock.clone()).await?;
            Ok(transaction)
        };
        retry(begin).await
    }

    /// Leaves commands that nobody has given, for boots of nodes and with their arguments. Under the lock of
    /// edits, so that commands are seen in the order of their numbers.
    ///
    /// # Errors
    /// The database failed; none was left then.
    pub async fn command(&self, commands: Vec<(Boot, Command, i64)>) -> Result<(), DbErr> {
        let db = self.lock().await?;
        let rows =
            commands.into_iter().map(|(boot, command, argument)| command.row(boot, argument));
        entity::command::Entity::insert_many(rows).exec_without_returning(&db).await?;
        db.commit().await
    }

    /// Writes a change as part of a transaction: the audit log, and, if nodes are to know, a generation. It is
    /// to be announced once the transaction is committed.
    ///
    /// # Errors
    /// The database failed.
    pub async fn write(
        &self,
        db: &DatabaseTransaction,
        actor: Actor,
        change: Change,
    ) -> Result<Option<i64>, DbErr> {
        let mut generation = None;
        if change.policy || !change.users.is_empty() {
            let count = format!("UPDATE head SET generation = generation + 1 WHERE id = {HEAD}");
            self.run(db, count).await?;
            let head = entity::head::Entity::find_by_id(HEAD).one(db).await?;
            let next = head.map_or(1, |head| head.generation);
            let policy = change.policy.then_some(0);
            let changed = change.users.iter().copied().chain(policy);
            let rows: Vec<_> = changed
                .map(|user_id| entity::change::ActiveModel {
                    generation: Set(next),
                    user_id: Set(user_id),
                })
                .collect();
            for part in rows.chunks(ROWS) {
                entity::change::Entity::insert_many(part.iter().cloned())
                    .exec_without_returning(db)
                    .await?;
            }
            generation = Some(next);
        }
        let audit = entity::audit::ActiveModel {
            at: Set(now()),
            actor: Set(actor.name),
            address: Set(actor.address),
            action: Set(change.action.to_owned()),
            subject: Set(change.subject.chars().take(SUBJECT).collect()),
            old: Set(change.old),
            new: Set(change.new),
            ..Default::default()
        };
        entity::audit::Entity::insert(audit).exec_without_returning(db).await?;
        Ok(generation)
    }

    async fn run(&self, db: &DatabaseTransaction, sql: String) -> Result<(), DbErr> {
        let backend = self.db.get_database_backend();
        db.execute_raw(Statement::from_string(backend, sql)).await.map(drop)
    }
}

/// An edit under way; dropped, it has not happened.
pub struct Edit<'a> {
    store: &'a Store,
    transaction: DatabaseTransaction,
    actor: Actor,
}

impl Edit<'_> {
    /// For reading and writing.
    pub fn db(&self) -> &DatabaseTransaction {
        &self.transaction
    }

    /// Counts the generation up if nodes are to know, writes the audit log, and commits.
    ///
    /// # Errors
    /// The database failed; nothing has changed then.
    pub async fn commit(self, change: Change) -> Result<(), DbErr> {
        let generation = self.store.write(&self.transaction, self.actor, change).await?;
        self.transaction.commit().await?;
        self.store.announce(generation);
        Ok(())
    }
}

/// Runs a transaction, again if another's lock was in the way.
///
/// # Errors
/// Its error, if it was another or came too often.
pub async fn retry<T, F: Future<Output = Result<T, DbErr>>>(
    run: impl FnMut() -> F,
) -> Result<T, DbErr> {
    retry_if(is_contention, run).await
}

async fn retry_if<T, F: Future<Output = Result<T, DbErr>>>(
    passes: fn(&DbErr) -> bool,
    mut run: impl FnMut() -> F,
) -> Result<T, DbErr> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match run().await {
            Err(error) if attempt < TRIES && passes(&error) => {
                tokio::time::sleep(Duration::from_millis(5 << attempt)).await;
            }
            done => return done,
        }
    }
}

/// Takes the locks of users: whoever else wants them waits until the transaction ends. On SQLite that is
/// whoever writes.
///
/// # Errors
/// The database failed, or others held one for too long.
pub async fn lock_users(
    db: &DatabaseTransaction,
    ids: impl IntoIterator<Item = i64>,
) -> Result<(), DbErr> {
    use entity::user::{Column, Entity};
    let own = Expr::col(Column::UpdatedAt);
    let users = Entity::update_many().col_expr(Column::UpdatedAt, own);
    users.filter(Column::Id.is_in(ids)).exec(db).await.map(drop)
}

/// What ends a SELECT whose rows stay as they are, and are read as they are, until the transaction ends. SQLite
/// has one writer, who sees that anyway.
pub fn held(backend: DatabaseBackend) -> &'static str {
    match backend {
        // MariaDB knows no FOR SHARE.
        DatabaseBackend::MySql => " LOCK IN SHARE MODE",
        _ => "",
    }
}

/// Rows of one INSERT: SQLite takes 32,766 values in one statement.
pub const ROWS: usize = 500;

/// The number of an error of a MySQL server.
fn number(error: &DbErr) -> Option<u16> {
    let (DbErr::Conn(error) | DbErr::Exec(error) | DbErr::Query(error)) = error else {
        return None;
    };
    let RuntimeErr::SqlxError(error) = error else { return None };
    let error = error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}

/// Whether another transaction was in the way: lock wait (1205), deadlock (1213), SQLITE_BUSY (5).
fn is_contention(error: &DbErr) -> bool {
    let text = error.to_string();
    number(error).is_some_and(|number| matches!(number, 1205 | 1213))
        || ["database is locked", "database table is locked", "(code: 5)"]
            .iter()
            .any(|sign| text.contains(sign))
}

/// When a connection was last told that its server only reads, in microseconds since 1970: those made
/// before are not used again.
static ONLY_READ_AT: AtomicI64 = AtomicI64::new(0);

/// Takes note of an error that says that a server only reads.
pub fn note(error: &DbErr) {
    if number(error).is_some_and(|number| ONLY_READS.contains(&number)) {
        ONLY_READ_AT.store(now(), Relaxed);
    }
}

/// `--read-only`, a transaction that only reads, `innodb_read_only`.
const ONLY_READS: [u16; 3] = [1290, 1792, 1836];
/// No room on the disk (1021) or in a table (1114); too many connections, of all (1040), of the user
/// (1203) or of the account (1226); the server ends (1053); the connection (1927) or the statement
/// (1317) was killed, or the latter took too long (1969, MySQL's 3024).
const NOT_NOW: [u16; 10] = [1021, 1040, 1053, 1114, 1203, 1226, 1317, 1927, 1969, 3024];

/// Whether the database could not be asked at all, or takes no changes now.
pub fn is_away(error: &DbErr) -> bool {
    let text = error.to_string();
    number(error).is_some_and(|number| ONLY_READS.contains(&number) || NOT_NOW.contains(&number))
        || matches!(error, DbErr::Conn(_) | DbErr::ConnectionAcquire(_))
        || is_contention(error)
        || ["readonly", "read-only", "disk is full", "disk I/O", "Io(", "error communicating"]
            .iter()
            .any(|sign| text.contains(sign))
}

/// Whether a database that was to be opened is away but may come: it did not refuse us, and is who it is to be.
pub fn may_come(error: &DbErr) -> bool {
    // Access denied, a database that does not exist, a host that may not connect; the certificate.
    const REFUSED: [&str; 6] =
        ["(28000)", "1044 (42000)", "1049 (42000)", "1130 (", "peer certificate", "TLS"];
    let text = error.to_string();
    is_away(error) && !REFUSED.iter().any(|sign| text.contains(sign))
}

/// Whether what was to be made was made meanwhile: a table (1050) or an index (1061) is there, a row is.
fn is_made_by_another(error: &DbErr) -> bool {
    number(error).is_some_and(|number| matches!(number, 1050 | 1061))
        || error.to_string().contains("already exists")
        || is_duplicate(error)
        || is_contention(error)
}

/// Whether a unique index said no.
pub fn is_duplicate(error: &DbErr) -> bool {
    matches!(error.sql_err(), Some(sea_orm::SqlErr::UniqueConstraintViolation(_)))
}
