//! Logging in and out.

use axum::{
    Json,
    http::{HeaderMap, HeaderValue, StatusCode, header},
};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, ExprTrait, QueryFilter, Set,
    TransactionTrait, sea_query::Expr,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App, Body, Caller, Problem, extract, is_active,
    problem::Result,
    users::{UserView, edit},
};
use crate::{
    auth::{RefreshToken, check_password, hash_password, verify_password},
    store::{
        Actor, Change,
        entity::{refresh, user},
        lock_users, now,
    },
};

const COOKIE: &str = "culvert_refresh";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(login))
        .routes(routes!(renew))
        .routes(routes!(logout))
        .routes(routes!(password))
        .routes(routes!(me))
}

/// Name and password.
#[derive(Deserialize, ToSchema)]
struct Login {
    /// The user's name.
    #[schema(max_length = 255)]
    username: String,
    /// The user's password.
    #[schema(max_length = 1024, format = Password)]
    password: String,
    /// The second factor's code, of who uses one.
    #[schema(max_length = 16)]
    totp: Option<String>,
}

/// An access token.
#[derive(Serialize, ToSchema)]
struct Access {
    /// For `Authorization: Bearer`.
    access_token: String,
    /// Always `Bearer`.
    token_type: &'static str,
    /// Seconds it is good for.
    expires_in: u64,
}

type Granted = (HeaderMap, Json<Access>);

fn cookie(app: &App, text: &str, seconds: i64) -> HeaderMap {
    let secure = if app.secure_cookies { "; Secure" } else { "" };
    let value = format!(
        "{COOKIE}={text}; Path=/api/v1/auth; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}"
    );
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert(header::SET_COOKIE, value);
    }
    headers
}

fn cookie_of(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    cookies.flat_map(|value| value.split(';')).find_map(|cookie| {
        cookie.trim().strip_prefix(COOKIE)?.strip_prefix('=').filter(|text| !text.is_empty())
    })
}

async fn grant(app: &App, db: &impl ConnectionTrait, user: &user::Model) -> Result<Granted> {
    let token = RefreshToken::random();
    let row = refresh::ActiveModel {
        hash: Set(token.hash),
        user_id: Set(user.id),
        // Whatever voids the access token voids this one.
        epoch: Set(user.token_epoch),
        used: Set(false),
        expires_at: Set(now() + app.refresh_life),
    };
    refresh::Entity::insert(row).exec_without_returning(db).await?;
    let access_token = app
        .tokens
        .issue(user.id, user.token_epoch)
        .ok_or_else(|| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "no token could be made"))?;
    let access =
        Access { access_token, token_type: "Bearer", expires_in: app.tokens.life.as_secs() };
    Ok((cookie(app, &token.text, app.refresh_life / 1_000_000), Json(access)))
}

/// Counts a try before what was offered is looked at.
///
/// # Errors
/// 429: too many failed.
pub(super) fn throttle(app: &App, from: &extract::From, user: &str) -> Result<()> {
    if app.throttle.begin(from.0, user) {
        return Ok(());
    }
    let detail = "too many wrong passwords or codes; wait five minutes";
    Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail))
}

/// Log in.
///
/// The answer's cookie renews the access token. Too many failures of one address or user are
/// refused unchecked for five minutes.
#[utoipa::path(post, path = "/auth/login", tag = "auth", security(()), request_body = Login,
    responses((status = 200, body = Access), (status = 400, body = Problem), (status = 401, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 429, body = Problem),
        (status = 503, body = Problem)))]
async fn login(
    axum::extract::State(app): axum::extract::State<App>,
    from: extract::From,
    Body(login): Body<Login>,
) -> Result<Granted> {
    let name: String = login.username.chars().take(255).collect();
    let granted = log_in(&app, &from, login).await;
    let result = match &granted {
        Ok(_) => "accepted",
        Err(problem) if problem.status == 401 => "rejected",
        Err(problem) if problem.status == 429 => "throttled",
        Err(_) => return granted,
    };
    app.counts.logged_in(result);
    // Those that are not looked at any more would fill the log.
    if result != "throttled" {
        tracing::info!(user = ?name, address = %from.0, result, "login to the API");
    }
    granted
}

async fn log_in(app: &App, from: &extract::From, login: Login) -> Result<Granted> {
    let wrong = || Problem::anonymous("wrong user name or password");
    // Of whatever name: each is logged.
    throttle(app, from, &login.username)?;
    if login.username.len() > 255 {
        return Err(wrong());
    }
    let found = user::Entity::find().filter(user::Column::Name.eq(&login.username));
    // MySQL passes over spaces at the end, which the throttle does not.
    let user = found.one(app.store.db()).await?.filter(|user| user.name == login.username);
    let hash = user.as_ref().map(|user| user.password_hash.clone());
    if !verify_password(login.password, hash).await.ok_or_else(no_hash)? {
        return Err(wrong());
    }
    let user = user.filter(is_active).ok_or_else(wrong)?;
    if !super::totp::accept(app, &user, login.totp.as_deref().unwrap_or_default()).await? {
        return Err(Problem::anonymous("the second factor's code (totp) is missing or wrong"));
    }
    app.throttle.forgive(from.0, &login.username);
    grant(app, app.store.db(), &user).await
}

