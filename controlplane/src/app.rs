//! The running control plane.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use sea_orm::{ActiveModelTrait, ColumnTrait, EntityTrait, PaginatorTrait, QueryFilter, Set};
use tokio::net::TcpListener;

use crate::{
    auth::{LoginThrottle, Tokens, hash_password, random_password, secret_file},
    config::Config,
    http::{self, App},
    link::{Authority, Hub},
    store::{
        Actor, Change, Store,
        entity::{access_log, audit, change, command, heartbeat, refresh, traffic, user},
        now,
    },
};

/// How often another control plane's edits are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// How often what is old is deleted.
const CLEAN: Duration = Duration::from_secs(600);
/// How long heartbeats, commands and changes are kept, in microseconds and generations.
const HEARTBEATS: i64 = 86_400_000_000;
const COMMANDS: i64 = 60_000_000;
const CHANGES: i64 = 100_000;
const DAY: i64 = 86_400_000_000;
/// The first admin.
pub const FIRST_ADMIN: &str = "admin";

/// Opens the database and brings it up to date, again and again until it is there.
async fn open(config: &Config) -> anyhow::Result<Store> {
    let mut told = false;
    loop {
        let opened = async {
            let store = Store::connect(&config.database_url(), config.database.pool).await?;
            store.migrate().await?;
            Ok::<_, sea_orm::DbErr>(store)
        };
        match opened.await {
            Ok(store) => return Ok(store),
            Err(error) if crate::store::is_away(&error) && !config.database.url.is_empty() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "the database is away; waiting for it");
                }
                tokio::time::sleep(LOOK).await;
            }
            Err(error) => anyhow::bail!("database: {error}; see database.url and state.dir"),
        }
    }
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
    open(config).await
}

/// Makes the first admin, whose password is kept in a file until it is changed.
///
/// # Errors
/// The database or the file fails.
pub async fn first_admin(store: &Store, dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("initial-admin");
    if user::Entity::find().count(store.db()).await? > 0 {
        return Ok(());
    }
    let password = random_password();
    let hash = hash_password(password.clone()).await.context("no password could be hashed")?;
    let actor = Actor { name: "start".into(), address: String::new() };
    {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        writeln!(file, "{FIRST_ADMIN} {password}")?;
        file.sync_all()?;
    }
    let edit = store.edit(actor).await?;
    if user::Entity::find().count(edit.db()).await? > 0 {
        // Another control plane was faster.
        std::fs::remove_file(&path)?;
        return Ok(());
    }
    let row = new_user(FIRST_ADMIN, &hash, "admin").insert(edit.db()).await?;
    edit.commit(Change::new("user.create", FIRST_ADMIN).user(row.id)).await?;
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
        source_addresses: Set("[]".into()),
        egress_address: Set(None),
        quota_bytes: Set(None),
        quota_period: Set(None),
        comment: Set(String::new()),
        token_epoch: Set(now()),
        totp_secret: Set(None),
        created_at: Set(now()),
        updated_at: Set(now()),
        ..Default::default()
    }
}

/// What the handlers need.
///
/// # Errors
/// A key file cannot be had.
pub fn parts(config: &Config, store: Store) -> anyhow::Result<App> {
    let path = config.state.dir.join("jwt.key");
    let key = secret_file(&path).with_context(|| path.display().to_string())?;
    Ok(App {
        hub: Hub::new(store.clone()),
        authority: Arc::new(Authority::open(&config.state.dir)?),
        store,
        tokens: Arc::new(Tokens::new(&key, config.auth.access_token.0)),
        refresh_life: i64::try_from(config.auth.refresh_token.0.as_micros())?,
        secure_cookies: config.server.public_url.starts_with("https:"),
        throttle: Arc::new(LoginThrottle::default()),
        started: now(),
    })
}

/// Serves until told to end.
///
/// # Errors
/// What keeps it from starting, with the next step.
pub async fn serve(
    config: &Config,
    ended: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.server.bind).await.map_err(|error| {
        anyhow::anyhow!("{}: {error}; choose another address with server.bind", config.server.bind)
    })?;
    let store = store(config).await?;
    first_admin(&store, &config.state.dir).await?;
    let app = parts(config, store.clone())?;
    app.hub.listen(&config.link_path(), config.link.allow_uids.clone())?;
    let nodes = match config.link.bind {
        Some(bind) => Some(app.hub.listen_tls(bind, &app.authority).await?),
        None => None,
    };
    tokio::spawn(look(store.clone()));
    tokio::spawn(periods(store.clone()));
    tokio::spawn(clean(store));
    tracing::info!(address = %listener.local_addr()?, link = %config.link_path().display(), ?nodes, "listening");
    let service = http::router(app).into_make_service_with_connect_info::<std::net::SocketAddr>();
    axum::serve(listener, service).with_graceful_shutdown(ended).await?;
    Ok(())
}

async fn look(store: Store) {
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tick.tick().await;
        let _ = store.look().await;
    }
}

/// When a day begins, users whose quota begins anew may log in again: nodes are told of all that have
/// one. So they are at the start, which may come after a midnight that was missed.
async fn periods(store: Store) {
    let mut told = 0;
    loop {
        let today = now() / DAY;
        if today != told {
            match begin_periods(&store).await {
                Ok(()) => told = today,
                Err(error) => {
                    tracing::warn!(%error, "quotas could not be begun anew; trying again")
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn begin_periods(store: &Store) -> Result<(), sea_orm::DbErr> {
    let metered = user::Entity::find().filter(user::Column::QuotaBytes.is_not_null());
    let users: Vec<i64> = metered.all(store.db()).await?.iter().map(|user| user.id).collect();
    if users.is_empty() {
        return Ok(());
    }
    let edit = store.edit(Actor { name: "quota".into(), address: String::new() }).await?;
    edit.commit(Change::new("user.quota_period", format!("{} users", users.len())).users(users))
        .await
}

async fn clean(store: Store) {
    let mut tick = tokio::time::interval(CLEAN);
    loop {
        tick.tick().await;
        if let Err(error) = clean_once(&store).await {
            tracing::warn!(%error, "old rows could not be deleted; trying again in ten minutes");
        }
    }
}

async fn clean_once(store: &Store) -> Result<(), sea_orm::DbErr> {
    let (db, now) = (store.db(), now());
    let [access, minutes, audits] =
        http::settings_of(db).await?.days().map(|days| i64::from(days) * DAY);
    access_log::Entity::delete_many()
        .filter(access_log::Column::At.lt(now - access))
        .exec(db)
        .await?;
    traffic::Entity::delete_many().filter(traffic::Column::At.lt(now - minutes)).exec(db).await?;
    if audits > 0 {
        audit::Entity::delete_many().filter(audit::Column::At.lt(now - audits)).exec(db).await?;
    }
    heartbeat::Entity::delete_many()
        .filter(heartbeat::Column::At.lt(now - HEARTBEATS))
        .exec(db)
        .await?;
    command::Entity::delete_many().filter(command::Column::At.lt(now - COMMANDS)).exec(db).await?;
    crate::lease::clean(db, now - DAY).await?;
    refresh::Entity::delete_many().filter(refresh::Column::ExpiresAt.lt(now)).exec(db).await?;
    let oldest = store.generation().await? - CHANGES;
    change::Entity::delete_many().filter(change::Column::Generation.lt(oldest)).exec(db).await?;
    Ok(())
}
