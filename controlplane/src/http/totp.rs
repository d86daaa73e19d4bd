//! The second factor of the API's users.

use axum::{Json, extract::State, http::StatusCode};
use sea_orm::{ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, Set};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Admin, App, Body, Caller, Id, Problem, auth::throttle, extract, problem::Result, users::edit,
};
use crate::{
    auth::{new_secret, step_of, text_of, verify_password},
    store::{Change, entity::user, now},
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(enrol))
        .routes(routes!(confirm))
        .routes(routes!(remove))
        .routes(routes!(remove_of))
}

/// The password once more.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Password {
    /// The present password.
    #[schema(max_length = 1024, format = Password)]
    password: String,
}

/// What an authenticator app is told.
#[derive(Serialize, ToSchema)]
struct Enrolment {
    /// The secret, base32.
    secret: String,
    /// The same as an address, for a QR code.
    uri: String,
}

/// A code.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Code {
    /// Six digits.
    #[schema(max_length = 16)]
    code: String,
}

fn purpose(user: i64) -> String {
    format!("totp {user}")
}

/// Begin to use a second factor; it is asked for once a first code has confirmed it.
#[utoipa::path(post, path = "/auth/totp", tag = "auth", request_body = Password,
    responses((status = 200, body = Enrolment), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem), (status = 429, body = Problem), (status = 503, body = Problem)))]
async fn enrol(
    State(app): State<App>,
    caller: Caller,
    from: extract::From,
    Body(body): Body<Password>,
) -> Result<Json<Enrolment>> {
    throttle(&app, &from, &caller.user.name)?;
    if !verify_password(body.password, Some(caller.user.password_hash.clone()))
        .await
        .ok_or_else(super::auth::no_hash)?
    {
        return Err(Problem::new(StatusCode::FORBIDDEN, "the present password is another"));
    }
    let secret = new_secret();
    let sealed = app.seal.seal(&purpose(caller.user.id), &secret).ok_or_else(Problem::no_key)?;
    let edit = app.store.edit(caller.actor()).await?;
    let user = edit::find(edit.db(), caller.user.id).await?;
    if user.totp_secret.is_some() {
        let detail = "there is a second factor already; remove it first, with a code of it";
        return Err(Problem::new(StatusCode::CONFLICT, detail));
    }
    let mut row = user.clone().into_active_model();
    row.totp_pending = Set(Some(sealed));
    let (_, change) = edit::write(edit.db(), "auth.totp_enrol", user, row, None).await?;
    edit.commit(change).await?;
    let secret = text_of(&secret);
    let name = percent(&caller.user.name);
    let uri = format!("otpauth://totp/Culvert:{name}?secret={secret}&issuer=Culvert");
    Ok(Json(Enrolment { secret, uri }))
}

/// Use the second factor from now on; every token of before is void.
#[utoipa::path(post, path = "/auth/totp/confirm", tag = "auth", request_body = Code,
    responses((status = 204), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 429, body = Problem), (status = 503, body = Problem)))]
async fn confirm(
    State(app): State<App>,
    caller: Caller,
    from: extract::From,
    Body(body): Body<Code>,
) -> Result<StatusCode> {
    throttle(&app, &from, &caller.user.name)?;
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let user = edit::find(db, caller.user.id).await?;
    let pending = user.totp_pending.clone();
    let step = pending.as_deref().and_then(|sealed| step(&app, user.id, sealed, &body.code));
    let step = step.ok_or_else(wrong)?;
    app.throttle.forgive(from.0, &caller.user.name);
    let mut row = user.clone().into_active_model();
    row.token_epoch = Set(user.token_epoch + 1);
    (row.totp_secret, row.totp_pending, row.totp_step) = (Set(pending), Set(None), Set(step));
    let (_, change) = edit::write(db, "auth.totp_confirm", user, row, None).await?;
    edit.commit(change).await?;

    Ok(StatusCode::NO_CONTENT)
}

/// Use the second factor no more.
#[utoipa::path(post, path = "/auth/totp/remove", tag = "auth", request_body = Code,
    responses((status = 204), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 429, body = Problem), (status = 503, body = Problem)))]
async fn remove(
    State(app): State<App>,
    caller: Caller,
    from: extract::From,
    Body(body): Body<Code>,
) -> Result<StatusCode> {
    throttle(&app, &from, &caller.user.name)?;
    if caller.user.totp_secret.is_none() || !accept(&app, &caller.user, &body.code).await? {
        return Err(wrong());
    }
    app.throttle.forgive(from.0, &caller.user.name);
    let edit = app.store.edit(caller.actor()).await?;
    let change = take_away(edit.db(), caller.user.id).await?;
    edit.commit(change).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Take a user's second factor away: the device is lost.
#[utoipa::path(delete, path = "/users/{id}/totp", tag = "users", params(("id" = String, Path)),
    responses((status = 204), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove_of(State(app): State<App>, Admin(caller): Admin, Id(id): Id) -> Result<StatusCode> {
    let edit = app.store.edit(caller.actor()).await?;
    let change = take_away(edit.db(), id).await?;
    edit.commit(change).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A user logs in by the password alone from now on.
///
/// # Errors
/// There is no such user, or the database fails.
pub(crate) async fn take_away(db: &DatabaseTransaction, id: i64) -> Result<Change> {
    let user = edit::find(db, id).await?;
    let mut row = user.clone().into_active_model();
    (row.totp_secret, row.totp_pending) = (Set(None), Set(None));
    Ok(edit::write(db, "user.totp_remove", user, row, None).await?.1)
}

fn wrong() -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "the code is wrong, or was used already")
}

fn step(app: &App, user: i64, sealed: &str, code: &str) -> Option<i64> {
    let secret = app.seal.open(&purpose(user), sealed);
    if secret.is_none() {
        tracing::error!(user, "a second factor cannot be opened; is seal.key another?");
    }
    step_of(&secret?, code, (now() / 1_000_000).unsigned_abs())
}

/// Whether a code is right and was not used before. Who has no second factor needs no code.
pub(super) async fn accept(app: &App, user: &user::Model, code: &str) -> Result<bool> {
    let Some(sealed) = &user.totp_secret else { return Ok(true) };
    let Some(step) = step(app, user.id, sealed, code) else { return Ok(false) };
    // Of two at once, one is too late.
    let taken = user::Entity::update_many()
        .col_expr(user::Column::TotpStep, step.into())
        .filter(user::Column::Id.eq(user.id))
        .filter(user::Column::TotpStep.lt(step))
        .exec(app.store.db())
        .await?;
    Ok(taken.rows_affected > 0)
}

/// Percent-encodes what is not unreserved (RFC 3986 section 2.3).
fn percent(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}
