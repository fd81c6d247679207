//! Why a message body was not forwarded to its end.

/// Why a body was not forwarded to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The sender's connection was lost.
    SourceClosed,
    /// The sender reset the HTTP/2 stream, or its connection ended. Holds the reason, for logs.
    StreamEnded(&'static str),
    /// The sender violated the body's framing. Holds the violation, for logs.
    Malformed(&'static str),
    /// The receiver reset its stream or closed its connection.
    SinkClosed,
}
