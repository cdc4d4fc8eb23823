//! Times for people and for programs. The libraries count nanoseconds since 1970.

/// As RFC 3339 in UTC, to the millisecond: `2026-01-31T23:59:59.123Z`.
pub fn rfc3339(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let (seconds, millisecond) = (milliseconds / 1000, milliseconds % 1000);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millisecond:03}Z")
}

/// The date of a day, counted from 1970-01-01. Eras of 400 years, which begin on 1 March so that the leap day is last.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// How long something takes or took, roughly: `3 minutes`.
pub fn roughly(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (count, unit) = match seconds {
        0 => return "less than a second".into(),
        1..120 => (seconds, "second"),
        120..7_200 => (seconds / 60, "minute"),
        7_200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural}")
}

/// How long ago something was, roughly. A clock that was set back does not make it negative.
pub fn ago(nanoseconds: u64, now: u64) -> String {
    format!("{} ago", roughly(now.saturating_sub(nanoseconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_date_1_prints_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(seconds * 1_000_000_000), text);
        }
        assert_eq!(rfc3339(1_123_456_789), "1970-01-01T00:00:01.123Z");
        // The largest time must not overflow.
        rfc3339(u64::MAX);
    }

    #[test]
    fn durations() {
        let second = 1_000_000_000;
        for (duration, text) in [
            (999, "less than a second"),
            (second, "1 second"),
            (119 * second, "119 seconds"),
            (120 * second, "2 minutes"),
            (7200 * second, "2 hours"),
            (172_800 * second, "2 days"),
        ] {
            assert_eq!(roughly(duration), text);
        }
        assert_eq!(ago(5 * second, 0), "less than a second ago");
    }
}
