//! Metrics, health and sessions over HTTP; on the private socket also the commands.

mod metrics;

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde_json::json;

use crate::{config::Config, node::Node};

/// Name of the private socket in the state directory.
pub const SOCKET: &str = "admin.sock";

/// Starts serving on the calling thread's runtime: read-only on TCP, everything on the private socket
/// (0600).
///
/// # Errors
/// An address cannot be bound.
pub async fn start(node: &Arc<Node>, config: &Config) -> anyhow::Result<()> {
    let state = Arc::new(Admin {
        node: node.clone(),
        config: debug_config(config),
        metrics: metrics::Metrics::new(),
    });
    let public = public(state.clone());
    if let Some(address) = config.admin {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|error| anyhow::anyhow!("admin.bind {address}: {error}"))?;
        tracing::info!(address = %listener.local_addr()?, "metrics and health");
        let router = public.clone();
        tokio::spawn(async move { axum::serve(listener, router).await });
    }
    if let Some(path) = config.state_dir.as_ref().map(|dir| dir.join(SOCKET)) {
        // A socket left by a process that was killed.
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path)
            .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let router = public.merge(private(state));
        tokio::spawn(async move { axum::serve(listener, router).await });
    }
    Ok(())
}

struct Admin {
    node: Arc<Node>,
    config: serde_json::Value,
    metrics: metrics::Metrics,
}

fn public(state: Arc<Admin>) -> Router {
    Router::new()
        .route("/metrics", get(render))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/sessions", get(sessions))
        .route("/snapshot", get(snapshot))
        .route("/debug/config", get(debug))
        .with_state(state)
}

fn private(state: Arc<Admin>) -> Router {
    Router::new()
        .route("/drain", post(drain))
        .route("/sessions/{id}", delete(end_session))
        .with_state(state)
}

async fn render(State(admin): State<Arc<Admin>>) -> Response {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], admin.metrics.render(&admin.node)).into_response()
}

async fn livez(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    match admin.node.is_alive().await {
        true => (StatusCode::OK, "every worker answers\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "a worker does not answer\n"),
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    match admin.node.is_ready() {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}

async fn sessions(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.node.sessions().await).into_response()
}

async fn snapshot(State(admin): State<Arc<Admin>>) -> Response {
    let snapshot = admin.node.shared.snapshot.load();
    Json(json!({
        "generation": snapshot.generation,
        "users": snapshot.directory.len(),
        "filters": snapshot.filters(),
        "rules": snapshot.rules(),
    }))
    .into_response()
}

async fn debug(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.config.clone()).into_response()
}

async fn drain(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    let _ = admin.node.drain.try_send(());
    (StatusCode::ACCEPTED, "draining\n")
}

async fn end_session(State(admin): State<Arc<Admin>>, Path(id): Path<u64>) -> StatusCode {
    match admin.node.end_session(id) {
        true => StatusCode::ACCEPTED,
        false => StatusCode::NOT_FOUND,
    }
}

/// The configuration without what is nobody's business: users are counted, not named.
fn debug_config(config: &Config) -> serde_json::Value {
    let listeners: Vec<_> = config
        .listeners
        .iter()
        .map(|listener| {
            let protocols: Vec<_> = listener.protocols.iter().map(|p| p.name()).collect();
            json!({ "name": listener.name, "bind": listener.bind, "protocols": protocols })
        })
        .collect();
    let timeouts = config.settings.timeouts;
    json!({
        "node": { "name": config.name, "workers": config.workers, "state_dir": config.state_dir },
        "listener": listeners,
        "timeouts": {
            "handshake": timeouts.handshake.as_secs_f64(),
            "connect": timeouts.connect.as_secs_f64(),
            "idle": timeouts.idle.as_secs_f64(),
            "half_close": timeouts.half_close.as_secs_f64(),
            "drain": config.drain.as_secs_f64(),
        },
    })
}
