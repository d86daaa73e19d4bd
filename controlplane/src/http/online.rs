//! The sessions that run.

use std::collections::HashMap;

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{
    ColumnTrait, EntityTrait, ExprTrait, Order, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, Select, sea_query::Expr,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Caller, Id, Page, Paging, Params, Problem, problem::Result};
use crate::store::{
    Boot, Change, Command,
    entity::{command, session, user},
    lately,
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(kick))
        .routes(routes!(users))
        .routes(routes!(kick_user))
}

/// A session that runs.
#[derive(Debug, Serialize, ToSchema)]
struct SessionView {
    /// For ending it: the numbers of the node, of its boot and of the session, with dashes between.
    id: String,
    /// The node.
    node_id: String,
    /// The user.
    user_id: Option<String>,
    /// What the node tells of it: client, target, protocol, rule, bytes_up, bytes_down, seconds.
    #[schema(value_type = Object)]
    session: serde_json::Value,
}

/// Which sessions.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only those of a user.
    user_id: Option<String>,
    /// Only those of a node.
    node_id: Option<String>,
}

/// What nodes have told a moment ago: one may be gone, with the control plane that would have noticed.
pub(super) fn running() -> Select<session::Entity> {
    session::Entity::find().filter(lately(session::Column::ToldAt))
}

/// Sessions that run, on all nodes; others than admins see only their own.
///
/// At most 5 s old. A node tells 10,000 at most; how many there are, its heartbeats say.
#[utoipa::path(get, path = "/online", tag = "online", params(Paging, Which),
    responses((status = 200, body = Page<SessionView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<SessionView>>> {
    let mut query = running();
    let number = |text: &str| text.parse::<i64>().unwrap_or(-1);
    if let Some(user) = &which.user_id {
        query = query.filter(session::Column::UserId.eq(number(user)));
    }
    if let Some(node) = &which.node_id {
        query = query.filter(session::Column::NodeId.eq(number(node)));
    }
    if !caller.is_admin() {
        query = query.filter(session::Column::UserId.eq(caller.user.id));
    }
    let known = [("node_id", session::Column::NodeId), ("user_id", session::Column::UserId)];
    let query = paging
        .sorted(query, "node_id", &known)?
        .order_by_asc(session::Column::Boot)
        .order_by_asc(session::Column::Session);
    let view = |row: session::Model| SessionView {
        id: format!("{}-{}-{}", row.node_id, row.boot.cast_unsigned(), row.session),
        node_id: row.node_id.to_string(),
        user_id: (row.user_id > 0).then(|| row.user_id.to_string()),
        session: serde_json::from_str(&row.body).unwrap_or_default(),
    };
    paging.load(app.store.db(), query, view).await
}

/// A user with sessions that run.
#[derive(Debug, Serialize, ToSchema)]
struct OnlineUser {
    /// The user.
    user_id: String,
    /// The user's name; empty when the user is gone.
    name: String,
    /// Sessions that run, on all nodes.
    sessions: i64,
    /// Nodes they run on.
    nodes: i64,
}

/// Users with sessions that run, most sessions first. At most 5 s old.
#[utoipa::path(get, path = "/online/users", tag = "online", params(Paging),
    responses((status = 200, body = Page<OnlineUser>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn users(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
) -> Result<Json<Page<OnlineUser>>> {
    let (size, skip) = paging.bounds()?;
    let order = match paging.sort.as_deref() {
        None | Some("-sessions") => Order::Desc,
        Some("sessions") => Order::Asc,
        Some(_) => {
            let text = "sort is sessions, with - in front for backwards";
            return Err(Problem::new(StatusCode::BAD_REQUEST, text));
        }
    };
    let (db, id) = (app.store.db(), session::Column::UserId);
    let named = running().filter(id.gt(0)).select_only();
    let total = named.clone().column(id).distinct().count(db).await?;
    let (sessions, nodes) = (session::Column::Session, session::Column::NodeId);
    let distinct_nodes = Expr::col(nodes).count_distinct();
    let rows: Vec<(i64, i64, i64)> = named
        .column(id)
        .column_as(sessions.count(), "sessions")
        .column_as(distinct_nodes, "nodes")
        .group_by(id)
        .order_by(sessions.count(), order)
        .order_by_asc(id)
        .limit(size)
        .offset(skip)
        .into_tuple()
        .all(db)
        .await?;
    let ids = rows.iter().map(|row| row.0);
    let known = user::Entity::find().filter(user::Column::Id.is_in(ids)).all(db).await?;
    let names: HashMap<i64, String> = known.into_iter().map(|user| (user.id, user.name)).collect();
    let view = |(id, sessions, nodes): (i64, i64, i64)| OnlineUser {
        user_id: id.to_string(),
        name: names.get(&id).cloned().unwrap_or_default(),
        sessions,
        nodes,
    };
    Ok(Json(Page::new(rows.into_iter().map(view).collect(), total, &paging)))
}

/// End one session.
#[utoipa::path(delete, path = "/online/{session}", tag = "online", params(("session" = String, Path)),
    responses((status = 202), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn kick(
    State(app): State<App>,
    Admin(caller): Admin,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<StatusCode> {
    let missing = || Problem::missing("session");
    let numbers: Option<Vec<u64>> = id.split('-').map(|number| number.parse().ok()).collect();
    let numbers: [u64; 3] = numbers.and_then(|all| all.try_into().ok()).ok_or_else(missing)?;
    let [node, boot, number] = numbers.map(u64::cast_signed);
    let known = session::Entity::find_by_id((node, boot, number)).one(app.store.db()).await?;
    known.ok_or_else(missing)?;
    ask(&app, &caller, (node, boot), Command::EndSession, number, &id).await
}

/// End all sessions of a user, on all nodes.
#[utoipa::path(delete, path = "/online/users/{id}", tag = "online", params(("id" = String, Path)),
    responses((status = 202), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn kick_user(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let user = user::Entity::find_by_id(id).one(app.store.db()).await?;
    let user = user.ok_or_else(|| Problem::missing("user"))?;
    ask(&app, &caller, (0, 0), Command::EndUser, id, &user.name).await
}

/// Leaves a command for whichever control plane has the boot of a node; 0 is all.
pub(super) async fn ask(
    app: &App,
    caller: &Caller,
    boot: Boot,
    command: Command,
    argument: i64,
    subject: &str,
) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let row = command.row(boot, argument);
    command::Entity::insert(row).exec_without_returning(db).await?;
    let action = match command {
        Command::EndSession => "online.end_session",
        Command::EndUser => "online.end_user",
        Command::Drain => "node.drain",
        Command::TakeBack => "node.take_back",
    };
    edit.commit(Change::new(action, subject)).await?;

    app.hub.look();
    Ok(StatusCode::ACCEPTED)
}
