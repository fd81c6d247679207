//! Parts of a configuration that are not in effect, and what that means for readiness.

/// Parts of a configuration that are not in effect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    /// Listeners, or parts of listeners, that serve no client. The process is not ready.
    pub unserved: Vec<String>,
    /// Clusters that cannot be reached. They delay readiness at the start. A process that was ready stays
    /// ready, because its other clusters are served.
    pub unreachable: Vec<String>,
    /// Parts that are served differently from the configuration.
    pub warnings: Vec<String>,
}

impl Problems {
    /// All problems, most severe first.
    pub fn all(&self) -> impl Iterator<Item = &String> {
        self.unserved.iter().chain(&self.unreachable).chain(&self.warnings)
    }

    /// Adds a warning, unless the same warning exists.
    pub fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Checks whether the whole configuration is served. `was_ready` says whether the process was ready
    /// before.
    ///
    /// # Errors
    /// The listeners that are not served and, before the process was ready, the clusters that cannot be
    /// reached.
    pub fn ready(&self, was_ready: bool) -> Result<(), String> {
        let unreachable = self.unreachable.iter().filter(|_| !was_ready);
        let all: Vec<&str> = self.unserved.iter().chain(unreachable).map(String::as_str).collect();
        if all.is_empty() { Ok(()) } else { Err(all.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unserved_listener_is_never_ready_and_unreachable_cluster_only_at_the_start() {
        let listener = Problems { unserved: vec!["listener".into()], ..Problems::default() };
        assert_eq!(listener.ready(true), Err("listener".into()));
        let cluster = Problems { unreachable: vec!["cluster".into()], ..Problems::default() };
        assert_eq!(cluster.ready(false), Err("cluster".into()));
        assert_eq!(cluster.ready(true), Ok(()));
        let warning = Problems { warnings: vec!["other".into()], ..Problems::default() };
        assert_eq!(warning.ready(false), Ok(()));
    }
}
