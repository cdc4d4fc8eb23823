//! Amounts of bytes for people.

/// In units of 1024, with three digits: `512B`, `1.5KiB`, `12.3MiB`, `123GiB`.
pub fn bytes(amount: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if amount < 1024 {
        return format!("{amount}B");
    }
    let mut value = amount as f64 / 1024.0;
    let mut unit = 0;
    // 999.5 would be printed as 1000, a fourth digit.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        for (amount, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.00KiB"),
            (1 << 20, "1.00MiB"),
            (1_040_000, "0.99MiB"),
            (268_435_456, "256MiB"),
            (12_900_000, "12.3MiB"),
            (u64::MAX, "16.0EiB"),
        ] {
            assert_eq!(bytes(amount), text);
        }
    }
}
