//! Rates of groups and by default; those of one user are part of the user.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, Set};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Body, Id, Page, Paging, Params, Problem, problem::Result};
use crate::store::{Change, entity::bandwidth_limit as limit, now};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(show, update, remove))
}

/// Whom rates are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum LimitKind {
    /// Members of a group that have none of their own; the highest of their groups.
    Group,
    /// Everybody else.
    Default,
}

/// Rates.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Rates {
    /// Whom for.
    kind: LimitKind,
    /// The group's name; empty with `default`.
    #[serde(default)]
    #[schema(max_length = 255)]
    subject: String,
    /// Bytes a second to targets.
    #[schema(minimum = 1)]
    up: Option<i64>,
    /// Bytes a second to clients.
    #[schema(minimum = 1)]
    down: Option<i64>,
    /// Bytes at once after a pause.
    #[schema(minimum = 1)]
    burst: Option<i64>,
}

/// Rates, as they are kept.
#[derive(Debug, Serialize, ToSchema)]
struct RatesView {
    /// Number.
    id: String,
    /// Whom for.
    kind: LimitKind,
    /// The group's name; empty with `default`.
    subject: String,
    /// Bytes a second to targets.
    up: Option<i64>,
    /// Bytes a second to clients.
    down: Option<i64>,
    /// Bytes at once after a pause.
    burst: Option<i64>,
}

impl Rates {
    fn check(&self) -> Result<()> {
        let named = (self.kind == LimitKind::Group) != self.subject.is_empty();
        if !named || self.subject.len() > 255 || self.subject.chars().any(char::is_control) {
            return Err(Problem::invalid("subject: a group's name, or empty with kind `default`"));
        }
        if [self.up, self.down, self.burst].iter().flatten().any(|rate| *rate < 1) {
            return Err(Problem::invalid("rates are 1 or more, or null"));
        }
        Ok(())
    }

    fn kind_name(&self) -> &'static str {
        if self.kind == LimitKind::Group { "group" } else { "default" }
    }
}

fn view(row: limit::Model) -> RatesView {
    let kind = if row.kind == "group" { LimitKind::Group } else { LimitKind::Default };
    RatesView {
        id: row.id.to_string(),
        kind,
        subject: row.subject,
        up: row.up,
        down: row.down,
        burst: row.burst,
    }
}

async fn find(db: &impl sea_orm::ConnectionTrait, id: i64) -> Result<limit::Model> {
    let row = limit::Entity::find_by_id(id).filter(limit::Column::Kind.ne("user")).one(db).await?;
    row.ok_or_else(|| Problem::missing("limit"))
}

/// All rates of groups, and the default.
#[utoipa::path(get, path = "/traffic/limits", tag = "traffic", params(Paging),
    responses((status = 200, body = Page<RatesView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
) -> Result<Json<Page<RatesView>>> {
    let query = limit::Entity::find().filter(limit::Column::Kind.ne("user"));
    let known = [("id", limit::Column::Id), ("subject", limit::Column::Subject)];
    paging.load(app.store.db(), paging.sorted(query, "id", &known)?, view).await
}

/// One.
#[utoipa::path(get, path = "/traffic/limits/{id}", tag = "traffic", params(("id" = String, Path)),
    responses((status = 200, body = RatesView), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, _: Admin, Id(id): Id) -> Result<Json<RatesView>> {
    Ok(Json(view(find(app.store.db(), id).await?)))
}

/// Limit a group, or everybody.
#[utoipa::path(post, path = "/traffic/limits", tag = "traffic", request_body = Rates,
    responses((status = 201, body = RatesView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(rates): Body<Rates>,
) -> Result<(StatusCode, Json<RatesView>)> {
    rates.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let row = limit::ActiveModel {
        kind: Set(rates.kind_name().into()),
        subject: Set(rates.subject.clone()),
        up: Set(rates.up),
        down: Set(rates.down),
        burst: Set(rates.burst),
        updated_at: Set(now()),
        ..Default::default()
    };
    let row = row.insert(db).await?;
    let change = Change::new("limit.create", &rates.subject).new_value(&rates);
    let users = crate::publish::members(db, &rates.subject).await?;
    edit.commit(change.users(users)).await?;

    Ok((StatusCode::CREATED, Json(view(row))))
}

/// Change rates.
#[utoipa::path(put, path = "/traffic/limits/{id}", tag = "traffic", params(("id" = String, Path)), request_body = Rates,
    responses((status = 200, body = RatesView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(rates): Body<Rates>,
) -> Result<Json<RatesView>> {
    rates.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    let mut row = old.clone().into_active_model();
    row.kind = Set(rates.kind_name().into());
    row.subject = Set(rates.subject.clone());
    (row.up, row.down, row.burst) = (Set(rates.up), Set(rates.down), Set(rates.burst));
    row.updated_at = Set(now());
    let row = row.update(db).await?;
    let mut users = crate::publish::members(db, &old.subject).await?;
    users.extend(crate::publish::members(db, &rates.subject).await?);
    users.sort_unstable();
    users.dedup();
    let change = Change::new("limit.update", &rates.subject).new_value(&rates).users(users);
    edit.commit(change.old(&view(old))).await?;

    Ok(Json(view(row)))
}

/// Take rates away.
#[utoipa::path(delete, path = "/traffic/limits/{id}", tag = "traffic", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    limit::Entity::delete_by_id(id).exec(db).await?;
    let users = crate::publish::members(db, &old.subject).await?;
    let change = Change::new("limit.delete", &old.subject).users(users);
    edit.commit(change.old(&view(old))).await?;

    Ok(StatusCode::NO_CONTENT)
}
