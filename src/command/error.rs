//! Why a command failed, and with it the exit code.

/// Why a command failed. Decides the exit code.
#[derive(Debug)]
pub enum CommandError {
    /// A usage or configuration error: exit code 2.
    Usage(String),
    /// Any other failure: exit code 1.
    Failed(String),
}

impl From<String> for CommandError {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}
