//! Settings of the policy and of the control plane.

use axum::{Json, extract::State};
use culvert_api::policy::{Access, Policy, Rule};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QuerySelect, Set,
    sea_query::OnConflict,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Admin, App, Body, Problem, problem::Result, users::network};
use crate::{
    calendar::zone,
    store::{
        Change,
        entity::{setting, user},
    },
};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(show, update))
}

/// What is done when no rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DefaultPolicy {
    /// Let through.
    Allow,
    /// Refuse.
    Deny,
}

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Settings {
    /// When no rule decides.
    default_policy: DefaultPolicy,
    /// Internal targets that may be dialled.
    allow_internal: Vec<String>,
    /// Target ports nobody may use.
    deny_ports: Vec<u16>,
    /// Where days, weeks and months of quotas begin, such as `Europe/Berlin`. A change counts anew what was
    /// moved in the present periods, as far as minutes are kept (`traffic_log_days`).
    time_zone: String,
    /// Days access logs are kept.
    access_log_days: u32,
    /// Days minutes of traffic are kept.
    traffic_log_days: u32,
    /// Days the audit log is kept; 0 is for ever.
    audit_log_days: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_policy: DefaultPolicy::Allow,
            allow_internal: Vec::new(),
            deny_ports: vec![25],
            time_zone: "UTC".into(),
            access_log_days: 30,
            traffic_log_days: 30,
            audit_log_days: 0,
        }
    }
}

impl Settings {
    /// As the database has them.
    pub(crate) async fn load(db: &impl ConnectionTrait) -> std::result::Result<Self, DbErr> {
        let rows = setting::Entity::find().all(db).await?;
        let (mut settings, mut unreadable) = (Self::default(), false);
        for row in rows {
            match settings.with(&row) {
                None => {}
                Some(Ok(more)) => settings = more,
                Some(Err(error)) => {
                    tracing::error!(setting = row.name, %error, "unreadable; by default all is refused");
                    unreadable = true;
                }
            }
        }
        // Whatever it was to say, nothing opens by it, and nothing is deleted.
        if unreadable {
            settings.default_policy = DefaultPolicy::Deny;
            [settings.access_log_days, settings.traffic_log_days] = [KEPT; 2];
            settings.audit_log_days = 0;
        }
        Ok(settings)
    }

    /// With one more row; `None` when the row is none of a setting.
    fn with(&self, row: &setting::Model) -> Option<serde_json::Result<Self>> {
        let mut map = serde_json::to_value(self).ok()?;
        map.get(&row.name)?;
        Some(serde_json::from_str(&row.value).and_then(|value: serde_json::Value| {
            map[&row.name] = value;
            serde_json::from_value(map)
        }))
    }

    /// Their part of a policy.
    pub(crate) fn apply(&self, policy: &mut Policy) {
        policy.default = match self.default_policy {
            DefaultPolicy::Allow => Access::Allow,
            DefaultPolicy::Deny => Access::Deny,
        };
        policy.allow_internal =
            self.allow_internal.iter().filter_map(|text| network(text).ok()).collect();
        policy.deny_ports.clone_from(&self.deny_ports);
        // Only where it says something: a node of the version before does not know it.
        let is_timed = |rule: &Rule| !rule.when.time.is_empty() || !rule.when.weekday.is_empty();
        let is_said = self.time_zone != "UTC" && policy.rule.iter().any(is_timed);
        policy.timezone = is_said.then(|| self.time_zone.clone());
    }

    /// Days rows are kept: access log, traffic, audit.
    pub(crate) fn days(&self) -> [u32; 3] {
        [self.access_log_days, self.traffic_log_days, self.audit_log_days]
    }
}

/// Days that are as good as for ever.
const KEPT: u32 = 36_500;

/// What is left out stays.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SettingsPatch {
    /// When no rule decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    default_policy: Option<DefaultPolicy>,
    /// Internal targets that may be dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 1000)]
    allow_internal: Option<Vec<String>>,
    /// Target ports nobody may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 1000)]
    deny_ports: Option<Vec<u16>>,
    /// Where days, weeks and months of quotas begin, such as `Europe/Berlin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 64)]
    time_zone: Option<String>,
    /// Days access logs are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3650)]
    access_log_days: Option<u32>,
    /// Days minutes of traffic are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3650)]
    traffic_log_days: Option<u32>,
    /// Days the audit log is kept; 0 is for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 3650)]
    audit_log_days: Option<u32>,
}

/// The settings.
#[utoipa::path(get, path = "/settings", tag = "settings",
    responses((status = 200, body = Settings), (status = 401, body = Problem), (status = 403, body = Problem), (status = 503, body = Problem)))]
