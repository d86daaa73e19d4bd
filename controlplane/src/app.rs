//! The running control plane.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use axum::Router;
use axum_server::{Handle, tls_rustls::RustlsConfig};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, EntityTrait, PaginatorTrait, QueryFilter,
    QuerySelect, Set, Statement, TransactionTrait, sea_query::OnConflict,
};
use tokio::net::TcpListener;

use crate::{
    auth::{LoginThrottle, Seal, Tokens, hash_password, random_password, secret_file},
    calendar::Calendar,
    config::{Config, Key, Tls},
    http::{self, App},
    link::{Authority, Hub},
    store::{
        Actor, Change, Store,
        entity::{
            access_log, audit, boot, change, command, heartbeat, node_usage, refresh, session,
            setting, traffic, user,
        },
        may_come, now, retry,
    },
};

/// How often another control plane's edits are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// How often the certificate is looked at.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(10);
/// How long requests may take that run when the server ends.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
/// One step with the database takes no longer than that: it may hang. MySQL waits 50 s for a lock.
const STEP: Duration = Duration::from_secs(120);
/// The same of deleting what is old.
const CLEANED: Duration = Duration::from_secs(300);
/// How often what is old is deleted.
const CLEAN: Duration = Duration::from_secs(600);
/// How long heartbeats, commands and changes are kept, in microseconds and generations.
const HEARTBEATS: i64 = 86_400_000_000;
const COMMANDS: i64 = 3_600_000_000;
const CHANGES: i64 = 100_000;
const DAY: i64 = 86_400_000_000;
/// How long the sums of a boot that is over are kept by themselves.
const BOOTS: i64 = 30 * DAY;
const MINUTE: i64 = 60_000_000;
/// The setting that says for which day quotas were begun anew.
const TODAY: &str = "quota_day";
/// The first admin.
pub const FIRST_ADMIN: &str = "admin";

/// Opens the database and brings it up to date.
async fn open(config: &Config) -> Result<Store, sea_orm::DbErr> {
    let store = Store::connect(&config.database_url(), config.database.pool).await?;
    store.migrate().await?;
    Ok(store)
}

fn explained(error: sea_orm::DbErr) -> anyhow::Error {
    anyhow::anyhow!("database: {error}; see database.url and state.dir")
}

/// Waits until the database is there; meanwhile whoever asks is told so.
async fn await_store(config: &Config, server: &Server) -> anyhow::Result<Store> {
    let waits = |error: &sea_orm::DbErr| !config.database.url.is_empty() && may_come(error);
    match open(config).await {
        Err(error) if waits(&error) => {
            tracing::warn!(address = %server.address, %error, "the database is away; waiting for it");
        }
        opened => return opened.map_err(explained),
    }
    let handle = Handle::new();
    let answering = tokio::spawn(server.clone().serve(http::waiting(), handle.clone()));
    let opened = loop {
        tokio::time::sleep(LOOK).await;
        match open(config).await {
            Err(error) if waits(&error) => {}
            opened => break opened,
        }
    };
    handle.graceful_shutdown(Some(LAST_REQUESTS));
    answering.await??;
    opened.map_err(explained)
}

/// The state directory, for us alone.
///
/// # Errors
/// It cannot be made.
pub fn state_dir(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path).with_context(|| {
        format!("{}: set state.dir to a folder this user may write", path.display())
    })
}

/// Opens everything a command needs.
///
/// # Errors
/// What is missing, with the next step.
pub async fn store(config: &Config) -> anyhow::Result<Store> {
    state_dir(&config.state.dir)?;
    open(config).await.map_err(explained)
}

