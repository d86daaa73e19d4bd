//! Edits of users, by the API, the command line and the start. Each says what the audit log is to have:
//! how the user was, and how it is.

use axum::http::StatusCode;
use culvert_api::policy::USERS_MAX;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, PaginatorTrait, QueryFilter, Set,
};

use super::{
    super::extract::refuse_beyond, Period, Problem, Result, Status, UserLimits, UserPatch,
    UserView, json, name_of, network, time_of,
};
use crate::store::{
    Change,
    entity::{bandwidth_limit as limit, refresh, user},
    now,
};

/// Makes a user of a row, with limits.
///
/// # Errors
/// There is one of that name, or the database fails.
pub(crate) async fn create(
    db: &DatabaseTransaction,
    row: user::ActiveModel,
    limits: Option<&UserLimits>,
) -> Result<(UserView, Change)> {
    let user = insert(db, row, limits).await?;
    refuse_beyond(db, user::Entity, USERS_MAX).await?;
    let id = user.id;
    let view = UserView::load(db, user).await?;
    let change = Change::new("user.create", &view.name).new_value(&view).user(id);
    Ok((view, change))
}

/// The row of a new user, and its rates.
pub(super) async fn insert(
    db: &DatabaseTransaction,
    mut row: user::ActiveModel,
    limits: Option<&UserLimits>,
) -> Result<user::Model> {
    if let Some(limits) = limits {
        apply_limits(&mut row, limits);
    }
    let user = row.insert(db).await.map_err(|error| match Problem::from(error) {
        problem if problem.status == 409 => {
            Problem::new(StatusCode::CONFLICT, "there is a user of that name")
        }
        problem => problem,
    })?;
    if let Some(limits) = limits {
        set_rates(db, user.id, limits).await?;
    }
    Ok(user)
}

/// Puts what an edit has made of a user in its place.
pub(in crate::http) async fn write(
    db: &DatabaseTransaction,
    action: &'static str,
    old: user::Model,
    mut row: user::ActiveModel,
    limits: Option<&UserLimits>,
) -> Result<(UserView, Change)> {
    let id = old.id;
    let old = UserView::load(db, old).await?;
    if let Some(limits) = limits {
        apply_limits(&mut row, limits);
        set_rates(db, id, limits).await?;
    }
    row.updated_at = Set(now());
    let new = UserView::load(db, row.update(db).await?).await?;
    let change = Change::new(action, &new.name).old(&old).new_value(&new).user(id);
    Ok((new, change))
}

/// Changes what a patch names.
///
/// # Errors
/// The patch is wrong, there is no such user, no admin would be left, or the database fails.
pub(super) async fn update(
    db: &DatabaseTransaction,
    id: i64,
    patch: &UserPatch,
) -> Result<(UserView, Change)> {
    let old = find(db, id).await?;
    let mut row = old.clone().into_active_model();
    if let Some(role) = patch.role {
        row.role = Set(name_of(&role));
    }
    // A token of before stands for what its user was.
    if patch.role.is_some() || patch.status.is_some() {
        row.token_epoch = Set(old.token_epoch + 1);
    }
    if let Some(status) = patch.status {
        row.status = Set(name_of(&status));
    }
    if let Some(access) = patch.proxy_access {
        row.proxy_access = Set(access);
    }
    if let Some(expires_at) = &patch.expires_at {
        row.expires_at = Set(expires_at.as_deref().map(time_of).transpose()?);
    }
    if let Some(groups) = &patch.groups {
        row.groups = Set(json(groups));
    }
    if let Some(comment) = &patch.comment {
        row.comment = Set(comment.clone());
    }
    let period = old.quota_period.clone();
    let (user, change) = write(db, "user.update", old, row, patch.limits.as_ref()).await?;
    if let Some(now) = user.limits.quota_period.map(Period::name)
        && period.as_deref() != Some(now)
    {
        crate::usage::begin(db, Some((id, now))).await?;
    }
    keep_an_admin(db).await?;
    Ok((user, change))
}

