//! The load generator and the scenario runner: see `perf/README.md` for the method.

mod bare;
mod control;
mod load;
mod peer;
mod process;
mod report;
mod target;

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Parser, ValueEnum};

use crate::{
    load::{Load, Sample},
    peer::{Kind, Peer},
    report::Report,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs scenarios against Culvert and its peers in turns, and prints ratios.
#[derive(Debug, Parser)]
struct Cli {
    /// What to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Scenario::Bulk, Scenario::Echo, Scenario::Churn, Scenario::Idle, Scenario::Swap])]
    scenario: Vec<Scenario>,
    /// Whom to measure; those that are not installed are left out.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::ALL)]
    peer: Vec<Kind>,
    /// The culvert program.
    #[arg(long, default_value = "target/release/culvert")]
    culvert: PathBuf,
    /// Measure a control plane among 100,000 users instead: an edit until 200 nodes have it, a node's first
    /// subscription, records into the database. The culvert-control program.
    #[arg(long)]
    control_plane: Option<PathBuf>,
    /// The control plane's database, `mysql://…` with a socket; left out: SQLite.
    #[arg(long)]
    database: Option<String>,
    /// Be the peer `bare` on this address instead.
    #[arg(long, hide = true)]
    bare: Option<std::net::SocketAddr>,
    /// Rounds; medians are printed.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds a round.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Idle sessions.
    #[arg(long, default_value_t = 9000)]
    sessions: usize,
    /// Clients at once of the churn scenario.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// What drives culvert's workers: auto, io_uring or epoll.
    #[arg(long, default_value = "auto")]
    driver: String,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Two streams down and two up.
    Bulk,
    /// 64 sessions that exchange 128 bytes.
    Echo,
    /// Sessions that connect, exchange one byte and close.
    Churn,
    /// Many sessions that do nothing.
    Idle,
    /// Sessions that run while snapshots of 100,000 users replace each other.
    Swap,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    process::raise_descriptor_limit();
    if let Some(address) = cli.bare {
        return bare::serve(address);
    }
    let folder = tempfile::tempdir()?;
    if let Some(program) = &cli.control_plane {
        return control::run(program, cli.database.as_deref(), cli.rounds, folder.path());
    }
    let target = target::start()?;
    for scenario in &cli.scenario {
        let mut report = Report::new(*scenario);
        let peers: Vec<Kind> =
            cli.peer.iter().copied().filter(|kind| kind.takes_part(*scenario)).collect();
        for round in 0..cli.rounds {
            // The order turns, so that nobody always follows the same neighbour.
            for i in 0..peers.len() {
                let kind = peers[(i + round) % peers.len()];
                let users = if *scenario == Scenario::Swap { control::USERS } else { 0 };
                let started =
                    Peer::start(kind, users, target, &cli.culvert, &cli.driver, folder.path());
                let Some(peer) = started.with_context(|| kind.name())? else {
                    report.absent(kind);
                    continue;
                };
                let load = Load {
                    peer: &peer,
                    target,
                    time: Duration::from_secs_f64(cli.seconds),
                    sessions: cli.sessions,
                    clients: cli.clients,
                };
                let sample: Sample = load.run(*scenario).with_context(|| kind.name())?;
                report.add(kind, sample);
            }
        }
        println!("{report}");
    }
    Ok(())
}
