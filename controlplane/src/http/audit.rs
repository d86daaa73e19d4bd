//! Who changed what.

use axum::{Json, extract::State, response::Response};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Select};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Page, Paging, Params, Problem,
    logs::{cell, csv_response},
    problem::Result,
    users::time_text,
};
use crate::store::{entity::audit, has_part};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(export))
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
    /// From when.
    #[param(format = DateTime)]
    from: Option<String>,
    /// Until when.
    #[param(format = DateTime)]
    to: Option<String>,
}

impl Which {
    fn query(&self) -> Result<Select<audit::Entity>> {
        let mut query = audit::Entity::find();
        if let Some(actor) = &self.actor {
            query = query.filter(audit::Column::Actor.eq(actor));
        }
        if let Some(action) = &self.action {
            query = query.filter(audit::Column::Action.eq(action));
        }
        if let Some(part) = super::users::short(self.q.as_ref())? {
            query = query.filter(has_part(audit::Column::Subject, part));
        }
        super::logs::within(query, audit::Column::At, [&self.from, &self.to])
    }
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
    let known = [("id", audit::Column::Id), ("at", audit::Column::At)];
    let query = paging.sorted(which.query()?, "-id", &known)?;
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
    paging.load(app.store.db(), query, view).await
}

/// Rows of one part of an export.
const PART: u64 = 1000;

/// The same as CSV, the first first, streamed.
#[utoipa::path(get, path = "/logs/audit/export.csv", tag = "logs", params(Which),
    responses((status = 200, body = String, content_type = "text/csv"), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn export(
    State(app): State<App>,
    _: Admin,
    Params(which): Params<Which>,
) -> Result<Response> {
    let query = which.query()?.order_by_asc(audit::Column::Id);
    let part = move |after: i64| {
        let (query, app) = (query.clone(), app.clone());
        async move {
            let part = query.filter(audit::Column::Id.gt(after)).limit(PART);
            let rows = part.all(app.store.db()).await?;
            let Some(last) = rows.last().map(|row| row.id) else { return Ok(None) };
            let mut writer = csv::Writer::from_writer(Vec::new());
            for row in rows {
                let texts =
                    [&row.actor, &row.address, &row.action, &row.subject, &row.old, &row.new];
                let cells = texts.into_iter().map(|text| cell(text));
                let _ = writer.write_record(std::iter::once(time_text(row.at)).chain(cells));
            }
            Ok(Some((last, writer.into_inner().unwrap_or_default())))
        }
    };
    Ok(csv_response("audit.csv", "time,actor,address,action,subject,old,new\n", part))
}
