//! Why a command failed, and with which exit code.

/// The exit codes of every command, with their meaning.
pub const EXIT_CODES: [(u8, &str); 3] = [
    (0, "success; of `weft why`: allowed or redirected; of `weft status`: ready"),
    (
        FAILURE_CODE,
        "failure; of `weft why`: denied at a destination; of `weft status`: not ready; of `weft redirect verify`, `diff` and `probe`: the rules differ or do not redirect",
    ),
    (USAGE_CODE, "usage or configuration error"),
];
pub(super) const FAILURE_CODE: u8 = 1;
pub(super) const USAGE_CODE: u8 = 2;

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
