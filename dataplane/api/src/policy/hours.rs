//! Times of a week.

use serde::{Deserialize, Serialize};

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weekday {
    /// Monday.
    Mon,
    /// Tuesday.
    Tue,
    /// Wednesday.
    Wed,
    /// Thursday.
    Thu,
    /// Friday.
    Fri,
    /// Saturday.
    Sat,
    /// Sunday.
    Sun,
}

impl Weekday {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Mon, Self::Tue, Self::Wed, Self::Thu, Self::Fri, Self::Sat, Self::Sun];

    /// The day before.
    #[must_use]
    pub fn before(self) -> Self {
        Self::ALL[(self as usize + 6) % 7]
    }
}

/// A part of a day, `"08:00-18:30"`, to its end but not with it; `"22:00-06:00"` goes over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hours {
    /// The first minute of the day.
    pub first: u16,
    /// The minute after the last.
    pub end: u16,
}

/// Minutes of a day.
const DAY: u16 = 24 * 60;

impl Hours {
    /// Parses two times of a day, of which the second may be `24:00`.
    pub fn parse(text: &str) -> Option<Self> {
        let minute = |text: &str| {
            let (hours, minutes) = text.split_once(':')?;
            let plain = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            let number = |text: &str| plain(text).then(|| text.parse::<u16>().ok()).flatten();
            let (hours, minutes) = (number(hours)?, number(minutes)?);
            (minutes < 60).then_some(60 * hours + minutes)
        };
        let (first, end) = text.split_once('-')?;
        let (first, end) = (minute(first.trim())?, minute(end.trim())?);
        (first < DAY && end <= DAY && first != end).then_some(Self { first, end })
    }

    /// Whether a minute of the day lies in it.
    pub fn contains(self, minute: u16) -> bool {
        if self.first < self.end {
            (self.first..self.end).contains(&minute)
        } else {
            minute >= self.first || minute < self.end
        }
    }
}

impl Serialize for Hours {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = |minute: u16| (minute / 60, minute % 60);
        let ((a, b), (c, d)) = (time(self.first), time(self.end));
        serializer.collect_str(&format_args!("{a:02}:{b:02}-{c:02}:{d:02}"))
    }
}

impl<'de> Deserialize<'de> for Hours {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "`{text}` is no part of a day, such as \"08:00-18:30\""
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_day_are_read_and_may_go_over_midnight() {
        let day = Hours::parse("08:00-18:30").unwrap();
        let holds = |hours: Hours, time: &[u16]| {
            time.iter().map(|minute| hours.contains(*minute)).collect::<Vec<_>>()
        };
        assert_eq!(holds(day, &[479, 480, 1109, 1110]), [false, true, true, false]);
        let night = Hours::parse("22:00-06:00").unwrap();
        assert_eq!(holds(night, &[0, 359, 360, 1319, 1320]), [true, true, false, false, true]);
        assert_eq!(holds(Hours::parse("00:00-24:00").unwrap(), &[0, 1439]), [true, true]);
        for text in [
            "",
            "8:00-9:00",
            "08:00",
            "08:00-08:00",
            "24:00-01:00",
            "08:60-09:00",
            "00:00-24:01",
            "+8:00-09:00",
        ] {
            assert_eq!(Hours::parse(text), None, "{text}");
        }
    }
}
