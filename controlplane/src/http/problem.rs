//! Errors of the API: problem documents (RFC 9457).

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use sea_orm::DbErr;
use serde::Serialize;
use utoipa::ToSchema;

use crate::store::{is_away, is_duplicate, note};

/// What went wrong, and what to do about it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// The status in words.
    pub title: String,
    /// What went wrong here.
    pub detail: String,
}

/// The result of a handler.
pub(super) type Result<T> = std::result::Result<T, Problem>;

impl Problem {
    /// A problem of a status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        Self { status: status.as_u16(), title, detail: detail.into() }
    }

    /// 422: a value that cannot be.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    }

    /// 404: no such thing.
    pub fn missing(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no such {what}"))
    }

    /// 401: who are you?
    pub fn anonymous(detail: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    /// 503: the kernel gives no random bytes.
    pub fn no_key() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "no key could be made; try again")
    }

    /// 403: not for you.
    pub fn forbidden() -> Self {
        Self::new(StatusCode::FORBIDDEN, "this needs the role admin")
    }
}

impl From<DbErr> for Problem {
    fn from(error: DbErr) -> Self {
        if is_duplicate(&error) {
            return Self::new(StatusCode::CONFLICT, "there is one already");
        }
        note(&error);
        if is_away(&error) {
            tracing::warn!(%error, "the database is away");
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the database cannot be reached or takes no changes now; try again",
            );
        }
        tracing::error!(%error, "the database failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the database failed; see the log")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}
