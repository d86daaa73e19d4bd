//! When days, weeks and months begin: in the zone of the settings.

use jiff::{Timestamp, ToSpan, Zoned, civil::Weekday, tz::TimeZone};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, Statement};

use crate::store::{entity::setting, held, now};

/// The setting that names the zone.
pub const ZONE: &str = "time_zone";
/// The quota period that never ends; it can be begun anew, what was moved since ever cannot.
pub const TOTAL: i64 = 1;

/// A moment in a zone.
pub struct Calendar(Zoned);

/// The zone of a name such as `Europe/Berlin`.
pub fn zone(name: &str) -> Option<TimeZone> {
    TimeZone::get(name).ok()
}

impl Calendar {
    /// Now, in the zone of the settings.
    ///
    /// # Errors
    /// The database fails.
    pub async fn load(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        let row = setting::Entity::find_by_id(ZONE).one(db).await?;
        Ok(Self::of(row.as_ref().map(|row| row.value.as_str())))
    }

    /// The same; nobody changes the zone until the transaction ends.
    ///
    /// # Errors
    /// The database fails.
    pub async fn hold(db: &DatabaseTransaction) -> Result<Self, DbErr> {
        let backend = db.get_database_backend();
        let sql = format!("SELECT value FROM settings WHERE name = '{ZONE}'{}", held(backend));
        let row = db.query_one_raw(Statement::from_string(backend, sql)).await?;
        let value = row.map(|row| row.try_get::<String>("", "value")).transpose()?;
        Ok(Self::of(value.as_deref()))
    }

    fn of(setting: Option<&str>) -> Self {
        let name = setting.and_then(|value| serde_json::from_str::<String>(value).ok());
        Self::at(now(), name.and_then(|name| zone(&name)).unwrap_or(TimeZone::UTC))
    }

    /// A moment (microseconds since 1970) in a zone.
    pub fn at(moment: i64, zone: TimeZone) -> Self {
        Self(Timestamp::from_microsecond(moment).unwrap_or_default().to_zoned(zone))
    }

    /// When the present period of a quota began, in microseconds since 1970; 0 without a period.
    pub fn start(&self, period: Option<&str>) -> i64 {
        let today = || self.0.start_of_day();
        let start = match period {
            Some("day") => today(),
            Some("week") => {
                let days = self.0.weekday().since(Weekday::Monday);
                today().and_then(|today| today.checked_sub(i64::from(days).days()))
            }
            Some("month") => self.0.first_of_month().and_then(|first| first.start_of_day()),
            Some("total") => return TOTAL,
            _ => return 0,
        };
        start.map_or(0, |start| start.timestamp().as_microsecond())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_begin_at_midnight_monday_and_the_first() {
        // Saturday, 2026-11-21 15:01:14 UTC.
        let now = 1_795_273_274_000_000;
        let start =
            |zone: TimeZone, period| Calendar::at(now, zone).start(Some(period)) / 1_000_000;
        let utc = |period| start(TimeZone::UTC, period);
        assert_eq!(utc("day"), 1_795_219_200);
        assert_eq!(utc("week"), 1_795_219_200 - 5 * 86_400);
        assert_eq!(utc("month"), 1_795_219_200 - 20 * 86_400);
        assert_eq!(Calendar::at(now, TimeZone::UTC).start(Some("total")), TOTAL);
        assert_eq!(Calendar::at(now, TimeZone::UTC).start(None), 0);
        // Sunday, 00:01:14, in Tokyo.
        let tokyo = |period| start(zone("Asia/Tokyo").unwrap(), period);
        assert_eq!(tokyo("day"), 1_795_219_200 + 15 * 3600);
        assert_eq!(tokyo("week"), 1_795_219_200 + 15 * 3600 - 6 * 86_400);
        // Summer time ends within the month.
        let berlin = |at| Calendar::at(at, zone("Europe/Berlin").unwrap()).start(Some("month"));
        assert_eq!(berlin(1_792_969_200_000_000), 1_790_805_600_000_000, "1 October, 00:00 +02:00");
        assert!(zone("Mars/Olympus").is_none());
    }
}
