//! The ordered rules.

use axum::{Json, extract::State, http::StatusCode};
use culvert_api::policy::{RULES_MAX, Rule, When};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Id, Page, Paging, Params, Problem, extract::refuse_beyond, problem::Result,
    users::time_text,
};
use crate::{
    publish,
    store::{Change, entity::rule, now},
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, update, remove))
        .routes(routes!(reorder))
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum RuleDoes {
    /// Let through.
    Allow,
    /// Refuse.
    Deny,
    /// Go elsewhere.
    Redirect,
}

/// A rule.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RuleBody {
    /// Its name in logs and records.
    #[schema(min_length = 1, max_length = 255)]
    name: String,
    /// Conditions: lists under `user`, `group`, `client`, `protocol`, `domain`, `domain_suffix`,
    /// `domain_keyword`, `domain_regex`, `cidr`, `port`, `time` (such as `08:00-18:30`, in the zone of the
    /// settings) and `weekday` (such as `mon`); all that are given must hold.
    #[serde(default)]
    #[schema(value_type = Object)]
    when: serde_json::Map<String, serde_json::Value>,
    /// What it does.
    action: RuleDoes,
    /// `host:port` to go to instead, with `redirect`.
    #[serde(default)]
    #[schema(max_length = 512)]
    to: Option<String>,
    /// Whether it is in force.
    #[serde(default = "yes")]
    enabled: bool,
}

fn yes() -> bool {
    true
}

/// A rule, as it is kept.
#[derive(Debug, Serialize, ToSchema)]
struct RuleView {
    /// Number.
    id: String,
    /// Place in the order, from 1.
    position: i64,
    /// Its name in logs and records.
    name: String,
    /// Conditions; all must hold.
    #[schema(value_type = Object)]
    when: serde_json::Map<String, serde_json::Value>,
    /// What it does.
    action: RuleDoes,
    /// `host:port` to go to instead.
    to: Option<String>,
    /// Whether it is in force.
    enabled: bool,
    /// When it was made.
    #[schema(format = DateTime)]
    created_at: String,
}

fn view(row: rule::Model) -> RuleView {
    let action = serde_json::Value::String(row.action);
    RuleView {
        id: row.id.to_string(),
        position: row.position,
        created_at: time_text(row.created_at),
        name: row.name,
        when: serde_json::from_str(&row.conditions).unwrap_or_default(),
        action: serde_json::from_value(action).unwrap_or(RuleDoes::Deny),
        to: row.target,
        enabled: row.enabled,
    }
}

/// A row as nodes read it.
pub(crate) fn compiled(row: &rule::Model) -> std::result::Result<Rule, String> {
    let when: When =
        serde_json::from_str(&row.conditions).map_err(|error| format!("when: {error}"))?;
    let action = serde_json::Value::String(row.action.clone());
    Ok(Rule {
        name: row.name.clone(),
        when,
        action: serde_json::from_value(action).map_err(|error| format!("action: {error}"))?,
        upstream: row.upstream.clone(),
        to: row.target.clone(),
    })
}

impl RuleBody {
    fn row(&self, position: i64) -> rule::Model {
        let action = serde_json::to_value(self.action).unwrap_or_default();
        rule::Model {
            id: 0,
            position,
            name: self.name.clone(),
            enabled: self.enabled,
            conditions: serde_json::to_string(&self.when).unwrap_or_default(),
            action: action.as_str().unwrap_or_default().to_owned(),
            upstream: None,
            target: self.to.clone(),
            created_at: now(),
        }
    }

    fn check(&self) -> Result<()> {
        if self.name.is_empty() || self.name.len() > 255 || self.name.chars().any(char::is_control)
        {
            return Err(Problem::invalid("name: 1 to 255 bytes without control characters"));
        }
        if self.to.as_ref().is_some_and(|to| to.len() > 512) {
            return Err(Problem::invalid("to: at most 512 bytes"));
        }
        let rule = compiled(&self.row(0)).map_err(Problem::invalid)?;
        let policy = culvert_api::policy::Policy { rule: vec![rule], ..Default::default() };
        publish::check(&policy)?;
        publish::refuse(policy.check_together())
    }
}

