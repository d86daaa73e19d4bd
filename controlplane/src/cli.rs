//! The command line.

use std::{io::Read, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sea_orm::{ColumnTrait, DatabaseTransaction, EntityTrait, QueryFilter, QueryOrder};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    app,
    auth::{check_password, hash_password},
    backup,
    config::{Config, LogFormat},
    http,
    link::Authority,
    store::{
        Actor, Change,
        entity::{node, user},
    },
};

/// The control plane of Culvert.
#[derive(Debug, Parser)]
#[command(name = "culvert-control", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct File {
    /// The configuration file; without one the defaults hold.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets a key over the file and the environment, such as server.bind=127.0.0.1:8080; may be given often.
    /// Lists are set in the file only.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API, the page and the nodes.
    Serve {
        #[command(flatten)]
        file: File,
    },
    /// Bring the database's schema up to date, and end.
    Migrate {
        #[command(flatten)]
        file: File,
    },
    /// Print the API's description (OpenAPI 3.1, JSON).
    Openapi,
    /// Write all that is kept to standard output, but what nodes tell anew.
    Backup {
        #[command(flatten)]
        file: File,
    },
    /// Read a backup from standard input into a database without users, of either kind.
    Restore {
        #[command(flatten)]
        file: File,
    },
    /// Users.
    #[command(subcommand)]
    User(UserCommand),
    /// Nodes.
    #[command(subcommand)]
    Node(NodeCommand),
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Make a user; the password comes from standard input.
    Add {
        /// The name.
        name: String,
        /// Make an admin, who may use the API for everything and not the proxy.
        #[arg(long)]
        admin: bool,
        #[command(flatten)]
        file: File,
    },
    /// List users.
    List {
        #[command(flatten)]
        file: File,
    },
    /// Set a user's password, from standard input.
    Passwd {
        /// The name.
        name: String,
        #[command(flatten)]
        file: File,
    },
    /// Take a user's second factor away: the device is lost.
    TotpOff {
        /// The name.
        name: String,
        #[command(flatten)]
        file: File,
    },
    /// Let a user log in no more; live sessions end.
    Disable {
        /// The name.
        name: String,
        #[command(flatten)]
        file: File,
    },
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Enrol a node of another host, and write its identity to standard output: the file that
    /// `[control] identity` of the node names. A node on this host enrols itself by connecting.
    Add {
        /// Its `node.name`.
        name: String,
        #[command(flatten)]
        file: File,
    },
    /// Give a node another identity; the one before is worthless at once.
    Identity {
        /// Its name.
        name: String,
        #[command(flatten)]
        file: File,
    },
    /// List nodes.
    List {
        #[command(flatten)]
        file: File,
    },
    /// Let a node connect no more.
    Revoke {
        /// Its name.
        name: String,
        #[command(flatten)]
        file: File,
    },
}

/// Runs the program.
pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Openapi => {
                println!("{}", http::openapi().to_pretty_json()?);
                Ok(())
            }
            Command::Serve { file } => serve(&file.load()?).await,
            Command::Migrate { file } => app::store(&file.load()?).await.map(drop),
            Command::Backup { file } => {
                let store = app::store(&file.load()?).await?;
                backup::write(&store, std::io::BufWriter::new(std::io::stdout().lock())).await
            }
            Command::Restore { file } => {
                let store = app::store(&file.load()?).await?;
                backup::restore(&store, std::io::stdin().lock()).await?;
                let edit = store.edit(actor()).await?;
                edit.commit(Change::new("backup.restore", "")).await.map_err(failed)
            }
            Command::User(command) => command.run().await,
            Command::Node(command) => command.run().await,
        }
    })
}

impl File {
    fn load(&self) -> anyhow::Result<Config> {
        Config::load(self.config.as_deref(), &self.set).map_err(|problems| {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            anyhow::anyhow!("{}", lines.join("\n"))
        })
    }
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_new(&config.log.level).context("log.level")?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    match config.log.format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.init(),
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    app::serve(config, async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    })
    .await
}

/// Who runs this, and from where, as far as sudo, login and sshd have said it: a name that no user has.
fn actor() -> Actor {
    let said = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let who = ["SUDO_USER", "LOGNAME", "USER"].into_iter().find_map(said);
    let mut name = format!("cli:{}", who.unwrap_or_default());
    name.truncate(name.floor_char_boundary(255));
    let from = said("SSH_CONNECTION");
    let from = from.and_then(|text| text.split(' ').next()?.parse::<std::net::IpAddr>().ok());
    Actor { name, address: from.map_or(String::new(), |address| address.to_string()) }
}

fn password() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin().take(1024).read_to_string(&mut text)?;
    let password = text.trim_end_matches(['\r', '\n']).to_owned();
    check_password(&password).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(password)
}