/// Makes the first admin, unless there is one; the password is kept in a file until it is changed.
///
/// # Errors
/// The database or the file fails.
pub async fn first_admin(store: &Store, dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("initial-admin");
    let admins = || user::Entity::find().filter(user::Column::Role.eq("admin"));
    if admins().count(store.db()).await? > 0 {
        return Ok(());
    }
    let password = random_password();
    let hash = hash_password(password.clone()).await.context("no password could be hashed")?;
    let actor = Actor { name: "system:start".into(), address: String::new() };
    {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        writeln!(file, "{FIRST_ADMIN} {password}")?;
        file.sync_all()?;
    }
    let edit = store.edit(actor).await?;
    if admins().count(edit.db()).await? > 0 {
        // Another control plane was faster.
        std::fs::remove_file(&path)?;
        return Ok(());
    }
    let row = new_user(FIRST_ADMIN, &hash, "admin");
    let made = http::edit_user::create(edit.db(), row, None).await;
    let (_, change) = made.map_err(|problem| {
        let detail = problem.detail;
        let _ = std::fs::remove_file(&path);
        anyhow::anyhow!("no admin {FIRST_ADMIN:?} can be made: {detail}; make one with culvert-control user add --admin")
    })?;
    edit.commit(change).await?;
    tracing::info!(file = %path.display(), "the first admin's password is there");
    Ok(())
}

/// A user with nothing special.
pub fn new_user(name: &str, hash: &str, role: &str) -> user::ActiveModel {
    user::ActiveModel {
        name: Set(name.to_owned()),
        password_hash: Set(hash.to_owned()),
        role: Set(role.to_owned()),
        status: Set("active".into()),
        proxy_access: Set(role == "user"),
        expires_at: Set(None),
        groups: Set("[]".into()),
        sessions: Set(None),
        new_sessions_per_second: Set(None),
        devices: Set(None),
        evict_oldest: Set(false),
        source_addresses: Set("[]".into()),
        egress_address: Set(None),
        quota_bytes: Set(None),
        quota_period: Set(None),
        comment: Set(String::new()),
        token_epoch: Set(now()),
        totp_secret: Set(None),
        totp_pending: Set(None),
        totp_step: Set(0),
        created_at: Set(now()),
        updated_at: Set(now()),
        ..Default::default()
    }
}

/// The first admin has another password: that of the file is of no use any more.
pub fn forget_first_password(state: &Path, user: &str) {
    if user == FIRST_ADMIN {
        let _ = std::fs::remove_file(state.join("initial-admin"));
    }
}

/// What the handlers need.
///
/// # Errors
/// A key file cannot be had.
pub fn parts(config: &Config, store: Store) -> anyhow::Result<App> {
    let key = |given: &Key, name: &str| match given.bytes() {
        Ok(None) => {
            let path = config.state.dir.join(name);
            secret_file(&path).with_context(|| path.display().to_string())
        }
        Ok(Some(key)) => Ok(key),
        Err(wanted) => Err(anyhow::anyhow!("{name}: {wanted}")),
    };
    let seal = Seal::new(&key(&config.keys.seal, "seal.key")?)
        .context("seal.key has less than 32 bytes")?;
    Ok(App {
        hub: Hub::new(store.clone()),
        authority: Arc::new(Authority::open(config)?),
        store,
        tokens: Arc::new(Tokens::new(
            &key(&config.keys.jwt, "jwt.key")?,
            config.auth.access_token.0,
        )),
        refresh_life: i64::try_from(config.auth.refresh_token.0.as_micros())?,
        trusted_proxies: config.server.trusted_proxies.clone().into(),
        state: config.state.dir.as_path().into(),
        secure_cookies: config.server.tls.is_set()
            || config.server.public_url.starts_with("https:"),
        seal: Arc::new(seal),
        throttle: Arc::new(LoginThrottle::default()),
        counts: Arc::default(),
        started: now(),
    })
}

/// Where the API is served.
#[derive(Clone)]
struct Server {
    address: SocketAddr,
    listener: Arc<std::net::TcpListener>,
    certificate: Option<RustlsConfig>,
}

impl Server {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let bind = config.server.bind;
        let listener = TcpListener::bind(bind).await.map_err(|error| {
            anyhow::anyhow!("{bind}: {error}; choose another address with server.bind")
        })?;
        if !bind.ip().is_loopback() && !config.server.tls.is_set() {
            tracing::warn!(%bind, "passwords and tokens travel in clear: set server.tls, or bind 127.0.0.1 behind a proxy that speaks TLS");
        }
        let certificate = certificate(&config.server.tls).await?;
        let listener = listener.into_std()?;
        Ok(Self { address: listener.local_addr()?, listener: Arc::new(listener), certificate })
    }

    async fn serve(self, router: Router, handle: Handle<SocketAddr>) -> std::io::Result<()> {
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let listener = self.listener.try_clone()?;
        match self.certificate {
            Some(certificate) => {
                let server = axum_server::from_tcp_rustls(listener, certificate)?;
                server.handle(handle).serve(service).await
            }
            None => axum_server::from_tcp(listener)?.handle(handle).serve(service).await,
        }
    }
}

