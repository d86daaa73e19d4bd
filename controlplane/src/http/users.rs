//! Users.

mod csv;
pub(crate) mod edit;

use std::collections::HashMap;

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, PaginatorTrait, QueryFilter, QuerySelect, Set,
};
use serde::{Deserialize, Deserializer, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Caller, Id, Page, Paging, Params, Problem, auth::no_hash, extract,
    problem::Result,
};
use crate::{
    auth::{check_password, hash_password},
    store::{
        entity::{bandwidth_limit as limit, user},
        has_part,
    },
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, update, remove))
        .routes(routes!(password))
        .merge(csv::routes())
}

/// Times of the API: RFC 3339.
pub(super) fn time_text(microseconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(microseconds) * 1000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// The other way.
pub(super) fn time_of(text: &str) -> Result<i64> {
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .and_then(|time| i64::try_from(time.unix_timestamp_nanos() / 1000).ok())
        .ok_or_else(|| {
            Problem::invalid(format!("`{text}` is no time such as 2027-01-01T00:00:00Z"))
        })
}

/// What a user may use; what is null is not limited, or follows the group or the default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct UserLimits {
    /// Bytes a second to targets.
    #[schema(minimum = 1)]
    up: Option<i64>,
    /// Bytes a second to the client.
    #[schema(minimum = 1)]
    down: Option<i64>,
    /// Bytes at once after a pause.
    #[schema(minimum = 1)]
    burst: Option<i64>,
    /// Sessions at once.
    #[schema(minimum = 1, maximum = 4294967295u32)]
    sessions: Option<i64>,
    /// New sessions a second.
    #[schema(minimum = 1, maximum = 4294967295u32)]
    new_sessions_per_second: Option<i64>,
    /// Client addresses at once.
    #[schema(minimum = 1, maximum = 64)]
    devices: Option<i64>,
    /// With `devices` in use, a further address takes the place of the one that came first, whose sessions
    /// end; otherwise the further address is refused. Addresses that are there when `devices` changes are not
    /// counted.
    evict_oldest: bool,
    /// Client networks the user may come from; empty is any.
    #[schema(max_items = 64)]
    source_addresses: Vec<String>,
    /// The local address to dial from.
    egress_address: Option<String>,
    /// Bytes in a period.
    #[schema(minimum = 1)]
    quota_bytes: Option<i64>,
    /// The period.
    quota_period: Option<Period>,
}

/// When a quota begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Period {
    /// At midnight.
    Day,
    /// On Monday.
    Week,
    /// On the first.
    Month,
    /// Never.
    Total,
}

impl Period {
    fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::Day, Self::Week, Self::Month, Self::Total]
            .into_iter()
            .find(|period| period.name() == name)
    }
}

impl UserLimits {
    fn check(&self) -> Result<()> {
        let positive = [
            ("up", self.up, i64::MAX),
            ("down", self.down, i64::MAX),
            ("burst", self.burst, i64::MAX),
            ("sessions", self.sessions, i64::from(u32::MAX)),
            ("new_sessions_per_second", self.new_sessions_per_second, i64::from(u32::MAX)),
            ("devices", self.devices, 64),
            ("quota_bytes", self.quota_bytes, i64::MAX),
        ];
        for (name, value, max) in positive {
            if value.is_some_and(|value| !(1..=max).contains(&value)) {
                return Err(Problem::invalid(format!("limits.{name} is 1 to {max}, or null")));
            }
        }
        if self.source_addresses.len() > 64 {
            return Err(Problem::invalid("limits.source_addresses has at most 64 networks"));
        }
        for text in &self.source_addresses {
            network(text)?;
        }
        if let Some(text) = &self.egress_address
            && text.parse::<std::net::IpAddr>().is_err()
        {
            return Err(Problem::invalid(format!("limits.egress_address: `{text}` is no address")));
        }
        Ok(())
    }
}

/// What is searched for; databases refuse long patterns.
pub(super) fn short(text: Option<&String>) -> Result<Option<&String>> {
    match text {
        Some(text) if text.len() > 255 => {
            Err(Problem::new(StatusCode::BAD_REQUEST, "at most 255 bytes can be searched for"))
        }
        text => Ok(text),
    }
}

