//! Logs for people, on standard error. The level can be changed while the process runs.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Changes what is logged.
#[derive(Clone)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl std::fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogLevel")
    }
}

impl LogLevel {
    /// Logs what `filter` says, such as `debug` or `weft_xds=trace,info`.
    ///
    /// # Errors
    /// Why the text is no filter.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let filter = parse(filter)?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }

    /// What is logged now.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts logging. Colour only on a terminal.
///
/// # Errors
/// Why the text is no filter, or that logging was started already.
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

fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder().parse(filter).map_err(|error| {
        format!("{filter:?} is no log filter, such as info, debug or weft_xds=trace,info: {error}")
    })
}