async fn show(State(app): State<App>, _: Admin) -> Result<Json<Settings>> {
    Ok(Json(Settings::load(app.store.db()).await?))
}

/// Change settings.
#[utoipa::path(patch, path = "/settings", tag = "settings", request_body = SettingsPatch,
    responses((status = 200, body = Settings), (status = 400, body = Problem), (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
async fn update(
    State(app): State<App>,
    Admin(caller): Admin,
    Body(mut patch): Body<SettingsPatch>,
) -> Result<Json<Settings>> {
    if let Some(nets) = &mut patch.allow_internal {
        for net in nets.iter_mut() {
            *net = network(net)?.to_string();
        }
    }
    if patch.time_zone.as_deref().is_some_and(|name| zone(name).is_none()) {
        return Err(Problem::invalid("time_zone: a name such as UTC or Europe/Berlin"));
    }
    let long = |list: Option<usize>| list.is_some_and(|length| length > 1000);
    if long(patch.allow_internal.as_ref().map(Vec::len))
        || long(patch.deny_ports.as_ref().map(Vec::len))
    {
        return Err(Problem::invalid("lists have at most 1000 entries"));
    }
    let kept = [patch.access_log_days, patch.traffic_log_days];
    let days = kept.into_iter().flatten();
    if days.clone().any(|days| days == 0)
        || days.chain(patch.audit_log_days).any(|days| days > 3650)
    {
        return Err(Problem::invalid("days are 1 to 3650 (audit_log_days: 0 is for ever)"));
    }
    let edit = app.store.edit(caller.actor()).await?;
    let db = edit.db();
    let old = Settings::load(db).await?;
    let patch = serde_json::to_value(&patch).unwrap_or_default();
    for (name, value) in patch.as_object().into_iter().flatten() {
        let row = setting::ActiveModel { name: Set(name.clone()), value: Set(value.to_string()) };
        let over = OnConflict::column(setting::Column::Name)
            .update_column(setting::Column::Value)
            .to_owned();
        setting::Entity::insert(row).on_conflict(over).exec_without_returning(db).await?;
    }
    let new = Settings::load(db).await?;
    let mut change = Change::new("settings.update", "").old(&old).new_value(&new).policy();
    if old.time_zone != new.time_zone {
        // Periods began at other times than was counted.
        crate::usage::begin(db, None).await?;
        let metered = user::Entity::find()
            .select_only()
            .column(user::Column::Id)
            .filter(user::Column::QuotaBytes.is_not_null());
        change = change.users(metered.into_tuple::<i64>().all(db).await?);
    }
    edit.commit(change).await?;
    let settings = new;

    Ok(Json(settings))
}

#[cfg(test)]
mod tests {
    use culvert_api::policy::Weekday;

    use super::*;

    /// A row of another version, or of somebody's hand.
    #[tokio::test]
    async fn what_is_not_known_opens_nothing() {
        let (store, _folder) = crate::store::tests::new_store(None).await;
        let zone = setting::ActiveModel {
            name: Set("time_zone".into()),
            value: Set("\"Asia/Kolkata\"".into()),
        };
        setting::Entity::insert(zone).exec_without_returning(store.db()).await.unwrap();
        for (name, value) in
            [("default_policy", "\"ask\""), ("default_policy", "deny"), ("deny_ports", "[70000]")]
        {
            let row = setting::ActiveModel { name: Set(name.into()), value: Set(value.into()) };
            setting::Entity::insert(row).exec_without_returning(store.db()).await.unwrap();
            let settings = Settings::load(store.db()).await.unwrap();
            assert!(matches!(settings.default_policy, DefaultPolicy::Deny), "{name}");
            assert_eq!((&*settings.time_zone, settings.days()), ("Asia/Kolkata", [KEPT, KEPT, 0]));
            setting::Entity::delete_by_id(name).exec(store.db()).await.unwrap();
        }
    }

    #[test]
    fn nodes_are_told_the_zone_if_a_rule_needs_it() {
        let settings = Settings { time_zone: "Europe/Berlin".into(), ..Settings::default() };
        let mut policy = Policy { rule: vec![Rule::default()], ..Policy::default() };
        settings.apply(&mut policy);
        assert_eq!(policy.timezone, None);
        policy.rule[0].when.weekday = vec![Weekday::Mon];
        settings.apply(&mut policy);
        assert_eq!(policy.timezone.as_deref(), Some("Europe/Berlin"));
        Settings::default().apply(&mut policy);
        assert_eq!(policy.timezone, None);
    }
}
