//! Notes for the operator about an accepted configuration.

/// Notes for the operator about an accepted configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// The paths of fields that are set and have no effect.
    pub not_honoured: Vec<String>,
    /// Settings that weaken security, each with its path and its consequence.
    pub warnings: Vec<String>,
}

impl Notes {
    /// Whether there are no notes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.not_honoured.is_empty() && self.warnings.is_empty()
    }

    pub(crate) fn extend(&mut self, other: Self) {
        self.not_honoured.extend(other.not_honoured);
        self.warnings.extend(other.warnings);
    }
}
