//! The API itself: who may what, and what it says of itself.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::{
    accounting::transfer,
    support::{
        PASSWORD, Planes, Program, await_cut, await_some, echo, is_soak, on_each, ping, web,
    },
};

/// Who may ask, whatever the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Right {
    Anyone,
    User,
    /// A user of what is theirs.
    Own,
    Admin,
}
use Right::{Admin, Anyone, Own, User};

/// Every route. RELIABILITY H3: a new one without a line fails.
const ROLES: &[(&str, &str, Right)] = &[
    ("POST", "/auth/login", Anyone),
    ("POST", "/auth/refresh", Anyone),
    ("POST", "/auth/logout", User),
    ("POST", "/auth/password", User),
    ("GET", "/auth/me", User),
    ("GET", "/users", Admin),
    ("POST", "/users", Admin),
    ("GET", "/users/export.csv", Admin),
    ("POST", "/users/import", Admin),
    ("GET", "/users/{id}", Own),
    ("PATCH", "/users/{id}", Admin),
    ("DELETE", "/users/{id}", Admin),
    ("POST", "/users/{id}/password", Admin),
    ("GET", "/users/{id}/usage", Own),
    ("POST", "/users/{id}/usage/reset", Admin),
    ("DELETE", "/users/{id}/totp", Admin),
    ("POST", "/auth/totp", User),
    ("POST", "/auth/totp/confirm", User),
    ("POST", "/auth/totp/remove", User),
    ("GET", "/traffic/summary", User),
    ("GET", "/traffic/live", Admin),
    ("GET", "/traffic/limits", Admin),
    ("POST", "/traffic/limits", Admin),
    ("GET", "/traffic/limits/{id}", Admin),
    ("PUT", "/traffic/limits/{id}", Admin),
    ("DELETE", "/traffic/limits/{id}", Admin),
    ("GET", "/filters", Admin),
    ("POST", "/filters", Admin),
    ("GET", "/filters/{id}", Admin),
    ("PUT", "/filters/{id}", Admin),
    ("DELETE", "/filters/{id}", Admin),
    ("POST", "/filters/import", Admin),
    ("POST", "/filters/test", Admin),
    ("GET", "/whitelist", Admin),
    ("POST", "/whitelist", Admin),
    ("GET", "/whitelist/{id}", Admin),
    ("PUT", "/whitelist/{id}", Admin),
    ("DELETE", "/whitelist/{id}", Admin),
    ("GET", "/rules", Admin),
    ("POST", "/rules", Admin),
    ("GET", "/rules/{id}", Admin),
    ("PUT", "/rules/{id}", Admin),
    ("DELETE", "/rules/{id}", Admin),
    ("POST", "/rules/reorder", Admin),
    ("POST", "/rules/test", Admin),
    ("GET", "/settings", Admin),
    ("PATCH", "/settings", Admin),
    ("GET", "/online", User),
    ("GET", "/online/users", Admin),
    ("DELETE", "/online/{session}", Admin),
    ("DELETE", "/online/users/{id}", Admin),
    ("GET", "/logs/access", User),
    ("GET", "/logs/access/export.csv", User),
    ("GET", "/logs/audit", Admin),
    ("GET", "/logs/audit/export.csv", Admin),
    ("GET", "/proxy/nodes", Admin),
    ("POST", "/proxy/nodes", Admin),
    ("DELETE", "/proxy/nodes/{id}", Admin),
    ("POST", "/proxy/nodes/{id}/drain", Admin),
    ("POST", "/proxy/nodes/{id}/identity", Admin),
    ("GET", "/proxy/health", Admin),
    ("GET", "/proxy/heartbeats", Admin),
    ("GET", "/system/info", Admin),
    ("GET", "/system/stats", Admin),
];

fn document(planes: &Planes) -> Value {
    let (status, text) = planes.raw("", "GET", "/api/v1/openapi.json", None);
    assert_eq!(status, 200);
    serde_json::from_str(&text).unwrap()
}

/// A token of the control plane's own key, of a user as another token says, with other claims.
fn forged(planes: &Planes, token: &str, change: impl FnOnce(&mut Value)) -> String {
    let body = token.split('.').nth(1).unwrap();
    let mut claims: Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(body).unwrap()).unwrap();
    change(&mut claims);
    let key = std::fs::read(planes.state().join("jwt.key")).unwrap();
    let key = jsonwebtoken::EncodingKey::from_secret(&key);
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
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
        let disabled = planes.login("cem", PASSWORD).unwrap();
        planes.must("PATCH", &format!("/users/{}", ids[2]), json!({ "status": "disabled" }));
        for (method, path) in routes {
            let line = ROLES.iter().find(|line| (line.0, line.1) == (&*method, &*path));
            let Some((.., right)) = line else { panic!("no line for {method} {path}") };
            // Whose, and of what else nothing that is there.
            let of = |id: &str| {
                let id = if path.starts_with("/users") { id } else { "999999" };
                path.replace("{id}", id).replace("{session}", "1-1-1")
            };
            let (theirs, mine) = (of(&ids[1]), of(&ids[0]));
            // What was called before may have ended the tokens.
            let token = || planes.login("ann", PASSWORD).unwrap();
            let ask =
                |token: &str, path: &str| planes.ask_as(token, &method, path, Some(&json!({}))).0;
            // A login without a name is refused as such.
            let opens = *right == Anyone && !path.ends_with("/logout");
            let expired = forged(&planes, &token(), |claims| {
                claims["exp"] = json!(claims["iat"].as_i64().unwrap() - 1);
            });
            for (who, token) in [("nobody", ""), ("disabled", &disabled), ("expired", &expired)] {
                let status = ask(token, &theirs);
                assert!(opens || status == 401, "{method} {path} by {who}: {status}");
            }
            let status = ask(&token(), &theirs);
            assert_eq!(status == 403, *right >= Own, "{method} {path} of another: {status}");
            let status = ask(&token(), &mine);
            assert_eq!(status == 403, *right == Admin, "{method} {path} of their own: {status}");
            // What it sends has no end.
            if path != "/traffic/live" {
                let status = ask(&planes.login_admin(), &theirs);
                assert!(
                    opens || ![401, 403].contains(&status),
                    "{method} {path} by an admin: {status}"
                );
            }
        }
    });
}