/// Renew the access token by the cookie, which is replaced.
///
/// A cookie that was used before was stolen, or its answer lost: all tokens of the user are void then.
#[utoipa::path(post, path = "/auth/refresh", tag = "auth", security(()),
    responses((status = 200, body = Access), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn renew(
    axum::extract::State(app): axum::extract::State<App>,
    from: extract::From,
    headers: HeaderMap,
) -> Result<Granted> {
    let expired = || Problem::anonymous("log in again");
    let hash = RefreshToken::hash(cookie_of(&headers).ok_or_else(expired)?);
    let token = refresh::Entity::find_by_id(hash.clone()).one(app.store.db()).await?;
    let token = token.ok_or_else(expired)?;
    let db = app.store.db().begin().await?;
    // The user's lock first, as whoever makes tokens void.
    lock_users(&db, [token.user_id]).await?;
    // Two at once cannot both turn it.
    let turned = refresh::Entity::update_many()
        .col_expr(refresh::Column::Used, true.into())
        .filter(refresh::Column::Hash.eq(&hash))
        .filter(refresh::Column::Used.eq(false))
        .exec(&db)
        .await?;
    let user = user::Entity::find_by_id(token.user_id).one(&db).await?;
    let good = |user: &user::Model| {
        is_active(user) && token.epoch == user.token_epoch && token.expires_at > now()
    };
    // Of one that is void already, no more is told by a second use.
    let user = user.filter(good).ok_or_else(expired)?;
    if turned.rows_affected == 0 {
        db.rollback().await?;
        // Used before: stolen, or its answer was lost. Every token of the user is void.
        let actor = Actor { name: "system:auth".into(), address: from.0.to_string() };
        let edit = app.store.edit(actor).await?;
        void_tokens(edit.db(), user.id).await?;
        edit.commit(Change::new("auth.token_reused", &user.name)).await?;
        return Err(expired());
    }
    let granted = grant(&app, &db, &user).await?;
    db.commit().await?;
    Ok(granted)
}

/// Whatever a user logged in with before is good for nothing from now on.
async fn void_tokens(db: &DatabaseTransaction, user: i64) -> Result<()> {
    user::Entity::update_many()
        .col_expr(user::Column::TokenEpoch, Expr::col(user::Column::TokenEpoch).add(1))
        .filter(user::Column::Id.eq(user))
        .exec(db)
        .await?;
    refresh::Entity::delete_many().filter(refresh::Column::UserId.eq(user)).exec(db).await?;
    Ok(())
}

/// Log out: every token of the user is void.
#[utoipa::path(post, path = "/auth/logout", tag = "auth",
    responses((status = 204), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn logout(
    axum::extract::State(app): axum::extract::State<App>,
    caller: Caller,
) -> Result<(StatusCode, HeaderMap)> {
    let edit = app.store.edit(caller.actor()).await?;
    void_tokens(edit.db(), caller.user.id).await?;
    edit.commit(Change::new("auth.logout", &caller.user.name)).await?;

    Ok((StatusCode::NO_CONTENT, cookie(&app, "", 0)))
}

/// The old password and a new one.
#[derive(Deserialize, ToSchema)]
struct PasswordChange {
    /// The present one.
    #[schema(max_length = 1024, format = Password)]
    old_password: String,
    /// 8 characters or more, 72 bytes or less.
    #[schema(min_length = 8, max_length = 72, format = Password)]
    new_password: String,
}

/// Change one's own password; every token is void afterwards, and live proxy sessions end.
#[utoipa::path(post, path = "/auth/password", tag = "auth", request_body = PasswordChange,
    responses((status = 204), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 429, body = Problem), (status = 503, body = Problem)))]
async fn password(
    axum::extract::State(app): axum::extract::State<App>,
    caller: Caller,
    from: extract::From,
    Body(change): Body<PasswordChange>,
) -> Result<StatusCode> {
    check_password(&change.new_password).map_err(Problem::invalid)?;
    throttle(&app, &from, &caller.user.name)?;
    if !verify_password(change.old_password, Some(caller.user.password_hash.clone()))
        .await
        .ok_or_else(no_hash)?
    {
        return Err(Problem::new(StatusCode::FORBIDDEN, "the present password is another"));
    }
    app.throttle.forgive(from.0, &caller.user.name);
    let hash = hash_password(change.new_password).await.ok_or_else(no_hash)?;
    let edit = app.store.edit(caller.actor()).await?;
    let (_, change) = edit::password(edit.db(), caller.user.id, &hash).await?;
    edit.commit(change).await?;
    crate::app::forget_first_password(&app.state, &caller.user.name);
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn no_hash() -> Problem {
    let detail = "too many passwords wait to be hashed; try again soon";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
}

/// Who one is.
#[utoipa::path(get, path = "/auth/me", tag = "auth",
    responses((status = 200, body = UserView), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn me(
    axum::extract::State(app): axum::extract::State<App>,
    caller: Caller,
) -> Result<Json<UserView>> {
    Ok(Json(UserView::shown(app.store.db(), caller.user.clone(), &caller).await?))
}
