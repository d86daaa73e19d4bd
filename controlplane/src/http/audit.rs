//! Who changed what.

use axum::{Json, extract::State};
use sea_orm::{ColumnTrait, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Page, Paging, Params, Problem, problem::Result, users::time_text};
use crate::store::entity::audit;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

/// A change.
#[derive(Debug, Serialize, ToSchema)]
struct AuditView {
    /// Number.
    id: String,
    /// When.
    #[schema(format = DateTime)]
    at: String,
    /// Who.
    actor: String,
    /// From where; empty for the command line.
    address: String,
    /// What was done, such as `user.update`.
    action: String,
    /// To what.
    subject: String,
    /// How it was.
    #[schema(value_type = Option<Object>)]
    old: serde_json::Value,
    /// How it is.
    #[schema(value_type = Option<Object>)]
    new: serde_json::Value,
}

/// Which changes.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only by.
    actor: Option<String>,
    /// Only this action.
    action: Option<String>,
    /// A part of the subject.
    q: Option<String>,
}

/// Changes, the last first.
#[utoipa::path(get, path = "/logs/audit", tag = "logs", params(Paging, Which),
    responses((status = 200, body = Page<AuditView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<AuditView>>> {
    let (size, skip) = paging.bounds()?;
    let mut query = audit::Entity::find();
    if let Some(actor) = &which.actor {
        query = query.filter(audit::Column::Actor.eq(actor));
    }
    if let Some(action) = &which.action {
        query = query.filter(audit::Column::Action.eq(action));
    }
    if let Some(part) = super::users::short(which.q.as_ref())? {
        query = query.filter(audit::Column::Subject.contains(part));
    }
    let total = query.clone().count(app.store.db()).await?;
    let rows = query.order_by_desc(audit::Column::Id).limit(size).offset(skip);
    let value = |text: &str| match serde_json::from_str(text).unwrap_or_default() {
        serde_json::Value::Array(list) => serde_json::json!({ "value": list }),
        other => other,
    };
    let view = |row: audit::Model| AuditView {
        id: row.id.to_string(),
        at: time_text(row.at),
        actor: row.actor,
        address: row.address,
        action: row.action,
        subject: row.subject,
        old: value(&row.old),
        new: value(&row.new),
    };
    let items = rows.all(app.store.db()).await?.into_iter().map(view).collect();
    Ok(Json(Page::new(items, total, &paging)))
}
