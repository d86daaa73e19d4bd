//! The schema, from one source for SQLite and MySQL. Steps only go forward, and each can be run again:
//! DDL is not transactional in MySQL.

use sea_orm_migration::prelude::*;

/// All steps.
pub(super) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(First)]
    }
}

struct First;

impl MigrationName for First {
    fn name(&self) -> &str {
        "m0001_first"
    }
}

/// A column's kind.
#[derive(Clone, Copy)]
enum Kind {
    /// Text of at most so many characters.
    Name(u32),
    /// Text without a bound worth naming.
    Text,
    /// A number, or a time in microseconds since 1970, UTC.
    Number,
    /// Yes or no.
    Flag,
}
use Kind::{Flag, Name, Number, Text};

/// A table: its columns (a `?` after the name lets it be NULL) and its primary key. Without one it has a
/// number `id` of its own, which is never used again.
fn table(
    name: &'static str,
    columns: &[(&'static str, Kind)],
    key: &[&'static str],
) -> TableCreateStatement {
    let mut table = Table::create();
    table.table(name).if_not_exists();
    if key.is_empty() {
        let mut id = ColumnDef::new("id");
        table.col(id.big_integer().not_null().auto_increment().primary_key());
    }
    for &(name, kind) in columns {
        let (name, null) = match name.strip_suffix('?') {
            Some(name) => (name, true),
            None => (name, false),
        };
        let mut column = ColumnDef::new(name);
        match kind {
            Name(length) => column.string_len(length),
            // MySQL's TEXT ends at 64 KiB.
            Text => column.custom("LONGTEXT"),
            Number => column.big_integer(),
            Flag => column.boolean(),
        };
        if !null {
            column.not_null();
        }
        table.col(column);
    }
    if !key.is_empty() {
        let mut index = Index::create();
        key.iter().for_each(|column| {
            index.col(*column);
        });
        table.primary_key(&mut index);
    }
    table
}

fn tables() -> Vec<TableCreateStatement> {
    vec![
        // One row: the generation that edits count up under its lock.
        table("head", &[("id", Number), ("generation", Number)], &["id"]),
        // Which users and whether the policy changed with a generation.
        table(
            "changes",
            &[("generation", Number), ("user_id", Number)],
            &["generation", "user_id"],
        ),
        table(
            "users",
            &[
                ("name", Name(255)),
                ("password_hash", Name(255)),
                ("role", Name(16)),
                ("status", Name(16)),
                ("proxy_access", Flag),
                ("expires_at?", Number),
                ("groups", Text),
                ("sessions?", Number),
                ("new_sessions_per_second?", Number),
                ("devices?", Number),
                ("evict_oldest", Flag),
                ("source_addresses", Text),
                ("egress_address?", Name(64)),
                ("quota_bytes?", Number),
                ("quota_period?", Name(16)),
                ("comment", Text),
                ("token_epoch", Number),
                ("totp_secret?", Name(255)),
                ("totp_pending?", Name(255)),
                ("totp_step", Number),
                ("created_at", Number),
                ("updated_at", Number),
            ],
            &[],
        ),
        table(
            "bandwidth_limits",
            &[
                ("kind", Name(16)),
                ("subject", Name(255)),
                ("up?", Number),
                ("down?", Number),
                ("burst?", Number),
                ("updated_at", Number),
            ],
            &[],
        ),
        table(
            "url_filters",
            &[
                ("action", Name(16)),
                ("kind", Name(32)),
                ("value", Text),
                ("ports", Text),
                ("enabled", Flag),
                ("comment", Text),
                ("created_at", Number),
            ],
            &[],
        ),
        table(
            "ip_whitelist",
            &[("cidr", Name(64)), ("comment", Text), ("created_at", Number)],
            &[],
        ),
        table(
            "rules",
            &[
                ("position", Number),
                ("name", Name(255)),
                ("enabled", Flag),
                ("conditions", Text),
                ("action", Name(16)),
                ("upstream?", Name(255)),
                ("target?", Name(512)),
                ("created_at", Number),
            ],
            &[],
        ),
        table("settings", &[("name", Name(64)), ("value", Text)], &["name"]),
        table(
            "nodes",
            &[
                ("name", Name(255)),
                ("status", Name(16)),
                ("boot", Number),
                ("version", Name(64)),
                ("generation", Number),
                ("refusal", Text),
                ("connected", Flag),
                ("certificate", Name(64)),
                ("seen_at?", Number),
                ("created_at", Number),
            ],
            &[],
        ),
        table(
            "proxy_heartbeats",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("at", Number),
                ("sessions", Number),
                ("cpu_us", Number),
                ("memory", Number),
                ("up", Number),
                ("down", Number),
                ("ready", Flag),
                ("uptime", Number),
            ],
            &["node_id", "boot", "at"],
        ),
        // The sessions that run, as each boot of a node tells them.
        table(
            "proxy_sessions",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("session", Number),
                ("user_id", Number),
                ("told_at", Number),
                ("body", Text),
            ],
            &["node_id", "boot", "session"],
        ),
        table(
            "access_logs",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("sequence", Number),
                ("at", Number),
                ("user_id", Number),
                ("user_name", Name(255)),
                ("client", Name(64)),
                ("target", Name(300)),
                ("ended", Name(32)),
                ("bytes_up", Number),
                ("bytes_down", Number),
                ("body", Text),
            ],
            &[],
        ),
        // Each boot of a node: when it was last heard of, and what of its reports has been applied.
        table(
            "boots",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("sequence", Number),
                ("uncertain", Number),
                ("ended", Flag),
                ("seen_at", Number),
                // The last command of before it began.
                ("command", Number),
            ],
            &["node_id", "boot"],
        ),
        table(
            "node_usage",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("user_id", Number),
                ("up", Number),
                ("down", Number),
            ],
            &["node_id", "boot", "user_id"],
        ),
        table(
            "leases",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("user_id", Number),
                ("granted", Number),
                ("updated_at", Number),
            ],
            &["node_id", "boot", "user_id"],
        ),
        // By minute.
        table(
            "traffic_logs",
            &[
                ("at", Number),
                ("user_id", Number),
                ("node_id", Number),
                ("up", Number),
                ("down", Number),
            ],
            &["at", "user_id", "node_id"],
        ),
        // By user and period; 0 is since ever.
        table(
            "user_usage",
            &[("user_id", Number), ("period", Number), ("up", Number), ("down", Number)],
            &["user_id", "period"],
        ),
        table(
            "usage_resets",
            &[
                ("user_id", Number),
                ("at", Number),
                ("period", Number),
                ("up", Number),
                ("down", Number),
            ],
            &["user_id", "at"],
        ),
        table(
            "audit_logs",
            &[
                ("at", Number),
                ("actor", Name(255)),
                ("address", Name(64)),
                ("action", Name(64)),
                ("subject", Name(300)),
                ("old", Text),
                ("new", Text),
            ],
            &[],
        ),
        table(
            "refresh_tokens",
            &[
                ("hash", Name(64)),
                ("user_id", Number),
                ("epoch", Number),
                ("used", Flag),
                ("expires_at", Number),
            ],
            &["hash"],
        ),
        // What any control plane asks of a node.
        table(
            "commands",
            &[
                ("node_id", Number),
                ("boot", Number),
                ("kind", Name(32)),
                ("argument", Number),
                ("at", Number),
            ],
            &[],
        ),
    ]
}

