//! What handlers take: bodies, queries and numbers whose errors are problem documents, and who calls.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request, rejection},
    http::{StatusCode, header, request::Parts},
};
use sea_orm::EntityTrait;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::{IntoParams, ToSchema};

use super::{App, Problem};
use crate::store::{Actor, entity::user};

/// A JSON body.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let body = axum::Json::<serde_json::Map<_, _>>::from_request(request, app).await;
        let axum::Json(body) = body.map_err(|error| match error {
            rejection::JsonRejection::JsonDataError(_) => Problem::invalid("not an object"),
            error => Problem::new(error.status(), error.body_text()),
        })?;
        let value = serde_json::from_value(serde_json::Value::Object(body));
        value.map(Self).map_err(|error| Problem::invalid(error.to_string()))
    }
}

/// An object, where serde would also take a list of its values.
pub(super) fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: DeserializeOwned,
{
    let map = serde_json::Map::deserialize(deserializer)?;
    serde_json::from_value(serde_json::Value::Object(map)).map_err(serde::de::Error::custom)
}

/// The same, or null.
pub(super) fn object_or_null<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: DeserializeOwned,
{
    let Some(map) = Option::<serde_json::Map<_, _>>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let value = serde_json::from_value(serde_json::Value::Object(map));
    value.map(Some).map_err(serde::de::Error::custom)
}

/// The query.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<App> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        match Query::from_request_parts(parts, app).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(error) => Err(Problem::new(StatusCode::BAD_REQUEST, error.body_text())),
        }
    }
}

/// A number in the path; ids are strings in the API.
pub struct Id(pub i64);

impl FromRequestParts<App> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, app).await {
            Ok(Path(text)) => text.parse().map(Self).map_err(|_| Problem::missing("id")),
            Err(_) => Err(Problem::missing("id")),
        }
    }
}

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Paging {
    /// Counted from 1.
    #[serde(default = "first")]
    #[param(minimum = 1, maximum = 1_000_000)]
    pub page: u64,
    /// At most 500.
    #[serde(default = "page_size")]
    #[param(minimum = 1, maximum = 500)]
    pub page_size: u64,
}

fn first() -> u64 {
    1
}

fn page_size() -> u64 {
    50
}

impl Paging {
    /// The size and the rows before the page.
    ///
    /// # Errors
    /// Out of bounds.
    pub fn bounds(&self) -> Result<(u64, u64), Problem> {
        let fits = (1..=500).contains(&self.page_size) && (1..=1_000_000).contains(&self.page);
        if !fits {
            let text = "page is 1 to 1000000, page_size 1 to 500";
            return Err(Problem::new(StatusCode::BAD_REQUEST, text));
        }
        Ok((self.page_size, (self.page - 1) * self.page_size))
    }
}

/// A part of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The part.
    pub items: Vec<T>,
    /// How many there are in all.
    pub total: u64,
    /// Counted from 1.
    pub page: u64,
    /// The size asked for.
    pub page_size: u64,
}

impl<T> Page<T> {
    /// The part of a list that was asked for.
    pub fn new(items: Vec<T>, total: u64, paging: &Paging) -> Self {
        Self { items, total, page: paging.page, page_size: paging.page_size }
    }
}

/// Where a request comes from.
pub(super) struct From(pub(super) IpAddr);

impl FromRequestParts<App> for From {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Problem> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        Ok(Self(peer.map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0.ip())))
    }
}

/// Who calls: a user whose token is good and who may still use the API.
pub struct Caller {
    /// The user as the database has it now.
    pub user: user::Model,
    address: IpAddr,
}

impl Caller {
    /// Whether the caller is an admin.
    pub fn is_admin(&self) -> bool {
        self.user.role == "admin"
    }

    /// For the audit log.
    pub fn actor(&self) -> Actor {
        Actor { name: self.user.name.clone(), address: self.address.to_string() }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let From(address) = From::from_request_parts(parts, app).await?;
        let token = parts.headers.get(header::AUTHORIZATION);
        let token = token.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| Problem::anonymous("log in and send the access token"))?;
        let expired = || Problem::anonymous("the access token is not good any more; log in again");
        let claims = app.tokens.check(token).ok_or_else(expired)?;
        let user = user::Entity::find_by_id(claims.user).one(app.store.db()).await?;
        let user = user.filter(|user| claims.epoch == user.token_epoch && is_active(user));
        Ok(Self { user: user.ok_or_else(expired)?, address })
    }
}

/// Whether a user may use anything now.
pub fn is_active(user: &user::Model) -> bool {
    user.status == "active" && user.expires_at.is_none_or(|at| at > crate::store::now())
}

/// An admin who calls.
pub struct Admin(pub Caller);

impl FromRequestParts<App> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let caller = Caller::from_request_parts(parts, app).await?;
        if caller.is_admin() { Ok(Self(caller)) } else { Err(Problem::forbidden()) }
    }
}
