//! Users as CSV, out and in.

use axum::{Json, extract::State, http::StatusCode, response::Response};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    super::{
        Admin, App, Problem,
        auth::no_hash,
        logs::{cell, csv_response},
        problem::Result,
    },
    Period, UserLimits, UserView, check_comment, check_groups, check_name,
    edit::insert,
    json, time_of, time_text,
};
use crate::{
    auth::{check_password, hash_password},
    store::{Change, entity::user},
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(export)).routes(routes!(import))
}

/// Rows of one part of an export.
const PART: u64 = 1000;
/// Users of one import: each password takes a hash of about 50 ms.
const IMPORT_MAX: usize = 1000;

/// All users as CSV, streamed; without passwords.
#[utoipa::path(get, path = "/users/export.csv", tag = "users",
    responses((status = 200, body = String, content_type = "text/csv"), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn export(State(app): State<App>, _: Admin) -> Result<Response> {
    let head =
        "id,name,role,status,proxy_access,expires_at,groups,quota_bytes,quota_period,comment\n";
    let part = move |after: i64| {
        let app = app.clone();
        async move {
            let part = user::Entity::find().filter(user::Column::Id.gt(after));
            let rows = part.order_by_asc(user::Column::Id).limit(PART).all(app.store.db()).await?;
            let Some(last) = rows.last().map(|user| user.id) else { return Ok(None) };
            let mut writer = csv::Writer::from_writer(Vec::new());
            for user in rows {
                let groups: Vec<String> = serde_json::from_str(&user.groups).unwrap_or_default();
                let number = |number: Option<i64>| number.map_or(String::new(), |n| n.to_string());
                let _ = writer.write_record([
                    user.id.to_string(),
                    cell(&user.name),
                    user.role,
                    user.status,
                    user.proxy_access.to_string(),
                    user.expires_at.map_or(String::new(), time_text),
                    cell(&groups.join(" ")),
                    number(user.quota_bytes),
                    user.quota_period.unwrap_or_default(),
                    cell(&user.comment),
                ]);
            }
            Ok(Some((last, writer.into_inner().unwrap_or_default())))
        }
    };
    Ok(csv_response("users.csv", head, part))
}

/// What an import did.
#[derive(Debug, Serialize, ToSchema)]
struct Imported {
    /// Users that were made.
    created: usize,
}

/// Many users at once: CSV with a head, of which `name` and `password` are needed and `groups` (separated by
/// spaces), `expires_at`, `quota_bytes`, `quota_period` and `comment` are known. All or none are made.
#[utoipa::path(post, path = "/users/import", tag = "users", request_body(content = String, content_type = "text/csv"),
    responses((status = 201, body = Imported), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 409, body = Problem),
        (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn import(
    State(app): State<App>,
    Admin(caller): Admin,
    headers: axum::http::HeaderMap,
    text: std::result::Result<String, axum::extract::rejection::StringRejection>,
) -> Result<(StatusCode, Json<Imported>)> {
    let kind = headers.get(axum::http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if !kind.is_some_and(|kind| kind.starts_with("text/csv")) {
        let detail = "send it as text/csv";
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
    }
    let text = text.map_err(|error| Problem::new(error.status(), error.body_text()))?;
    let rows = parse_import(&text)?;
    let mut hashed = Vec::with_capacity(rows.len());
    for row in rows {
        let hash = hash_password(row.password.clone()).await.ok_or_else(no_hash)?;
        hashed.push((row, hash));
    }
    let edit = app.store.edit(caller.actor()).await?;
    let (mut ids, mut views) = (Vec::new(), Vec::new());
    for (row, hash) in &hashed {
        let mut new = crate::app::new_user(&row.name, hash, "user");
        new.groups = Set(json(&row.groups));
        new.expires_at = Set(row.expires_at);
        new.comment = Set(row.comment.clone());
        let made = insert(edit.db(), new, Some(&row.limits)).await.map_err(|mut problem| {
            problem.detail = format!("`{}`: {}; nothing was imported", row.name, problem.detail);
            problem
        })?;
        ids.push(made.id);
        views.push(UserView::load(edit.db(), made).await?);
    }
    let created = ids.len();
    let change = Change::new("user.import", format!("{created} users")).new_value(&views);
    edit.commit(change.users(ids)).await?;
    Ok((StatusCode::CREATED, Json(Imported { created })))
}

/// One line of an import.
struct ImportRow {
    name: String,
    password: String,
    groups: Vec<String>,
    expires_at: Option<i64>,
    limits: UserLimits,
    comment: String,
}

fn parse_import(text: &str) -> Result<Vec<ImportRow>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let bad = |line: u64, detail: String| Problem::invalid(format!("line {line}: {detail}"));
    let head = reader.headers().map_err(|error| bad(1, error.to_string()))?.clone();
    let known =
        ["name", "password", "groups", "expires_at", "quota_bytes", "quota_period", "comment"];
    if let Some(column) = head.iter().find(|column| !known.contains(column)) {
        return Err(bad(1, format!("unknown column `{column}`; known are {}", known.join(", "))));
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| Problem::invalid(error.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let get = |name: &str| {
            let at = head.iter().position(|column| column == name);
            at.and_then(|at| record.get(at)).unwrap_or("").to_owned()
        };
        let (name, password, comment) = (get("name"), get("password"), get("comment"));
        let groups: Vec<String> = get("groups").split_whitespace().map(str::to_owned).collect();
        let checked = check_name(&name)
            .and_then(|()| check_password(&password).map_err(Problem::invalid))
            .and_then(|()| check_groups(&groups))
            .and_then(|()| check_comment(&comment));
        checked.map_err(|problem| bad(line, problem.detail))?;
        let expires_at = Some(get("expires_at")).filter(|text| !text.is_empty());
        let expires_at = expires_at.map(|text| time_of(&text)).transpose();
        let quota = get("quota_bytes");
        let period = get("quota_period");
        let limits = UserLimits {
            quota_bytes: match quota.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| bad(line, "quota_bytes".into()))?),
            },
            quota_period: match period.as_str() {
                "" => None,
                text => Some(Period::of(text).ok_or_else(|| bad(line, "quota_period".into()))?),
            },
            ..UserLimits::default()
        };
        limits.check().map_err(|problem| bad(line, problem.detail))?;
        let expires_at = expires_at.map_err(|problem| bad(line, problem.detail))?;
        rows.push(ImportRow { name, password, groups, expires_at, limits, comment });
        if rows.len() > IMPORT_MAX {
            return Err(Problem::invalid(format!("at most {IMPORT_MAX} users at once")));
        }
    }
    Ok(rows)
}
