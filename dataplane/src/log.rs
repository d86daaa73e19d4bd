//! Logs: what happens to the node through `tracing`, and what its users do as access records. Neither
//! is ever waited for.

mod access;
mod spool;

use std::sync::OnceLock;

use culvert_api::Problem;
use tracing_appender::{
    non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard},
    rolling::{RollingFileAppender, Rotation},
};
use tracing_subscriber::EnvFilter;

pub use access::AccessLog;
pub use spool::Spool;

use crate::config::{LogConfig, Rotate};

/// Lines of the log that may wait for its writer; further ones are dropped.
const LINES_MAX: usize = 16_384;

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Lines of the log that were dropped because their writer did not keep up.
pub fn lines_dropped() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// Keeps the log's writer until the process ends.
pub struct Logging {
    _guard: WorkerGuard,
}

/// Starts the log.
///
/// # Errors
/// The file cannot be opened.
pub fn start(config: &LogConfig) -> anyhow::Result<Logging> {
    let (writer, guard) = match &config.file {
        None => lossy(std::io::stderr()),
        Some(path) => lossy(rolling(path, config.rotate)?),
    };
    let _ = DROPPED.set(writer.error_counter());
    let filter = EnvFilter::try_new(&config.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(false)
        .with_target(false);
    // A second start in one process (tests) keeps the first log.
    let _ = if config.json { builder.json().try_init() } else { builder.try_init() };
    Ok(Logging { _guard: guard })
}

fn lossy(writer: impl std::io::Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).finish(writer)
}

/// A file that begins anew as often as asked; the date is appended to its name.
pub(crate) fn rolling(
    path: &std::path::Path,
    rotate: Rotate,
) -> anyhow::Result<RollingFileAppender> {
    let directory = path.parent().unwrap_or(std::path::Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let rotation = match rotate {
        Rotate::Daily => Rotation::DAILY,
        Rotate::Hourly => Rotation::HOURLY,
        Rotate::Never => Rotation::NEVER,
    };
    RollingFileAppender::builder()
        .rotation(rotation)
        .filename_prefix(name)
        .build(directory)
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

/// Problems of a configuration, one a line, as `check` and a failed start print them.
pub fn problems(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
}