/// A network as text, or one address.
pub(super) fn network(text: &str) -> Result<ipnet::IpNet> {
    text.parse::<ipnet::IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(ipnet::IpNet::from))
        .map(|net| net.trunc())
        .map_err(|_| Problem::invalid(format!("`{text}` is no network such as 10.0.0.0/8")))
}

/// A role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// Sees and changes what is their own.
    #[default]
    User,
    /// Sees and changes everything.
    Admin,
}

/// Whether a user may log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// Yes.
    #[default]
    Active,
    /// No.
    Disabled,
}

/// The word a value of few words is written as.
pub(super) fn name_of(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A user.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UserView {
    /// Number; never used again.
    id: String,
    /// Name.
    name: String,
    /// Role.
    role: Role,
    /// Status.
    status: Status,
    /// May use the proxy.
    proxy_access: bool,
    /// Whether a second factor is asked for at the API's login.
    totp: bool,
    /// From when on the user may not log in.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Groups.
    groups: Vec<String>,
    /// Limits.
    limits: UserLimits,
    /// For the admins.
    comment: String,
    /// When it was made.
    #[schema(format = DateTime)]
    created_at: String,
    /// When it was changed.
    #[schema(format = DateTime)]
    updated_at: String,
}

impl UserView {
    fn new(user: user::Model, rates: Option<limit::Model>) -> Self {
        let list = |text: &str| serde_json::from_str(text).unwrap_or_default();
        let rates = rates.as_ref();
        Self {
            id: user.id.to_string(),
            role: if user.role == "admin" { Role::Admin } else { Role::User },
            status: if user.status == "active" { Status::Active } else { Status::Disabled },
            proxy_access: user.proxy_access,
            totp: user.totp_secret.is_some(),
            expires_at: user.expires_at.map(time_text),
            groups: list(&user.groups),
            limits: UserLimits {
                up: rates.and_then(|rates| rates.up),
                down: rates.and_then(|rates| rates.down),
                burst: rates.and_then(|rates| rates.burst),
                sessions: user.sessions,
                new_sessions_per_second: user.new_sessions_per_second,
                devices: user.devices,
                evict_oldest: user.evict_oldest,
                source_addresses: list(&user.source_addresses),
                egress_address: user.egress_address,
                quota_bytes: user.quota_bytes,
                quota_period: user.quota_period.as_deref().and_then(Period::of),
            },
            comment: user.comment,
            created_at: time_text(user.created_at),
            updated_at: time_text(user.updated_at),
            name: user.name,
        }
    }

    /// A user as somebody may see them.
    pub(super) async fn shown(
        db: &impl ConnectionTrait,
        user: user::Model,
        caller: &Caller,
    ) -> Result<Self> {
        let mut view = Self::load(db, user).await?;
        if !caller.is_admin() {
            view.comment.clear();
        }
        Ok(view)
    }

    /// A user with the rates of its own.
    pub(super) async fn load(db: &impl ConnectionTrait, user: user::Model) -> Result<Self> {
        let rates = rates_of(db, &[user.id]).await?.remove(&user.id);
        Ok(Self::new(user, rates))
    }
}

async fn rates_of(
    db: &impl ConnectionTrait,
    users: &[i64],
) -> std::result::Result<HashMap<i64, limit::Model>, sea_orm::DbErr> {
    let subjects = users.iter().map(ToString::to_string);
    let rates = limit::Entity::find()
        .filter(limit::Column::Kind.eq("user"))
        .filter(limit::Column::Subject.is_in(subjects))
        .all(db)
        .await?;
    let numbered = |rate: limit::Model| Some((rate.subject.parse().ok()?, rate));
    Ok(rates.into_iter().filter_map(numbered).collect())
}

/// Which users.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// A part of the name.
    q: Option<String>,
    /// Only these.
    status: Option<Status>,
    /// Only these.
    role: Option<Role>,
}

