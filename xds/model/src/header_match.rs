//! Conditions on headers (`envoy.config.route.v3.HeaderMatcher`), with the results of Envoy 1.40. Statements about
//! Envoy's behaviour were measured by running it beside the sidecar (`integration/tests/envoy_matchers`).

use crate::{RequestFacts, StringMatch};

/// A condition on a header; `:method`, `:path` with its query, `:scheme` and `:authority` count as headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    /// The name, lower case.
    pub name: String,
    /// The condition on the header's value.
    pub check: HeaderCheck,
    /// Whether the result is inverted. A condition on the value of a missing header is never met, inverted or not.
    pub invert: bool,
    /// Whether a missing header counts as one with an empty value (`treat_missing_header_as_empty`).
    pub missing_is_empty: bool,
}

/// A condition on a header's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderCheck {
    /// The header is present, with any value.
    Present,
    /// The header is present and its value matches.
    Value(StringMatch),
    /// The value is a decimal number from `start` up to `end` exclusive (`range_match`).
    Range {
        /// The first number.
        start: i64,
        /// The end of the range, exclusive.
        end: i64,
    },
}

impl HeaderMatch {
    /// The condition that a header's value matches. `name` is lower case.
    #[must_use]
    pub fn new(name: &str, value: StringMatch) -> Self {
        Self {
            name: name.to_owned(),
            check: HeaderCheck::Value(value),
            invert: false,
            missing_is_empty: false,
        }
    }

    /// Whether the request meets the condition.
    ///
    /// When a header occurs several times, each value is compared alone and one match suffices; inverted, none may
    /// match. Headers that Envoy stores as one value ([`is_joined`]) are compared with all their values joined.
    #[must_use]
    pub fn matches(&self, facts: &dyn RequestFacts) -> bool {
        let mut is_there = false;
        let mut fits = |value: &[u8]| {
            is_there = true;
            self.check.fits(value)
        };
        let any_fits = match self.name.as_str() {
            ":method" => fits(facts.method().as_bytes()),
            ":path" => facts.target_fits(&mut fits),
            ":scheme" => fits(facts.scheme().as_bytes()),
            ":authority" | "host" => fits(facts.authority().as_bytes()),
            name if is_joined(name) => fits_joined(name, facts, &mut fits),
            name => facts.has_header(name, &mut fits),
        };
        if is_there {
            any_fits != self.invert
        } else if self.missing_is_empty {
            self.check.fits(b"") != self.invert
        } else {
            self.check == HeaderCheck::Present && self.invert
        }
    }
}

impl HeaderCheck {
    fn fits(&self, value: &[u8]) -> bool {
        match self {
            Self::Present => true,
            Self::Value(wanted) => wanted.matches(value),
            Self::Range { start, end } => {
                // Same as `absl::SimpleAtoi`: a sign and leading zeros are accepted, a number that does not fit
                // 64 bits is not.
                let number = str::from_utf8(value.trim_ascii()).ok();
                let number = number.and_then(|text| text.parse::<i64>().ok());
                number.is_some_and(|number| (*start..*end).contains(&number))
            }
        }
    }
}

/// Whether Envoy 1.40 joins repeated values of a header with commas: those that have an inline slot in its header map.
/// Measured with two values of each of 130 known names.
#[must_use]
pub fn is_joined(name: &str) -> bool {
    const NAMES: [&str; 36] = [
        "accept",
        "accept-encoding",
        "access-control-request-headers",
        "access-control-request-method",
        "access-control-request-private-network",
        "authorization",
        "cache-control",
        "cdn-loop",
        "content-encoding",
        "content-type",
        "expect",
        "grpc-timeout",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "origin",
        "pragma",
        "proxy-status",
        "referer",
        "user-agent",
        "via",
        "x-client-trace-id",
        "x-envoy-attempt-count",
        "x-envoy-decorator-operation",
        "x-envoy-downstream-service-cluster",
        "x-envoy-downstream-service-node",
        "x-envoy-external-address",
        "x-envoy-original-host",
        "x-envoy-original-path",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-proto",
        "x-request-id",
    ];
    NAMES.binary_search(&name).is_ok()
}

