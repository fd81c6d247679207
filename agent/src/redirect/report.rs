//! The status of redirects that a guard maintains.

use std::fmt;

/// The status of the redirects of one namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedirectStatus {
    /// The rules were not checked yet.
    Pending,
    /// The rules are in force.
    InForce,
    /// The namespace does not exist.
    NamespaceMissing,
    /// The rules could not be installed or compared, or a probe was not redirected.
    Failed(String),
}

/// The status of all redirects.
#[derive(Debug, Clone, Default)]
pub struct RedirectReport {
    /// The status of each namespace, by its name.
    pub statuses: Vec<(String, RedirectStatus)>,
    /// How often rules that had drifted were installed again.
    pub repairs: u64,
    /// How often installing or comparing rules failed.
    pub failures: u64,
    /// How often a probe was not redirected although the rules are in force.
    pub probe_failures: u64,
    /// The packets that strict rules have dropped, by the name of the namespace.
    pub dropped: Vec<(String, u64)>,
    /// Whether DNS is redirected, by the name of the namespace, where it is configured: it is while the DNS server
    /// answers.
    pub dns: Vec<(String, bool)>,
}

impl RedirectReport {
    /// Checks that the redirects of every existing namespace are in force.
    ///
    /// # Errors
    /// The first namespace whose redirects are not in force, and its status.
    pub fn ready(&self) -> Result<(), String> {
        let failed = self.statuses.iter().find_map(|(name, status)| match status {
            RedirectStatus::Pending | RedirectStatus::Failed(_) => {
                Some(format!("redirects in {name}: {status}"))
            }
            RedirectStatus::InForce | RedirectStatus::NamespaceMissing => None,
        });
        failed.map_or(Ok(()), Err)
    }
}

impl fmt::Display for RedirectStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending => f.write_str("not checked yet"),
            Self::InForce => f.write_str("in force"),
            Self::NamespaceMissing => f.write_str("namespace not found"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
