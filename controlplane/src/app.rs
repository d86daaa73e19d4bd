//! The running control plane.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use axum_server::{Handle, tls_rustls::RustlsConfig};
use sea_orm::{ActiveModelTrait, ColumnTrait, EntityTrait, PaginatorTrait, QueryFilter, Set};
use tokio::net::TcpListener;

use crate::{
    auth::{LoginThrottle, Seal, Tokens, hash_password, random_password, secret_file},
    calendar::Calendar,
    config::{Config, Tls},
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
/// How often the certificate is looked at.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(10);
/// How long requests may take that run when the server ends.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
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
        totp_pending: Set(None),
        totp_step: Set(0),
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
    let key = |name: &str| {
        let path = config.state.dir.join(name);
        secret_file(&path).with_context(|| path.display().to_string())
    };
    let seal = Seal::new(&key("seal.key")?).context("seal.key has less than 32 bytes")?;
    Ok(App {
        hub: Hub::new(store.clone()),
        authority: Arc::new(Authority::open(&config.state.dir)?),
        store,
        tokens: Arc::new(Tokens::new(&key("jwt.key")?, config.auth.access_token.0)),
        refresh_life: i64::try_from(config.auth.refresh_token.0.as_micros())?,
        trusted_proxies: config.server.trusted_proxies.clone().into(),
        secure_cookies: config.server.tls.is_set()
            || config.server.public_url.starts_with("https:"),
        seal: Arc::new(seal),
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
    let certificate = certificate(&config.server.tls).await?;
    app.hub.listen(&config.link_path(), config.link.allow_uids.clone())?;
    let nodes = match config.link.bind {
        Some(_) if !app.authority.is_of(&store).await? => anyhow::bail!(
            "{}: nodes of this database know another authority; copy link-authority.key from the other control plane",
            config.state.dir.display()
        ),
        Some(bind) => Some(app.hub.listen_tls(bind, &app.authority).await?),
        None => None,
    };
    tokio::spawn(look(store.clone()));
    tokio::spawn(periods(store.clone()));
    tokio::spawn(clean(store));
    tracing::info!(address = %listener.local_addr()?, link = %config.link_path().display(), ?nodes, "listening");
    let handle = Handle::new();
    let ending = handle.clone();
    tokio::spawn(async move {
        ended.await;
        ending.graceful_shutdown(Some(LAST_REQUESTS));
    });
    let service = http::router(app).into_make_service_with_connect_info::<SocketAddr>();
    let listener = listener.into_std()?;
    match certificate {
        Some(certificate) => {
            let server = axum_server::from_tcp_rustls(listener, certificate)?;
            server.handle(handle).serve(service).await?;
        }
        None => axum_server::from_tcp(listener)?.handle(handle).serve(service).await?,
    }
    Ok(())
}

/// The server's certificate, read again when its files change.
async fn certificate(tls: &Tls) -> anyhow::Result<Option<RustlsConfig>> {
    if !tls.is_set() {
        return Ok(None);
    }
    // Who else speaks TLS here names its provider; this library takes the process's.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let (chain, key) = (tls.certificate.clone(), tls.key.clone());
    let loaded = RustlsConfig::from_pem_file(&chain, &key).await;
    let config = loaded
        .map_err(|error| anyhow::anyhow!("server.tls: {}: {error}", tls.certificate.display()))?;
    let (reloaded, mut known) = (config.clone(), changed(&[&chain, &key]));
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

fn changed(files: &[&Path]) -> Vec<Option<std::time::SystemTime>> {
    files.iter().map(|file| std::fs::metadata(file).ok()?.modified().ok()).collect()
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
        if let Ok(calendar) = Calendar::load(store.db()).await
            && calendar.start(Some("day")) != told
        {
            match begin_periods(&store).await {
                Ok(()) => told = calendar.start(Some("day")),
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
