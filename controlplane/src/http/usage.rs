//! What a user has moved, and quotas begun anew.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set};
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
    store::{
        Change,
        entity::{usage, usage_reset},
        now,
    },
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
    /// The periods of quotas, the latest first, each part of one that was reset for itself; at most 100.
    history: Vec<PeriodView>,
}

/// What was moved in a period.
#[derive(Debug, Serialize, ToSchema)]
struct PeriodView {
    /// When it began; null for a quota in total.
    #[schema(format = DateTime)]
    started_at: Option<String>,
    /// When it was reset; null if it went on to its end, or goes on.
    #[schema(format = DateTime)]
    reset_at: Option<String>,
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
    let resets = usage_reset::Entity::find()
        .filter(usage_reset::Column::UserId.eq(id))
        .order_by_desc(usage_reset::Column::At)
        .limit(HISTORY);
    let of_period = |period: i64, reset: Option<i64>, up: i64, down: i64| {
        let view = PeriodView {
            started_at: (period > TOTAL).then(|| time_text(period)),
            reset_at: reset.map(time_text),
            up,
            down,
        };
        // Of one period, what goes on is later than what was reset; one in total has no other time.
        let began = if period > TOTAL { period } else { reset.unwrap_or(0) };
        ((began, reset.unwrap_or(i64::MAX)), view)
    };
    let periods = history.all(db).await?.into_iter();
    let periods = periods.map(|row| of_period(row.period, None, row.up, row.down));
    let resets = resets.all(db).await?.into_iter();
    let resets = resets.map(|row| of_period(row.period, Some(row.at), row.up, row.down));
    let mut history: Vec<_> = periods.chain(resets).collect();
    history.sort_unstable_by_key(|(at, _)| std::cmp::Reverse(*at));
    history.truncate(HISTORY as usize);
    Ok(Json(UsageView {
        up: all.as_ref().map_or(0, |row| row.up),
        down: all.as_ref().map_or(0, |row| row.down),
        used: used.map_or(0, |row| row.up + row.down),
        quota_bytes: user.quota_bytes,
        period_started: (period > TOTAL).then(|| time_text(period)),
        history: history.into_iter().map(|(_, view)| view).collect(),
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
    // As it is now, and stays until it is taken out.
    let used = usage::Entity::find_by_id((id, start)).lock_exclusive().one(db).await?;
    let old = used.as_ref().map_or((0, 0), |row| (row.up, row.down));
    if start > 0 && used.is_some() {
        usage::Entity::delete_by_id((id, start)).exec(db).await?;
        let (up, down) = (Set(old.0), Set(old.1));
        let kept = usage_reset::ActiveModel {
            user_id: Set(id),
            at: Set(now()),
            period: Set(start),
            up,
            down,
        };
        usage_reset::Entity::insert(kept).exec_without_returning(db).await?;
    }
    edit.commit(Change::new("user.usage_reset", &user.name).old(&old).user(id)).await?;

    Ok(StatusCode::NO_CONTENT)
}