/// RELIABILITY H5: of what all may ask for, a user gets what is their own.
#[test]
fn a_user_sees_what_is_their_own() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        // What a spreadsheet would take for a formula.
        let names = ["ann", "=cmd"];
        let ids = names.map(|name| planes.user(name, json!({})));
        for name in names {
            await_some("tunnel", || node.tunnel(name, target).ok());
        }
        for (name, size) in [("ann", 1000), ("=cmd", 70_000)] {
            transfer(&node, name, target, size);
        }
        let mut held = names.map(|name| node.tunnel(name, target).unwrap());
        held.iter_mut().for_each(|stream| ping(stream).unwrap());
        let all = |path: &str| planes.must("GET", path, Value::Null);
        await_some("all of it", || {
            let logs = all("/logs/access?end=finished")["total"].as_u64().unwrap();
            let used = ids.iter().all(|id| planes.used(id) > 2000);
            (logs >= 4 && used && all("/online")["total"] == 2).then_some(())
        });
        let token = planes.login("ann", PASSWORD).unwrap();
        for path in [
            "/logs/access".to_owned(),
            format!("/logs/access?user_id={}", ids[1]),
            "/online".to_owned(),
            format!("/online?user_id={}", ids[1]),
        ] {
            let (status, list) = planes.ask_as(&token, "GET", &path, None);
            assert_eq!(status, 200, "{path}");
            let items = list["items"].as_array().unwrap();
            assert!(items.iter().all(|item| item["user_id"] == *ids[0]), "{path}: {list}");
            assert_eq!(items.is_empty(), path.contains('?'), "{path}: {list}");
        }
        let export =
            |token: &str| planes.raw(token, "GET", "/api/v1/logs/access/export.csv", None).1;
        let csv = export(&token);
        assert!(
            csv.lines().count() > 1 && csv.lines().skip(1).all(|line| line.contains(",ann,")),
            "{csv}"
        );
        let csv = export(&planes.token);
        assert!(csv.contains(",'=cmd,") && !csv.contains(",=cmd"), "{csv}");
        await_some("their sum", || {
            let (_, summary) = planes.ask_as(&token, "GET", "/traffic/summary", None);
            let total = &summary["total"];
            let sum = total["up"].as_u64().unwrap() + total["down"].as_u64().unwrap();
            (sum == planes.used(&ids[0])).then_some(())
        });
    });
}

/// RELIABILITY H3: who is another from now on has another token.
#[test]
fn a_token_ends_with_its_users_role_and_time() {
    on_each(|planes| {
        let id = planes.user("ann", json!({}));
        let path = format!("/users/{id}");
        for role in ["admin", "user"] {
            let token = planes.login("ann", PASSWORD).unwrap();
            assert_eq!(planes.ask_as(&token, "GET", "/auth/me", None).0, 200);
            planes.must("PATCH", &path, json!({ "role": role }));
            assert_eq!(planes.ask_as(&token, "GET", "/auth/me", None).0, 401, "{role}");
        }
        let token = planes.login("ann", PASSWORD).unwrap();
        planes.must("PATCH", &path, json!({ "expires_at": "2026-01-01T00:00:00Z" }));
        assert_eq!(planes.ask_as(&token, "GET", "/auth/me", None).0, 401);
        assert_eq!(planes.login("ann", PASSWORD), Err(401));
    });
}

/// RELIABILITY H2: a token is what it says, to whom it says, by whom it says.
#[test]
fn tokens_are_checked_whole() {
    on_each(|planes| {
        planes.user("ann", json!({}));
        let token = planes.login("ann", PASSWORD).unwrap();
        let status = |token: &str| planes.ask_as(token, "GET", "/auth/me", None).0;
        assert_eq!((status(&token), status(&forged(&planes, &token, |_| {}))), (200, 200));
        for (claim, value) in [
            ("iss", json!("somebody")),
            ("aud", json!("something")),
            ("exp", json!(1)),
            ("iat", json!(i64::MAX)),
            ("sub", json!("999999")),
            ("sub", json!("1; drop")),
            ("epoch", json!(1)),
            ("exp", Value::Null),
            ("aud", Value::Null),
        ] {
            let forged = forged(&planes, &token, |claims| claims[claim] = value.clone());
            assert_eq!(status(&forged), 401, "{claim} {value}");
        }
    });
}

/// A refresh token is good once; one that comes again ends what came of it.
#[test]
fn a_refresh_token_is_good_once() {
    on_each(|planes| {
        planes.user("ann", json!({}));
        let folder = tempfile::tempdir().unwrap();
        let jar = |name: &str| folder.path().join(name);
        let post = |path: &str, body: &str, from: &str, to: &str| {
            let output = Command::new("curl")
                .args(["-s", "-i", "--max-time", "20", "-H", "Content-Type: application/json"])
                .args(["-X", "POST", "-d", body, "-b"])
                .arg(jar(from))
                .arg("-c")
                .arg(jar(to))
                .arg(format!("http://{}/api/v1/auth/{path}", planes.api))
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let status: u16 = text.split(' ').nth(1).unwrap().parse().unwrap();
            let token =
                text.split("\"access_token\":\"").nth(1).and_then(|rest| rest.split('"').next());
            (status, token.unwrap_or_default().to_owned(), text)
        };
        let status = |token: &str| planes.ask_as(token, "GET", "/auth/me", None).0;
        let login = json!({ "username": "ann", "password": PASSWORD }).to_string();
        let (_, _, answer) = post("login", &login, "none", "first");
        let cookie = answer.lines().find(|line| line.starts_with("set-cookie:")).unwrap();
        let parts: Vec<&str> = cookie.split("; ").skip(1).collect();
        // Seven days; plain HTTP, so not `Secure`.
        let expected = ["Path=/api/v1/auth", "HttpOnly", "SameSite=Strict", "Max-Age=604800"];
        assert_eq!(parts, expected, "{cookie}");
        let (renewed, token, _) = post("refresh", "", "first", "second");
        assert_eq!((renewed, status(&token)), (200, 200));
        let (renewed, token, _) = post("refresh", "", "second", "third");
        assert_eq!((renewed, status(&token)), (200, 200));
        // The first again: somebody has taken it.
        assert_eq!(post("refresh", "", "first", "none").0, 401);
        assert_eq!(status(&token), 401);
        assert_eq!(post("refresh", "", "third", "none").0, 401);
        let log = planes.must("GET", "/logs/audit?action=auth.token_reused", Value::Null);
        let line = &log["items"][0];
        assert_eq!((&line["subject"], &line["address"]), (&json!("ann"), &json!("127.0.0.1")));
        // Whoever has it can do no more with it: a later login stays.
        let (_, token, _) = post("login", &login, "none", "fourth");
        assert_eq!(post("refresh", "", "first", "none").0, 401);
        assert_eq!((status(&token), post("refresh", "", "fourth", "fifth").0), (200, 200));
        assert_eq!(post("refresh", "", "none", "none").0, 401);
    });
}

/// RELIABILITY H4 and what an operator scrapes.
#[test]
fn answers_are_guarded_and_counted() {
    on_each(|planes| {
        let curl = |path: &str| {
            let url = format!("http://{}{path}", planes.api);
            let output = Command::new("curl").args(["-s", "-i", "--max-time", "20", &url]).output();
            String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
        };
        let docs = curl("/api/docs/");
        assert!(docs.starts_with("HTTP/1.1 200"), "{docs}");
        assert!(docs.contains("content-security-policy: default-src 'self'"), "{docs}");
        // All that the page takes is served here.
        let parts: Vec<&str> = ["src=\"", "href=\""]
            .iter()
            .flat_map(|mark| docs.split(mark).skip(1))
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert!(parts.len() > 3, "{docs}");
        for part in parts {
            assert!(!part.contains("//"), "{part}");
            let got = curl(&format!("/api/docs/{}", part.trim_start_matches("./")));
            assert!(got.starts_with("HTTP/1.1 200"), "{part}: {got}");
        }
        let missing = curl("/api/v1/users");
        assert!(missing.contains("content-security-policy: default-src 'self'"), "{missing}");
        assert!(!missing.contains("unsafe-inline"), "{missing}");
        for part in ["401", "x-content-type-options: nosniff", "cache-control: no-store"] {
            assert!(missing.contains(part), "{missing}");
        }
        assert_eq!(planes.login("admin", "a wrong one"), Err(401));
        planes.control.await_line("result=\"rejected\"");
        let _node = planes.node("edge");
        let metrics = await_some("a node", || {
            let metrics = curl("/metrics");
            metrics.contains("culvert_control_nodes_connected 1").then_some(metrics)
        });
        for part in [
            "culvert_control_database_up 1",
            "culvert_control_generation ",
            "culvert_control_requests_total{status=\"4xx\"} ",
            "culvert_control_records_total ",
            "culvert_control_logins_total{result=\"accepted\"} 1",
            "culvert_control_logins_total{result=\"rejected\"} 1",
            "culvert_control_build_info{version=",
        ] {
            assert!(metrics.contains(part), "no {part} in {metrics}");
        }
    });
}

