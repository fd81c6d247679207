//! SPIFFE IDs: the identity in a workload's certificate.

use std::fmt;
use std::sync::Arc;

/// The longest SPIFFE ID, in bytes (SPIFFE-ID, section 2.3).
const LENGTH_LIMIT_BYTES: usize = 2048;

/// A SPIFFE ID such as `spiffe://mesh.local/ns/default/sa/web`, valid by SPIFFE-ID section 2.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// The whole text. Always `spiffe://` + trust domain + path.
    text: Arc<str>,
}

impl SpiffeId {
    /// Parses the URI of a certificate or a policy.
    ///
    /// # Errors
    /// When the text is longer than 2048 bytes, has another scheme than `spiffe`, or has an invalid trust domain or
    /// path segment.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        let refuse =
            |reason| Err(InvalidSpiffeId { text: text.chars().take(200).collect(), reason });
        if text.len() > LENGTH_LIMIT_BYTES {
            return refuse("must be at most 2048 bytes long");
        }
        let Some(rest) = text.strip_prefix("spiffe://") else {
            return refuse("must start with spiffe://");
        };
        let (domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        let domain_char =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if domain.is_empty() || domain.len() > 255 || !domain.chars().all(domain_char) {
            return refuse("the trust domain must be 1 to 255 characters of a-z 0-9 . _ -");
        }
        let path_char = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let good = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.chars().all(path_char)
        };
        if rest.len() > domain.len() && !path.split('/').all(good) {
            return refuse(
                "path segments must be of A-Z a-z 0-9 . _ -, and neither empty nor a dot segment",
            );
        }
        Ok(Self { text: text.into() })
    }

    /// The whole ID.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain, such as `mesh.local`.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        let rest = self.text.strip_prefix("spiffe://").unwrap_or(&self.text);
        rest.split_once('/').map_or(rest, |(domain, _)| domain)
    }

    /// The last path segment, by convention the service account or service name.
    #[must_use]
    pub fn workload(&self) -> &str {
        self.text.rsplit('/').next().unwrap_or(&self.text)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A text that is not a valid SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidSpiffeId {
    /// The text, cut at 200 characters.
    pub text: String,
    /// The rule that the text breaks.
    pub reason: &'static str,
}

impl fmt::Display for InvalidSpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid SPIFFE ID {:?}: {}", self.text, self.reason)
    }
}

impl std::error::Error for InvalidSpiffeId {}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<(&str, &str), &str>) {
        let got = SpiffeId::parse(text);
        match (&got, expected) {
            (Ok(id), Ok((domain, workload))) => {
                assert_eq!((id.trust_domain(), id.workload()), (domain, workload), "{text}");
            }
            (Err(error), Err(part)) => assert!(error.reason.contains(part), "{text}: {error}"),
            _ => panic!("{text}: {got:?}"),
        }
    }

    #[test]
    fn spiffe_id_needs_its_scheme_a_trust_domain_and_valid_segments() {
        check("spiffe://mesh.local/ns/default/sa/web", Ok(("mesh.local", "web")));
        check("spiffe://mesh.local", Ok(("mesh.local", "mesh.local")));
        check("https://mesh.local/web", Err("spiffe://"));
        check("spiffe:///web", Err("trust domain"));
        check("spiffe://Mesh.local/web", Err("trust domain"));
        check("spiffe://mesh.local/", Err("segment"));
        check("spiffe://mesh.local/a//b", Err("segment"));
        check("spiffe://mesh.local/a/../b", Err("segment"));
        check("spiffe://mesh.local/a%2fb", Err("segment"));
        check(&format!("spiffe://mesh.local/{}", "a".repeat(2048)), Err("2048"));
    }
}
