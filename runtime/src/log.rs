//! The process log, on standard error. The level can be changed while the process runs.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Changes the log filter.
#[derive(Clone)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl std::fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogLevel")
    }
}

impl LogLevel {
    /// Sets the log filter, such as `debug` or `weft_xds=trace,info`.
    ///
    /// # Errors
    /// When the text is not a valid log filter.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let filter = parse(filter)?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }

    /// The current log filter.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts logging, in colour if standard error is a terminal.
///
/// # Errors
/// When the text is not a valid log filter, or logging was started already.
pub fn start(filter: &str) -> Result<LogLevel, String> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let colour = std::io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colour).with_target(false);
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| error.to_string())?;
    Ok(LogLevel(handle))
}

/// Checks the text of a log filter.
///
/// # Errors
/// The invalid part, and what is accepted.
pub fn check(filter: &str) -> Result<(), String> {
    parse(filter).map(drop)
}

fn parse(filter: &str) -> Result<EnvFilter, String> {
    let refuse = |why: String| {
        format!(
            "invalid log filter {filter:?}: {why}: must be LEVEL or TARGET=LEVEL, separated by commas; {LEVELS}"
        )
    };
    if let Some(part) = filter.split(',').find(|part| !is_directive(part.trim())) {
        return Err(refuse(format!("unknown level {:?}", part.trim())));
    }
    EnvFilter::builder().parse(filter).map_err(|error| refuse(error.to_string()))
}

const LEVELS: &str = "levels are off, error, warn, info, debug and trace";

/// Whether a directive names a level. [`EnvFilter`] takes an unknown level for a target and then logs nothing
/// else, so a typing error would silence the log.
fn is_directive(part: &str) -> bool {
    let is_of_span = part.contains(['[', ']', '{', '}']);
    // An empty text parses as a level.
    part.contains('=') || is_of_span || (!part.is_empty() && part.parse::<LevelFilter>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_targets_with_levels_are_accepted() {
        for filter in ["info", "OFF", "weft_xds=trace,info", "h2=warn, debug", "weft[span]=debug"] {
            assert_eq!(check(filter), Ok(()), "{filter}");
        }
    }

    #[test]
    fn word_that_is_not_a_level_is_refused_with_the_accepted_levels() {
        for filter in ["nosuch", "", "weft_xds", "info,nosuch", "weft=nosuch", "weft_xds%3Dtrace"] {
            let refused = check(filter).expect_err(filter);
            assert!(refused.starts_with(&format!("invalid log filter {filter:?}")), "{refused}");
            assert!(refused.ends_with("off, error, warn, info, debug and trace"), "{refused}");
        }
    }
}