/// Serves until told to end.
///
/// # Errors
/// What keeps it from starting, with the next step.
pub async fn serve(
    config: &Config,
    ended: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let mut ended = Box::pin(ended);
    state_dir(&config.state.dir)?;
    let server = Server::bind(config).await?;
    let store = tokio::select! {
        store = await_store(config, &server) => store?,
        () = &mut ended => return Ok(()),
    };
    first_admin(&store, &config.state.dir).await?;
    let app = parts(config, store.clone())?;
    for (name, own) in
        [("link-authority.key", app.authority.known_by()), ("seal.key", app.seal.known_by())]
    {
        anyhow::ensure!(
            is_first_or_same(&store, name, own).await?,
            "{}: this database knows another {name}; copy it from the other control plane",
            config.state.dir.join(name).display()
        );
    }
    if !is_first_or_same(&store, "jwt.key", app.tokens.known_by()).await? {
        // It may be replaced, which ends all tokens; but then everywhere.
        tracing::warn!(
            "another jwt.key than the control plane's that started last: where keys differ, one refuses the other's tokens"
        );
        replace_known(&store, "jwt.key", app.tokens.known_by()).await?;
    }
    app.hub.listen(&config.link_path(), config.link.allow_uids.clone())?;
    let nodes = match config.link.bind {
        Some(bind) => Some(app.hub.listen_tls(bind, &app.authority).await?),
        None => None,
    };
    tokio::spawn(look(store.clone()));
    tokio::spawn(periods(store.clone()));
    tokio::spawn(clean(store));
    let nodes = nodes.map(tracing::field::display);
    tracing::info!(address = %server.address, link = %config.link_path().display(), nodes, "listening");
    let handle = Handle::new();
    let ending = handle.clone();
    tokio::spawn(async move {
        ended.await;
        ending.graceful_shutdown(Some(LAST_REQUESTS));
    });
    Ok(server.serve(http::router(app), handle).await?)
}

/// The server's certificate, read again when its files change.
async fn certificate(tls: &Tls) -> anyhow::Result<Option<RustlsConfig>> {
    if !tls.is_set() {
        return Ok(None);
    }
    // Who else speaks TLS here names its provider; this library takes the process's.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let (chain, key) = (tls.certificate.clone(), tls.key.clone());
    let mut known = changed(&[&chain, &key]);
    let loaded = RustlsConfig::from_pem_file(&chain, &key).await;
    let config = loaded
        .map_err(|error| anyhow::anyhow!("server.tls: {}: {error}", tls.certificate.display()))?;
    let reloaded = config.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(CERTIFICATE_LOOK).await;
            let present = changed(&[&chain, &key]);
            if present == known {
                continue;
            }
            match reloaded.reload_from_pem_file(&chain, &key).await {
                Ok(()) => {
                    known = present;
                    tracing::info!(file = %chain.display(), "another certificate");
                }
                Err(error) => {
                    tracing::warn!(%error, file = %chain.display(), "the certificate before stays");
                }
            }
        }
    });
    Ok(Some(config))
}

/// Whether a key is the one that the database knows by its fingerprint; the first that comes is.
async fn is_first_or_same(store: &Store, name: &str, own: String) -> Result<bool, sea_orm::DbErr> {
    let own = serde_json::Value::String(own).to_string();
    let row = setting::ActiveModel { name: Set(name.into()), value: Set(own.clone()) };
    let first =
        OnConflict::column(setting::Column::Name).do_nothing_on([setting::Column::Name]).to_owned();
    setting::Entity::insert(row).on_conflict(first).exec_without_returning(store.db()).await?;
    let known = setting::Entity::find_by_id(name).one(store.db()).await?;
    Ok(known.is_some_and(|known| known.value == own))
}

/// From now on this key is the one that is known.
async fn replace_known(store: &Store, name: &str, own: String) -> Result<(), sea_orm::DbErr> {
    let value = serde_json::Value::String(own).to_string();
    let row = setting::ActiveModel { name: Set(name.into()), value: Set(value) };
    setting::Entity::update(row).exec(store.db()).await.map(drop)
}

