//! Writes the results of commands to standard output.

use std::io::Write as _;

/// Writes a line to standard output.
pub(crate) fn print_line(text: &str) {
    // The reader may have closed the pipe.
    drop(writeln!(std::io::stdout(), "{text}"));
}
