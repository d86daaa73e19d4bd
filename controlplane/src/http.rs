//! The API under `/api/v1`: JSON, problem documents, OpenAPI from the code.

mod audit;
mod auth;
mod explain;
mod extract;
mod filters;
mod limits;
mod logs;
mod metrics;
mod online;
mod problem;
mod proxy;
mod rules;
mod settings;
mod system;
mod totp;
mod traffic;
mod usage;
mod users;
mod whitelist;

use std::{path::Path, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::router::OpenApiRouter;

pub use extract::{Admin, Body, Caller, Id, Page, Paging, Params, is_active};
pub(crate) use filters::compiled as filter_of;
pub use metrics::Counts;
pub use problem::Problem;
pub(crate) use proxy::{add_node, replace_identity, revoke_node};
pub(crate) use rules::compiled as rule_of;
pub(crate) use totp::take_away as take_totp_away;
pub(crate) use users::{check_name, edit as edit_user};

use crate::{
    auth::{LoginThrottle, Seal, Tokens},
    link::{Authority, Hub},
    store::Store,
};

/// Longest body in bytes of what is not an import.
const BODY_MAX: usize = 1 << 20;
/// How long a request may take, and one that hashes many passwords.
const REQUEST_TIME: Duration = Duration::from_secs(10);
const IMPORT_TIME: Duration = Duration::from_secs(120);

/// What every handler has.
#[derive(Clone)]
pub struct App {
    /// The database.
    pub store: Store,
    /// Access tokens.
    pub tokens: Arc<Tokens>,
    /// How long a refresh token is good, in microseconds.
    pub refresh_life: i64,
    /// Proxies whose word on the client's address is taken.
    pub trusted_proxies: Arc<[ipnet::IpNet]>,
    /// Cookies are for TLS only.
    pub secure_cookies: bool,
    /// The state directory.
    pub state: Arc<Path>,
    /// Secrets in the database.
    pub seal: Arc<Seal>,
    /// Failed logins.
    pub throttle: Arc<LoginThrottle>,
    /// The nodes that are connected here.
    pub hub: Arc<Hub>,
    /// What nodes of other hosts are known by.
    pub authority: Arc<Authority>,
    /// What is counted since the start.
    pub counts: Arc<Counts>,
    /// When the program started, in microseconds since 1970.
    pub started: i64,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Culvert",
        description = "Users, policy and exact accounting of Culvert's proxies.",
        license(name = "Apache-2.0 OR MIT", identifier = "Apache-2.0 OR MIT")
    ),
    servers((url = "/")),
    modifiers(&Bearer),
    security(("bearer" = []))
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build();
        components.add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

/// Problem documents have a content type of their own (RFC 9457 section 3).
fn name_problems(document: &mut utoipa::openapi::OpenApi) {
    use utoipa::openapi::RefOr;
    for item in document.paths.paths.values_mut() {
        let operations =
            [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch];
        for operation in operations.into_iter().flatten() {
            for (status, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response
                    && status.starts_with(['4', '5'])
                    && let Some(content) = response.content.swap_remove("application/json")
                {
                    response.content.insert("application/problem+json".into(), content);
                }
            }
        }
    }
}

fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi()).nest(
        "/api/v1",
        OpenApiRouter::new()
            .merge(auth::routes())
            .merge(totp::routes())
            .merge(users::routes())
            .merge(usage::routes())
            .merge(limits::routes())
            .merge(traffic::routes())
            .merge(filters::routes())
            .merge(whitelist::routes())
            .merge(rules::routes())
            .merge(explain::routes())
            .merge(settings::routes())
            .merge(online::routes())
            .merge(logs::routes())
            .merge(audit::routes())
            .merge(proxy::routes())
            .merge(system::routes()),
    )
}

/// The API's description.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = routes().into_openapi();
    name_problems(&mut document);
    document
}

/// The settings as the database has them.
pub(crate) async fn settings_of(
    db: &impl sea_orm::ConnectionTrait,
) -> std::result::Result<settings::Settings, sea_orm::DbErr> {
    settings::Settings::load(db).await
}

/// All routes.
pub fn router(app: App) -> Router {
    let (router, _) = routes().split_for_parts();
    let docs =
        utoipa_swagger_ui::SwaggerUi::new("/api/docs").url("/api/v1/openapi.json", openapi());
    router
        .merge(docs)
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(system::ready))
        .route("/metrics", get(metrics::metrics))
        .fallback(async || Problem::missing("page"))
        .method_not_allowed_fallback(async || {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "not here").into_response()
        })
        .layer(axum::extract::DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(in_time))
        .layer(middleware::from_fn(guarded))
        .layer(middleware::from_fn_with_state(app.clone(), counted))
        .with_state(app)
}

/// What is served while there is no database.
pub fn waiting() -> Router {
    let away = async || {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the database is away; try again soon")
    };
    Router::new().route("/livez", get(async || "alive\n")).fallback(away)
}

async fn counted(State(app): State<App>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    app.counts.answered(response.status());
    response
}

/// What browsers are told: take nothing for what it does not say it is, run nothing of others, show it
/// in no page of others, keep no answer.
async fn guarded(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let (is_api, is_docs) = (path.starts_with("/api/v1/"), path.starts_with("/api/docs"));
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // The page of the API's description sets styles as it runs.
    let policy = if is_docs {
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
         object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    } else {
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; \
         frame-ancestors 'none'"
    };
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    if is_api {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

/// A database that hangs must not hang everybody who asks. Answers that are streamed have begun in time.
async fn in_time(request: Request, next: Next) -> Response {
    let hashes = request.uri().path().ends_with("/users/import");
    let time = if hashes { IMPORT_TIME } else { REQUEST_TIME };
    match tokio::time::timeout(time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let detail = "the database does not answer; nothing was changed unless it did meanwhile; try again";
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail).into_response()
        }
    }
}
