//! Nodes: enrolled, revoked, how they are.

use std::collections::HashMap;

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait,
    IntoActiveModel, QueryFilter, QuerySelect, Set,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Id, Page, Paging, Params, Problem, online::ask, problem::Result,
    users::time_text,
};
use crate::store::{
    Change, Command,
    entity::{boot, heartbeat, node},
    now, was_lately,
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, enrol))
        .routes(routes!(revoke))
        .routes(routes!(identity))
        .routes(routes!(drain))
        .routes(routes!(health))
        .routes(routes!(heartbeats))
}

/// A node.
#[derive(Debug, Serialize, ToSchema)]
struct NodeView {
    /// Number.
    id: String,
    /// Name.
    name: String,
    /// `active` or `revoked`.
    status: String,
    /// Whether it is connected and was heard of a moment ago.
    online: bool,
    /// The program's version.
    version: String,
    /// The generation in force there.
    generation: i64,
    /// Why it refuses a newer one; empty if it does not.
    refusal: String,
    /// Bytes that boots which were killed may have moved beyond what was counted.
    uncertain_bytes: i64,
    /// When it was last heard of.
    #[schema(format = DateTime)]
    seen_at: Option<String>,
    /// When it was enrolled.
    #[schema(format = DateTime)]
    created_at: String,
}

fn is_online(row: &node::Model) -> bool {
    row.connected && row.seen_at.is_some_and(was_lately)
}

fn view(row: node::Model, uncertain: &HashMap<i64, i64>) -> NodeView {
    NodeView {
        id: row.id.to_string(),
        online: is_online(&row),
        name: row.name,
        status: row.status,
        version: row.version,
        generation: row.generation,
        refusal: row.refusal,
        uncertain_bytes: uncertain.get(&row.id).copied().unwrap_or(0),
        seen_at: row.seen_at.map(time_text),
        created_at: time_text(row.created_at),
    }
}

/// All nodes.
#[utoipa::path(get, path = "/proxy/nodes", tag = "proxy", params(Paging),
    responses((status = 200, body = Page<NodeView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
) -> Result<Json<Page<NodeView>>> {
    let known = [
        ("id", node::Column::Id),
        ("name", node::Column::Name),
        ("status", node::Column::Status),
        ("seen_at", node::Column::SeenAt),
    ];
    let query = paging.sorted(node::Entity::find(), "id", &known)?;
    let db = app.store.db();
    let uncertain = uncertain(db).await?;
    paging.load(db, query, |row| view(row, &uncertain)).await
}

/// What the boots that were killed may have moved beyond what was counted, by node.
async fn uncertain(db: &impl ConnectionTrait) -> std::result::Result<HashMap<i64, i64>, DbErr> {
    let killed = boot::Entity::find().filter(boot::Column::Uncertain.gt(0)).select_only();
    let killed = killed.columns([boot::Column::NodeId, boot::Column::Uncertain]);
    let mut sums = HashMap::new();
    for (node, bytes) in killed.into_tuple::<(i64, i64)>().all(db).await? {
        *sums.entry(node).or_default() += bytes;
    }
    Ok(sums)
}

/// A new node.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewNode {
    /// The `node.name` of its file.
    #[schema(min_length = 1, max_length = 255, pattern = "^[^:\\x00-\\x1f\\x7f]+$")]
    name: String,
}

/// A node and what it proves itself with.
#[derive(Debug, Serialize, ToSchema)]
struct Enrolled {
    /// The node.
    node: NodeView,
    /// For the file that `[control] identity` of the node names: a private key and its certificate, as
    /// PEM. It is not kept and not shown again. A node on the control plane's host needs none.
    identity: String,
}

/// Enrol a node.
#[utoipa::path(post, path = "/proxy/nodes", tag = "proxy", request_body = NewNode,
    responses((status = 201, body = Enrolled), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn enrol(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<NewNode>,
) -> Result<(StatusCode, Json<Enrolled>)> {
    super::users::check_name(&new.name)?;
    let issued = app.authority.node(&new.name).map_err(|_| Problem::no_key())?;
    let edit = app.store.edit(caller.actor()).await?;
    let (row, change) = add_node(edit.db(), &new.name, &issued.fingerprint).await?;
    edit.commit(change).await?;

    Ok((
        StatusCode::CREATED,
        Json(Enrolled { node: view(row, &HashMap::new()), identity: issued.pem }),
    ))
}

/// Give a node another identity; the one before is worthless at once.
#[utoipa::path(post, path = "/proxy/nodes/{id}/identity", tag = "proxy", params(("id" = String, Path)),
    responses((status = 200, body = Enrolled), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 409, body = Problem), (status = 503, body = Problem)))]
async fn identity(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
) -> Result<Json<Enrolled>> {
    let edit = app.store.edit(caller.actor()).await?;
    let row = node::Entity::find_by_id(id).one(edit.db()).await?;
    let row = row.ok_or_else(|| Problem::missing("node"))?;
    if row.status != "active" {
        let detail = "the node was revoked; enrol one of another name";
        return Err(Problem::new(StatusCode::CONFLICT, detail));
    }
    let issued = app.authority.node(&row.name).map_err(|_| Problem::no_key())?;
    let (row, change) = replace_identity(edit.db(), row, issued.fingerprint).await?;
    let node = view(row, &uncertain(edit.db()).await?);
    edit.commit(change).await?;

    app.hub.look();
    Ok(Json(Enrolled { node, identity: issued.pem }))
}

