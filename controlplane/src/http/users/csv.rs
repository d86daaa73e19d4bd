//! Users as CSV, out and in.

use axum::{Json, extract::State, http::StatusCode, response::Response};
use culvert_api::policy::USERS_MAX;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set};
use serde::{Serialize, de::DeserializeOwned};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    super::{
        Admin, App, Problem,
        auth::no_hash,
        extract::refuse_beyond,
        logs::{cell, csv_response, uncelled},
        problem::Result,
    },
    Role, Status, UserLimits, UserView, check_comment, check_groups, check_name,
    edit::insert,
    json, name_of, rates_of, time_of,
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

/// The columns of both, but for the password, which only comes in.
const COLUMNS: [&str; 20] = [
    "name",
    "role",
    "status",
    "proxy_access",
    "expires_at",
    "groups",
    "up",
    "down",
    "burst",
    "sessions",
    "new_sessions_per_second",
    "devices",
    "evict_oldest",
    "source_addresses",
    "egress_address",
    "quota_bytes",
    "quota_period",
    "comment",
    "id",
    "password",
];

/// All users as CSV, streamed; without passwords. An import takes the same columns.
#[utoipa::path(get, path = "/users/export.csv", tag = "users",
    responses((status = 200, body = String, content_type = "text/csv"), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn export(State(app): State<App>, _: Admin) -> Result<Response> {
    let head = COLUMNS[..COLUMNS.len() - 1].join(",") + "\n";
    let part = move |after: i64| {
        let app = app.clone();
        async move {
            let part = user::Entity::find().filter(user::Column::Id.gt(after));
            let rows = part.order_by_asc(user::Column::Id).limit(PART).all(app.store.db()).await?;
            let Some(last) = rows.last().map(|user| user.id) else { return Ok(None) };
            let ids: Vec<i64> = rows.iter().map(|user| user.id).collect();
            let mut rates = rates_of(app.store.db(), &ids).await?;
            let mut writer = csv::Writer::from_writer(Vec::new());
            for user in rows {
                let rates = rates.remove(&user.id);
                let _ = writer.write_record(cells(UserView::new(user, rates)));
            }
            Ok(Some((last, writer.into_inner().unwrap_or_default())))
        }
    };
    Ok(csv_response("users.csv", &head, part))
}

/// Groups with spaces between, or as JSON if a name has some itself.
fn listed(groups: &[String]) -> String {
    let is_plain = |name: &String| !name.contains(char::is_whitespace) && !name.starts_with('[');
    if groups.iter().all(is_plain) { groups.join(" ") } else { json(&groups) }
}

/// A user's line.
fn cells(user: UserView) -> [String; 19] {
    let number = |number: Option<i64>| number.map_or(String::new(), |n| n.to_string());
    let limits = user.limits;
    [
        cell(&user.name),
        name_of(&user.role),
        name_of(&user.status),
        user.proxy_access.to_string(),
        user.expires_at.unwrap_or_default(),
        cell(&listed(&user.groups)),
        number(limits.up),
        number(limits.down),
        number(limits.burst),
        number(limits.sessions),
        number(limits.new_sessions_per_second),
        number(limits.devices),
        limits.evict_oldest.to_string(),
        limits.source_addresses.join(" "),
        limits.egress_address.unwrap_or_default(),
        number(limits.quota_bytes),
        limits.quota_period.map_or(String::new(), |period| name_of(&period)),
        cell(&user.comment),
        user.id,
    ]
}

/// What an import did.
#[derive(Debug, Serialize, ToSchema)]
struct Imported {
    /// Users that were made.
    created: usize,
}

/// Many users at once: CSV with a head that names columns as an export has them, of which `name` and
/// `password` are needed; what is empty is not limited, and `id` is passed over. Groups (or JSON)
/// and source addresses are separated by spaces. At most 1,000; all or none are made.
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
        let mut new = crate::app::new_user(&row.name, hash, &name_of(&row.role));
        new.status = Set(name_of(&row.status));
        new.proxy_access = Set(row.proxy_access.unwrap_or(row.role == Role::User));
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
    refuse_beyond(edit.db(), user::Entity, USERS_MAX).await?;
    let created = ids.len();
    let change = Change::new("user.import", format!("{created} users")).new_value(&views);
    edit.commit(change.users(ids)).await?;
    Ok((StatusCode::CREATED, Json(Imported { created })))
}

