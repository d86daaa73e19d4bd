//! Ended sessions.

use axum::{
    Json,
    body::Body as HttpBody,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Select};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App, Caller, Page, Paging, Params, Problem,
    problem::Result,
    users::{time_of, time_text},
};
use crate::store::{entity::access_log as log, has_part};

/// Rows of one part of an export.
const PART: u64 = 1000;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(export))
}

/// An ended session or HTTP exchange.
#[derive(Debug, Serialize, ToSchema)]
struct LogView {
    /// Number.
    id: String,
    /// When it ended.
    #[schema(format = DateTime)]
    at: String,
    /// The node.
    node_id: String,
    /// The user.
    user_id: Option<String>,
    /// The user's name then.
    user: String,
    /// The client's address.
    client: String,
    /// The target asked for.
    target: String,
    /// How it ended.
    end: String,
    /// Bytes to the target.
    bytes_up: i64,
    /// Bytes to the client.
    bytes_down: i64,
    /// The whole record.
    #[schema(value_type = Object)]
    record: serde_json::Value,
}

fn view(row: log::Model) -> LogView {
    LogView {
        id: row.id.to_string(),
        at: time_text(row.at),
        node_id: row.node_id.to_string(),
        user_id: (row.user_id > 0).then(|| row.user_id.to_string()),
        user: row.user_name,
        client: row.client,
        target: row.target,
        end: row.ended,
        bytes_up: row.bytes_up,
        bytes_down: row.bytes_down,
        record: serde_json::from_str(&row.body).unwrap_or_default(),
    }
}

/// Which records.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only of a user.
    user_id: Option<String>,
    /// A part of the target.
    target: Option<String>,
    /// How they ended, such as `finished`.
    end: Option<String>,
    /// From when.
    #[param(format = DateTime)]
    from: Option<String>,
    /// Until when.
    #[param(format = DateTime)]
    to: Option<String>,
}

/// Rows from a time on until before another.
pub(super) fn within<E: EntityTrait>(
    mut query: Select<E>,
    at: E::Column,
    [from, to]: [&Option<String>; 2],
) -> Result<Select<E>> {
    let bad = |problem: Problem| Problem::new(axum::http::StatusCode::BAD_REQUEST, problem.detail);
    if let Some(from) = from {
        query = query.filter(at.gte(time_of(from).map_err(bad)?));
    }
    if let Some(to) = to {
        query = query.filter(at.lt(time_of(to).map_err(bad)?));
    }
    Ok(query)
}

impl Which {
    fn query(&self, caller: &Caller) -> Result<Select<log::Entity>> {
        let mut query = log::Entity::find();
        if let Some(user) = &self.user_id {
            query = query.filter(log::Column::UserId.eq(user.parse::<i64>().unwrap_or(-1)));
        }
        if let Some(target) = super::users::short(self.target.as_ref())? {
            query = query.filter(has_part(log::Column::Target, target));
        }
        if let Some(end) = &self.end {
            query = query.filter(log::Column::Ended.eq(end));
        }
        query = within(query, log::Column::At, [&self.from, &self.to])?;
        if !caller.is_admin() {
            query = query.filter(log::Column::UserId.eq(caller.user.id));
        }
        Ok(query)
    }
}

/// Ended sessions, the last first; others than admins see only their own.
#[utoipa::path(get, path = "/logs/access", tag = "logs", params(Paging, Which),
    responses((status = 200, body = Page<LogView>), (status = 400, body = Problem), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(paging): Params<Paging>,
    Params(which): Params<Which>,
) -> Result<Json<Page<LogView>>> {
    let known = [("id", log::Column::Id), ("at", log::Column::At)];
    let query = paging.sorted(which.query(&caller)?, "-id", &known)?;
    paging.load(app.store.db(), query, view).await
}

/// The same as CSV, the first first, streamed.
#[utoipa::path(get, path = "/logs/access/export.csv", tag = "logs", params(Which),
    responses((status = 200, body = String, content_type = "text/csv"), (status = 400, body = Problem), (status = 401, body = Problem), (status = 503, body = Problem)))]
