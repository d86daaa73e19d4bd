//! The black and white lists of targets.

use std::collections::HashSet;

use axum::{Json, extract::State, http::StatusCode};
use culvert_api::policy::{Access, FILTER_ENTRIES_MAX, Filter, PortRange};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Id, Page, Paging, Params, Problem,
    extract::refuse_beyond,
    problem::Result,
    users::{name_of, time_text},
};
use crate::{
    publish::{self, check_together},
    store::{Change, ROWS, entity::url_filter as filter, has_part, now},
};

/// Filters of one import, and its body in bytes.
const IMPORT_MAX: usize = 10_000;
const IMPORT_BODY: usize = 12 << 20;

pub(super) fn routes() -> OpenApiRouter<App> {
    let large = axum::extract::DefaultBodyLimit::max(IMPORT_BODY);
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, update, remove))
        .merge(OpenApiRouter::new().routes(routes!(import)).layer(large))
}

/// What a filter does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum FilterAction {
    /// Black list.
    Deny,
    /// White list: exempts from the black one.
    Allow,
}

/// How a filter's value is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FilterKind {
    /// An exact host name.
    Domain,
    /// A host name and all below it.
    DomainSuffix,
    /// A part of a host name.
    DomainKeyword,
    /// A regular expression on host names.
    DomainRegex,
    /// Addresses.
    Cidr,
}

/// A filter.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct FilterBody {
    /// What it does.
    action: FilterAction,
    /// How its value is read.
    kind: FilterKind,
    /// What matches.
    #[schema(min_length = 1, max_length = 1000)]
    value: String,
    /// Ports and ranges it is for, such as `443` and `8000-8100`; empty is all.
    #[serde(default)]
    #[schema(max_items = 64)]
    ports: Vec<String>,
    /// Whether it is in force.
    #[serde(default = "yes")]
    enabled: bool,
    /// For the admins.
    #[serde(default)]
    #[schema(max_length = 1000)]
    comment: String,
}

fn yes() -> bool {
    true
}

/// A filter, as it is kept.
#[derive(Debug, Serialize, ToSchema)]
struct FilterView {
    /// Number.
    id: String,
    /// What it does.
    action: FilterAction,
    /// How its value is read.
    kind: FilterKind,
    /// What matches.
    value: String,
    /// Ports and ranges it is for; empty is all.
    ports: Vec<String>,
    /// Whether it is in force.
    enabled: bool,
    /// For the admins.
    comment: String,
    /// When it was made.
    #[schema(format = DateTime)]
    created_at: String,
}

fn view(row: filter::Model) -> FilterView {
    let word = |text: &str| serde_json::Value::String(text.to_owned());
    FilterView {
        id: row.id.to_string(),
        created_at: time_text(row.created_at),
        action: serde_json::from_value(word(&row.action)).unwrap_or(FilterAction::Deny),
        kind: serde_json::from_value(word(&row.kind)).unwrap_or(FilterKind::Domain),
        value: row.value,
        ports: serde_json::from_str(&row.ports).unwrap_or_default(),
        enabled: row.enabled,
        comment: row.comment,
    }
}

/// A row as nodes read it.
pub(crate) fn compiled(row: &filter::Model) -> std::result::Result<Filter, String> {
    let mut filter = Filter {
        action: if row.action == "allow" { Access::Allow } else { Access::Deny },
        ..Filter::default()
    };
    let ports: Vec<String> = serde_json::from_str(&row.ports).unwrap_or_default();
    for port in ports {
        let port: PortRange = serde_json::from_value(serde_json::Value::String(port))
            .map_err(|error| format!("ports: {error}"))?;
        filter.port.push(port);
    }
    let list = match row.kind.as_str() {
        "domain" => &mut filter.domain,
        "domain_suffix" => &mut filter.domain_suffix,
        "domain_keyword" => &mut filter.domain_keyword,
        "domain_regex" => &mut filter.domain_regex,
        _ => {
            let net = super::users::network(&row.value).map_err(|problem| problem.detail)?;
            filter.cidr.push(net);
            return Ok(filter);
        }
    };
    list.push(row.value.clone());
    Ok(filter)
}

impl FilterBody {
    fn row(&self) -> filter::Model {
        filter::Model {
            id: 0,
            action: name_of(&self.action),
            kind: name_of(&self.kind),
            value: self.value.clone(),
            ports: serde_json::to_string(&self.ports).unwrap_or_default(),
            enabled: self.enabled,
            comment: self.comment.clone(),
            created_at: now(),
        }
    }

    /// Says what a node would say of all expressions together, if this is one of them.
    async fn check_together(&self, db: &impl sea_orm::ConnectionTrait) -> Result<()> {
        match self.kind {
            FilterKind::DomainRegex => check_together(db).await,
            _ => Ok(()),
        }
    }

    /// Says at once what a node would say.
    fn check(&self) -> Result<()> {
        if self.comment.chars().count() > 1000 || self.value.chars().count() > 1000 {
            return Err(Problem::invalid("value and comment have at most 1000 characters"));
        }
        if self.value.is_empty() {
            return Err(Problem::invalid("value: an empty one would match everything"));
        }
        let filter = compiled(&self.row()).map_err(Problem::invalid)?;
        let policy = culvert_api::policy::Policy { filter: vec![filter], ..Default::default() };
        publish::check(&policy)
    }
}

async fn find(db: &impl sea_orm::ConnectionTrait, id: i64) -> Result<filter::Model> {
    filter::Entity::find_by_id(id).one(db).await?.ok_or_else(|| Problem::missing("filter"))
}

/// Which filters.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// A part of the value.
    q: Option<String>,
    /// Only these.
    action: Option<FilterAction>,
}