/// Compares the values of a header joined with commas. Allocates only when there are several.
fn fits_joined(name: &str, facts: &dyn RequestFacts, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    let mut lines = 0;
    facts.has_header(name, &mut |_| {
        lines += 1;
        lines > 1
    });
    if lines < 2 {
        return facts.has_header(name, fits);
    }
    let mut joined: Vec<u8> = Vec::new();
    facts.has_header(name, &mut |value| {
        // Envoy skips empty values: `a` and an empty value give `a`, in either order.
        if !joined.is_empty() && !value.is_empty() {
            joined.push(b',');
        }
        joined.extend_from_slice(value);
        false
    });
    fits(&joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_request::TestRequest;

    /// A request with these values of a header.
    fn with(name: &str, values: &[&str]) -> TestRequest {
        let headers = values.iter().map(|value| (name.to_owned(), (*value).to_owned()));
        TestRequest { headers: headers.collect(), ..TestRequest::default() }
    }

    /// The results for a missing header, an empty value, `a`, `b` and `a`, and `b`.
    fn met(check: HeaderCheck, invert: bool, missing_is_empty: bool) -> [bool; 5] {
        let matcher = HeaderMatch { name: "x".into(), check, invert, missing_is_empty };
        let values: [&[&str]; 5] = [&[], &[""], &["a"], &["b", "a"], &["b"]];
        values.map(|values| matcher.matches(&with("x", values)))
    }

    #[test]
    fn inverted_matcher_of_a_value_does_not_match_a_missing_header() {
        let exact = || HeaderCheck::Value(StringMatch::Exact("a".into()));
        assert_eq!(met(exact(), false, false), [false, false, true, true, false]);
        assert_eq!(met(exact(), true, false), [false, true, false, false, true]);
        let present = HeaderCheck::Present;
        assert_eq!(met(present.clone(), false, false), [false, true, true, true, true]);
        assert_eq!(met(present, true, false), [true, false, false, false, false]);
    }

    #[test]
    fn missing_header_counts_as_empty_on_request() {
        let exact = |text: &str| HeaderCheck::Value(StringMatch::Exact(text.into()));
        assert_eq!(met(exact("a"), true, true), [true, true, false, false, true]);
        assert_eq!(met(exact(""), false, true), [true, true, false, false, false]);
        assert_eq!(met(exact(""), true, true), [false, false, true, true, true]);
        assert_eq!(met(HeaderCheck::Present, false, true), [true; 5]);
        assert_eq!(met(HeaderCheck::Present, true, true), [false; 5]);
        let range = HeaderCheck::Range { start: 0, end: 1 };
        assert_eq!(met(range, true, true), [true; 5]);
    }

    #[test]
    fn range_matches_decimal_numbers_below_its_end() {
        let check = |start, end, value: &str, expected: bool| {
            let matcher =
                HeaderMatch { check: HeaderCheck::Range { start, end }, ..plain("x", "a") };
            assert_eq!(matcher.matches(&with("x", &[value])), expected, "{start}..{end} {value}");
        };
        for value in ["0", "9", "+9", "-0", "007"] {
            check(0, 10, value, true);
        }
        for value in ["", "-1", "10", "0x5", "5.0", "1e0", "1_0", "\u{a0}5", "5 x"] {
            check(0, 10, value, false);
        }
        check(i64::MIN, i64::MAX, "-9223372036854775808", true);
        check(i64::MIN, i64::MAX, "9223372036854775807", false);
        check(i64::MIN, i64::MAX, "9223372036854775808", false);
        check(5, 5, "5", false);
        check(5, 1, "3", false);
    }

    fn plain(name: &str, value: &str) -> HeaderMatch {
        HeaderMatch::new(name, StringMatch::Exact(value.into()))
    }

    #[test]
    fn repeated_header_values_are_compared_alone_unless_envoy_joins_them() {
        let check = |name: &str, wanted: &str, values: &[&str], expected: bool| {
            let found = plain(name, wanted).matches(&with(name, values));
            assert_eq!(found, expected, "{name}: {values:?} is {wanted}");
        };
        check("x", "a", &["b", "a"], true);
        check("x", "b,a", &["b", "a"], false);
        check("x", "b,a", &["b,a"], true);
        check("cookie", "a", &["b", "a"], true);
        check("accept", "a", &["b", "a"], false);
        check("accept", "b,a", &["b", "a"], true);
        check("user-agent", "a", &["", "a"], true);
        check("user-agent", "a", &["a", ""], true);
        check("user-agent", "", &["", ""], true);
        check("user-agent", "a", &["a"], true);
        check("user-agent", "", &[""], true);
    }

    #[test]
    fn pseudo_headers_are_those_of_the_request() {
        let request = TestRequest { target: "/p?q=1".into(), ..TestRequest::default() };
        let check = |name: &str, value: &str, expected: bool| {
            assert_eq!(plain(name, value).matches(&request), expected, "{name}: {value}");
        };
        check(":path", "/p?q=1", true);
        check(":path", "/p", false);
        check(":method", "GET", true);
        check(":scheme", "http", true);
        check(":authority", "a", true);
        check("host", "a", true);
        check(":protocol", "", false);
        let tunnel = TestRequest { target: String::new(), ..TestRequest::default() };
        assert!(!plain(":path", "").matches(&tunnel));
    }
}