async fn export(
    State(app): State<App>,
    caller: Caller,
    Params(which): Params<Which>,
) -> Result<Response> {
    let query = which.query(&caller)?.order_by_asc(log::Column::Id);
    let head = "time,node,user,client,target,end,bytes_up,bytes_down\n";
    let part = move |after: i64| {
        let (query, app) = (query.clone(), app.clone());
        async move {
            let part = query.filter(log::Column::Id.gt(after)).limit(PART);
            let rows = part.all(app.store.db()).await?;
            let Some(last) = rows.last().map(|row| row.id) else { return Ok(None) };
            let mut writer = csv::Writer::from_writer(Vec::new());
            for row in rows {
                let (up, down) = (row.bytes_up.to_string(), row.bytes_down.to_string());
                let (at, node) = (time_text(row.at), row.node_id.to_string());
                let cells = [&at, &node, &cell(&row.user_name), &cell(&row.client)];
                let more = [&cell(&row.target), &row.ended, &up, &down];
                let _ = writer.write_record(cells.into_iter().chain(more));
            }
            Ok(Some((last, writer.into_inner().unwrap_or_default())))
        }
    };
    Ok(csv_response("access.csv", head, part))
}

/// Streams a CSV file: the head, then part after part, each asked for by the last number of the one
/// before. A client whose database fails meanwhile sees that the file is not whole.
pub(super) fn csv_response<F, P>(name: &'static str, head: &str, part: P) -> Response
where
    P: Fn(i64) -> F + Send + 'static,
    F: Future<Output = std::result::Result<Option<(i64, Vec<u8>)>, sea_orm::DbErr>> + Send,
{
    let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<Vec<u8>>>(2);
    let head = head.as_bytes().to_vec();
    tokio::spawn(async move {
        let (mut after, mut sent) = (0, sender.send(Ok(head)).await);
        while sent.is_ok() {
            match part(after).await {
                Ok(None) => return,
                Ok(Some((last, bytes))) => {
                    after = last;
                    sent = sender.send(Ok(bytes)).await;
                }
                Err(error) => {
                    let _ = sender.send(Err(std::io::Error::other(error.to_string()))).await;
                    return;
                }
            }
        }
    });
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let headers = [
        (header::CONTENT_TYPE, "text/csv; charset=utf-8".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    (headers, HttpBody::from_stream(stream)).into_response()
}

/// The other way of [`cell`].
pub(super) fn uncelled(text: &str) -> String {
    let plain = text.strip_prefix('\'').filter(|rest| runs(rest));
    plain.unwrap_or(text).to_owned()
}

/// Whether it begins like a formula, or like one that was made plain.
fn runs(text: &str) -> bool {
    text.trim_start_matches('\'').starts_with(FORMULA)
}

/// What a formula begins with.
const FORMULA: [char; 6] = ['=', '+', '-', '@', '\t', '\r'];

/// A spreadsheet would run a cell that begins like a formula.
pub(super) fn cell(text: &str) -> String {
    if runs(text) { format!("'{text}") } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RELIABILITY D11: whatever a client calls itself or asks for, no cell runs, a row is a row, and it comes
    /// back as it was.
    #[test]
    fn no_cell_is_a_formula_and_each_comes_back() {
        let starts = ["", "'", "''", "=", "+", "-", "@", "\t", "\r", "\n", "\0", "\x1b", "\"", ","];
        let rests =
            ["", "=1+1", "HYPERLINK(\"http://a\")", "cmd|' /C calc'!A0", "\r\n=x", "a,\"b\"\n"];
        let ends = ["", "'", "\r\n", "ä"];
        let all = starts.iter().flat_map(|start| rests.iter().map(move |rest| (start, rest)));
        let all = all.flat_map(|(start, rest)| ends.map(|end| format!("{start}{rest}{end}")));
        let all: Vec<String> = all.collect();
        assert!(all.len() > 200);
        let mut writer = csv::Writer::from_writer(Vec::new());
        for text in &all {
            assert!(!cell(text).starts_with(FORMULA), "{text:?}");
            writer.write_record([&cell(text), "end"]).unwrap();
        }
        let written = writer.into_inner().unwrap();
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(&*written);
        let read: Vec<String> =
            reader.records().map(|record| uncelled(record.unwrap().get(0).unwrap())).collect();
        assert_eq!(read, all);
    }
}
