//! What the demo prints.

use std::io::{IsTerminal as _, Write as _};

/// Prints a line and flushes it.
pub(super) fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    // The reader may have closed the pipe.
    drop(writeln!(out, "{text}").and_then(|()| out.flush()));
}

/// Prints the result of a step.
pub(super) fn mark(done: bool, text: &str) {
    let colour = std::io::stdout().is_terminal();
    let (word, code) = if done { ("ok", 32) } else { ("FAILED", 31) };
    if colour {
        line(&format!("  \u{1b}[{code}m{word:6}\u{1b}[0m {text}"));
    } else {
        line(&format!("  {word:6} {text}"));
    }
}
