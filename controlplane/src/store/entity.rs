//! The tables as types. Times are microseconds since 1970, UTC; lists and conditions are JSON.

/// One table: its columns, the first ones its key.
macro_rules! table {
    ($(#[$doc:meta])* $module:ident = $name:literal, $auto:literal: $($key:ident: $key_type:ty),+; $($column:ident: $type:ty),* $(,)?) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        pub mod $module {
            use sea_orm::entity::prelude::*;

            #[derive(Clone, Debug, PartialEq, DeriveEntityModel, serde::Serialize, serde::Deserialize)]
            #[sea_orm(table_name = $name)]
            pub struct Model {
                $(#[sea_orm(primary_key, auto_increment = $auto)] pub $key: $key_type,)+
                $(pub $column: $type,)*
            }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

table!(
    /// The one row whose generation every edit counts up.
    head = "head", false: id: i64; generation: i64
);
table!(
    /// What a generation changed: a user, or the policy (0).
    change = "changes", false: generation: i64, user_id: i64;
);
table!(
    /// Users of the proxy and of the API.
    user = "users", true: id: i64;
    name: String, password_hash: String, role: String, status: String, proxy_access: bool,
    expires_at: Option<i64>, groups: String, sessions: Option<i64>,
    new_sessions_per_second: Option<i64>, devices: Option<i64>, evict_oldest: bool,
    source_addresses: String,
    egress_address: Option<String>, quota_bytes: Option<i64>, quota_period: Option<String>,
    comment: String, token_epoch: i64, totp_secret: Option<String>,
    totp_pending: Option<String>, totp_step: i64, created_at: i64, updated_at: i64,
);
table!(
    /// Rates of users (subject: the number), groups (the name) and by default (empty).
    bandwidth_limit = "bandwidth_limits", true: id: i64;
    kind: String, subject: String, up: Option<i64>, down: Option<i64>, burst: Option<i64>,
    updated_at: i64,
);
table!(
    /// Black and white list of targets.
    url_filter = "url_filters", true: id: i64;
    action: String, kind: String, value: String, ports: String, enabled: bool, comment: String,
    created_at: i64,
);
table!(
    /// Clients that may connect.
    whitelist = "ip_whitelist", true: id: i64; cidr: String, comment: String, created_at: i64
);
table!(
    /// Rules, in the order of their positions.
    rule = "rules", true: id: i64;
    position: i64, name: String, enabled: bool, conditions: String, action: String,
    upstream: Option<String>, target: Option<String>, created_at: i64,
);
table!(
    /// Settings that differ from their defaults.
    setting = "settings", false: name: String; value: String
);
table!(
    /// Enrolled nodes.
    node = "nodes", true: id: i64;
    name: String, status: String, boot: i64, version: String, generation: i64, refusal: String,
    connected: bool, certificate: String, seen_at: Option<i64>, created_at: i64,
);
table!(
    /// How nodes were.
    heartbeat = "proxy_heartbeats", false: node_id: i64, boot: i64, at: i64;
    sessions: i64, cpu_us: i64, memory: i64, up: i64, down: i64, ready: bool, uptime: i64,
);
table!(
    /// Sessions that run.
    session = "proxy_sessions", false: node_id: i64, boot: i64, session: i64;
    user_id: i64, told_at: i64, body: String
);
table!(
    /// Ended sessions.
    access_log = "access_logs", true: id: i64;
    node_id: i64, boot: i64, sequence: i64, at: i64, user_id: i64, user_name: String,
    client: String, target: String, ended: String, bytes_up: i64, bytes_down: i64, body: String,
);
table!(
    /// Boots of nodes, and what was applied of their reports.
    boot = "boots", false: node_id: i64, boot: i64;
    sequence: i64, uncertain: i64, ended: bool, seen_at: i64, command: i64
);
table!(
    /// The sums of a boot, as last reported.
    node_usage = "node_usage", false: node_id: i64, boot: i64, user_id: i64; up: i64, down: i64
);
table!(
    /// What a boot may move of users' quotas: the sum of both directions it may reach.
    lease = "leases", false: node_id: i64, boot: i64, user_id: i64; granted: i64, updated_at: i64
);
table!(
    /// Traffic by minute.
    traffic = "traffic_logs", false: at: i64, user_id: i64, node_id: i64; up: i64, down: i64
);
table!(
    /// Traffic by user and quota period; period 0 is since ever.
    usage = "user_usage", false: user_id: i64, period: i64; up: i64, down: i64
);
table!(
    /// What a quota period had come to when it was begun anew by hand.
    usage_reset = "usage_resets", false: user_id: i64, at: i64; period: i64, up: i64, down: i64
);
table!(
    /// Who changed what.
    audit = "audit_logs", true: id: i64;
    at: i64, actor: String, address: String, action: String, subject: String, old: String,
    new: String,
);
table!(
    /// Refresh tokens, hashed.
    refresh = "refresh_tokens", false: hash: String;
    user_id: i64, epoch: i64, used: bool, expires_at: i64,
);
table!(
    /// What is asked of nodes.
    command = "commands", true: id: i64;
    node_id: i64, boot: i64, kind: String, argument: i64, at: i64
);
