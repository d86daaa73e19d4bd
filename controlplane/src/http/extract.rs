//! What handlers take: bodies, queries and numbers whose errors are problem documents, and who calls.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request, rejection},
    http::{StatusCode, header, request::Parts},
};
use sea_orm::{
    DatabaseConnection, DatabaseTransaction, EntityTrait, PaginatorTrait, QueryOrder, Select,
};
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
    /// By what the list is sorted; with `-` in front, backwards. What a list knows, it says when asked for
    /// another.
    #[param(max_length = 64)]
    pub sort: Option<String>,
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

    /// A query in the order that was asked for, or else in the first; those of equal values by number.
    ///
    /// # Errors
    /// The list does not know it.
    pub fn sorted<E: EntityTrait>(
        &self,
        query: Select<E>,
        usual: &str,
        known: &[(&str, E::Column)],
    ) -> Result<Select<E>, Problem> {
        let sort = self.sort.as_deref().unwrap_or(usual);
        let (name, order) = match sort.strip_prefix('-') {
            Some(name) => (name, sea_orm::Order::Desc),
            None => (sort, sea_orm::Order::Asc),
        };
        let Some((_, column)) = known.iter().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            let text =
                format!("sort is one of {}, with - in front for backwards", names.join(", "));
            return Err(Problem::new(StatusCode::BAD_REQUEST, text));
        };
        let query = query.order_by(*column, order.clone());
        Ok(match known.first() {
            Some((first, number)) if *first != name => query.order_by(*number, order),
            _ => query,
        })
    }

    /// That part of a query in its order, each row as it is shown.
    ///
    /// # Errors
    /// Out of bounds, or the database fails.
    pub async fn load<E: EntityTrait<Model: Send + Sync>, T>(
        &self,
        db: &DatabaseConnection,
        query: Select<E>,
        view: impl FnMut(E::Model) -> T,
    ) -> Result<axum::Json<Page<T>>, Problem> {
        let (size, _) = self.bounds()?;
        let pages = query.paginate(db, size);
        let total = pages.num_items().await?;
        let rows = pages.fetch_page(self.page - 1).await?;
        Ok(axum::Json(Page::new(rows.into_iter().map(view).collect(), total, self)))
    }
}

/// Refuses an edit after which there would be more rows of a table than nodes take.
pub(super) async fn refuse_beyond<E: EntityTrait<Model: Send + Sync>>(
    db: &DatabaseTransaction,
    _: E,
    max: usize,
) -> Result<(), Problem> {
    match E::find().count(db).await? {
        count if count > max as u64 => {
            Err(Problem::invalid(format!("that would be {count}; nodes take {max} at most")))
        }
        _ => Ok(()),
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

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        let peer = peer.map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0.ip());
        let said = parts.headers.get_all("x-forwarded-for").iter();
        let said = said.filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(','));
        Ok(Self(client(peer, said.collect(), &app.trusted_proxies)))
    }
}

/// The client's address: each proxy that is trusted says who came to it, the last one last.
fn client(peer: IpAddr, said: Vec<&str>, trusted: &[ipnet::IpNet]) -> IpAddr {
    let mut client = peer.to_canonical();
    for text in said.iter().rev() {
        let Ok(before) = text.trim().parse::<IpAddr>() else { break };
        if !trusted.iter().any(|network| network.contains(&client)) {
            break;
        }
        client = before.to_canonical();
    }
    client
}

/// Who calls: a user whose token is good and who may still use the API.
pub struct Caller {
    /// The user as the database has it now.
    pub user: user::Model,
    address: IpAddr,
    /// When the token ends, in seconds since 1970.
    until: i64,
}

impl Caller {
    /// Whether the caller is an admin.
    pub fn is_admin(&self) -> bool {
        self.user.role == "admin"
    }

    /// Whether the token is still good and its user still the same.
    ///
    /// # Errors
    /// The database fails.
    pub async fn is_still_good(&self, app: &App) -> Result<bool, sea_orm::DbErr> {
        let user = user::Entity::find_by_id(self.user.id).one(app.store.db()).await?;
        let same = user.is_some_and(|user| {
            is_active(&user)
                && user.token_epoch == self.user.token_epoch
                && user.role == self.user.role
        });
        Ok(same && crate::store::now() / 1_000_000 < self.until)
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
        Ok(Self { user: user.ok_or_else(expired)?, address, until: claims.until })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trusted_proxies_are_believed() {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        let of = |peer: &str, said: &str| {
            client(peer.parse().unwrap(), said.split(',').collect(), &trusted).to_string()
        };
        assert_eq!(of("192.0.2.1", "203.0.113.9"), "192.0.2.1");
        assert_eq!(of("10.0.0.1", "203.0.113.9"), "203.0.113.9");
        assert_eq!(of("::ffff:10.0.0.1", "203.0.113.9"), "203.0.113.9");
        assert_eq!(of("10.0.0.1", "1.1.1.1, 203.0.113.9, 10.0.0.2"), "203.0.113.9");
        assert_eq!(of("10.0.0.1", "1.1.1.1, nonsense"), "10.0.0.1");
        assert_eq!(of("::1", ""), "::1");
    }
}
