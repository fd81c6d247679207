//! HTTP methods that a sidecar refuses, whatever the routes and policies say.

/// Why a sidecar refuses every request with a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MethodRefusal {
    /// A standard method that is not in upper case, such as `get`. The answer is 400.
    NotUpperCase,
    /// `TRACE`. The answer is 405.
    Trace,
}

/// Whether a sidecar refuses every request with this method, and why. `CONNECT` depends on the listener
/// (`Upgrades::connect`).
///
/// Methods are case-sensitive (RFC 9110, section 9.1): a policy for `DELETE` does not cover `delete`, which some
/// services accept as `DELETE`. A `TRACE` response would show a script headers that only the browser and the sidecar
/// should know (RFC 9110, section 9.3.8).
#[must_use]
pub fn method_refusal(method: &str) -> Option<MethodRefusal> {
    const STANDARD: [&str; 9] =
        ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    let has_lower_case = method.bytes().any(|byte| byte.is_ascii_lowercase());
    if has_lower_case && STANDARD.iter().any(|standard| method.eq_ignore_ascii_case(standard)) {
        return Some(MethodRefusal::NotUpperCase);
    }
    (method == "TRACE").then_some(MethodRefusal::Trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_methods_in_another_case_are_refused() {
        for method in ["get", "GeT", "connect", "Trace"] {
            assert_eq!(method_refusal(method), Some(MethodRefusal::NotUpperCase), "{method}");
        }
        for method in ["GET", "CONNECT", "propfind", "getx"] {
            assert_eq!(method_refusal(method), None, "{method}");
        }
        assert_eq!(method_refusal("TRACE"), Some(MethodRefusal::Trace));
    }
}