/// Revoke a node: it gets nothing more, and is not listened to.
#[utoipa::path(delete, path = "/proxy/nodes/{id}", tag = "proxy", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn revoke(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let row = node::Entity::find_by_id(id).one(edit.db()).await?;
    let row = row.ok_or_else(|| Problem::missing("node"))?;
    let change = revoke_node(edit.db(), row).await?;
    edit.commit(change).await?;

    app.hub.look();
    Ok(StatusCode::NO_CONTENT)
}

/// What the audit log has of a node.
fn audited(node: &node::Model) -> serde_json::Value {
    serde_json::json!({ "name": node.name, "status": node.status, "certificate": node.certificate })
}

/// Enrols a node that nobody has heard of yet; one of the control plane's host has no certificate.
///
/// # Errors
/// There is one of that name, or the database fails.
pub(crate) async fn add_node(
    db: &DatabaseTransaction,
    name: &str,
    certificate: &str,
) -> std::result::Result<(node::Model, Change), DbErr> {
    let row = node::ActiveModel {
        name: Set(name.to_owned()),
        status: Set("active".into()),
        boot: Set(0),
        version: Set(String::new()),
        generation: Set(0),
        refusal: Set(String::new()),
        connected: Set(false),
        certificate: Set(certificate.to_owned()),
        seen_at: Set(None),
        created_at: Set(now()),
        ..Default::default()
    };
    let row = row.insert(db).await?;
    let change = Change::new("node.add", name).new_value(&audited(&row));
    Ok((row, change))
}

/// Lets a node prove itself by another certificate, and by that of before no more.
///
/// # Errors
/// The database fails.
pub(crate) async fn replace_identity(
    db: &DatabaseTransaction,
    old: node::Model,
    certificate: String,
) -> std::result::Result<(node::Model, Change), DbErr> {
    let change = Change::new("node.identity", &old.name).old(&audited(&old));
    let mut row = old.into_active_model();
    row.certificate = Set(certificate);
    let row = row.update(db).await?;
    let change = change.new_value(&audited(&row));
    Ok((row, change))
}

/// Gives a node nothing more, and listens to it no more.
///
/// # Errors
/// The database fails.
pub(crate) async fn revoke_node(
    db: &DatabaseTransaction,
    old: node::Model,
) -> std::result::Result<Change, DbErr> {
    let change = Change::new("node.revoke", &old.name).old(&audited(&old));
    let mut row = old.into_active_model();
    row.status = Set("revoked".into());
    let row = row.update(db).await?;
    Ok(change.new_value(&audited(&row)))
}

/// Let a node drain: it takes no more sessions, lets the others end, and exits.
#[utoipa::path(post, path = "/proxy/nodes/{id}/drain", tag = "proxy", params(("id" = String, Path)),
    responses((status = 202), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn drain(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let row = node::Entity::find_by_id(id).one(app.store.db()).await?;
    let row = row.ok_or_else(|| Problem::missing("node"))?;
    ask(&app, &caller, (id, 0), Command::Drain, 0, &row.name).await
}

/// How the proxies are.
#[derive(Debug, Serialize, ToSchema)]
struct Health {
    /// Enrolled and not revoked.
    nodes: usize,
    /// Of those, connected and heard of a moment ago.
    online: usize,
    /// Of those, with the present generation in force.
    current: usize,
    /// The present generation.
    generation: i64,
}

/// How the proxies are.
#[utoipa::path(get, path = "/proxy/health", tag = "proxy",
    responses((status = 200, body = Health), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn health(State(app): State<App>, _: Admin) -> Result<Json<Health>> {
    let nodes = node::Entity::find().filter(node::Column::Status.eq("active"));
    let nodes = nodes.all(app.store.db()).await?;
    let generation = app.store.generation().await?;
    let online = nodes.iter().filter(|node| is_online(node));
    Ok(Json(Health {
        online: online.clone().count(),
        current: online.filter(|node| node.generation >= generation).count(),
        nodes: nodes.len(),
        generation,
    }))
}

/// How a node was.
#[derive(Debug, Serialize, ToSchema)]
struct HeartbeatView {
    /// The node.
    node_id: String,
    /// The boot: a node that drains while its successor runs has two.
    boot: String,
    /// When.
    #[schema(format = DateTime)]
    at: String,
    /// Sessions that ran.
    sessions: i64,
    /// CPU time of the process so far, in microseconds.
    cpu_us: i64,
    /// Resident memory in bytes.
    memory: i64,
    /// Bytes to targets since its start.
    up: i64,
    /// Bytes to clients since its start.
    down: i64,
    /// Whether it took sessions.
    ready: bool,
    /// Seconds since its start.
    uptime: i64,
}

/// Which heartbeats.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only of a node.
    node_id: Option<String>,
}

/// How the nodes were, the last first.
#[utoipa::path(get, path = "/proxy/heartbeats", tag = "proxy", params(Paging, Which),
    responses((status = 200, body = Page<HeartbeatView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn heartbeats(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<HeartbeatView>>> {
    let mut query = heartbeat::Entity::find();
    if let Some(node) = &which.node_id {
        query = query.filter(heartbeat::Column::NodeId.eq(node.parse::<i64>().unwrap_or(-1)));
    }
    let view = |row: heartbeat::Model| HeartbeatView {
        node_id: row.node_id.to_string(),
        boot: row.boot.cast_unsigned().to_string(),
        at: time_text(row.at),
        sessions: row.sessions,
        cpu_us: row.cpu_us,
        memory: row.memory,
        up: row.up,
        down: row.down,
        ready: row.ready,
        uptime: row.uptime,
    };
    let known = [("node_id", heartbeat::Column::NodeId), ("at", heartbeat::Column::At)];
    paging.load(app.store.db(), paging.sorted(query, "-at", &known)?, view).await
}
