//! The workers' counters as Prometheus text. Names, kinds and help are declared here, once.

use std::{sync::Mutex, time::Duration};

use metrics::{Key, Label, counter, gauge};
use metrics_exporter_prometheus::{
    LabelSet, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
    formatting::{write_help_line, write_metric_line, write_type_line},
};

use crate::{
    end::Cause,
    ledger::Direction,
    node::Node,
    policy::Denial,
    telemetry::{
        BUCKETS, Counter, Histogram, LoginResult, TurnedAway, WorkerCounters, protocol_name,
    },
};

/// A part of a worker's counters.
type Of<T> = fn(&WorkerCounters) -> &T;

/// Renders the node's metrics.
pub(super) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// One scrape at a time: the recorder is set, then rendered.
    scrape: Mutex<()>,
}

const HELP: &[(&str, bool, &str)] = &[
    ("culvert_sessions_active", false, "Sessions open now"),
    ("culvert_sessions_max", false, "Sessions the node takes at once"),
    ("culvert_sessions_total", true, "Sessions ended, by protocol and how"),
    ("culvert_exchanges_total", true, "HTTP requests forwarded"),
    ("culvert_bytes_total", true, "Bytes the kernel accepted for the other side, by direction"),
    ("culvert_auth_total", true, "Logins, by result"),
    ("culvert_denied_total", true, "Requests refused by policy, by reason"),
    ("culvert_turned_away_total", true, "Clients closed before a session began, by reason"),
    ("culvert_accept_exhausted_total", true, "Accepts that found no descriptor or memory"),
    ("culvert_records_total", true, "Access records queued"),
    ("culvert_records_dropped_total", true, "Access records that found their queue full"),
    ("culvert_records_written_total", true, "Access records written"),
    ("culvert_records_lost_total", true, "Access records that could not be written"),
    (
        "culvert_log_lines_dropped_total",
        true,
        "Lines of the log that its writer did not keep up with",
    ),
    ("culvert_dns_lookups_total", true, "Names looked up, by where the answer came from"),
    ("culvert_revoked_total", true, "Sessions ended because a new snapshot forbids them"),
    ("culvert_spliced_total", true, "Sessions of which a direction was moved to splice"),
    ("culvert_panics_total", true, "Sessions ended by a bug"),
    (
        "culvert_config_rejected_total",
        true,
        "Configurations refused; the one before stayed in force",
    ),
    ("culvert_snapshot_generation", false, "Number of the snapshot in force"),
    ("culvert_control_connected", false, "Whether the control plane has taken this node"),
    (
        "culvert_snapshot_age_seconds",
        false,
        "Following: time since the policy was last known to be the control plane's, else since it was published",
    ),
    (
        "culvert_snapshots",
        false,
        "Snapshots in memory: the one in force, and those somebody still looks at",
    ),
    ("culvert_users", false, "Users of the snapshot in force"),
    (
        "culvert_worker_snapshot_generation",
        false,
        "Number of the snapshot a worker has judged its sessions by",
    ),
    ("culvert_worker_sessions_active", false, "Sessions open now, by worker"),
    ("culvert_worker_cq_overflow", false, "Completions that overflow a worker's ring right now"),
    ("culvert_io_driver", false, "1 for what drives each worker"),
    ("culvert_uptime_seconds", false, "Time since the node started"),
    ("culvert_build_info", false, "1, with the version"),
];

impl Metrics {
    pub(super) fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            for (name, is_counter, help) in HELP {
                if *is_counter {
                    metrics::describe_counter!(*name, *help);
                } else {
                    metrics::describe_gauge!(*name, *help);
                }
            }
        });
        let handle = recorder.handle();
        Self { recorder, handle, scrape: Mutex::new(()) }
    }

    /// All metrics of a node, in Prometheus text format.
    pub(super) fn render(&self, node: &Node) -> String {
        let _one = self.scrape.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        metrics::with_local_recorder(&self.recorder, || set_all(node));
        let mut text = self.handle.render();
        let histograms: [(&str, &str, Of<Histogram>); 3] = [
            ("culvert_session_duration_seconds", "How long sessions lived", |c| {
                &c.session_duration
            }),
            ("culvert_handshake_seconds", "From accept to request", |c| &c.handshake),
            ("culvert_dial_seconds", "Judging, resolving and connecting", |c| &c.dial),
        ];
        for (name, help, of) in histograms {
            write_histogram(&mut text, name, help, node, of);
        }
        text
    }
}

