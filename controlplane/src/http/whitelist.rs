//! Clients that may connect. An empty list lets all connect.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{ActiveModelTrait, EntityTrait, QueryOrder, Set};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Id, Page, Paging, Params, Problem,
    problem::Result,
    users::{network, time_text},
};
use crate::store::{Change, entity::whitelist, now};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(remove))
}

/// A network.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// A network, such as `10.0.0.0/8`, or an address.
    #[schema(max_length = 64)]
    cidr: String,
    /// For the admins.
    #[serde(default)]
    #[schema(max_length = 1000)]
    comment: String,
}

/// A network, as it is kept.
#[derive(Debug, Serialize, ToSchema)]
struct EntryView {
    /// Number.
    id: String,
    /// The network.
    cidr: String,
    /// For the admins.
    comment: String,
    /// When it was made.
    #[schema(format = DateTime)]
    created_at: String,
}

fn view(row: whitelist::Model) -> EntryView {
    EntryView {
        id: row.id.to_string(),
        cidr: row.cidr,
        comment: row.comment,
        created_at: time_text(row.created_at),
    }
}

/// All networks.
#[utoipa::path(get, path = "/whitelist", tag = "whitelist", params(Paging),
    responses((status = 200, body = Page<EntryView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
) -> Result<Json<Page<EntryView>>> {
    let query = whitelist::Entity::find().order_by_asc(whitelist::Column::Id);
    paging.load(app.store.db(), query, view).await
}

/// Let a network connect; from the first one on, no other may.
#[utoipa::path(post, path = "/whitelist", tag = "whitelist", request_body = Entry,
    responses((status = 201, body = EntryView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<Entry>,
) -> Result<(StatusCode, Json<EntryView>)> {
    let cidr = network(&new.cidr)?.to_string();
    if new.comment.chars().count() > 1000 {
        return Err(Problem::invalid("comment: at most 1000 characters"));
    }
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let row = whitelist::ActiveModel {
        cidr: Set(cidr.clone()),
        comment: Set(new.comment.clone()),
        created_at: Set(now()),
        ..Default::default()
    };
    let row = row.insert(db).await?;
    edit.commit(Change::new("whitelist.create", &cidr).new_value(&new).policy()).await?;

    Ok((StatusCode::CREATED, Json(view(row))))
}

/// Take a network away; with the last one, all may connect again.
#[utoipa::path(delete, path = "/whitelist/{id}", tag = "whitelist", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = whitelist::Entity::find_by_id(id).one(db).await?;
    let old = old.ok_or_else(|| Problem::missing("entry"))?;
    whitelist::Entity::delete_by_id(id).exec(db).await?;
    let change = Change::new("whitelist.delete", &old.cidr).policy();
    edit.commit(change.old(&view(old))).await?;

    Ok(StatusCode::NO_CONTENT)
}
