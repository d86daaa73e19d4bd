//! What a user has moved, and quotas begun anew.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Caller, Id, Problem,
    problem::Result,
    users::{edit::find, own, time_text},
};
use crate::{
    calendar::{Calendar, TOTAL},
    store::{Change, entity::usage},
};

/// Periods of the past that are shown.
const HISTORY: u64 = 100;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(show)).routes(routes!(reset))
}

/// What a user has moved.
#[derive(Debug, Serialize, ToSchema)]
struct UsageView {
    /// Bytes to targets since ever.
    up: i64,
    /// Bytes to the client since ever.
    down: i64,
    /// Both, in the present period of the quota.
    used: i64,
    /// The quota, if there is one.
    quota_bytes: Option<i64>,
    /// When the period began.
    #[schema(format = DateTime)]
    period_started: Option<String>,
    /// The periods of quotas, the present one first; at most 100.
    history: Vec<PeriodView>,
}

/// What was moved in a period.
#[derive(Debug, Serialize, ToSchema)]
struct PeriodView {
    /// When it began.
    #[schema(format = DateTime)]
    started_at: String,
    /// Bytes to targets.
    up: i64,
    /// Bytes to the client.
    down: i64,
}

/// A user's traffic; others than admins see only their own.
#[utoipa::path(get, path = "/users/{id}/usage", tag = "users", params(("id" = String, Path)),
    responses((status = 200, body = UsageView), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, caller: Caller, Id(id): Id) -> Result<Json<UsageView>> {
    own(&caller, id)?;
    let db = app.store.db();
    let user = find(db, id).await?;
    let all = usage::Entity::find_by_id((id, 0)).one(db).await?;
    let period = Calendar::load(db).await?.start(user.quota_period.as_deref());
    let used = match period {
        0 => all.clone(),
        start => usage::Entity::find_by_id((id, start)).one(db).await?,
    };
    let history = usage::Entity::find()
        .filter(usage::Column::UserId.eq(id))
        .filter(usage::Column::Period.gt(TOTAL))
        .order_by_desc(usage::Column::Period)
        .limit(HISTORY);
    let of_period = |row: usage::Model| PeriodView {
        started_at: time_text(row.period),
        up: row.up,
        down: row.down,
    };
    Ok(Json(UsageView {
        up: all.as_ref().map_or(0, |row| row.up),
        down: all.as_ref().map_or(0, |row| row.down),
        used: used.map_or(0, |row| row.up + row.down),
        quota_bytes: user.quota_bytes,
        period_started: (period > TOTAL).then(|| time_text(period)),
        history: history.all(db).await?.into_iter().map(of_period).collect(),
    }))
}

/// Begin a user's quota period anew.
#[utoipa::path(post, path = "/users/{id}/usage/reset", tag = "users", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn reset(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let user = find(db, id).await?;
    let start = Calendar::load(db).await?.start(user.quota_period.as_deref());
    let used = usage::Entity::find_by_id((id, start)).one(db).await?;
    if start > 0 {
        usage::Entity::delete_by_id((id, start)).exec(db).await?;
    }
    let old = used.map_or((0, 0), |row| (row.up, row.down));
    edit.commit(Change::new("user.usage_reset", &user.name).old(&old).user(id)).await?;

    Ok(StatusCode::NO_CONTENT)
}
