//! The API itself: who may what, and what it says of itself.

use serde_json::{Value, json};

use crate::support::{PASSWORD, Planes, on_each};

/// Every route, with what an anonymous caller, a user and an admin get at most: 1 is the right to ask,
/// whatever the answer. RELIABILITY H: a new route without a line fails.
const ROLES: &[(&str, &str, [bool; 3])] = &[
    ("POST", "/auth/login", [true, true, true]),
    ("POST", "/auth/refresh", [true, true, true]),
    ("POST", "/auth/logout", [false, true, true]),
    ("POST", "/auth/password", [false, true, true]),
    ("GET", "/auth/me", [false, true, true]),
    ("GET", "/users", [false, false, true]),
    ("POST", "/users", [false, false, true]),
    ("GET", "/users/export.csv", [false, false, true]),
    ("POST", "/users/import", [false, false, true]),
    ("GET", "/users/{id}", [false, false, true]),
    ("PATCH", "/users/{id}", [false, false, true]),
    ("DELETE", "/users/{id}", [false, false, true]),
    ("POST", "/users/{id}/password", [false, false, true]),
    ("GET", "/users/{id}/usage", [false, false, true]),
    ("POST", "/users/{id}/usage/reset", [false, false, true]),
    ("GET", "/traffic/summary", [false, true, true]),
    ("GET", "/traffic/limits", [false, false, true]),
    ("POST", "/traffic/limits", [false, false, true]),
    ("GET", "/traffic/limits/{id}", [false, false, true]),
    ("PATCH", "/traffic/limits/{id}", [false, false, true]),
    ("DELETE", "/traffic/limits/{id}", [false, false, true]),
    ("GET", "/filters", [false, false, true]),
    ("POST", "/filters", [false, false, true]),
    ("GET", "/filters/{id}", [false, false, true]),
    ("PUT", "/filters/{id}", [false, false, true]),
    ("DELETE", "/filters/{id}", [false, false, true]),
    ("GET", "/whitelist", [false, false, true]),
    ("POST", "/whitelist", [false, false, true]),
    ("DELETE", "/whitelist/{id}", [false, false, true]),
    ("GET", "/rules", [false, false, true]),
    ("POST", "/rules", [false, false, true]),
    ("GET", "/rules/{id}", [false, false, true]),
    ("PUT", "/rules/{id}", [false, false, true]),
    ("DELETE", "/rules/{id}", [false, false, true]),
    ("POST", "/rules/reorder", [false, false, true]),
    ("GET", "/settings", [false, false, true]),
    ("PATCH", "/settings", [false, false, true]),
    ("GET", "/online", [false, true, true]),
    ("DELETE", "/online/{session}", [false, false, true]),
    ("DELETE", "/online/users/{id}", [false, false, true]),
    ("GET", "/logs/access", [false, true, true]),
    ("GET", "/logs/access/export.csv", [false, true, true]),
    ("GET", "/logs/audit", [false, false, true]),
    ("GET", "/logs/audit/export.csv", [false, false, true]),
    ("GET", "/proxy/nodes", [false, false, true]),
    ("POST", "/proxy/nodes", [false, false, true]),
    ("DELETE", "/proxy/nodes/{id}", [false, false, true]),
    ("POST", "/proxy/nodes/{id}/drain", [false, false, true]),
    ("POST", "/proxy/nodes/{id}/identity", [false, false, true]),
    ("GET", "/proxy/health", [false, false, true]),
    ("GET", "/proxy/heartbeats", [false, false, true]),
    ("GET", "/system/info", [false, false, true]),
    ("GET", "/system/stats", [false, false, true]),
];