/// What is exported can be imported, with all limits; a spreadsheet runs none of it.
#[test]
fn users_go_out_and_come_back() {
    on_each(|planes| {
        let limits = json!({
            "up": 1000, "down": 2000, "burst": 3000, "sessions": 4, "new_sessions_per_second": 5,
            "devices": 6, "evict_oldest": true, "source_addresses": ["10.0.0.0/8", "192.0.2.1/32"],
            "egress_address": "192.0.2.9", "quota_bytes": 7000, "quota_period": "week",
        });
        let more = json!({
            "limits": limits, "groups": ["a", "night shift"], "comment": "'=1+1, \"said\"\r\nand more",
            "expires_at": "2099-01-01T00:00:00Z", "proxy_access": false, "role": "admin",
        });
        let id = planes.user("-ann", more);
        let before = planes.must("GET", &format!("/users/{id}"), Value::Null);
        let (_, csv) = planes.raw(&planes.token, "GET", "/api/v1/users/export.csv", None);
        assert!(csv.contains("\n'-ann,") && csv.contains("\"''=1+1, \"\"said\"\""), "{csv}");
        planes.must("DELETE", &format!("/users/{id}"), Value::Null);
        // The password is a column that is not exported; the first line after the head is the admin.
        let mut reader = csv::Reader::from_reader(csv.as_bytes());
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut head = reader.headers().unwrap().clone();
        head.push_field("password");
        writer.write_record(&head).unwrap();
        for mut row in reader.records().map(Result::unwrap).filter(|row| &row[0] == "'-ann") {
            row.push_field("a long password");
            writer.write_record(&row).unwrap();
        }
        let csv = String::from_utf8(writer.into_inner().unwrap()).unwrap();
        let (status, answer) = planes.import("/api/v1/users/import", &csv);
        assert_eq!(status, 201, "{answer}");
        let mut after = planes.must("GET", "/users?q=-ann", Value::Null)["items"][0].clone();
        for key in ["id", "created_at", "updated_at"] {
            after[key] = before[key].clone();
        }
        assert_eq!(after, before);
    });
}

