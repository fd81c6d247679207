//! What there is to tell of the redirects that a guard keeps.

use std::fmt;

/// How it stands with a wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedirectStatus {
    /// It was not looked at yet.
    Pending,
    /// The rules are in force.
    InForce,
    /// The namespace is not there.
    NamespaceMissing,
    /// The rules could not be installed or compared.
    Failed(String),
}

/// What a guard has to tell.
#[derive(Debug, Clone, Default)]
pub struct RedirectReport {
    /// How it stands with each wish, by its namespace's name.
    pub statuses: Vec<(String, RedirectStatus)>,
    /// How often rules that somebody had changed were installed again.
    pub repairs: u64,
    /// How often that failed.
    pub failures: u64,
    /// How often a probe was not handed over though the rules are in force.
    pub probe_failures: u64,
    /// How many packets strict rules have dropped, by the namespace's name.
    pub dropped: Vec<(String, u64)>,
    /// Whether DNS is handed over, where it is to be, by the namespace's name: it is as long as somebody
    /// answers.
    pub dns: Vec<(String, bool)>,
}

impl RedirectReport {
    /// Whether every wish whose namespace is there is in force.
    ///
    /// # Errors
    /// Which is not, and why.
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
            Self::Pending => f.write_str("not looked at yet"),
            Self::InForce => f.write_str("in force"),
            Self::NamespaceMissing => f.write_str("its namespace is not there"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
