//! The HTTP service.

use axum::{Router, routing::get};

/// All routes.
pub fn router() -> Router {
    Router::new().route("/livez", get(async || "alive\n")).route("/readyz", get(async || "ready\n"))
}
