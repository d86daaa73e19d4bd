//! Clients that may connect. An empty list lets all connect.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{
    ActiveModelTrait, Condition, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, Set,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Id, Page, Paging, Params, Problem,
    problem::Result,
    users::{network, short, time_text},
};
use crate::store::{Change, entity::whitelist, has_part, now};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(show, update, remove))
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

impl Entry {
    /// The network as it is kept.
    fn check(&self) -> Result<String> {
        if self.comment.chars().count() > 1000 {
            return Err(Problem::invalid("comment: at most 1000 characters"));
        }
        Ok(network(&self.cidr)?.to_string())
    }
}

/// Which networks.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// A part of the network or of the comment.
    q: Option<String>,
}

/// All networks.
#[utoipa::path(get, path = "/whitelist", tag = "whitelist", params(Paging, Which),
    responses((status = 200, body = Page<EntryView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<EntryView>>> {
    let mut query = whitelist::Entity::find();
    if let Some(part) = short(which.q.as_ref())? {
        let part = |column: whitelist::Column| has_part(column, part);
        query = query.filter(
            Condition::any()
                .add(part(whitelist::Column::Cidr))
                .add(part(whitelist::Column::Comment)),
        );
    }
    let known = [
        ("id", whitelist::Column::Id),
        ("cidr", whitelist::Column::Cidr),
        ("created_at", whitelist::Column::CreatedAt),
    ];
    paging.load(app.store.db(), paging.sorted(query, "id", &known)?, view).await
}

async fn find(db: &impl ConnectionTrait, id: i64) -> Result<whitelist::Model> {
    let found = whitelist::Entity::find_by_id(id).one(db).await?;
    found.ok_or_else(|| Problem::missing("entry"))
}

/// One network.
#[utoipa::path(get, path = "/whitelist/{id}", tag = "whitelist", params(("id" = String, Path)),
    responses((status = 200, body = EntryView), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, _: Admin, Id(id): Id) -> Result<Json<EntryView>> {
    Ok(Json(view(find(app.store.db(), id).await?)))
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
    let cidr = new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let row = whitelist::ActiveModel {
        cidr: Set(cidr.clone()),
        comment: Set(new.comment.clone()),
        created_at: Set(now()),
        ..Default::default()
    };
    let row = view(row.insert(db).await?);
    edit.commit(Change::new("whitelist.create", &cidr).new_value(&row).policy()).await?;

    Ok((StatusCode::CREATED, Json(row)))
}

/// Put another network, or comment, in its place.
#[utoipa::path(put, path = "/whitelist/{id}", tag = "whitelist", params(("id" = String, Path)), request_body = Entry,
    responses((status = 200, body = EntryView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(new): Body<Entry>,
) -> Result<Json<EntryView>> {
    let cidr = new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    let mut row = old.clone().into_active_model();
    (row.cidr, row.comment) = (Set(cidr.clone()), Set(new.comment));
    let row = view(row.update(db).await?);
    let change = Change::new("whitelist.update", cidr).old(&view(old)).new_value(&row);
    edit.commit(change.policy()).await?;

    Ok(Json(row))
}

/// Take a network away; with the last one, all may connect again.
#[utoipa::path(delete, path = "/whitelist/{id}", tag = "whitelist", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    whitelist::Entity::delete_by_id(id).exec(db).await?;
    let change = Change::new("whitelist.delete", &old.cidr).policy();
    edit.commit(change.old(&view(old))).await?;

    Ok(StatusCode::NO_CONTENT)
}