/// Table, unique, columns.
const INDICES: &[(&str, bool, &[&str])] = &[
    ("users", true, &["name"]),
    ("bandwidth_limits", true, &["kind", "subject"]),
    ("ip_whitelist", true, &["cidr"]),
    ("nodes", true, &["name"]),
    ("nodes", false, &["certificate"]),
    ("boots", false, &["seen_at"]),
    ("leases", false, &["user_id"]),
    ("access_logs", true, &["node_id", "boot", "sequence"]),
    ("access_logs", false, &["at"]),
    ("access_logs", false, &["user_id", "at"]),
    ("audit_logs", false, &["at"]),
    ("refresh_tokens", false, &["user_id"]),
    ("traffic_logs", false, &["user_id", "at"]),
];

#[allow(elided_lifetimes_in_paths)]
#[async_trait::async_trait]
impl MigrationTrait for First {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for mut table in tables() {
            if manager.get_database_backend() == sea_orm::DatabaseBackend::MySql {
                // Names differ by every byte, as they do in SQLite, but for spaces at the end.
                table.character_set("utf8mb4").collate("utf8mb4_bin");
            }
            manager.create_table(table).await?;
        }
        for (table, unique, columns) in INDICES {
            let name = format!("{table}_by_{}", columns.join("_"));
            if manager.has_index(table, &name).await? {
                continue;
            }
            let mut index = Index::create();
            index.name(&name).table(*table);
            columns.iter().for_each(|column| {
                index.col(*column);
            });
            if *unique {
                index.unique();
            }
            manager.create_index(index.to_owned()).await?;
        }
        Ok(())
    }
}