/// All filters.
#[utoipa::path(get, path = "/filters", tag = "filters", params(Paging, Which),
    responses((status = 200, body = Page<FilterView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<FilterView>>> {
    let mut query = filter::Entity::find();
    if let Some(part) = super::users::short(which.q.as_ref())? {
        query = query.filter(has_part(filter::Column::Value, part));
    }
    if let Some(action) = which.action {
        query = query.filter(filter::Column::Action.eq(name_of(&action)));
    }
    let known = [
        ("id", filter::Column::Id),
        ("value", filter::Column::Value),
        ("kind", filter::Column::Kind),
        ("created_at", filter::Column::CreatedAt),
    ];
    paging.load(app.store.db(), paging.sorted(query, "id", &known)?, view).await
}

/// One filter.
#[utoipa::path(get, path = "/filters/{id}", tag = "filters", params(("id" = String, Path)),
    responses((status = 200, body = FilterView), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, _: Admin, Id(id): Id) -> Result<Json<FilterView>> {
    Ok(Json(view(find(app.store.db(), id).await?)))
}

/// Make a filter.
#[utoipa::path(post, path = "/filters", tag = "filters", request_body = FilterBody,
    responses((status = 201, body = FilterView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<FilterBody>,
) -> Result<(StatusCode, Json<FilterView>)> {
    new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let mut row = new.row().into_active_model().reset_all();
    row.id = sea_orm::NotSet;
    let row = row.insert(db).await?;
    refuse_beyond(db, filter::Entity, FILTER_ENTRIES_MAX).await?;
    new.check_together(db).await?;
    edit.commit(Change::new("filter.create", &new.value).new_value(&new).policy()).await?;

    Ok((StatusCode::CREATED, Json(view(row))))
}

/// Many filters of one kind.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Import {
    /// What they do.
    action: FilterAction,
    /// How their values are read.
    kind: FilterKind,
    /// What matches, one filter each.
    #[schema(min_items = 1, max_items = 10000)]
    values: Vec<String>,
    /// For the admins, of each.
    #[serde(default)]
    #[schema(max_length = 1000)]
    comment: String,
}

/// What became of an import.
#[derive(Debug, Serialize, ToSchema)]
struct Imported {
    /// New filters.
    created: usize,
    /// Values that were there already, or twice.
    skipped: usize,
}

/// Make many filters: all of them, or none if one cannot be. Values that are there already are passed over.
#[utoipa::path(post, path = "/filters/import", tag = "filters", request_body = Import,
    responses((status = 201, body = Imported), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn import(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<Import>,
) -> Result<(StatusCode, Json<Imported>)> {
    if !(1..=IMPORT_MAX).contains(&new.values.len()) {
        return Err(Problem::invalid(format!("values: 1 to {IMPORT_MAX} at once")));
    }
    let body = |value: &str| FilterBody {
        action: new.action,
        kind: new.kind,
        value: value.to_owned(),
        ports: Vec::new(),
        enabled: true,
        comment: new.comment.clone(),
    };
    let bodies: Vec<FilterBody> = new.values.iter().map(|value| body(value)).collect();
    // Beside the event loop: expressions take a while.
    let checked = tokio::task::spawn_blocking(move || {
        bodies.iter().enumerate().try_for_each(|(place, body)| {
            let told = |problem: Problem| format!("values[{place}]: {}", problem.detail);
            body.check().map_err(|problem| Problem::invalid(told(problem)))
        })
    });
    checked.await.map_err(|_| Problem::invalid("values could not be checked"))??;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let known = filter::Entity::find()
        .select_only()
        .column(filter::Column::Value)
        .filter(filter::Column::Action.eq(name_of(&new.action)))
        .filter(filter::Column::Kind.eq(name_of(&new.kind)))
        .filter(filter::Column::Ports.eq("[]"))
        .filter(filter::Column::Enabled.eq(true));
    let mut seen: HashSet<String> = known.into_tuple().all(db).await?.into_iter().collect();
    let fresh: Vec<&String> =
        new.values.iter().filter(|value| seen.insert((*value).clone())).collect();
    for part in fresh.chunks(ROWS) {
        let row = |value: &&String| {
            let mut row = body(value).row().into_active_model().reset_all();
            row.id = sea_orm::NotSet;
            row
        };
        filter::Entity::insert_many(part.iter().map(row)).exec_without_returning(db).await?;
    }
    refuse_beyond(db, filter::Entity, FILTER_ENTRIES_MAX).await?;
    body("").check_together(db).await?;
    let (created, skipped) = (fresh.len(), new.values.len() - fresh.len());
    if created > 0 {
        let subject = format!("{created} of kind {}", name_of(&new.kind));
        edit.commit(Change::new("filter.import", subject).new_value(&fresh).policy()).await?;
    }
    Ok((StatusCode::CREATED, Json(Imported { created, skipped })))
}

/// Change a filter.
#[utoipa::path(put, path = "/filters/{id}", tag = "filters", params(("id" = String, Path)), request_body = FilterBody,
    responses((status = 200, body = FilterView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(new): Body<FilterBody>,
) -> Result<Json<FilterView>> {
    new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    let row = filter::Model { id, created_at: old.created_at, ..new.row() };
    let row = row.into_active_model().reset_all().update(db).await?;
    new.check_together(db).await?;
    let change = Change::new("filter.update", &new.value).old(&view(old)).new_value(&new);
    edit.commit(change.policy()).await?;

    Ok(Json(view(row)))
}

/// Delete a filter.
#[utoipa::path(delete, path = "/filters/{id}", tag = "filters", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    filter::Entity::delete_by_id(id).exec(db).await?;
    let change = Change::new("filter.delete", &old.value).policy();
    edit.commit(change.old(&view(old))).await?;

    Ok(StatusCode::NO_CONTENT)
}
