//! What there is to tell of the redirects that a guard keeps.

use std::fmt;

/// How it stands with a wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It was not looked at yet.
    Waiting,
    /// The rules are in force.
    InForce,
    /// The namespace is not there.
    NoNamespace,
    /// The rules could not be installed or compared.
    Failed(String),
}

/// What a guard has to tell.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// How it stands with each wish, by its namespace's name.
    pub standing: Vec<(String, Standing)>,
    /// How often rules that somebody had changed were installed again.
    pub repairs: u64,
    /// How often that failed.
    pub failures: u64,
    /// How often a probe was not handed over though the rules are in force.
    pub passed: u64,
    /// How many packets strict rules have dropped, by the namespace's name.
    pub dropped: Vec<(String, u64)>,
    /// Whether DNS is handed over, where it is to be, by the namespace's name: it is as long as somebody
    /// answers.
    pub dns: Vec<(String, bool)>,
}

impl Report {
    /// Whether every wish whose namespace is there is in force.
    ///
    /// # Errors
    /// Which is not, and why.
    pub fn ready(&self) -> Result<(), String> {
        let failed = self.standing.iter().find_map(|(name, standing)| match standing {
            Standing::Waiting | Standing::Failed(_) => {
                Some(format!("redirects in {name}: {standing}"))
            }
            Standing::InForce | Standing::NoNamespace => None,
        });
        failed.map_or(Ok(()), Err)
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("not looked at yet"),
            Self::InForce => f.write_str("in force"),
            Self::NoNamespace => f.write_str("its namespace is not there"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
