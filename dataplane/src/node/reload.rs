//! What happens while the node runs: signals, a changed file, a user's expiry, the drain.

use std::{path::Path, sync::Arc, time::Duration};

use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, CreateKind, ModifyKind},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

use super::Node;
use crate::config::{Config, Origin};

/// A changed file is read when nothing has happened to it for so long.
const QUIET: Duration = Duration::from_millis(200);
/// One to which something always happens is read after so long.
const RESTLESS: Duration = Duration::from_secs(2);
/// How often the clock is looked at for users that expire; it may step.
const LOOK: Duration = Duration::from_millis(250);

/// Where the configuration came from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file, which is read again on SIGHUP and when it changes.
    File(Origin),
    /// The command line.
    CommandLine,
}

/// What a node may be told from outside. Made before the node says that it is ready.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    pub(super) fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }
}

/// Serves until the node is to end, then drains it; whether all records were written.
pub(super) async fn serve(
    node: &Arc<Node>,
    source: Source,
    signals: Signals,
    mut drain: mpsc::Receiver<()>,
) -> anyhow::Result<bool> {
    let Signals { mut terminate, mut interrupt, mut hang_up } = signals;
    let (changed, mut changes) = mpsc::channel(1);
    let _watcher = match &source {
        Source::File(origin) => watch(&origin.path, changed),
        Source::CommandLine => None,
    };
    node.announce();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A reload goes on beside all else, one at a time: it may take a second, and a drain must not wait.
    let mut reloads = JoinSet::new();
    let (mut changed_at, mut due) = (None::<Instant>, None::<Instant>);
    // A supervisor that is not told in time starts another.
    let mut watchdog =
        sd_notify::watchdog_enabled().map(|within| tokio::time::interval(within / 3));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = drain.recv() => break,
            _ = hang_up.recv() => due = Some(Instant::now()),
            Some(()) = changes.recv() => {
                let first = *changed_at.get_or_insert_with(Instant::now);
                due = Some((Instant::now() + QUIET).min(first + RESTLESS));
            }
            () = sleep_until(due), if reloads.is_empty() => {
                (changed_at, due) = (None, None);
                let (node, source) = (node.clone(), source.clone());
                reloads.spawn(async move { reload(&node, &source).await });
            }
            Some(_) = reloads.join_next() => {}
            _ = look.tick() => node.judge_expired(),
            () = tick(&mut watchdog) => {
                let node = node.clone();
                // Beside all else: a worker that is stuck takes its time to be found out.
                tokio::spawn(async move {
                    if node.is_alive().await {
                        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                    }
                });
            }
        }
    }
    Ok(node.drain().await)
}

async fn tick(interval: &mut Option<tokio::time::Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Reads the file again; a bad one changes nothing.
async fn reload(node: &Arc<Node>, source: &Source) {
    let Source::File(origin) = source else {
        tracing::info!("nothing to reload: this node was started without a file");
        return;
    };
    let usec = sd_notify::NotifyState::monotonic_usec_now();
    let _ = usec.map(|usec| sd_notify::notify(&[sd_notify::NotifyState::Reloading, usec]));
    let (origin, publisher) = (origin.clone(), node.clone());
    let published = beside_the_workers(move || match Config::load(&origin) {
        Ok(config) => publisher.publish(&config),
        Err(problems) => {
            publisher.rejected.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Err(problems)
        }
    })
    .await;
    match published {
        Ok(Ok(generation)) => {
            let users = node.shared.snapshot.load().directory.len();
            tracing::info!(generation, users, "configuration published");
        }
        Ok(Err(problems)) => {
            for problem in &problems {
                tracing::error!(%problem, "configuration refused");
            }
            tracing::error!(problems = problems.len(), "the previous configuration stays in force");
        }
        Err(error) => tracing::error!(%error, "reload failed"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// Runs what takes long on a thread of its own that gives way to the workers.
pub(crate) async fn beside_the_workers<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    let handle = tokio::runtime::Handle::current();
    std::thread::Builder::new().name("compile".into()).spawn(move || {
        let _runtime = handle.enter();
        culvert_rt::lower_priority();
        let _ = done.send(work());
    })?;
    Ok(result.await?)
}

/// Watches the file's folder, so that a file moved into its place is seen too. Without a watcher SIGHUP
/// still works.
fn watch(path: &Path, changed: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let name = path.file_name()?.to_owned();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).to_owned();
    let handler = move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let written = match event.kind {
            // Reading the file is an event too; only a finished write is a change.
            EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
            EventKind::Modify(ModifyKind::Data(_)) | EventKind::Create(CreateKind::File) => false,
            _ => true,
        };
        // A folder of links (as orchestrators mount them) changes under another name.
        let ours = event.paths.iter().any(|path| {
            path.file_name().is_some_and(|changed| changed == name || changed == "..data")
        });
        if written && ours {
            let _ = changed.try_send(());
        }
    };
    let watched = notify::recommended_watcher(handler).and_then(|mut watcher| {
        watcher.watch(&folder, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    match watched {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "the configuration is not watched; use SIGHUP to reload");
            None
        }
    }
}
