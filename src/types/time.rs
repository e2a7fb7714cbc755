//! Wall-clock time as the domain keeps it: milliseconds since the Unix epoch, UTC.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Milliseconds since 1970-01-01T00:00:00Z. RFC 3339 in JSON, an integer in stored formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub i64);

impl Millis {
    /// RFC 3339 with milliseconds, for example `2026-11-21T05:10:53.120Z`.
    pub fn to_rfc3339(self) -> String {
        match self.digits() {
            Some(digits) => String::from_utf8_lossy(&digits).into_owned(),
            None => match jiff::Timestamp::from_millisecond(self.0) {
                Ok(timestamp) => format!("{timestamp:.3}"),
                Err(_) => String::from("out of range"),
            },
        }
    }

    /// The text of a time from 1970 on, written without an allocation: two of them are in every answered turn. The date
    /// from the days as in Hinnant's `civil_from_days`, with years that begin in March.
    fn digits(self) -> Option<[u8; 24]> {
        const DAY: u64 = 86_400_000;
        /// Where the library's range ends.
        const END: u64 = 253_402_207_200_001;
        let ms = u64::try_from(self.0).ok().filter(|ms| *ms < END)?;
        let (days, ms) = (ms / DAY + 719_468, ms % DAY);
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + u64::from(month <= 2);
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let parts = [
            (year, 0..4),
            (month, 5..7),
            (day, 8..10),
            (ms / 3_600_000, 11..13),
            (ms / 60_000 % 60, 14..16),
            (ms / 1000 % 60, 17..19),
            (ms % 1000, 20..23),
        ];
        for (value, place) in parts {
            let mut value = value;
            for digit in text[place].iter_mut().rev() {
                *digit = b'0' + (value % 10) as u8;
                value /= 10;
            }
        }
        Some(text)
    }

    /// Reads RFC 3339.
    ///
    /// # Errors
    /// The parser's error.
    pub fn from_rfc3339(text: &str) -> Result<Self, jiff::Error> {
        Ok(Self(text.parse::<jiff::Timestamp>()?.as_millisecond()))
    }

    /// This time, later by `ms`.
    pub const fn plus(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.digits() {
            Some(digits) => f.write_str(std::str::from_utf8(&digits).unwrap_or_default()),
            None => f.write_str(&self.to_rfc3339()),
        }
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return serializer.serialize_i64(self.0);
        }
        match self.digits() {
            Some(digits) => serializer.serialize_str(std::str::from_utf8(&digits).unwrap_or_default()),
            None => serializer.serialize_str(&self.to_rfc3339()),
        }
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            Self::from_rfc3339(&text).map_err(|_| {
                let shown: String = text.chars().take(40).collect();
                serde::de::Error::custom(format!("'{shown}' is no time as in 2026-01-02T12:00:00Z (RFC 3339)"))
            })
        } else {
            i64::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_round_trips() {
        let time = Millis(1_795_237_853_120);
        assert_eq!(time.to_rfc3339(), "2026-11-21T05:10:53.120Z");
        assert_eq!(Millis::from_rfc3339(&time.to_rfc3339()).unwrap(), time);
    }

    #[test]
    fn every_date_is_written_as_the_library_writes_it() {
        let library = |ms| format!("{:.3}", jiff::Timestamp::from_millisecond(ms).unwrap());
        let days = (0..2_932_895).step_by(17).map(|day| day * 86_400_000 + 86_399_999);
        let leap = ["2000-02-29", "2100-02-28", "2100-03-01", "2024-02-29", "1970-01-01", "2026-12-31"];
        let leap = leap.map(|day| Millis::from_rfc3339(&format!("{day}T23:59:59.999Z")).unwrap().0);
        for ms in days.chain(leap).chain([0, 1, 1_795_237_853_120, 253_402_207_200_000]) {
            assert_eq!(Millis(ms).to_rfc3339(), library(ms));
        }
        for ms in [-1, -62_135_596_800_000] {
            assert_eq!(Millis(ms).to_rfc3339(), library(ms), "before 1970");
        }
        assert_eq!(Millis(i64::MAX).to_rfc3339(), "out of range");
    }
}
