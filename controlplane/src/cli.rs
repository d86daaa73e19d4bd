//! The command line.

use std::{net::SocketAddr, process::ExitCode};

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// The control plane of Culvert.
#[derive(Debug, Parser)]
#[command(name = "culvert-control", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve. This version answers /livez and /readyz.
    Serve {
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:8012")]
        bind: SocketAddr,
    },
}

/// Runs the program.
pub fn main() -> ExitCode {
    let Command::Serve { bind } = Cli::parse().command;
    match serve(bind) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(bind: SocketAddr) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(bind).await.map_err(|error| {
            anyhow::anyhow!("{bind}: {error}; choose another address with --bind")
        })?;
        println!("listening on http://{}", listener.local_addr()?);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let ended = async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        axum::serve(listener, crate::app::router()).with_graceful_shutdown(ended).await?;
        Ok(())
    })
}
