//! The control plane's own figures, for Prometheus.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use axum::{extract::State, http::StatusCode};
use metrics::{counter, describe_counter, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::PrometheusBuilder;

use super::{Admin, App, extract::From, problem::Result};
use crate::store::now;

/// What is counted since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests by the first figure of their status, from 1.
    requests: [AtomicU64; 5],
    /// Logins by their result.
    logins: [AtomicU64; LOGIN_RESULTS.len()],
}

/// How a login to the API ends.
const LOGIN_RESULTS: [&str; 3] = ["accepted", "rejected", "throttled"];

impl Counts {
    /// Counts a login by its result.
    pub(super) fn logged_in(&self, result: &str) {
        if let Some(at) = LOGIN_RESULTS.iter().position(|known| *known == result) {
            self.logins[at].fetch_add(1, Relaxed);
        }
    }

    pub(super) fn answered(&self, status: StatusCode) {
        if let Some(class) = self.requests.get(usize::from(status.as_u16() / 100).wrapping_sub(1)) {
            class.fetch_add(1, Relaxed);
        }
    }
}

/// Prometheus text, for this host and for admins.
pub(super) async fn metrics(
    State(app): State<App>,
    from: From,
    admin: Result<Admin>,
) -> Result<String> {
    if !from.0.is_loopback() {
        admin?;
    }
    let generation = app.store.generation().await;
    let recorder = PrometheusBuilder::new().build_recorder();
    with_local_recorder(&recorder, || {
        describe_gauge!("culvert_control_build_info", "1, with the version");
        gauge!("culvert_control_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1);
        describe_gauge!("culvert_control_uptime_seconds", "Time since the start");
        gauge!("culvert_control_uptime_seconds").set((now() - app.started) as f64 / 1e6);
        describe_gauge!("culvert_control_database_up", "Whether the database answers");
        gauge!("culvert_control_database_up").set(u8::from(generation.is_ok()));
        if let Ok(generation) = generation {
            describe_gauge!("culvert_control_generation", "The present generation");
            gauge!("culvert_control_generation").set(generation as f64);
        }
        describe_gauge!("culvert_control_nodes_connected", "Nodes that are connected here");
        gauge!("culvert_control_nodes_connected").set(app.hub.connected() as f64);
        describe_counter!("culvert_control_requests_total", "Requests answered, by status");
        for (class, count) in (1..).zip(&app.counts.requests) {
            let class = format!("{class}xx");
            counter!("culvert_control_requests_total", "status" => class)
                .absolute(count.load(Relaxed));
        }
        describe_counter!("culvert_control_logins_total", "Logins to the API, by result");
        for (result, count) in LOGIN_RESULTS.iter().zip(&app.counts.logins) {
            counter!("culvert_control_logins_total", "result" => *result)
                .absolute(count.load(Relaxed));
        }
        describe_counter!("culvert_control_records_total", "Access records stored here");
        counter!("culvert_control_records_total").absolute(app.hub.counts.records.load(Relaxed));
        describe_counter!("culvert_control_reports_total", "Reports of sums applied here");
        counter!("culvert_control_reports_total").absolute(app.hub.counts.reports.load(Relaxed));
    });
    Ok(recorder.handle().render())
}
