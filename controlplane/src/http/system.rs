//! The control plane itself.

use axum::{Json, extract::State};
use sea_orm::{EntityTrait, PaginatorTrait};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Problem, problem::Result, users::time_text};
use crate::store::{
    entity::{access_log, user},
    now,
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(info)).routes(routes!(stats))
}

/// Whether requests can be served: the database answers.
pub(super) async fn ready(State(app): State<App>) -> Result<&'static str> {
    app.store.generation().await?;
    Ok("ready\n")
}

/// What runs.
#[derive(Debug, Serialize, ToSchema)]
struct Info {
    /// The program's version.
    version: &'static str,
    /// `sqlite` or `mysql`.
    database: &'static str,
    /// When it started.
    #[schema(format = DateTime)]
    started_at: String,
    /// Seconds since then.
    uptime: i64,
    /// Nodes that are connected to this control plane.
    nodes_connected: usize,
}

/// What runs.
#[utoipa::path(get, path = "/system/info", tag = "system",
    responses((status = 200, body = Info), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn info(State(app): State<App>, _: Admin) -> Result<Json<Info>> {
    Ok(Json(Info {
        version: env!("CARGO_PKG_VERSION"),
        database: app.store.backend(),
        started_at: time_text(app.started),
        uptime: (now() - app.started) / 1_000_000,
        nodes_connected: app.hub.connected(),
    }))
}

/// How much there is.
#[derive(Debug, Serialize, ToSchema)]
struct Stats {
    /// Users.
    users: u64,
    /// Sessions that run.
    sessions: u64,
    /// Records of ended sessions.
    access_logs: u64,
    /// The present generation.
    generation: i64,
}

/// How much there is.
#[utoipa::path(get, path = "/system/stats", tag = "system",
    responses((status = 200, body = Stats), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn stats(State(app): State<App>, _: Admin) -> Result<Json<Stats>> {
    let db = app.store.db();
    Ok(Json(Stats {
        users: user::Entity::find().count(db).await?,
        sessions: super::online::running().count(db).await?,
        access_logs: access_log::Entity::find().count(db).await?,
        generation: app.store.generation().await?,
    }))
}