fn document(planes: &Planes) -> Value {
    let (status, text) = planes.raw("", "GET", "/api/v1/openapi.json", None);
    assert_eq!(status, 200);
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_route_asks_who_calls() {
    on_each(|planes| {
        let paths = document(&planes)["paths"].clone();
        let routes = paths.as_object().unwrap().iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().keys();
            methods.map(|method| {
                (method.to_ascii_uppercase(), path.strip_prefix("/api/v1").unwrap().to_owned())
            })
        });
        let ids = ["ann", "bob", "cem"].map(|name| planes.user(name, json!({})));
        let body = json!({ "status": "disabled" });
        let old = planes.login("cem", PASSWORD).unwrap();
        planes.must("PATCH", &format!("/users/{}", ids[2]), body);
        for (method, path) in routes {
            let line = ROLES.iter().find(|line| (line.0, line.1) == (&*method, &*path));
            let Some((.., may)) = line else { panic!("no line for {method} {path}") };
            // Somebody else's, and nothing that is there.
            let at = if path.starts_with("/users") { &ids[1] } else { "999999" };
            let path = path.replace("{id}", at).replace("{session}", "1-1");
            let ann = planes.login("ann", PASSWORD).unwrap();
            let ask = |token: &str| planes.ask_as(token, &method, &path, Some(&json!({}))).0;
            let (anonymous, user, expired) = (ask(""), ask(&ann), ask(&old));
            // A login without a name is refused as such.
            let is_open = path.starts_with("/auth/login") || path.starts_with("/auth/refresh");
            assert_eq!(anonymous == 401 && !is_open, !may[0], "{method} {path}: {anonymous}");
            assert_eq!(expired == 401 && !is_open, !may[0], "{method} {path}: {expired}");
            assert_eq!(user == 403, !may[1], "{method} {path} as a user: {user}");
        }
        let mine = format!("/users/{}", ids[0]);
        let ann = planes.login("ann", PASSWORD).unwrap();
        assert_eq!(planes.ask_as(&ann, "GET", &mine, None).1["name"], "ann");
        assert_eq!(planes.ask_as(&ann, "GET", &format!("{mine}/usage"), None).0, 200);
    });
}

#[test]
fn tokens_end_with_what_they_stand_for() {
    on_each(|planes| {
        let id = planes.user("ann", json!({}));
        let login = || planes.login("ann", PASSWORD).unwrap();
        let status = |token: &str| planes.ask_as(token, "GET", "/auth/me", None).0;
        let token = login();
        assert_eq!(status(&token), 200);
        assert_eq!(planes.ask_as(&token, "POST", "/auth/logout", None).0, 204);
        assert_eq!(status(&token), 401);
        let token = login();
        let change = json!({ "old_password": PASSWORD, "new_password": "quite another" });
        assert_eq!(planes.ask_as(&token, "POST", "/auth/password", Some(&change)).0, 204);
        assert_eq!((status(&token), planes.login("ann", PASSWORD)), (401, Err(401)));
        let token = planes.login("ann", "quite another").unwrap();
        planes.must("DELETE", &format!("/users/{id}"), Value::Null);
        assert_eq!(status(&token), 401);
    });
}

#[test]
fn guesses_are_throttled() {
    on_each(|planes| {
        planes.user("ann", json!({}));
        let answers: Vec<_> = (0..12).map(|_| planes.login("ann", "a wrong one")).collect();
        assert!(answers[..9].iter().all(|answer| *answer == Err(401)), "{answers:?}");
        assert_eq!(answers[11], Err(429));
    });
}