async fn find(db: &impl sea_orm::ConnectionTrait, id: i64) -> Result<rule::Model> {
    rule::Entity::find_by_id(id).one(db).await?.ok_or_else(|| Problem::missing("rule"))
}

/// All rules in their order.
#[utoipa::path(get, path = "/rules", tag = "rules", params(Paging),
    responses((status = 200, body = Page<RuleView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
) -> Result<Json<Page<RuleView>>> {
    let known = [
        ("id", rule::Column::Id),
        ("position", rule::Column::Position),
        ("name", rule::Column::Name),
    ];
    let query = paging.sorted(rule::Entity::find(), "position", &known)?;
    paging.load(app.store.db(), query, view).await
}

/// One rule.
#[utoipa::path(get, path = "/rules/{id}", tag = "rules", params(("id" = String, Path)),
    responses((status = 200, body = RuleView), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, _: Admin, Id(id): Id) -> Result<Json<RuleView>> {
    Ok(Json(view(find(app.store.db(), id).await?)))
}

/// Make a rule, the last in the order.
#[utoipa::path(post, path = "/rules", tag = "rules", request_body = RuleBody,
    responses((status = 201, body = RuleView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<RuleBody>,
) -> Result<(StatusCode, Json<RuleView>)> {
    new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let last = rule::Entity::find().order_by_desc(rule::Column::Position).one(db).await?;
    let position = last.map_or(1, |last| last.position + 1);
    let mut row = new.row(position).into_active_model().reset_all();
    row.id = sea_orm::NotSet;
    let row = row.insert(db).await?;
    refuse_beyond(db, rule::Entity, RULES_MAX).await?;
    edit.commit(Change::new("rule.create", &new.name).new_value(&new).policy()).await?;

    Ok((StatusCode::CREATED, Json(view(row))))
}

/// Change a rule.
#[utoipa::path(put, path = "/rules/{id}", tag = "rules", params(("id" = String, Path)), request_body = RuleBody,
    responses((status = 200, body = RuleView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(new): Body<RuleBody>,
) -> Result<Json<RuleView>> {
    new.check()?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    let row = rule::Model { id, created_at: old.created_at, ..new.row(old.position) };
    let row = row.into_active_model().reset_all().update(db).await?;
    let change = Change::new("rule.update", &new.name).old(&view(old)).new_value(&new);
    edit.commit(change.policy()).await?;

    Ok(Json(view(row)))
}

/// Delete a rule.
#[utoipa::path(delete, path = "/rules/{id}", tag = "rules", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = find(db, id).await?;
    rule::Entity::delete_by_id(id).exec(db).await?;
    let change = Change::new("rule.delete", &old.name).policy();
    edit.commit(change.old(&view(old))).await?;

    Ok(StatusCode::NO_CONTENT)
}

/// The order of all rules.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Order {
    /// The numbers of all rules, first to last.
    #[schema(max_items = 10000)]
    ids: Vec<String>,
}

/// Put the rules into another order.
#[utoipa::path(post, path = "/rules/reorder", tag = "rules", request_body = Order,
    responses((status = 204), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 409, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn reorder(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(order): Body<Order>,
) -> Result<StatusCode> {
    let ids: Vec<i64> = order.ids.iter().filter_map(|id| id.parse().ok()).collect();
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let rows = rule::Entity::find().order_by_asc(rule::Column::Position).all(db).await?;
    let old: Vec<i64> = rows.iter().map(|row| row.id).collect();
    let (mut had, mut given) = (old.clone(), ids.clone());
    had.sort_unstable();
    given.sort_unstable();
    if had != given || order.ids.len() != ids.len() {
        let detail = "ids are those of all rules, each once; read them again";
        return Err(Problem::new(StatusCode::CONFLICT, detail));
    }
    for (position, id) in (1i64..).zip(&ids) {
        rule::Entity::update_many()
            .col_expr(rule::Column::Position, position.into())
            .filter(rule::Column::Id.eq(*id))
            .exec(db)
            .await?;
    }
    edit.commit(Change::new("rule.reorder", "").old(&old).new_value(&ids).policy()).await?;

    Ok(StatusCode::NO_CONTENT)
}
