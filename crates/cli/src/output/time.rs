//! Times for people and for programs. The libraries count nanoseconds since 1970.

use std::time::{Duration, UNIX_EPOCH};

/// As RFC 3339 in UTC, to the millisecond: `2026-01-31T23:59:59.123Z`.
pub fn rfc3339(nanoseconds: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_nanos(nanoseconds)).to_string()
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
