//! What was moved in all.

use axum::{Json, extract::State};
use sea_orm::{ConnectionTrait, DbErr, Statement};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{App, Caller, Problem, problem::Result};
use crate::{store::now, usage::period_start};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(summary))
}

/// Bytes both ways.
#[derive(Debug, Serialize, ToSchema)]
struct Sums {
    /// To targets.
    up: i64,
    /// To clients.
    down: i64,
}

/// What was moved, by when.
#[derive(Debug, Serialize, ToSchema)]
struct Summary {
    /// Since midnight (UTC).
    today: Sums,
    /// Since the first of the month (UTC), as far as minutes are kept (`traffic_log_days`).
    month: Sums,
    /// Since ever.
    total: Sums,
}

/// What was moved; others than admins see only their own.
#[utoipa::path(get, path = "/traffic/summary", tag = "traffic",
    responses((status = 200, body = Summary), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn summary(State(app): State<App>, caller: Caller) -> Result<Json<Summary>> {
    let whose = if caller.is_admin() {
        String::new()
    } else {
        format!(" AND user_id = {}", caller.user.id)
    };
    let since = |start: i64| format!("traffic_logs WHERE at >= {start}{whose}");
    let db = app.store.db();
    Ok(Json(Summary {
        today: sums(db, &since(period_start(Some("day"), now()))).await?,
        month: sums(db, &since(period_start(Some("month"), now()))).await?,
        total: sums(db, &format!("user_usage WHERE period = 0{whose}")).await?,
    }))
}

async fn sums(db: &impl ConnectionTrait, rows: &str) -> std::result::Result<Sums, DbErr> {
    // MySQL's sums are decimals.
    let sql = format!(
        "SELECT CAST(COALESCE(SUM(up), 0) AS SIGNED) AS up, \
         CAST(COALESCE(SUM(down), 0) AS SIGNED) AS down FROM {rows}"
    );
    let row = db.query_one_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
    match row {
        Some(row) => Ok(Sums { up: row.try_get("", "up")?, down: row.try_get("", "down")? }),
        None => Ok(Sums { up: 0, down: 0 }),
    }
}