/// One line of an import.
struct ImportRow {
    name: String,
    password: String,
    role: Role,
    status: Status,
    proxy_access: Option<bool>,
    groups: Vec<String>,
    expires_at: Option<i64>,
    limits: UserLimits,
    comment: String,
}

fn parse_import(text: &str) -> Result<Vec<ImportRow>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let bad = |line: u64, detail: String| Problem::invalid(format!("line {line}: {detail}"));
    let head = reader.headers().map_err(|error| bad(1, error.to_string()))?.clone();
    if let Some(column) = head.iter().find(|column| !COLUMNS.contains(column)) {
        return Err(bad(1, format!("unknown column `{column}`; known are {}", COLUMNS.join(", "))));
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| Problem::invalid(error.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let row = parse_row(&|name| {
            let at = head.iter().position(|column| column == name);
            at.and_then(|at| record.get(at)).unwrap_or("")
        });
        rows.push(row.map_err(|problem| bad(line, problem.detail))?);
        if rows.len() > IMPORT_MAX {
            return Err(Problem::invalid(format!("at most {IMPORT_MAX} users at once")));
        }
    }
    Ok(rows)
}

/// A line, given what is in its columns.
fn parse_row<'a>(get: &dyn Fn(&str) -> &'a str) -> Result<ImportRow> {
    fn word<T: DeserializeOwned>(name: &str, text: &str) -> Result<Option<T>> {
        if text.is_empty() {
            return Ok(None);
        }
        let word = serde_json::from_value(serde_json::Value::String(text.to_owned()));
        word.map(Some).map_err(|error| Problem::invalid(format!("{name}: {error}")))
    }
    let number = |name: &str| match get(name) {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| Problem::invalid(format!("{name}: `{text}` is no whole number"))),
    };
    let flag = |name: &str| match get(name) {
        "" => Ok(None),
        "true" => Ok(Some(true)),
        "false" => Ok(Some(false)),
        text => Err(Problem::invalid(format!("{name}: `{text}`, not true or false"))),
    };
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let optional = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let row = ImportRow {
        name: uncelled(get("name")),
        password: get("password").to_owned(),
        role: word("role", get("role"))?.unwrap_or_default(),
        status: word("status", get("status"))?.unwrap_or_default(),
        proxy_access: flag("proxy_access")?,
        groups: match uncelled(get("groups")) {
            text if text.starts_with('[') => serde_json::from_str(&text)
                .map_err(|error| Problem::invalid(format!("groups: {error}")))?,
            text => words(&text),
        },
        expires_at: optional(get("expires_at")).map(|text| time_of(&text)).transpose()?,
        limits: UserLimits {
            up: number("up")?,
            down: number("down")?,
            burst: number("burst")?,
            sessions: number("sessions")?,
            new_sessions_per_second: number("new_sessions_per_second")?,
            devices: number("devices")?,
            evict_oldest: flag("evict_oldest")?.unwrap_or_default(),
            source_addresses: words(get("source_addresses")),
            egress_address: optional(get("egress_address")),
            quota_bytes: number("quota_bytes")?,
            quota_period: word("quota_period", get("quota_period"))?,
        },
        comment: uncelled(get("comment")),
    };
    check_name(&row.name)?;
    check_password(&row.password).map_err(Problem::invalid)?;
    check_groups(&row.groups)?;
    check_comment(&row.comment)?;
    row.limits.check()?;
    Ok(row)
}