fn failed(error: sea_orm::DbErr) -> anyhow::Error {
    if crate::store::is_duplicate(&error) {
        anyhow::anyhow!("there is one of that name")
    } else {
        anyhow::anyhow!("the database failed: {error}")
    }
}

fn refused(problem: http::Problem) -> anyhow::Error {
    anyhow::anyhow!(problem.detail)
}

async fn known(db: &DatabaseTransaction, name: &str) -> anyhow::Result<user::Model> {
    let found = user::Entity::find().filter(user::Column::Name.eq(name)).one(db).await;
    found.map_err(failed)?.with_context(|| format!("there is no user {name:?}"))
}

async fn known_node(db: &DatabaseTransaction, name: &str) -> anyhow::Result<node::Model> {
    let found = node::Entity::find().filter(node::Column::Name.eq(name)).one(db).await;
    found.map_err(failed)?.with_context(|| format!("there is no node {name:?}"))
}

impl UserCommand {
    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Add { name, admin, file } => {
                http::check_name(&name).map_err(refused)?;
                let store = app::store(&file.load()?).await?;
                let hash = hash_password(password()?).await.context("no hash could be made")?;
                let role = if admin { "admin" } else { "user" };
                let edit = store.edit(actor()).await?;
                let row = app::new_user(&name, &hash, role);
                let made = http::edit_user::create(edit.db(), row, None).await;
                edit.commit(made.map_err(refused)?.1).await.map_err(failed)
            }
            Self::List { file } => {
                let store = app::store(&file.load()?).await?;
                let users = user::Entity::find().order_by_asc(user::Column::Id);
                for user in users.all(store.db()).await? {
                    println!("{}\t{}\t{}\t{}", user.id, user.name, user.role, user.status);
                }
                Ok(())
            }
            Self::Passwd { name, file } => {
                let config = file.load()?;
                let store = app::store(&config).await?;
                let hash = hash_password(password()?).await.context("no hash could be made")?;
                let edit = store.edit(actor()).await?;
                let user = known(edit.db(), &name).await?;
                let changed = http::edit_user::password(edit.db(), user.id, &hash).await;
                edit.commit(changed.map_err(refused)?.1).await.map_err(failed)?;
                app::forget_first_password(&config.state.dir, &name);
                Ok(())
            }
            Self::TotpOff { name, file } => {
                let store = app::store(&file.load()?).await?;
                let edit = store.edit(actor()).await?;
                let user = known(edit.db(), &name).await?;
                let change = http::take_totp_away(edit.db(), user.id).await;
                edit.commit(change.map_err(refused)?).await.map_err(failed)
            }
            Self::Disable { name, file } => {
                let store = app::store(&file.load()?).await?;
                let edit = store.edit(actor()).await?;
                let user = known(edit.db(), &name).await?;
                let change = http::edit_user::disable(edit.db(), user.id).await;
                edit.commit(change.map_err(refused)?).await.map_err(failed)
            }
        }
    }
}

impl NodeCommand {
    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Add { name, file } => {
                let config = file.load()?;
                let store = app::store(&config).await?;
                http::check_name(&name).map_err(refused)?;
                let issued = Authority::open(&config)?.node(&name)?;
                let edit = store.edit(actor()).await?;
                let added = http::add_node(edit.db(), &name, &issued.fingerprint).await;
                edit.commit(added.map_err(failed)?.1).await.map_err(failed)?;
                print!("{}", issued.pem);
                Ok(())
            }
            Self::Identity { name, file } => {
                let config = file.load()?;
                let store = app::store(&config).await?;
                let issued = Authority::open(&config)?.node(&name)?;
                let edit = store.edit(actor()).await?;
                let node = known_node(edit.db(), &name).await?;
                if node.status != "active" {
                    anyhow::bail!("node {name:?} was revoked; enrol one of another name");
                }
                let replaced = http::replace_identity(edit.db(), node, issued.fingerprint).await;
                edit.commit(replaced.map_err(failed)?.1).await.map_err(failed)?;
                print!("{}", issued.pem);
                Ok(())
            }
            Self::List { file } => {
                let store = app::store(&file.load()?).await?;
                let nodes = node::Entity::find().order_by_asc(node::Column::Id);
                for node in nodes.all(store.db()).await? {
                    println!("{}\t{}\t{}\t{}", node.id, node.name, node.status, node.version);
                }
                Ok(())
            }
            Self::Revoke { name, file } => {
                let store = app::store(&file.load()?).await?;
                let edit = store.edit(actor()).await?;
                let node = known_node(edit.db(), &name).await?;
                let revoked = http::revoke_node(edit.db(), node).await;
                edit.commit(revoked.map_err(failed)?).await.map_err(failed)
            }
        }
    }
}