#[test]
fn lists_are_sorted_and_say_by_what() {
    on_each(|planes| {
        for name in ["b", "a", "c"] {
            planes.user(name, json!({}));
            let entry =
                json!({ "cidr": format!("10.0.0.{}", name.as_bytes()[0]), "comment": name });
            planes.must("POST", "/whitelist", entry);
        }
        let sorted = |path: &str, key: &str| {
            let list = planes.must("GET", path, Value::Null);
            let items = list["items"].as_array().unwrap().iter();
            items.map(|item| item[key].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(sorted("/users?sort=-name", "name"), ["c", "b", "admin", "a"]);
        assert_eq!(sorted("/whitelist?sort=cidr&q=10.0", "comment"), ["a", "b", "c"]);
        assert_eq!(sorted("/whitelist?q=b", "comment"), ["b"]);
        // A part is a part, in whichever case, and what it holds means nothing else.
        assert_eq!(sorted("/whitelist?q=B", "comment"), ["b"]);
        planes.user("D_d%d!", json!({}));
        for (part, found) in [("_", 1), ("%25", 1), ("d!", 1), ("D_D%25", 1), ("%5C", 0), ("x", 0)]
        {
            let names = sorted(&format!("/users?q={part}"), "name");
            assert_eq!(names, ["D_d%d!"][..found], "{part}");
        }
        let (status, told) = planes.ask("GET", "/whitelist?sort=moon", None);
        assert_eq!(status, 400);
        assert!(told["detail"].as_str().unwrap().contains("id, cidr, created_at"), "{told}");
        let list = planes.must("GET", "/whitelist", Value::Null);
        let path = format!("/whitelist/{}", list["items"][0]["id"].as_str().unwrap());
        let entry = planes.must("PUT", &path, json!({ "cidr": "192.0.2.0/24" }));
        assert_eq!(entry["cidr"], "192.0.2.0/24");
        assert_eq!(planes.must("GET", &path, Value::Null), entry);
    });
}

/// Keys may come by the environment; then there are no files of them.
#[test]
fn keys_are_given_by_the_environment() {
    let key = |byte: u8| base64::prelude::BASE64_STANDARD.encode([byte; 32]);
    let names = ["CULVERT_CTL_KEYS_JWT", "CULVERT_CTL_KEYS_SEAL"];
    let environment = vec![(names[0], key(1)), (names[1], key(2))];
    let planes = Planes::start_as(None, "", environment);
    let token = planes.login_admin();
    assert_eq!(planes.ask_as(&token, "GET", "/auth/me", None).0, 200);
    for name in ["jwt.key", "seal.key"] {
        assert!(!planes.state().join(name).exists(), "{name}");
    }
    assert!(
        jsonwebtoken::decode::<Value>(
            &token,
            &jsonwebtoken::DecodingKey::from_secret(&[1; 32]),
            &{
                let mut validation = jsonwebtoken::Validation::default();
                validation.set_audience(&["culvert-api"]);
                validation
            }
        )
        .is_ok()
    );
    let (done, told) = planes.command(&["user", "list", "--set", "keys.jwt=short"], "");
    assert!(!done && told.contains("keys.jwt") && told.contains("32 bytes"), "{told}");
}

/// What the command line tells is what there is; a schema that is up to date stays.
#[test]
fn the_command_line_lists_and_migrates() {
    on_each(|planes| {
        planes.user("ann", json!({}));
        let _node = planes.node("edge");
        let run = |words: &[&str]| {
            let (done, told) = planes.command(words, "");
            assert!(done, "{words:?}: {told}");
            told
        };
        let users = run(&["user", "list"]);
        assert!(
            users.contains("\tadmin\tadmin\tactive") && users.contains("\tann\tuser\tactive"),
            "{users}"
        );
        assert!(run(&["node", "list"]).contains("\tedge\tactive\t"), "{users}");
        run(&["migrate"]);
        assert_eq!(planes.must("GET", "/users", Value::Null)["total"], 2);
        for words in [["user", "disable", "nobody"], ["node", "revoke", "nowhere"]] {
            let (done, told) = planes.command(&words, "");
            assert!(!done && told.contains("there is no"), "{told}");
        }
    });
}

/// A user who was there before the first start does not keep the first admin from being made; one who has the
/// name of it is told of.
#[test]
fn an_admin_is_made_beside_users() {
    on_each(|mut planes| {
        planes.control.kill();
        planes.forget_database();
        let file = planes.state().join("initial-admin");
        std::fs::remove_file(&file).unwrap();
        for name in ["bob", "admin"] {
            let (done, told) = planes.command(&["user", "add", name], PASSWORD);
            assert!(done, "{told}");
        }
        planes.restart_unready();
        planes.control.await_failure();
        assert!(planes.control.lines().contains("user add --admin"), "{}", planes.control.lines());
        assert!(!file.exists());
        planes.sql("UPDATE users SET name = 'other' WHERE name = 'admin'");
        planes.restart_control();
        planes.token = planes.login("admin", &planes.admin_password()).unwrap();
        assert_eq!(planes.must("GET", "/users", Value::Null)["total"], 3);
    });
}

/// Control planes of one database have the same keys.
#[test]
fn other_keys_than_the_databases_are_refused() {
    on_each(|mut planes| {
        planes.control.kill();
        for name in ["seal.key", "link-authority.key"] {
            let path = planes.state().join(name);
            let kept = std::fs::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            planes.restart_unready();
            planes.control.await_failure();
            let told = planes.control.lines();
            assert!(told.contains(&format!("this database knows another {name}")), "{told}");
            std::fs::write(&path, kept).unwrap();
        }
        // Tokens are made anew.
        std::fs::remove_file(planes.state().join("jwt.key")).unwrap();
        planes.restart_unready();
        planes.control.await_line("another jwt.key");
        planes.await_listening();
        assert_eq!(planes.ask("GET", "/users", None).0, 401);
        planes.token = planes.login_admin();
        planes.control.kill();
        planes.restart_control();
        assert_eq!(planes.ask("GET", "/users", None).0, 200);
    });
}

/// The file with the first password is there as long as that is good.
#[test]
fn the_first_password_is_forgotten_with_its_use() {
    on_each(|planes| {
        let file = planes.state().join("initial-admin");
        assert!(file.exists());
        let (done, told) = planes.command(&["user", "passwd", "admin"], "quite another one");
        assert!(done, "{told}");
        assert!(!file.exists());
        assert!(planes.login("admin", "quite another one").is_ok());
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
        // MySQL takes names with spaces at the end for the same; they are nobody's.
        planes.user("bob", json!({}));
        assert_eq!(planes.login("bob ", PASSWORD), Err(401));
        assert!(planes.login("bob", PASSWORD).is_ok());
        let answers: Vec<_> = (0..12).map(|_| planes.login("ann", "a wrong one")).collect();
        assert!(answers[..9].iter().all(|answer| *answer == Err(401)), "{answers:?}");
        assert_eq!(answers[11], Err(429));
        // A name too long to be one is no way around it.
        let long = "x".repeat(300);
        let answers: Vec<_> = (0..12).map(|_| planes.login(&long, "a wrong one")).collect();
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
            // RELIABILITY H7.
            (
                "POST",
                "/filters",
                json!({ "action": "deny", "kind": "domain_regex", "value": "(a{1,1000}){1,1000}" }),
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
            let began = Instant::now();
            let (got, answer) = planes.ask(method, path, body);
            assert_eq!(got, status, "{method} {path} {body:?}: {answer}");
            let is_quick = !is_soak() || began.elapsed() < Duration::from_millis(50);
            assert!(is_quick || path != "/filters", "{body:?}: {:?}", began.elapsed());
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
        assert!(csv.contains("user7,user,active,true,,a b,,,,,,,false,,,1000,month,,"), "{csv}");
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

/// Whatever is changed, by whatever route, leaves a line that says who, from where and what.
#[test]
fn no_change_goes_without_a_line() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        let ann = planes.user("ann", json!({ "limits": { "quota_bytes": 1 << 30 } }));
        let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
        let edge = nodes["items"][0]["id"].as_str().unwrap().to_owned();
        let mut held = await_some("tunnel", || node.tunnel("ann", target).ok());
        let session = await_some("session", || {
            let online = planes.must("GET", "/online", Value::Null);
            Some(online["items"][0]["id"].as_str()?.to_owned())
        });
        let token = planes.login("ann", PASSWORD).unwrap();
        let filter = json!({ "action": "deny", "kind": "domain", "value": "a.example" });
        let rule = json!({ "name": "r", "action": "deny", "when": { "port": ["1"] } });
        // With {} for what was made last.
        let steps = [
            ("POST", "/filters", filter.clone(), "filter.create"),
            ("PUT", "/filters/{}", filter, "filter.update"),
            ("DELETE", "/filters/{}", Value::Null, "filter.delete"),
            (
                "POST",
                "/filters/import",
                json!({ "action": "deny", "kind": "domain", "values": ["b.example"] }),
                "filter.import",
            ),
            ("POST", "/whitelist", json!({ "cidr": "127.0.0.0/8" }), "whitelist.create"),
            ("PUT", "/whitelist/{}", json!({ "cidr": "127.0.0.0/9" }), "whitelist.update"),
            ("DELETE", "/whitelist/{}", Value::Null, "whitelist.delete"),
            ("POST", "/rules", rule.clone(), "rule.create"),
            ("PUT", "/rules/{}", rule, "rule.update"),
            ("POST", "/rules/reorder", json!({ "ids": ["{}"] }), "rule.reorder"),
            ("DELETE", "/rules/{}", Value::Null, "rule.delete"),
            ("PATCH", "/settings", json!({ "deny_ports": [26] }), "settings.update"),
            (
                "POST",
                "/traffic/limits",
                json!({ "kind": "group", "subject": "staff", "up": 1000 }),
                "limit.create",
            ),
            (
                "PUT",
                "/traffic/limits/{}",
                json!({ "kind": "group", "subject": "staff", "up": 2000 }),
                "limit.update",
            ),
            ("DELETE", "/traffic/limits/{}", Value::Null, "limit.delete"),
            ("DELETE", &format!("/online/{session}"), Value::Null, "online.end_session"),
            ("DELETE", &format!("/online/users/{ann}"), Value::Null, "online.end_user"),
            ("POST", &format!("/users/{ann}/usage/reset"), Value::Null, "user.usage_reset"),
            (
                "POST",
                &format!("/users/{ann}/password"),
                json!({ "password": "another password" }),
                "user.password",
            ),
            ("POST", &format!("/proxy/nodes/{edge}/drain"), Value::Null, "node.drain"),
            ("POST", "/proxy/nodes", json!({ "name": "far" }), "node.add"),
            ("POST", "/proxy/nodes/{}/identity", Value::Null, "node.identity"),
            ("DELETE", "/proxy/nodes/{}", Value::Null, "node.revoke"),
            ("DELETE", &format!("/users/{ann}"), Value::Null, "user.delete"),
        ];
        let lines = |action: &str| {
            planes.must("GET", &format!("/logs/audit?action={action}&sort=-id"), Value::Null)
        };
        let (mut made, mut changed) = (String::new(), Vec::new());
        for (method, path, body, action) in steps {
            let before = lines(action)["total"].as_u64().unwrap();
            let path = path.replace("{}", &made);
            let body = serde_json::from_str(&body.to_string().replace("{}", &made)).unwrap();
            let answer = planes.must(method, &path, body);
            if let Some(id) = answer["id"].as_str().or(answer["node"]["id"].as_str()) {
                made = id.to_owned();
            }
            let log = lines(action);
            assert_eq!(log["total"].as_u64(), Some(before + 1), "{method} {path}");
            let line = &log["items"][0];
            assert_eq!((&line["actor"], &line["address"]), (&json!("admin"), &json!("127.0.0.1")));
            assert!(line["subject"].as_str().is_some(), "{line}");
            // What was and what is, where there is either.
            let values = [!line["old"].is_null(), !line["new"].is_null()];
            match action.rsplit('.').next().unwrap() {
                "create" | "add" | "import" => assert_eq!(values, [false, true], "{line}"),
                "update" | "identity" | "revoke" | "reorder" => {
                    assert_eq!(values, [true, true], "{line}");
                }
                "delete" => assert_eq!(values, [true, false], "{line}"),
                _ => {}
            }
            changed.push((method.to_owned(), path));
        }
        // No route was forgotten: others change nothing, or are tried elsewhere.
        let elsewhere = [
            "/auth/login",
            "/auth/refresh",
            "/auth/logout",
            "/auth/password",
            "/auth/totp",
            "/auth/totp/confirm",
            "/auth/totp/remove",
            "/users/{id}/totp",
            "/users",
            "/users/import",
            "/rules/test",
            "/filters/test",
        ];
        let is_of = |template: &str, path: &str| {
            let (template, path) = (template.split('/'), path.split('/'));
            template.clone().count() == path.clone().count()
                && template.zip(path).all(|(named, part)| named.starts_with('{') || named == part)
        };
        for (template, methods) in document(&planes)["paths"].as_object().unwrap() {
            let template = template.strip_prefix("/api/v1").unwrap_or(template);
            for method in methods.as_object().unwrap().keys().filter(|method| *method != "get") {
                let method = method.to_uppercase();
                let tried =
                    changed.iter().any(|(way, path)| *way == method && is_of(template, path));
                let is_else = elsewhere.contains(&template)
                    || (method == "PATCH" && template == "/users/{id}");
                assert!(tried || is_else, "{method} {template}");
            }
        }
        assert!(held.read(&mut [0]).is_err());
        // What a user does to what is their own is theirs.
        assert_eq!(planes.ask_as(&token, "POST", "/auth/logout", None).0, 401, "the user is gone");
        planes.user("bob", json!({}));
        let token = planes.login("bob", PASSWORD).unwrap();
        let change = json!({ "old_password": PASSWORD, "new_password": "another password" });
        assert_eq!(planes.ask_as(&token, "POST", "/auth/password", Some(&change)).0, 204);
        let token = planes.login("bob", "another password").unwrap();
        assert_eq!(planes.ask_as(&token, "POST", "/auth/logout", None).0, 204);
        for action in ["user.password", "auth.logout"] {
            assert_eq!(lines(action)["items"][0]["actor"], "bob", "{action}");
        }
    });
}

#[test]
fn the_audit_log_has_what_was_and_what_is() {
    on_each(|planes| {
        // The last change of an action: who, and the values of a key before and after.
        let last = |action: &str, key: &str| {
            let log = planes.must("GET", &format!("/logs/audit?action={action}"), Value::Null);
            let line = log["items"][0].clone();
            (
                line["actor"].clone(),
                line["old"].pointer(key).cloned(),
                line["new"].pointer(key).cloned(),
            )
        };
        let by = |actor: &str, old: Value, new: Value| (json!(actor), Some(old), Some(new));

        // Rates are in a table of their own.
        let id = planes.user("ann", json!({ "limits": { "down": 1000 } }));
        assert_eq!(last("user.create", "/limits/down"), (json!("admin"), None, Some(json!(1000))));
        let path = format!("/users/{id}");
        planes.must("PATCH", &path, json!({ "limits": { "down": 2000 } }));
        assert_eq!(last("user.update", "/limits/down"), by("admin", json!(1000), json!(2000)));
        planes.must("DELETE", &path, Value::Null);
        assert_eq!(last("user.delete", "/limits/down"), (json!("admin"), Some(json!(2000)), None));
        let csv = "name,password,quota_bytes\nbea,long enough,77\n";
        assert_eq!(planes.import("/api/v1/users/import", csv).0, 201);
        assert_eq!(last("user.import", "/value/0/limits/quota_bytes").2, Some(json!(77)));

        let run = |words: &[&str], input: &str| {
            let (done, told) = planes.command(words, input);
            assert!(done, "{words:?}: {told}");
        };
        run(&["user", "add", "carl"], "a long password");
        let (actor, old, new) = last("user.create", "/name");
        assert!(actor.as_str().unwrap().starts_with("cli:"), "{actor}");
        assert_eq!((old, new), (None, Some(json!("carl"))));
        run(&["user", "disable", "carl"], "");
        let actor = actor.as_str().unwrap();
        assert_eq!(last("user.update", "/status"), by(actor, json!("active"), json!("disabled")));
        run(&["node", "add", "east"], "");
        let (_, _, first) = last("node.add", "/certificate");
        run(&["node", "identity", "east"], "");
        let (_, old, second) = last("node.identity", "/certificate");
        assert_eq!(old, first);
        assert_ne!(second, first);
        run(&["node", "revoke", "east"], "");
        assert_eq!(last("node.revoke", "/status"), by(actor, json!("active"), json!("revoked")));

        // An admin who is the only one stays, by the command line too.
        let (done, told) = planes.command(&["user", "disable", "admin"], "");
        assert!(!done && told.contains("no admin"), "{told}");
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

/// Waits until codes are good for a while yet.
fn await_fresh_step() {
    let into_step = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 30;
    await_some("another step", || (into_step() < 22).then_some(()));
}

/// The code of an authenticator app so many steps from now, by another implementation.
fn code(secret: &str, steps: i32) -> String {
    const PROGRAM: &str = "import sys, hmac, base64, struct, time
counter = int(time.time()) // 30 + int(sys.argv[2])
digest = hmac.new(base64.b32decode(sys.argv[1]), struct.pack('>Q', counter), 'sha1').digest()
at = digest[-1] & 15
print('%06d' % ((struct.unpack('>I', digest[at:at + 4])[0] & 0x7fffffff) % 10**6))";
    let steps = steps.to_string();
    let output = Command::new("python3").args(["-c", PROGRAM, secret, &steps]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_second_factor_is_asked_for_and_its_codes_are_good_once() {
    on_each(|planes| {
        let id = planes.user("ann", json!({}));
        let ann = planes.login("ann", PASSWORD).unwrap();
        let ask = |path: &str, body: Value| planes.ask_as(&ann, "POST", path, Some(&body));
        assert_eq!(ask("/auth/totp", json!({ "password": "not this one" })).0, 403);
        let (status, enrolled) = ask("/auth/totp", json!({ "password": PASSWORD }));
        assert_eq!(status, 200, "{enrolled}");
        let secret = enrolled["secret"].as_str().unwrap();
        assert!(enrolled["uri"].as_str().unwrap().starts_with("otpauth://totp/Culvert:ann?"));
        // Until it is confirmed the password is enough.
        planes.login("ann", PASSWORD).unwrap();
        assert_eq!(ask("/auth/totp/confirm", json!({ "code": "000000" })).0, 403);
        await_fresh_step();
        assert_eq!(ask("/auth/totp/confirm", json!({ "code": code(secret, -1) })).0, 204);
        // Tokens of before are void: they were had by the password alone.
        assert_eq!(planes.ask_as(&ann, "GET", "/auth/me", None).0, 401);
        assert_eq!(planes.login("ann", PASSWORD), Err(401));
        let login = |code: &str| {
            let body = json!({ "username": "ann", "password": PASSWORD, "totp": code });
            planes.ask_as("", "POST", "/auth/login", Some(&body))
        };
        assert_eq!(login("123").0, 401);
        let present = code(secret, 0);
        let (status, access) = login(&present);
        assert_eq!((status, login(&present).0), (200, 401));
        let ann = access["access_token"].as_str().unwrap().to_owned();
        let ask = |path: &str, body: Value| planes.ask_as(&ann, "POST", path, Some(&body));
        // Another takes its place only once it is removed.
        assert_eq!(ask("/auth/totp", json!({ "password": PASSWORD })).0, 409);
        // No secret lies in the database as it is.
        let (_, backup) = planes.command(&["backup"], "");
        assert!(backup.contains("totp_secret") && !backup.contains(secret));
        let next = json!({ "code": code(secret, 1) });
        assert_eq!(ask("/auth/totp/remove", next).0, 204);
        planes.login("ann", PASSWORD).unwrap();
        // An admin, or the command line, helps who has lost the device.
        for help in 0..2 {
            let ann = planes.login("ann", PASSWORD).unwrap();
            let ask = |path: &str, body: Value| planes.ask_as(&ann, "POST", path, Some(&body));
            let secret = ask("/auth/totp", json!({ "password": PASSWORD })).1["secret"].clone();
            await_fresh_step();
            let code = code(secret.as_str().unwrap(), 0);
            assert_eq!(ask("/auth/totp/confirm", json!({ "code": code })).0, 204);
            assert_eq!(planes.login("ann", PASSWORD), Err(401));
            if help == 0 {
                planes.must("DELETE", &format!("/users/{id}/totp"), Value::Null);
            } else {
                assert!(planes.command(&["user", "totp-off", "ann"], "").0);
            }
            planes.login("ann", PASSWORD).unwrap();
        }
    });
}

/// Behind a proxy that is trusted, failed logins are counted by the client it names.
#[test]
fn the_server_speaks_tls_and_knows_clients_behind_proxies() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let renew = || {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).unwrap();
        std::fs::write(path("cert.pem"), made.cert.pem()).unwrap();
    };
    renew();
    let tls = format!(
        "tls = {{ certificate = '{}', key = '{}' }}\ntrusted_proxies = ['127.0.0.0/8']\n",
        path("cert.pem").display(),
        path("key.pem").display()
    );
    let planes = Planes::start_with(None, &tls);
    let port = planes.api.port();
    let login = |user: &str, password: &str, more: &[&str]| {
        let address = format!("https://localhost:{port}/api/v1/auth/login");
        let output = Command::new("curl")
            .args(["-s", "-i", "-w", "%{http_code}", "--max-time", "10", "--resolve"])
            .arg(format!("localhost:{port}:127.0.0.1"))
            .arg("--cacert")
            .arg(path("cert.pem"))
            .args(["-H", "Content-Type: application/json", "-d"])
            .arg(json!({ "username": user, "password": password }).to_string())
            .args(more)
            .arg(address)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let curl = |more: &[&str]| {
        let text = login("nobody", "x", more);
        text[text.len() - 3..].to_owned()
    };
    let answer = login("admin", &planes.admin_password(), &[]);
    let cookie = answer.lines().find(|line| line.starts_with("set-cookie:")).unwrap();
    assert!(cookie.contains("; Secure"), "{cookie}");
    let from = |client: &str| curl(&["-H", &format!("X-Forwarded-For: 203.0.113.200, {client}")]);
    let answers: Vec<String> = (0..11).map(|_| from("192.0.2.1")).collect();
    assert_eq!((answers[9].as_str(), answers[10].as_str()), ("401", "429"));
    assert_eq!(from("192.0.2.2"), "401");
    // Another certificate is taken up without a restart.
    renew();
    planes.control.await_line("another certificate");
    assert_eq!(from("192.0.2.3"), "401");
}

#[test]
fn what_moves_is_told_as_it_happens() {
    on_each(|planes| {
        let node = planes.node("edge");
        planes.user("ann", json!({}));
        let target = echo();
        let mut stream = await_some("tunnel", || node.tunnel("ann", target).ok());
        ping(&mut stream).unwrap();
        let users = await_some("session", || {
            let users = planes.must("GET", "/online/users", Value::Null);
            (users["total"] == 1).then(|| users["items"][0].clone())
        });
        assert_eq!(
            (&users["name"], &users["sessions"], &users["nodes"]),
            (&json!("ann"), &json!(1), &json!(1))
        );

        let mut live = TcpStream::connect(planes.api).unwrap();
        let token = planes.login("admin", &planes.admin_password()).unwrap();
        write!(
            live,
            "GET /api/v1/traffic/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\r\n"
        )
        .unwrap();
        let mut lines = BufReader::new(live).lines().map_while(Result::ok);
        let event = lines.find(|line| line.starts_with("data:")).unwrap();
        let event: Value = serde_json::from_str(&event[5..]).unwrap();
        assert_eq!((&event["nodes"], &event["sessions"]), (&json!(1), &json!(1)));
        // It ends with the token.
        assert_eq!(planes.ask_as(&token, "POST", "/auth/logout", None).0, 204);
        assert!(lines.filter(|line| line.starts_with("data:")).count() < 4);
    });
}

/// RELIABILITY H8: what is secret is nowhere as it is.
#[test]
fn no_secret_lies_about() {
    on_each(|planes| {
        let mut canaries = Vec::new();
        let mut canary = || {
            canaries.push(format!("canary-{}-7f3a", canaries.len()));
            canaries.last().unwrap().clone()
        };
        let (node, target) = (planes.node("edge"), web(1));
        // Passwords in every way they are set,
        let (first, second) = (canary(), canary());
        let id = planes.user("ann", json!({ "password": first }));
        await_some("tunnel", || node.tunnel_with("ann", &first, target).ok());
        let token = planes.login("ann", &first).unwrap();
        let change = json!({ "old_password": first, "new_password": second });
        assert_eq!(planes.ask_as(&token, "POST", "/auth/password", Some(&change)).0, 204);
        let last = canary();
        planes.must("POST", &format!("/users/{id}/password"), json!({ "password": last }));
        let csv = format!("name,password\nbob,{}\ncarol,{}\n", canary(), canary());
        assert_eq!(planes.import("/api/v1/users/import", &csv).0, 201);
        assert!(planes.command(&["user", "add", "dave"], &canary()).0);
        assert!(planes.command(&["user", "passwd", "dave"], &canary()).0);
        // and in those in which they are refused;
        let refused = format!("name,password\neve,{}\nbob,{}\n", canary(), canary());
        assert_eq!(planes.import("/api/v1/users/import", &refused).0, 409);
        let body = json!({ "name": "a\nb", "password": canary() });
        assert_eq!(planes.ask("POST", "/users", Some(&body)).0, 422);
        let body = format!("{{\"name\": \"eve\", \"password\": \"{}\", oh", canary());
        assert_eq!(planes.raw(&planes.token, "POST", "/api/v1/users", Some(&body)).0, 400);
        assert_eq!(planes.login("ann", &canary()).err(), Some(401));
        let change = json!({ "old_password": canary(), "new_password": canary() });
        let token = planes.login("ann", &last).unwrap();
        assert_eq!(planes.ask_as(&token, "POST", "/auth/password", Some(&change)).0, 403);
        assert_eq!(planes.ask_as(&canary(), "GET", "/auth/me", None).0, 401);
        // through the proxy too, with what is said inside.
        assert_eq!(node.tunnel_with("ann", &canary(), target).err(), Some(255));
        await_some("tunnel", || node.tunnel_with("ann", &last, target).ok());
        let mut forward = |user: &str| {
            let output = Command::new("curl")
                .args(["-s", "-w", "%{http_code}", "-o", "/dev/null", "--max-time", "20"])
                .args(["-x", &format!("http://{}", node.proxy), "-U", user])
                .args(["-H", &format!("Authorization: Bearer {}", canary())])
                .arg(format!("http://{target}/?token={}", canary()))
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(forward(&format!("ann:{last}")), "200");
        assert_eq!(forward("ann:another one's"), "407");
        let enrolled = planes.must("POST", "/proxy/nodes", json!({ "name": "afar" }));
        let key = enrolled["identity"].as_str().unwrap().lines().nth(1).unwrap().to_owned();
        let admin = planes.admin_password();
        let (_, backup) = planes.command(&["backup"], "");
        let audit = planes.raw(&planes.token, "GET", "/api/v1/logs/audit/export.csv", None).1;
        let user = planes.must("GET", &format!("/users/{id}"), Value::Null).to_string();
        let mut told = vec![backup, audit, user];
        let folders = [planes.folder.path().join("control"), node.dir.clone()];
        for file in folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap().flatten()) {
            // Keys are kept in files of their own, and the first admin's password until it is changed.
            let name = file.file_name().to_string_lossy().into_owned();
            if file.file_type().unwrap().is_file()
                && !name.ends_with(".key")
                && name != "initial-admin"
            {
                told.push(
                    String::from_utf8_lossy(&std::fs::read(file.path()).unwrap()).into_owned(),
                );
            }
        }
        for program in [planes.control.id(), node.program.id()] {
            let line = std::fs::read(format!("/proc/{program}/cmdline")).unwrap();
            told.push(String::from_utf8_lossy(&line).into_owned());
        }
        told.extend([planes.control.lines(), node.program.lines()]);
        let secrets = canaries.iter().chain([&token, &key, &admin]);
        assert!(canaries.len() >= 20);
        for secret in secrets {
            assert!(told.iter().all(|text| !text.contains(secret)), "{secret}");
        }
    });
}

/// What no node would take is refused here: it would keep all nodes from following.
#[test]
fn what_nodes_would_refuse_is_refused() {
    on_each(|planes| {
        let node = planes.node("edge");
        for to in [
            "10.0.0.256:80",
            "db.1:5432",
            "a.example:+443",
            "a.example:000443",
            "a.example:0",
            "a.example",
            "::1:80",
            "a b:80",
        ] {
            let rule = json!({ "name": "r", "action": "redirect", "to": to });
            assert_eq!(planes.ask("POST", "/rules", Some(&rule)).0, 422, "{to}");
        }
        for kind in ["domain", "domain_suffix"] {
            for value in ["127.1", "12345", "10.0.0.1.", "0x7f.1", "example.1", "a..b", "::1"] {
                let filter = json!({ "action": "deny", "kind": kind, "value": value });
                assert_eq!(planes.ask("POST", "/filters", Some(&filter)).0, 422, "{value}");
                let rule = json!({ "name": "r", "action": "deny", "when": { kind: [value] } });
                assert_eq!(planes.ask("POST", "/rules", Some(&rule)).0, 422, "{value}");
            }
        }
        for value in ["a.example.", "B\u{fc}cher.example", "_dmarc.a-b.example"] {
            let filter = json!({ "action": "deny", "kind": "domain", "value": value });
            assert_eq!(planes.ask("POST", "/filters", Some(&filter)).0, 201, "{value}");
        }
        let generation = await_some("a node that follows", || {
            let health = planes.must("GET", "/proxy/health", Value::Null);
            (health["current"] == 1).then(|| health["generation"].clone())
        });
        let nodes = planes.must("GET", "/proxy/nodes", Value::Null);
        assert_eq!(
            (&nodes["items"][0]["generation"], &nodes["items"][0]["refusal"]),
            (&generation, &json!(""))
        );
        drop(node);
    });
}

/// Null takes away what can be away; what is for the admins is.
#[test]
fn a_patch_clears_and_users_do_not_see_comments() {
    on_each(|planes| {
        let more = json!({
            "limits": { "sessions": 3, "up": 1000 }, "groups": ["staff"], "comment": "owes us money",
            "expires_at": "2099-01-01T00:00:00Z",
        });
        let id = planes.user("ann", more);
        let path = format!("/users/{id}");
        let token = planes.login("ann", PASSWORD).unwrap();
        for path in ["/auth/me", &path] {
            let (status, seen) = planes.ask_as(&token, "GET", path, None);
            assert_eq!((status, &seen["comment"], &seen["name"]), (200, &json!(""), &json!("ann")));
        }
        assert_eq!(planes.must("GET", &path, Value::Null)["comment"], "owes us money");
        let nothing = json!({ "status": null, "role": null, "proxy_access": null });
        let same = planes.must("PATCH", &path, nothing);
        assert_eq!((&same["status"], &same["role"]), (&json!("active"), &json!("user")));
        let nulls = json!({ "limits": null, "groups": null, "comment": null, "expires_at": null });
        let cleared = planes.must("PATCH", &path, nulls);
        assert_eq!((&cleared["groups"], &cleared["comment"]), (&json!([]), &json!("")));
        assert_eq!(
            (&cleared["limits"]["sessions"], &cleared["limits"]["up"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(cleared["expires_at"], Value::Null);
    });
}

/// RELIABILITY H2: nor does the token say how it is to be checked.
#[test]
fn a_token_does_not_choose_its_check() {
    on_each(|planes| {
        let token = planes.token.clone();
        let parts: Vec<&str> = token.split('.').collect();
        let key = std::fs::read(planes.state().join("jwt.key")).unwrap();
        let status = |token: &str| planes.ask_as(token, "GET", "/auth/me", None).0;
        let signed = |header: &Value, key: &[u8]| {
            let said = BASE64_URL_SAFE_NO_PAD.encode(header.to_string());
            let said = format!("{said}.{}", parts[1]);
            let key = jsonwebtoken::EncodingKey::from_secret(key);
            let algorithm = match header["alg"].as_str() {
                Some("HS384") => jsonwebtoken::Algorithm::HS384,
                Some("HS512") => jsonwebtoken::Algorithm::HS512,
                _ => jsonwebtoken::Algorithm::HS256,
            };
            let signature = jsonwebtoken::crypto::sign(said.as_bytes(), &key, algorithm).unwrap();
            format!("{said}.{signature}")
        };
        assert_eq!(status(&signed(&json!({ "alg": "HS256", "typ": "JWT" }), &key)), 200);
        let none = |alg: &str| {
            let header = BASE64_URL_SAFE_NO_PAD.encode(json!({ "alg": alg }).to_string());
            format!("{header}.{}.", parts[1])
        };
        let forged = [
            none("none"),
            none("None"),
            none("HS256"),
            format!("{}.{}", parts[0], parts[1]),
            format!("{}.{}.", parts[0], parts[1]),
            signed(&json!({ "alg": "HS384", "typ": "JWT" }), &key),
            signed(&json!({ "alg": "HS512", "typ": "JWT" }), &key),
            signed(&json!({ "alg": "RS256", "typ": "JWT" }), &key),
            signed(&json!({ "alg": "HS256", "typ": "JWT" }), b""),
            signed(&json!({ "alg": "HS256", "typ": "JWT" }), &[0; 64]),
            signed(&json!({ "alg": "HS256", "kid": "/dev/null" }), b""),
            signed(&json!({ "alg": "HS256", "kid": "../../dev/null' UNION SELECT '" }), b""),
            signed(&json!({ "alg": "HS256", "jwk": { "kty": "oct", "k": "AAAA" } }), &[0; 3]),
            signed(&json!({ "alg": "HS256", "jku": "http://127.0.0.1:1/" }), b"key"),
            String::from_utf8(token.bytes().rev().collect()).unwrap(),
            "..".into(),
            "a.b.c".into(),
        ];
        for token in forged {
            assert_eq!(status(&token), 401, "{token}");
        }
    });
}

/// RELIABILITY H1: nothing is open that was not opened, and who opens it is told what that means.
#[test]
fn a_fresh_start_keeps_its_secrets() {
    use std::os::unix::fs::PermissionsExt;
    let planes = Planes::start_with(None, "");
    for name in ["initial-admin", "jwt.key", "seal.key", "link-authority.key"] {
        let mode = std::fs::metadata(planes.state().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let mode = std::fs::metadata(planes.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0);
    for password in ["", "admin", "password", "culvert"] {
        assert_eq!(planes.login("admin", password), Err(401), "{password}");
    }
    drop(planes);

    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("control.toml");
    let dir = folder.path().join("control");
    let text = format!("[server]\nbind = '0.0.0.0:0'\n[state]\ndir = '{}'\n", dir.display());
    std::fs::write(&config, text).unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-control"));
        Program::spawn(command.args(["serve", "-c", config.to_str().unwrap()]))
    };
    let mut open = start();
    let warned = open.await_line("in clear");
    assert!(warned.contains("WARN") && warned.contains("server.tls"), "{warned}");
    open.await_line("listening");
    open.kill();
    // A key that can be guessed is none.
    std::fs::write(dir.join("jwt.key"), "secret").unwrap();
    let mut short = start();
    let said = short.await_line("jwt.key");
    assert!(said.contains("32 bytes"), "{said}");
    short.await_failure();
}

/// Lists and exports of more than one page or part are whole.
#[test]
fn what_is_many_is_paged_and_exported_whole() {
    const MANY: usize = 2300;
    on_each(|planes| {
        planes.user("ann", json!({}));
        // By the database: each by the API would take a hash.
        let insert = |table: &str, row: &dyn Fn(usize) -> String| {
            let rows: Vec<String> = (0..MANY).map(|n| format!("({})", row(n))).collect();
            planes.sql(&format!("INSERT INTO {table} VALUES {}", rows.join(",")));
        };
        insert(
            "users (name, password_hash, role, status, proxy_access, `groups`, evict_oldest, \
             source_addresses, comment, token_epoch, totp_step, created_at, updated_at)",
            &|n| format!("'user {n:04}', '', 'user', 'active', 1, '[]', 0, '[]', '', 0, 0, 0, 0"),
        );
        // One a minute since 2026 began.
        const BEGAN: usize = 1_767_225_600;
        insert(
            "access_logs (node_id, boot, sequence, at, user_id, user_name, client, target, ended, \
             bytes_up, bytes_down, body)",
            &|n| {
                format!(
                    "1, 1, {n}, {}000000, 7, 'cid', '', 'a:{n}', '', 1, 2, '{{}}'",
                    BEGAN + 60 * n
                )
            },
        );
        let path = "/users?sort=name&q=user%20";
        let names: Vec<String> = (0..MANY).map(|n| format!("user {n:04}")).collect();
        let listed = planes.all(path);
        let listed: Vec<&str> = listed.iter().map(|user| user["name"].as_str().unwrap()).collect();
        assert_eq!(listed, names);
        let page = |number: usize| {
            let path = format!("{path}&page={number}&page_size=500");
            let page = planes.must("GET", &path, Value::Null);
            assert_eq!(
                (page["total"].as_u64(), &page["page"]),
                (Some(MANY as u64), &json!(number))
            );
            page["items"].as_array().unwrap().len()
        };
        assert_eq!((page(1), page(5), page(6)), (500, 300, 0));
        let column = |path: &str, index: usize| {
            let (status, csv) = planes.raw(&planes.token, "GET", &format!("/api/v1{path}"), None);
            assert_eq!(status, 200, "{csv}");
            let mut reader = csv::Reader::from_reader(csv.as_bytes());
            let rows = reader.records().map(|row| row.unwrap()[index].to_owned());
            rows.collect::<Vec<_>>()
        };
        let mut exported = column("/users/export.csv", 0);
        exported.retain(|name| name.starts_with("user "));
        assert_eq!(exported, names);

        let targets =
            |numbers: std::ops::Range<usize>| numbers.map(|n| format!("a:{n}")).collect::<Vec<_>>();
        let export = |which: &str| column(&format!("/logs/access/export.csv?{which}"), 4);
        assert_eq!(export("user_id=7"), targets(0..MANY));
        // An hour, its begin but not its end.
        let hour = "user_id=7&from=2026-01-01T10:00:00Z&to=2026-01-01T12:00:00%2B01:00";
        assert_eq!(export(hour), targets(600..660));
        let listed = planes.all(&format!("/logs/access?{hour}&sort=at"));
        let listed: Vec<&str> = listed.iter().map(|log| log["target"].as_str().unwrap()).collect();
        assert_eq!(listed, targets(600..660));
        let wrong = planes.ask("GET", "/logs/access?from=yesterday", None);
        assert_eq!(wrong.0, 400, "{}", wrong.1);
    });
}

/// What the command line changes holds at the nodes of a control plane that runs.
#[test]
fn the_command_line_reaches_nodes() {
    on_each(|planes| {
        let (node, target) = (planes.node("edge"), echo());
        planes.must("PATCH", "/settings", json!({ "allow_internal": ["127.0.0.0/8"] }));
        let run = |words: &[&str], input: &str| {
            let (done, told) = planes.command(words, input);
            assert!(done, "{words:?}: {told}");
        };
        let with = |password: &str| {
            await_some("tunnel", || node.tunnel_with("carl", password, target).ok())
        };
        run(&["user", "add", "carl"], PASSWORD);
        let mut stream = with(PASSWORD);
        ping(&mut stream).unwrap();
        run(&["user", "passwd", "carl"], "another of carl's");
        let began = Instant::now();
        await_cut(&mut stream);
        assert_eq!(node.tunnel("carl", target).err(), Some(255));
        let mut stream = with("another of carl's");
        run(&["user", "disable", "carl"], "");
        await_cut(&mut stream);
        // Two seconds each, for it is another process that edits.
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        run(&["node", "revoke", "edge"], "");
        await_some("the node's end", || {
            let health = planes.must("GET", "/proxy/health", Value::Null);
            (health["online"] == 0).then_some(())
        });
    });
}