/// All users.
#[utoipa::path(get, path = "/users", tag = "users", params(Paging, Which),
    responses((status = 200, body = Page<UserView>), (status = 400, body = Problem), (status = 401, body = Problem),
        (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    _: Admin,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<UserView>>> {
    let (size, skip) = paging.bounds()?;
    let mut query = user::Entity::find();
    if let Some(part) = short(which.q.as_ref())? {
        query = query.filter(has_part(user::Column::Name, part));
    }
    if let Some(status) = which.status {
        query = query.filter(user::Column::Status.eq(name_of(&status)));
    }
    if let Some(role) = which.role {
        query = query.filter(user::Column::Role.eq(name_of(&role)));
    }
    let total = query.clone().count(app.store.db()).await?;
    let known = [
        ("id", user::Column::Id),
        ("name", user::Column::Name),
        ("status", user::Column::Status),
        ("expires_at", user::Column::ExpiresAt),
        ("created_at", user::Column::CreatedAt),
    ];
    let query = paging.sorted(query, "id", &known)?;
    let rows = query.limit(size).offset(skip).all(app.store.db()).await?;
    let ids: Vec<i64> = rows.iter().map(|user| user.id).collect();
    let mut rates = rates_of(app.store.db(), &ids).await?;
    let view = |user: user::Model| {
        let rates = rates.remove(&user.id);
        UserView::new(user, rates)
    };
    let items = rows.into_iter().map(view).collect();
    Ok(Json(Page::new(items, total, &paging)))
}

/// A new user.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewUser {
    /// 1 to 255 bytes without control characters and colons.
    #[schema(min_length = 1, max_length = 255, pattern = "^[^:\\x00-\\x1f\\x7f]+$")]
    name: String,
    /// 8 characters or more, 72 bytes or less.
    #[schema(min_length = 8, max_length = 72, format = Password)]
    password: String,
    /// Role.
    #[serde(default)]
    role: Role,
    /// Status.
    #[serde(default)]
    status: Status,
    /// May use the proxy; left out: users may, admins may not.
    proxy_access: Option<bool>,
    /// From when on the user may not log in.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Groups.
    #[serde(default)]
    #[schema(max_items = 64)]
    groups: Vec<String>,
    /// Limits.
    #[serde(default, deserialize_with = "extract::object")]
    limits: UserLimits,
    /// For the admins.
    #[serde(default)]
    #[schema(max_length = 1000)]
    comment: String,
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    let fits = (1..=255).contains(&name.len())
        && !name.ends_with(' ')
        && !name.chars().any(|letter| letter.is_control() || letter == ':');
    if fits {
        Ok(())
    } else {
        Err(Problem::invalid(
            "names have 1 to 255 bytes, no control characters, no colons and no space at the end",
        ))
    }
}

fn check_groups(groups: &[String]) -> Result<()> {
    if groups.len() > 64 {
        return Err(Problem::invalid("groups: at most 64"));
    }
    groups.iter().try_for_each(|group| check_name(group))
}

fn check_comment(comment: &str) -> Result<()> {
    if comment.chars().count() <= 1000 {
        Ok(())
    } else {
        Err(Problem::invalid("comment: at most 1000 characters"))
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Make a user, who may use the proxy at once.
#[utoipa::path(post, path = "/users", tag = "users", request_body = NewUser,
    responses((status = 201, body = UserView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(new): Body<NewUser>,
) -> Result<(StatusCode, Json<UserView>)> {
    check_name(&new.name)?;
    check_groups(&new.groups)?;
    check_comment(&new.comment)?;
    new.limits.check()?;
    check_password(&new.password).map_err(Problem::invalid)?;
    let expires_at = new.expires_at.as_deref().map(time_of).transpose()?;
    let hash = hash_password(new.password).await.ok_or_else(no_hash)?;
    let edit = app.store.edit(caller.actor()).await?;
    let row = user::ActiveModel {
        status: Set(name_of(&new.status)),
        proxy_access: Set(new.proxy_access.unwrap_or(new.role == Role::User)),
        expires_at: Set(expires_at),
        groups: Set(json(&new.groups)),
        comment: Set(new.comment.clone()),
        ..crate::app::new_user(&new.name, &hash, &name_of(&new.role))
    };
    let (user, change) = edit::create(edit.db(), row, Some(&new.limits)).await?;
    edit.commit(change).await?;

    Ok((StatusCode::CREATED, Json(user)))
}

/// One user; others than admins see only themselves.
#[utoipa::path(get, path = "/users/{id}", tag = "users", params(("id" = String, Path)),
    responses((status = 200, body = UserView), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, caller: Caller, Id(id): Id) -> Result<Json<UserView>> {
    own(&caller, id)?;
    let user = edit::find(app.store.db(), id).await?;
    Ok(Json(UserView::shown(app.store.db(), user, &caller).await?))
}

pub(super) fn own(caller: &Caller, id: i64) -> Result<()> {
    if caller.is_admin() || caller.user.id == id { Ok(()) } else { Err(Problem::forbidden()) }
}

/// What is left out stays. Null takes an expiry, groups, limits or a comment away; elsewhere it says nothing.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
struct UserPatch {
    /// Role.
    role: Option<Role>,
    /// Status.
    status: Option<Status>,
    /// May use the proxy.
    proxy_access: Option<bool>,
    /// From when on the user may not log in; null is never.
    #[serde(deserialize_with = "given")]
    #[schema(format = DateTime, value_type = Option<String>)]
    expires_at: Option<Option<String>>,
    /// Groups.
    #[serde(deserialize_with = "cleared")]
    #[schema(max_items = 64)]
    groups: Option<Vec<String>>,
    /// Limits, all together.
    #[serde(deserialize_with = "cleared_limits")]
    limits: Option<UserLimits>,
    /// For the admins.
    #[serde(deserialize_with = "cleared")]
    #[schema(max_length = 1000)]
    comment: Option<String>,
}

/// Null is an empty value.
fn cleared<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<Option<T>, D::Error> {
    Option::deserialize(deserializer).map(|value: Option<T>| Some(value.unwrap_or_default()))
}

fn cleared_limits<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<UserLimits>, D::Error> {
    let limits: Option<UserLimits> = extract::object_or_null(deserializer)?;
    Ok(Some(limits.unwrap_or_default()))
}

/// Tells null from nothing.
fn given<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Change a user; live sessions that are not allowed any more end within a second.
#[utoipa::path(patch, path = "/users/{id}", tag = "users", params(("id" = String, Path)), request_body = UserPatch,
    responses((status = 200, body = UserView), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem), (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(patch): Body<UserPatch>,
) -> Result<Json<UserView>> {
    patch.groups.as_deref().map(check_groups).transpose()?;
    patch.comment.as_deref().map(check_comment).transpose()?;
    patch.limits.as_ref().map(UserLimits::check).transpose()?;
    let edit = app.store.edit(caller.actor()).await?;
    let (user, change) = edit::update(edit.db(), id, &patch).await?;
    edit.commit(change).await?;

    Ok(Json(user))
}

/// Delete a user; live sessions end within a second.
#[utoipa::path(delete, path = "/users/{id}", tag = "users", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
async fn remove(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let change = edit::remove(edit.db(), id).await?;
    edit.commit(change).await?;

    Ok(StatusCode::NO_CONTENT)
}

/// A new password.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewPassword {
    /// 8 characters or more, 72 bytes or less.
    #[schema(min_length = 8, max_length = 72, format = Password)]
    password: String,
}

/// Set a user's password; live sessions end within a second and tokens are void.
#[utoipa::path(post, path = "/users/{id}/password", tag = "users", params(("id" = String, Path)), request_body = NewPassword,
    responses((status = 204), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn password(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id,
    Body(new): Body<NewPassword>,
) -> Result<StatusCode> {
    check_password(&new.password).map_err(Problem::invalid)?;
    let hash = hash_password(new.password).await.ok_or_else(no_hash)?;
    let edit = app.store.edit(caller.actor()).await?;
    let (user, change) = edit::password(edit.db(), id, &hash).await?;
    edit.commit(change).await?;
    crate::app::forget_first_password(&app.state, &user.name);
    Ok(StatusCode::NO_CONTENT)
}
