//! What was moved in all.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::sse::{Event, Sse},
};
use sea_orm::{ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Caller, Problem, problem::Result};
use crate::{
    calendar::Calendar,
    store::{entity::heartbeat, now},
    usage::sums,
};

/// Who may watch at once.
const VIEWERS_MAX: usize = 32;
const SECOND: Duration = Duration::from_secs(1);
/// A heartbeat so old says nothing of now, in microseconds.
const RECENT: i64 = 15_000_000;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(summary)).routes(routes!(live))
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
    /// Since midnight in the zone of the settings.
    today: Sums,
    /// Since the first of the month, as far as minutes are kept (`traffic_log_days`).
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
    let calendar = Calendar::load(db).await?;
    let of = async |rows: String| sums(db, &rows).await.map(|[up, down]| Sums { up, down });
    Ok(Json(Summary {
        today: of(since(calendar.start(Some("day")))).await?,
        month: of(since(calendar.start(Some("month")))).await?,
        total: of(format!("user_usage WHERE period = 0{whose}")).await?,
    }))
}

/// What moves now, on all nodes that were heard of in the last 15 s.
#[derive(Debug, Default, Serialize, ToSchema)]
struct Now {
    /// Nodes.
    nodes: usize,
    /// Sessions.
    sessions: i64,
    /// Bytes a second to targets.
    up: i64,
    /// Bytes a second to clients.
    down: i64,
}

/// What moves now: an event (`text/event-stream`) each second, as nodes tell it every 5 s. It ends when the
/// token does.
#[utoipa::path(get, path = "/traffic/live", tag = "traffic",
    responses((status = 200, body = Now, content_type = "text/event-stream"), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn live(
    State(app): State<App>,
    Admin(caller): Admin,
) -> Result<Sse<impl Stream<Item = std::result::Result<Event, axum::Error>>>> {
    static VIEWERS: Semaphore = Semaphore::const_new(VIEWERS_MAX);
    let place = VIEWERS.try_acquire().map_err(|_| {
        let detail = "too many watch already; close another";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    })?;
    present(app.store.db()).await?;
    let (sender, events) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(SECOND);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let _place = place;
        loop {
            tick.tick().await;
            // The database may be away for a moment.
            let event = match caller.is_still_good(&app).await {
                Ok(true) => {
                    present(app.store.db()).await.map(|now| Event::default().json_data(now))
                }
                Ok(false) => return,
                Err(error) => Err(error),
            };
            let event = event.unwrap_or_else(|_| Ok(Event::default().comment("no news")));
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
    Ok(Sse::new(ReceiverStream::new(events)))
}

/// From the last two heartbeats of each boot of a node.
async fn present(db: &impl ConnectionTrait) -> std::result::Result<Now, DbErr> {
    let beats = heartbeat::Entity::find()
        .filter(heartbeat::Column::At.gt(now() - RECENT))
        .order_by_asc(heartbeat::Column::At);
    let mut of_boots: HashMap<(i64, i64), Vec<heartbeat::Model>> = HashMap::new();
    for beat in beats.all(db).await? {
        of_boots.entry((beat.node_id, beat.boot)).or_default().push(beat);
    }
    let nodes: HashSet<i64> = of_boots.keys().map(|(node, _)| *node).collect();
    let mut all = Now { nodes: nodes.len(), ..Now::default() };
    for beats in of_boots.values() {
        let Some(last) = beats.last() else { continue };
        all.sessions += last.sessions;
        if let Some(before) = beats.iter().rev().nth(1) {
            let rate = |more: i64| more.max(0) * 1_000_000 / (last.at - before.at).max(1);
            all.up += rate(last.up - before.up);
            all.down += rate(last.down - before.down);
        }
    }
    Ok(all)
}