#[test]
fn bad_input_is_told_and_changes_nothing() {
    on_each(|planes| {
        let generation = || planes.must("GET", "/system/stats", Value::Null)["generation"].clone();
        let before = generation();
        for (method, path, body, status) in [
            ("POST", "/users", json!({ "name": "", "password": PASSWORD }), 422),
            ("POST", "/users", json!({ "name": "a\u{0}b", "password": PASSWORD }), 422),
            ("POST", "/users", json!({ "name": "a:b", "password": PASSWORD }), 422),
            ("POST", "/users", json!({ "name": "a", "password": "short" }), 422),
            ("POST", "/users", json!({ "name": "a", "password": "x".repeat(73) }), 422),
            ("POST", "/users", json!({ "name": "a", "password": PASSWORD, "surprise": 1 }), 422),
            ("POST", "/users", json!({ "name": "admin", "password": PASSWORD }), 409),
            ("PATCH", "/users/1", json!({ "status": "disabled" }), 409),
            ("DELETE", "/users/1", Value::Null, 409),
            ("POST", "/users", json!(["a", PASSWORD]), 422),
            ("PATCH", "/users/1", json!({ "limits": [1, 2] }), 422),
            ("GET", "/users/999999", Value::Null, 404),
            ("GET", "/users/x", Value::Null, 404),
            ("GET", "/users?page=0", Value::Null, 400),
            ("GET", "/users?sort=password_hash", Value::Null, 400),
            ("GET", "/nowhere", Value::Null, 404),
            (
                "POST",
                "/filters",
                json!({ "action": "deny", "kind": "domain_regex", "value": "(" }),
                422,
            ),
            ("POST", "/filters", json!({ "action": "deny", "kind": "cidr", "value": "x" }), 422),
            (
                "POST",
                "/filters",
                json!({ "action": "deny", "kind": "domain", "value": "a b" }),
                422,
            ),
            (
                "POST",
                "/filters",
                json!({ "action": "deny", "kind": "domain", "value": "10.0.0.1" }),
                422,
            ),
            (
                "POST",
                "/rules",
                json!({ "name": "r", "action": "allow", "when": { "moon": [] } }),
                422,
            ),
            ("POST", "/rules", json!({ "name": "r", "action": "redirect" }), 422),
            ("POST", "/rules", json!({ "name": "r", "action": "redirect", "to": "a b:1" }), 422),
            ("POST", "/rules/reorder", json!({ "ids": ["1"] }), 409),
            ("POST", "/whitelist", json!({ "cidr": "10.0.0.0/40" }), 422),
            ("PATCH", "/settings", json!({ "access_log_days": 0 }), 422),
        ] {
            let body = (!body.is_null()).then_some(&body);
            let (got, answer) = planes.ask(method, path, body);
            assert_eq!(got, status, "{method} {path} {body:?}: {answer}");
            assert!(answer["detail"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
        }
        assert_eq!(generation(), before);
    });
}

#[test]
fn users_are_imported_together_or_not_at_all() {
    on_each(|planes| {
        let import = |text: &str| planes.import("/api/v1/users/import", text);
        let rows: String = (0..20).map(|i| format!("user{i},a long password,a b,1000\n")).collect();
        let head = "name,password,groups,quota_bytes\n";
        let (status, answer) = import(&format!("{head}{rows}"));
        assert_eq!((status, answer.contains("20")), (201, true), "{answer}");
        for (text, status, part) in [
            (format!("{head}new,a long password,,\nuser3,a long password,,\n"), 409, "user3"),
            (format!("{head}new,short,,\n"), 422, "line 2"),
            ("name,password,moon\n".to_owned(), 422, "unknown column `moon`"),
        ] {
            let (got, answer) = import(&text);
            assert_eq!((got, answer.contains(part)), (status, true), "{answer}");
        }
        assert_eq!(planes.must("GET", "/users?q=new", Value::Null)["total"], 0);
        let (status, csv) = planes.raw(&planes.token, "GET", "/api/v1/users/export.csv", None);
        assert_eq!((status, csv.lines().count()), (200, 1 + 1 + 20));
        assert!(csv.contains("user7,user,active,true,,a b,1000,month,"), "{csv}");
    });
}

#[test]
fn every_change_is_in_the_audit_log() {
    on_each(|planes| {
        let id = planes.user("ann", json!({ "comment": "first" }));
        planes.must("PATCH", &format!("/users/{id}"), json!({ "comment": "second" }));
        let long = json!({ "action": "deny", "kind": "domain_regex", "value": "a".repeat(1000) });
        planes.must("POST", "/filters", long);
        let log = planes.must("GET", "/logs/audit?action=user.update", Value::Null);
        let line = &log["items"][0];
        assert_eq!((&line["actor"], &line["subject"]), (&json!("admin"), &json!("ann")));
        assert_eq!(line["old"]["comment"], "first");
        assert_eq!(line["new"]["comment"], "second");
        assert_eq!(line["address"], "127.0.0.1");
        assert!(!log.to_string().contains("$2"), "a password hash in the audit log");
        let path = "/api/v1/logs/audit/export.csv?q=ann";
        let (status, csv) = planes.raw(&planes.token, "GET", path, None);
        assert_eq!((status, csv.lines().count()), (200, 3), "{csv}");
    });
}

#[test]
fn the_committed_description_is_the_codes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap();
    let present = culvert_control::http::openapi().to_pretty_json().unwrap() + "\n";
    let hint = "cargo run -p culvert-control -- openapi > controlplane/openapi.json";
    assert!(committed == present, "openapi.json is another than the code's; write it anew: {hint}");
}