/// Lets a user log in no more.
///
/// # Errors
/// As of [`update`].
pub(crate) async fn disable(db: &DatabaseTransaction, id: i64) -> Result<Change> {
    let patch = UserPatch { status: Some(Status::Disabled), ..UserPatch::default() };
    Ok(update(db, id, &patch).await?.1)
}

/// Puts another hash in place; tokens of before are void.
///
/// # Errors
/// There is no such user, or the database fails.
pub(crate) async fn password(
    db: &DatabaseTransaction,
    id: i64,
    hash: &str,
) -> Result<(UserView, Change)> {
    let old = find(db, id).await?;
    let mut row = old.clone().into_active_model();
    row.password_hash = Set(hash.to_owned());
    row.token_epoch = Set(old.token_epoch + 1);
    let written = write(db, "user.password", old, row, None).await?;
    refresh::Entity::delete_many().filter(refresh::Column::UserId.eq(id)).exec(db).await?;
    Ok(written)
}

/// Takes a user out, with all that is only theirs.
pub(super) async fn remove(db: &DatabaseTransaction, id: i64) -> Result<Change> {
    let old = UserView::load(db, find(db, id).await?).await?;
    user::Entity::delete_by_id(id).exec(db).await?;
    set_rates(db, id, &UserLimits::default()).await?;
    refresh::Entity::delete_many().filter(refresh::Column::UserId.eq(id)).exec(db).await?;
    keep_an_admin(db).await?;
    Ok(Change::new("user.delete", &old.name).old(&old).user(id))
}

fn apply_limits(row: &mut user::ActiveModel, limits: &UserLimits) {
    row.sessions = Set(limits.sessions);
    row.new_sessions_per_second = Set(limits.new_sessions_per_second);
    row.devices = Set(limits.devices);
    row.evict_oldest = Set(limits.evict_oldest);
    let networks = limits.source_addresses.iter().filter_map(|text| network(text).ok());
    let networks: Vec<String> = networks.map(|net| net.to_string()).collect();
    row.source_addresses = Set(json(&networks));
    row.egress_address = Set(limits.egress_address.clone());
    row.quota_bytes = Set(limits.quota_bytes);
    let period = limits.quota_bytes.and(limits.quota_period.or(Some(Period::Month)));
    row.quota_period = Set(period.map(|period| period.name().to_owned()));
}

/// Writes a user's own rates to their table.
async fn set_rates(
    db: &DatabaseTransaction,
    user: i64,
    limits: &UserLimits,
) -> std::result::Result<(), sea_orm::DbErr> {
    limit::Entity::delete_many()
        .filter(limit::Column::Kind.eq("user"))
        .filter(limit::Column::Subject.eq(user.to_string()))
        .exec(db)
        .await?;
    if limits.up.is_none() && limits.down.is_none() && limits.burst.is_none() {
        return Ok(());
    }
    let row = limit::ActiveModel {
        kind: Set("user".into()),
        subject: Set(user.to_string()),
        up: Set(limits.up),
        down: Set(limits.down),
        burst: Set(limits.burst),
        updated_at: Set(now()),
        ..Default::default()
    };
    limit::Entity::insert(row).exec_without_returning(db).await?;
    Ok(())
}

/// # Errors
/// There is no such user, or the database fails.
pub(in crate::http) async fn find(db: &impl ConnectionTrait, id: i64) -> Result<user::Model> {
    user::Entity::find_by_id(id).one(db).await?.ok_or_else(|| Problem::missing("user"))
}

/// Somebody must be able to log in.
async fn keep_an_admin(db: &DatabaseTransaction) -> Result<()> {
    let admins = user::Entity::find()
        .filter(user::Column::Role.eq("admin"))
        .filter(user::Column::Status.eq("active"))
        .filter(
            sea_orm::Condition::any()
                .add(user::Column::ExpiresAt.is_null())
                .add(user::Column::ExpiresAt.gt(now())),
        )
        .count(db)
        .await?;
    if admins == 0 {
        let detail = "this would leave no admin who can log in";
        return Err(Problem::new(StatusCode::CONFLICT, detail));
    }
    Ok(())
}
