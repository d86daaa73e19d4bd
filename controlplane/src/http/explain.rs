//! What a node would decide of requests that nobody has made.

use std::net::IpAddr;

use axum::{Json, extract::State, http::StatusCode};
use culvert_api::link::{Explain, Explained};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Body, Problem, problem::Result, users::name_of};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(rules)).routes(routes!(filters))
}

/// A request that nobody has made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Question {
    /// The user's name; left out: nobody has logged in.
    #[serde(default)]
    #[schema(max_length = 255)]
    user: Option<String>,
    /// The client's address.
    #[serde(default = "nowhere")]
    #[schema(value_type = String, example = "192.0.2.1")]
    client: IpAddr,
    /// `socks5`, `socks4` or `http`.
    #[serde(default)]
    protocol: ProtocolName,
    /// `host:port`.
    #[schema(max_length = 300, example = "example.com:443")]
    target: String,
}

/// Protocols of clients.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ProtocolName {
    /// SOCKS5.
    #[default]
    Socks5,
    /// SOCKS4 and 4a.
    Socks4,
    /// HTTP.
    Http,
}

fn nowhere() -> IpAddr {
    IpAddr::from([127, 0, 0, 1])
}

/// What a node would do.
#[derive(Debug, Serialize, ToSchema)]
struct Answer {
    /// Whether the request would be let through.
    allowed: bool,
    /// Why not: `port`, `filter`, `rule`, `default`, `internal`, `own_listener`, `client`, `user`, `source` or
    /// `unresolved`.
    reason: Option<String>,
    /// The rule that decides; none before the rules, and when the default does.
    rule: Option<String>,
    /// What would be dialled.
    addresses: Vec<String>,
    /// The generation in force at the node that was asked.
    generation: u64,
}

/// What would be decided of a request, and by which rule. A node that is connected here is asked: it resolves
/// names as it would for a client.
#[utoipa::path(post, path = "/rules/test", tag = "rules", request_body = Question,
    responses((status = 200, body = Answer), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 409, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn rules(
    State(app): State<App>,
    _: Admin,
    Body(question): Body<Question>,
) -> Result<Json<Answer>> {
    let said = explain(&app, question).await?;
    let given = |text: String| (!text.is_empty()).then_some(text);
    Ok(Json(Answer {
        allowed: said.allowed,
        reason: given(said.reason),
        rule: given(said.rule),
        addresses: said.addresses,
        generation: said.generation,
    }))
}

/// A target.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Tested {
    /// `host:port`.
    #[schema(max_length = 300, example = "example.com:443")]
    target: String,
}

/// What the filters say of a target.
#[derive(Debug, Serialize, ToSchema)]
struct Filtered {
    /// Whether the black list has it, and the white list does not.
    denied: bool,
    /// The generation in force at the node that was asked.
    generation: u64,
}

/// Whether the filters refuse a target, by its name or by an address it resolves to, as
/// `POST /rules/test` finds out.
#[utoipa::path(post, path = "/filters/test", tag = "filters", request_body = Tested,
    responses((status = 200, body = Filtered), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem), (status = 409, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn filters(
    State(app): State<App>,
    _: Admin,
    Body(tested): Body<Tested>,
) -> Result<Json<Filtered>> {
    let question = Question {
        user: None,
        client: nowhere(),
        protocol: ProtocolName::Socks5,
        target: tested.target,
    };
    let said = explain(&app, question).await?;
    Ok(Json(Filtered { denied: said.filtered, generation: said.generation }))
}

async fn explain(app: &App, question: Question) -> Result<Explained> {
    let user = question.user.as_ref().map_or(0, String::len);
    if question.target.len() > 300 || user > 255 {
        return Err(Problem::invalid("target has at most 300 bytes, user 255"));
    }
    let explain = Explain {
        id: 0,
        user: question.user.unwrap_or_default(),
        client: question.client.to_string(),
        protocol: name_of(&question.protocol),
        target: question.target,
    };
    let nobody = || {
        let detail =
            "no node that is connected to this control plane answers; start one, or ask the other";
        Problem::new(StatusCode::CONFLICT, detail)
    };
    let said = app.hub.explain(explain).await.ok_or_else(nobody)?;
    if said.problem.is_empty() { Ok(said) } else { Err(Problem::invalid(said.problem)) }
}
