//! What of a configuration is not in effect, and what that means for readiness.

/// What of a configuration is not in effect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    /// Listeners, or parts of them, that serve no client. The process is not ready.
    pub unserved: Vec<String>,
    /// Clusters that cannot be reached. The process does not become ready; once it was, it stays so,
    /// because other clusters are served.
    pub unreachable: Vec<String>,
    /// What is served, but otherwise than configured.
    pub warnings: Vec<String>,
}

impl Problems {
    /// All of them, worst first.
    pub fn all(&self) -> impl Iterator<Item = &String> {
        self.unserved.iter().chain(&self.unreachable).chain(&self.warnings)
    }

    /// Adds a warning, unless it is known.
    pub fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Whether everything that was configured is served. `was_ready`: it was before.
    ///
    /// # Errors
    /// What is not.
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
