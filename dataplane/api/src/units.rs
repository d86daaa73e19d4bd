//! Values with units. kB, MB, GB are powers of 1000; KiB, MiB, GiB powers of 1024; kbit, Mbit, Gbit are
//! bits, eight to a byte.

use std::{fmt, time::Duration};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Visitor},
};

/// A number of bytes: `"10MB"`, `"64KiB"`, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteCount(pub u64);

/// Bytes a second: `"10MB/s"`, `"100Mbit/s"`, or a plain number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteRate(pub u64);

/// A span of time: `"10s"`, `"5m 30s"`, `"250ms"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Span(pub Duration);

/// So many events in a span: `"10/2m"`; `0` switches it off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// Events allowed in a row, and in each span; 0 is no throttle.
    pub events: u32,
    /// The span.
    pub span: Duration,
}

const UNITS: [(&str, u64, u64); 14] = [
    ("B", 1, 1),
    ("kB", 1_000, 1),
    ("KB", 1_000, 1),
    ("MB", 1_000_000, 1),
    ("GB", 1_000_000_000, 1),
    ("TB", 1_000_000_000_000, 1),
    ("KiB", 1 << 10, 1),
    ("MiB", 1 << 20, 1),
    ("GiB", 1 << 30, 1),
    ("TiB", 1 << 40, 1),
    ("kbit", 1_000, 8),
    ("Mbit", 1_000_000, 8),
    ("Gbit", 1_000_000_000, 8),
    ("bit", 1, 8),
];

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let (_, factor, divisor) = match unit {
        "" => ("", 1, 1),
        unit => *UNITS.iter().find(|(name, ..)| *name == unit)?,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).map(|value| value / divisor);
    }
    let number: f64 = number.parse().ok()?;
    let value = number * factor as f64 / divisor as f64;
    (value < u64::MAX as f64).then_some(value as u64)
}

impl ByteCount {
    /// Parses a size.
    pub fn parse(text: &str) -> Option<Self> {
        parse_bytes(text).map(Self)
    }
}

impl ByteRate {
    /// Parses a rate.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        parse_bytes(text.strip_suffix("/s").unwrap_or(text)).map(Self)
    }
}

impl Throttle {
    /// No throttle.
    pub const OFF: Self = Self { events: 0, span: Duration::ZERO };

    /// Parses `events/span` or `0`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text == "0" {
            return Some(Self::OFF);
        }
        let (events, span) = text.split_once('/')?;
        let events = events.trim().parse().ok().filter(|&events| events > 0)?;
        let span = humantime::parse_duration(span.trim()).ok().filter(|span| !span.is_zero())?;
        Some(Self { events, span })
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];
        match exact.iter().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", ByteCount(self.0))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl fmt::Display for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.events {
            0 => f.write_str("0"),
            events => write!(f, "{events}/{}", Span(self.span)),
        }
    }
}

/// Reads a value from text, or from a plain number where one makes sense.
struct Reader<T> {
    expected: &'static str,
    text: fn(&str) -> Option<T>,
    number: fn(u64) -> Option<T>,
}

impl<T> Visitor<'_> for Reader<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.text)(text).ok_or_else(|| E::custom(format!("`{text}` is not {}", self.expected)))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        (self.number)(number)
            .ok_or_else(|| E::custom(format!("`{number}` is not {}", self.expected)))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => {
                Err(E::custom(format!("`{number}` is negative; it must be {}", self.expected)))
            }
        }
    }
}

macro_rules! value {
    ($type:ty, $expected:literal, $text:expr, $number:expr) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Reader {
                    expected: $expected,
                    text: $text,
                    number: $number,
                })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

value!(ByteCount, "a size such as \"64KiB\" or \"10MB\"", ByteCount::parse, |n| Some(ByteCount(n)));
value!(ByteRate, "a rate such as \"10MB/s\" or \"100Mbit/s\"", ByteRate::parse, |n| Some(
    ByteRate(n)
));
value!(
    Span,
    "a span of time such as \"10s\" or \"5m\"",
    |text| humantime::parse_duration(text).ok().map(Span),
    |number| (number == 0).then_some(Span(Duration::ZERO))
);
value!(Throttle, "a throttle such as \"10/2m\", or 0 for none", Throttle::parse, |number| (number
    == 0)
    .then_some(Throttle::OFF));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("10MB", 10_000_000),
            ("64KiB", 65_536),
            ("1.5kB", 1_500),
            ("8Mbit", 1_000_000),
            ("1 GiB", 1 << 30),
        ] {
            assert_eq!(ByteCount::parse(text), Some(ByteCount(bytes)), "{text}");
            assert_eq!(ByteRate::parse(&format!("{text}/s")), Some(ByteRate(bytes)), "{text}");
        }
        for text in ["", "MB", "10 mb", "-1", "1e9", "10MB/m", "99999999999999999999", "1..5kB"] {
            assert_eq!(ByteRate::parse(text), None, "{text}");
        }
    }

    #[test]
    fn throttles() {
        let span = Duration::from_secs(120);
        assert_eq!(Throttle::parse("10/2m"), Some(Throttle { events: 10, span }));
        assert_eq!(Throttle::parse("0"), Some(Throttle::OFF));
        for text in ["", "10", "/2m", "0/2m", "10/0s", "-1/2m", "10/2"] {
            assert_eq!(Throttle::parse(text), None, "{text}");
        }
    }
}
