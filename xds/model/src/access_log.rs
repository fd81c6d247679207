//! Where access log lines are written.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where access log lines are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogSink {
    /// Standard output (`envoy.extensions.access_loggers.stream.v3.StdoutAccessLog`).
    Stdout,
    /// Standard error (`envoy.extensions.access_loggers.stream.v3.StderrAccessLog`).
    Stderr,
    /// The end of this file (`envoy.extensions.access_loggers.file.v3.FileAccessLog`).
    File(Arc<Path>),
}

impl AccessLogSink {
    /// The sink for a file path. `/dev/stdout` and `/dev/stderr` are the streams of this process.
    #[must_use]
    pub fn for_path(path: &str) -> Self {
        match path {
            "/dev/stdout" => Self::Stdout,
            "/dev/stderr" => Self::Stderr,
            path => Self::File(Path::new(path).into()),
        }
    }
}

impl fmt::Display for AccessLogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("stdout"),
            Self::Stderr => f.write_str("stderr"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The sinks of a listener's access log (`access_log`). Cloning allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AccessLogSinks {
    /// No line is written.
    #[default]
    Off,
    /// Standard output alone.
    Stdout,
    /// Each of these sinks gets every line.
    Listed(Arc<[AccessLogSink]>),
}

impl AccessLogSinks {
    /// The set of these sinks. Sinks that are listed twice get each line once.
    #[must_use]
    pub fn new(listed: impl IntoIterator<Item = AccessLogSink>) -> Self {
        let mut sinks = Vec::new();
        for sink in listed {
            if !sinks.contains(&sink) {
                sinks.push(sink);
            }
        }
        match sinks.as_slice() {
            [] => Self::Off,
            [AccessLogSink::Stdout] => Self::Stdout,
            _ => Self::Listed(sinks.into()),
        }
    }

    /// Whether no line is written.
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::Off
    }

    /// The sinks.
    pub fn iter(&self) -> std::slice::Iter<'_, AccessLogSink> {
        const STDOUT: &[AccessLogSink] = &[AccessLogSink::Stdout];
        match self {
            Self::Off => [].iter(),
            Self::Stdout => STDOUT.iter(),
            Self::Listed(sinks) => sinks.iter(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_paths_are_the_streams_and_repeated_sinks_count_once() {
        let sinks = |paths: &[&str]| {
            AccessLogSinks::new(paths.iter().map(|path| AccessLogSink::for_path(path)))
        };
        assert_eq!(sinks(&[]), AccessLogSinks::Off);
        assert_eq!(sinks(&["/dev/stdout", "/dev/stdout"]), AccessLogSinks::Stdout);
        let listed = sinks(&["/var/log/a", "/dev/stderr", "/var/log/a"]);
        let names: Vec<String> = listed.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["/var/log/a", "stderr"]);
    }
}