fn set_all(node: &Node) {
    let sum = |of: &dyn Fn(&WorkerCounters) -> &Counter| -> u64 {
        node.workers.iter().map(|worker| of(&worker.counters).get()).sum()
    };
    let total = |name: &'static str, of: &dyn Fn(&WorkerCounters) -> &Counter| {
        counter!(name).absolute(sum(of));
    };
    gauge!("culvert_sessions_active").set(sum(&|c| &c.sessions_active) as f64);
    gauge!("culvert_sessions_max").set(node.shared.places.max() as f64);
    for protocol in 0..crate::telemetry::PROTOCOLS {
        for cause in Cause::ALL {
            let count = sum(&|c| &c.sessions[protocol][*cause as usize]);
            if count > 0 {
                let labels = [("protocol", protocol_name(protocol)), ("end", cause.name())];
                counter!("culvert_sessions_total", &labels).absolute(count);
            }
        }
    }
    total("culvert_exchanges_total", &|c| &c.exchanges);
    for direction in Direction::ALL {
        counter!("culvert_bytes_total", "direction" => direction.name())
            .absolute(sum(&|c| &c.bytes[direction as usize]));
    }
    for result in LoginResult::ALL {
        counter!("culvert_auth_total", "result" => result.name())
            .absolute(sum(&|c| &c.auth[result as usize]));
    }
    for (i, reason) in Denial::NAMES.iter().enumerate() {
        counter!("culvert_denied_total", "reason" => *reason).absolute(sum(&|c| &c.denied[i]));
    }
    for reason in TurnedAway::ALL {
        counter!("culvert_turned_away_total", "reason" => reason.name())
            .absolute(sum(&|c| &c.turned_away[reason as usize]));
    }
    total("culvert_accept_exhausted_total", &|c| &c.accept_exhausted);
    total("culvert_records_total", &|c| &c.records);
    total("culvert_records_dropped_total", &|c| &c.records_dropped);
    counter!("culvert_records_written_total").absolute(node.access.written());
    counter!("culvert_records_lost_total").absolute(node.access.lost());
    counter!("culvert_log_lines_dropped_total").absolute(crate::log::lines_dropped());
    let lookups: [(&str, Of<Counter>); 3] = [
        ("cache", |c| &c.dns_cached),
        ("server", |c| &c.dns_asked),
        ("refused", |c| &c.dns_refused),
    ];
    for (from, of) in lookups {
        counter!("culvert_dns_lookups_total", "from" => from).absolute(sum(&of));
    }
    total("culvert_revoked_total", &|c| &c.revoked);
    total("culvert_spliced_total", &|c| &c.spliced);
    counter!("culvert_panics_total").absolute(culvert_rt::panics_total());
    counter!("culvert_config_rejected_total")
        .absolute(node.rejected.load(std::sync::atomic::Ordering::Relaxed));
    set_snapshot(node);
    set_workers(node);
    gauge!("culvert_uptime_seconds").set(node.started.elapsed().as_secs_f64());
    gauge!("culvert_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

fn set_snapshot(node: &Node) {
    let snapshot = node.shared.snapshot.load();
    gauge!("culvert_snapshot_generation").set(snapshot.generation as f64);
    let age = match &node.follower {
        Some(follower) => {
            gauge!("culvert_control_connected").set(u8::from(follower.is_connected()));
            follower.stale().unwrap_or_default()
        }
        None => node.published.lock().map_or(Duration::ZERO, |published| published.elapsed()),
    };
    gauge!("culvert_snapshot_age_seconds").set(age.as_secs_f64());
    gauge!("culvert_snapshots").set(crate::policy::snapshots_alive() as f64);
    gauge!("culvert_users").set(snapshot.directory.len() as f64);
}

fn set_workers(node: &Node) {
    for (index, worker) in node.workers.iter().enumerate() {
        let label = ("worker", index.to_string());
        let counters = &worker.counters;
        gauge!("culvert_worker_snapshot_generation", std::slice::from_ref(&label))
            .set(counters.generation.get() as f64);
        gauge!("culvert_worker_sessions_active", std::slice::from_ref(&label))
            .set(counters.sessions_active.get() as f64);
        if let Some(overflow) = worker.ring_fd.and_then(culvert_rt::cq_overflow) {
            gauge!("culvert_worker_cq_overflow", std::slice::from_ref(&label)).set(overflow as f64);
        }
        let driver = ("driver", worker.driver.name().to_owned());
        gauge!("culvert_io_driver", &[label, driver]).set(1.0);
    }
}

fn write_histogram(
    text: &mut String,
    name: &str,
    help: &str,
    node: &Node,
    of: fn(&WorkerCounters) -> &Histogram,
) {
    let mut counts = [0; BUCKETS.len() + 1];
    let mut sum = 0.0;
    for worker in &node.workers {
        let (buckets, seconds) = of(&worker.counters).read();
        for (count, more) in counts.iter_mut().zip(buckets) {
            *count += more;
        }
        sum += seconds;
    }
    let none = LabelSet::from_key_and_global(
        &Key::from_parts("none", Vec::<Label>::new()),
        &Default::default(),
    );
    write_help_line(text, name, None, None, help);
    write_type_line(text, name, None, None, "histogram");
    let mut below = 0;
    for (bound, count) in BUCKETS.iter().zip(counts) {
        below += count;
        write_metric_line(text, name, Some("bucket"), &none, Some(("le", *bound)), below, None);
    }
    below += counts[BUCKETS.len()];
    write_metric_line(text, name, Some("bucket"), &none, Some(("le", "+Inf")), below, None);
    write_metric_line::<&str, f64>(text, name, Some("sum"), &none, None, sum, None);
    write_metric_line::<&str, u64>(text, name, Some("count"), &none, None, below, None);
    text.push('\n');
}
