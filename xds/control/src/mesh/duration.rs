//! Durations as text, in the form of the Gateway API.

use std::time::Duration;

/// How many numbers with a unit a duration may have.
const PARTS_LIMIT: usize = 4;

/// What a duration looks like, for errors.
pub(super) const ACCEPTED: &str = "such as 500ms, 30s or 1h30m";

/// Parses a duration such as `500ms`, `10s` or `1h1m30s`: one to four whole numbers, each with the unit `h`, `m`, `s` or
/// `ms` (GEP-2257). None where the text has another form.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    for _ in 0..PARTS_LIMIT {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, after) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let part = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            _ => return None,
        };
        total = total.checked_add(part)?;
        rest = after;
        if rest.is_empty() {
            return Some(total);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_form_of_the_gateway_api() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("10s", 10_000),
            ("90m", 5_400_000),
            ("1h1m", 3_660_000),
            ("1h1m30s", 3_690_000),
            ("1m500ms", 60_500),
            ("1h2m3s4ms", 3_723_004),
            ("100000s", 100_000_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in [
            "",
            "0",
            "10",
            "s",
            "1.5s",
            "-1s",
            "+1s",
            "1h 1m",
            "1d",
            "1S",
            "1m1",
            "1h1m1s1ms1ms",
            " 1s",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse("18446744073709551615h"), None);
        assert_eq!(parse("18446744073709551615s18446744073709551615s"), None);
    }
}