fn changed(files: &[&Path]) -> Vec<Option<std::time::SystemTime>> {
    files.iter().map(|file| std::fs::metadata(file).ok()?.modified().ok()).collect()
}

async fn look(store: Store) {
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tick.tick().await;
        let _ = tokio::time::timeout(STEP, store.look()).await;
    }
}

/// When a day begins, users whose quota begins anew may log in again: nodes are told of all that had spent
/// one. So they are at the start, if that comes after a midnight that was missed.
async fn periods(store: Store) {
    let mut told = 0;
    loop {
        let begun = async {
            let Ok(calendar) = Calendar::load(store.db()).await else { return Ok(told) };
            let today = calendar.start(Some("day"));
            if today != told {
                begin_periods(&store, today).await?;
            }
            Ok::<_, sea_orm::DbErr>(today)
        };
        match tokio::time::timeout(STEP, begun).await {
            Ok(Ok(today)) => told = today,
            Ok(Err(error)) => {
                tracing::warn!(%error, "quotas could not be begun anew; trying again");
            }
            Err(_) => tracing::warn!("quotas could not be begun anew in two minutes; trying again"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn begin_periods(store: &Store, today: i64) -> Result<(), sea_orm::DbErr> {
    let edit = store.edit(Actor { name: "system:quota".into(), address: String::new() }).await?;
    // One of several control planes does it.
    let done = setting::Entity::find_by_id(TODAY).one(edit.db()).await?;
    if done.is_some_and(|done| done.value == today.to_string()) {
        return Ok(());
    }
    let row = setting::ActiveModel { name: Set(TODAY.into()), value: Set(today.to_string()) };
    let over =
        OnConflict::column(setting::Column::Name).update_column(setting::Column::Value).to_owned();
    setting::Entity::insert(row).on_conflict(over).exec_without_returning(edit.db()).await?;
    // Those who had spent it in a period.
    let spent = "SELECT DISTINCT u.id AS id FROM users u JOIN user_usage s ON s.user_id = u.id AND s.period > 1 \
                 WHERE u.quota_bytes IS NOT NULL AND s.up + s.down >= u.quota_bytes";
    let spent = Statement::from_string(edit.db().get_database_backend(), spent);
    let rows = edit.db().query_all_raw(spent).await?;
    let users = rows.iter().map(|row| row.try_get("", "id")).collect::<Result<Vec<i64>, _>>()?;
    edit.commit(Change::new("quota.day", format!("{} users", users.len())).users(users)).await
}

async fn clean(store: Store) {
    let mut tick = tokio::time::interval(CLEAN);
    loop {
        tick.tick().await;
        let cleaned = async {
            // Ticks of several planes lie anywhere between each other.
            match store.takes("clean", CLEAN.as_micros() as i64 / 2).await? {
                true => retry(|| clean_once(&store)).await,
                false => Ok(()),
            }
        };
        match tokio::time::timeout(CLEANED, cleaned).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "old rows could not be deleted; trying again in ten minutes");
            }
            Err(_) => tracing::warn!("old rows were not deleted in five minutes; going on later"),
        }
    }
}

/// Deletes rows from before a time, a minute's at once: others want the database too.
async fn delete_old<E: EntityTrait>(
    db: &impl ConnectionTrait,
    _: E,
    at: E::Column,
    before: i64,
) -> Result<(), sea_orm::DbErr> {
    loop {
        let oldest = E::find().select_only().column_as(at.min(), "oldest");
        let oldest: Option<Option<i64>> = oldest.into_tuple().one(db).await?;
        let Some(oldest) = oldest.flatten().filter(|oldest| *oldest < before) else {
            return Ok(());
        };
        E::delete_many().filter(at.lt(before.min(oldest + MINUTE))).exec(db).await?;
        tokio::task::yield_now().await;
    }
}

async fn clean_once(store: &Store) -> Result<(), sea_orm::DbErr> {
    let (db, now) = (store.db(), now());
    let [access, minutes, audits] =
        http::settings_of(db).await?.days().map(|days| i64::from(days) * DAY);
    delete_old(db, access_log::Entity, access_log::Column::At, now - access).await?;
    delete_old(db, traffic::Entity, traffic::Column::At, now - minutes).await?;
    if audits > 0 {
        delete_old(db, audit::Entity, audit::Column::At, now - audits).await?;
    }
    heartbeat::Entity::delete_many()
        .filter(heartbeat::Column::At.lt(now - HEARTBEATS))
        .exec(db)
        .await?;
    command::Entity::delete_many().filter(command::Column::At.lt(now - COMMANDS)).exec(db).await?;
    session::Entity::delete_many().filter(session::Column::ToldAt.lt(now - DAY)).exec(db).await?;
    crate::lease::clean(db, now - DAY).await?;
    // Those of which no report came count for nothing.
    boot::Entity::delete_many()
        .filter(boot::Column::SeenAt.lt(now - DAY))
        .filter(boot::Column::Sequence.lt(0))
        .exec(db)
        .await?;
    forget_boots(db, now - BOOTS).await?;
    refresh::Entity::delete_many().filter(refresh::Column::ExpiresAt.lt(now)).exec(db).await?;
    let oldest = store.generation().await? - CHANGES;
    change::Entity::delete_many().filter(change::Column::Generation.lt(oldest)).exec(db).await?;
    Ok(())
}

/// Forgets the sums of boots that are over and long gone; of the boots stays that they are.
async fn forget_boots(db: &DatabaseConnection, before: i64) -> Result<(), sea_orm::DbErr> {
    let over = format!(
        "SELECT DISTINCT b.node_id AS node_id, b.boot AS boot FROM boots b \
         JOIN node_usage n ON n.node_id = b.node_id AND n.boot = b.boot \
         WHERE b.ended = TRUE AND b.seen_at < {before}"
    );
    let over = Statement::from_string(db.get_database_backend(), over);
    for row in db.query_all_raw(over).await? {
        let (node, boot): (i64, i64) = (row.try_get("", "node_id")?, row.try_get("", "boot")?);
        let forgotten = db.begin().await?;
        // Whatever may still come of it was applied.
        boot::Entity::update_many()
            .col_expr(boot::Column::Sequence, i64::MAX.into())
            .filter(boot::Column::NodeId.eq(node))
            .filter(boot::Column::Boot.eq(boot))
            .exec(&forgotten)
            .await?;
        node_usage::Entity::delete_many()
            .filter(node_usage::Column::NodeId.eq(node))
            .filter(node_usage::Column::Boot.eq(boot))
            .exec(&forgotten)
            .await?;
        forgotten.commit().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use culvert_api::link;

    use super::*;
    use crate::store::{
        Command,
        tests::{new_store, servers},
    };

    /// What is older than the settings say goes, and nothing else; one control plane does it.
    #[tokio::test]
    async fn old_rows_are_deleted_by_one() {
        for server in servers() {
            let (store, _folder) = new_store(server.as_deref()).await;
            let (db, now) = (store.db(), now());
            for (number, age) in [0, 29 * DAY, 31 * DAY, 400 * DAY].into_iter().enumerate() {
                let number = number as i64;
                let log = access_log::ActiveModel {
                    node_id: Set(1),
                    boot: Set(1),
                    sequence: Set(number),
                    at: Set(now - age),
                    user_id: Set(1),
                    user_name: Set("ann".into()),
                    client: Set(String::new()),
                    target: Set(String::new()),
                    ended: Set(String::new()),
                    bytes_up: Set(0),
                    bytes_down: Set(0),
                    body: Set("{}".into()),
                    ..Default::default()
                };
                access_log::Entity::insert(log).exec_without_returning(db).await.unwrap();
                let minute = traffic::ActiveModel {
                    at: Set(now - age),
                    user_id: Set(1),
                    node_id: Set(1),
                    up: Set(1),
                    down: Set(1),
                };
                traffic::Entity::insert(minute).exec_without_returning(db).await.unwrap();
            }
            for (number, age) in
                [0, HEARTBEATS - MINUTE, HEARTBEATS + MINUTE].into_iter().enumerate()
            {
                let beat = heartbeat::ActiveModel {
                    node_id: Set(1),
                    boot: Set(number as i64),
                    at: Set(now - age),
                    sessions: Set(0),
                    cpu_us: Set(0),
                    memory: Set(0),
                    up: Set(0),
                    down: Set(0),
                    ready: Set(true),
                    uptime: Set(0),
                };
                heartbeat::Entity::insert(beat).exec_without_returning(db).await.unwrap();
            }
            // One that is over and long gone, one that is gone but may come back, one that has just ended.
            let report = |boot: u64, last: bool| link::Report {
                boot,
                // As a boot that was killed is told of.
                sequence: if last { i64::MAX as u64 } else { 1 },
                users: vec![link::Usage { user: 1, up: 5, down: 0, held: None }],
                last,
                ..link::Report::default()
            };
            for (number, ended, age) in [(1, true, 31), (2, false, 31), (3, true, 1)] {
                crate::usage::apply(&store, 1, &report(number, ended)).await.unwrap();
                let seen = boot::Entity::update_many()
                    .col_expr(boot::Column::SeenAt, (now - age * DAY).into())
                    .filter(boot::Column::Boot.eq(number.cast_signed()));
                seen.exec(db).await.unwrap();
            }
            for (number, left) in [-1, MINUTE].into_iter().enumerate() {
                let token = refresh::ActiveModel {
                    hash: Set(number.to_string()),
                    user_id: Set(1),
                    epoch: Set(0),
                    used: Set(false),
                    expires_at: Set(now + left),
                };
                refresh::Entity::insert(token).exec_without_returning(db).await.unwrap();
            }
            store.command(vec![((1, 1), Command::EndUser, 7)]).await.unwrap();
            let long_ago = command::Column::At;
            let old =
                command::Entity::update_many().col_expr(long_ago, (now - 2 * COMMANDS).into());
            old.exec(db).await.unwrap();
            store.command(vec![((1, 1), Command::EndUser, 8)]).await.unwrap();
            let edit = async |action: &'static str| {
                let actor = Actor { name: "somebody".into(), address: String::new() };
                let edit = store.edit(actor).await.unwrap();
                edit.commit(Change::new(action, "").policy()).await.unwrap();
            };
            edit("first").await;
            let years =
                audit::Entity::update_many().col_expr(audit::Column::At, (now - 900 * DAY).into());
            years.exec(db).await.unwrap();
            let far = format!("UPDATE head SET generation = {}", CHANGES + 100);
            db.execute_unprepared(&far).await.unwrap();
            edit("second").await;

            clean_once(&store).await.unwrap();
            assert_eq!(access_log::Entity::find().count(db).await.unwrap(), 2);
            let minutes = traffic::Entity::find().filter(traffic::Column::Up.eq(1));
            assert_eq!(minutes.count(db).await.unwrap(), 2);
            let kept = node_usage::Entity::find().all(db).await.unwrap();
            assert_eq!(kept.iter().map(|row| row.boot).collect::<Vec<_>>(), [2, 3]);
            // What is said late of the one that is forgotten is known.
            for number in 1..=3 {
                crate::usage::apply(&store, 1, &report(number, true)).await.unwrap();
            }
            let sums = crate::usage::sums(db, "user_usage WHERE period = 0").await.unwrap();
            assert_eq!(sums, [15, 0]);
            assert_eq!(heartbeat::Entity::find().count(db).await.unwrap(), 2);
            assert_eq!(refresh::Entity::find().count(db).await.unwrap(), 1);
            assert_eq!(command::Entity::find().one(db).await.unwrap().unwrap().argument, 8);
            let changes = change::Entity::find().all(db).await.unwrap();
            assert_eq!(
                changes.iter().map(|row| row.generation).collect::<Vec<_>>(),
                [CHANGES + 101]
            );
            // Audits are kept for ever, unless a setting says otherwise.
            assert_eq!(audit::Entity::find().count(db).await.unwrap(), 2);
            let row = setting::ActiveModel {
                name: Set("audit_log_days".into()),
                value: Set("365".into()),
            };
            setting::Entity::insert(row).exec_without_returning(db).await.unwrap();
            clean_once(&store).await.unwrap();
            let audits = audit::Entity::find().all(db).await.unwrap();
            assert_eq!(audits.iter().map(|row| &*row.action).collect::<Vec<_>>(), ["second"]);

            let other = store.clone();
            assert!(store.takes("clean", DAY).await.unwrap());
            assert!(!other.takes("clean", DAY).await.unwrap());
            assert!(other.takes("clean", 0).await.unwrap(), "the period is over");
        }
    }
}
