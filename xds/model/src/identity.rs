//! A SPIFFE id, parsed: the name a certificate proves.

use std::fmt;
use std::sync::Arc;

/// The longest SPIFFE id, in bytes (SPIFFE-ID, section 2.3).
const LENGTH_LIMIT_BYTES: usize = 2048;

/// A SPIFFE id such as `spiffe://mesh.local/ns/default/sa/web`, checked against SPIFFE-ID section 2.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// The whole text. Always `spiffe://` + trust domain + path.
    text: Arc<str>,
}

impl SpiffeId {
    /// Parses a URI as found in a certificate or a policy.
    ///
    /// # Errors
    /// Says which rule of the SPIFFE specification the text breaks.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        let refuse =
            |reason| Err(InvalidSpiffeId { text: text.chars().take(200).collect(), reason });
        if text.len() > LENGTH_LIMIT_BYTES {
            return refuse("it is longer than 2048 bytes");
        }
        let Some(rest) = text.strip_prefix("spiffe://") else {
            return refuse("it does not start with spiffe://");
        };
        let (domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        let domain_char =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if domain.is_empty() || domain.len() > 255 || !domain.chars().all(domain_char) {
            return refuse("its trust domain is not 1 to 255 of a-z 0-9 . _ -");
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
                "a path segment is empty, a dot segment, or has a character outside A-Z a-z 0-9 . _ -",
            );
        }
        Ok(Self { text: text.into() })
    }

    /// The whole id.
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

    /// The last path segment, by custom the service account or service name.
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

/// A text that is no SPIFFE id, with the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidSpiffeId {
    /// The text, cut at 200 characters.
    pub text: String,
    /// The rule that it breaks.
    pub reason: &'static str,
}

impl fmt::Display for InvalidSpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no SPIFFE id: {}", self.text, self.reason)
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
    fn an_id_is_scheme_trust_domain_and_clean_segments() {
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
