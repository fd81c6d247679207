//! Why an endpoint could not be connected to or sent an invalid response: one word for each reason, from a closed set.

use std::io;

use crate::http::desync::DesyncReason;
use crate::tls::failure::TlsFailure;

/// Why an endpoint could not be connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectFailure {
    /// The endpoint refused the TCP connection.
    Refused,
    /// No route to the endpoint exists.
    NoRoute,
    /// The endpoint did not accept the TCP connection in time.
    Timeout,
    /// The TCP connection failed in another way.
    Failed,
    /// The TLS handshake failed.
    Tls(TlsFailure),
}

impl ConnectFailure {
    /// The failure of a connection attempt.
    pub(crate) fn of(error: &io::Error) -> Self {
        match (TlsFailure::of_attempt(error), error.kind()) {
            (Some(failure), _) => Self::Tls(failure),
            (None, io::ErrorKind::ConnectionRefused) => Self::Refused,
            (None, io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
                Self::NoRoute
            }
            (None, io::ErrorKind::TimedOut) => Self::Timeout,
            (None, _) => Self::Failed,
        }
    }

    /// The word in the access log; empty where the denial is enough.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Refused => "connection_refused",
            Self::NoRoute => "no_route_to_host",
            Self::Timeout => "",
            Self::Failed => "connect_failed",
            Self::Tls(failure) => failure.word(),
        }
    }
}

/// What makes an endpoint's response malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResponseFault {
    /// The endpoint closed the connection without a response.
    Closed,
    /// The connection was reset or lost before a response.
    Lost,
    /// The endpoint closed the connection within the head.
    IncompleteHead,
    /// The head is larger than the cluster allows.
    HeadTooLarge,
    /// There are more headers than the cluster allows.
    TooManyHeaders,
    /// The first line is not a status line of HTTP/1.
    BadStatusLine,
    /// A header continues on the next line.
    FoldedHeader,
    /// A line of the head has no colon.
    HeaderWithoutColon,
    /// A header has a character that no header may have.
    BadHeader,
    /// A header's name looks like one that frames the message.
    SuspiciousHeader,
    /// A line ends without a carriage return.
    BareLineFeed,
    /// Both `content-length` and `transfer-encoding` are there.
    LengthAndCoding,
    /// There is more than one `content-length`.
    SeveralLengths,
    /// The `content-length` is not a number.
    BadLength,
    /// There is more than one `transfer-encoding`.
    SeveralCodings,
    /// The `transfer-encoding` is not `chunked`.
    BadCoding,
    /// The announced body is larger than the limit.
    BodyTooLarge,
    /// There are more interim responses than are forwarded.
    TooManyInterim,
    /// The response to an upgrade neither accepts nor declines it.
    BadUpgrade,
    /// The `sec-websocket-accept` does not match the key of the request.
    BadWebSocketAccept,
    /// The endpoint sent this alert instead of a response.
    Tls(TlsFailure),
    /// The h2 crate found this error in the frames of the endpoint.
    Http2(h2::Reason),
    /// The endpoint reset the stream.
    Http2Reset(h2::Reason),
    /// The endpoint closed the connection with a GOAWAY.
    Http2GoAway(h2::Reason),
}

/// The words for each HTTP/2 error code (RFC 9113, section 7): found here, in RST_STREAM, in GOAWAY.
const HTTP2_WORDS: [(h2::Reason, [&str; 3]); 14] = {
    macro_rules! words {
        ($($reason:ident $word:literal,)*) => {
            [$((
                h2::Reason::$reason,
                [
                    concat!("http2_", $word),
                    concat!("http2_reset_", $word),
                    concat!("http2_goaway_", $word),
                ],
            ),)*]
        };
    }
    words![
        NO_ERROR "no_error",
        PROTOCOL_ERROR "protocol_error",
        INTERNAL_ERROR "internal_error",
        FLOW_CONTROL_ERROR "flow_control_error",
        SETTINGS_TIMEOUT "settings_timeout",
        STREAM_CLOSED "stream_closed",
        FRAME_SIZE_ERROR "frame_size_error",
        REFUSED_STREAM "refused_stream",
        CANCEL "cancel",
        COMPRESSION_ERROR "compression_error",
        CONNECT_ERROR "connect_error",
        ENHANCE_YOUR_CALM "enhance_your_calm",
        INADEQUATE_SECURITY "inadequate_security",
        HTTP_1_1_REQUIRED "http_1_1_required",
    ]
};

fn http2_word(reason: h2::Reason, place: usize) -> &'static str {
    let known = HTTP2_WORDS.iter().find(|(known, _)| *known == reason);
    known.and_then(|(_, words)| words.get(place).copied()).unwrap_or("http2_unknown_error")
}

impl ResponseFault {
    /// The word in the access log.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed_before_response",
            Self::Lost => "connection_lost",
            Self::IncompleteHead => "incomplete_head",
            Self::HeadTooLarge => "head_too_large",
            Self::TooManyHeaders => "too_many_headers",
            Self::BadStatusLine => "bad_status_line",
            Self::FoldedHeader => "folded_header",
            Self::HeaderWithoutColon => "header_without_colon",
            Self::BadHeader => "bad_header",
            Self::SuspiciousHeader => "suspicious_header",
            Self::BareLineFeed => "bare_line_feed",
            Self::LengthAndCoding => "content_length_and_transfer_encoding",
            Self::SeveralLengths => "several_content_lengths",
            Self::BadLength => "bad_content_length",
            Self::SeveralCodings => "several_transfer_encodings",
            Self::BadCoding => "bad_transfer_encoding",
            Self::BodyTooLarge => "body_too_large",
            Self::TooManyInterim => "too_many_interim_responses",
            Self::BadUpgrade => "bad_upgrade_response",
            Self::BadWebSocketAccept => "bad_websocket_accept",
            Self::Tls(failure) => failure.word(),
            Self::Http2(reason) => http2_word(reason, 0),
            Self::Http2Reset(reason) => http2_word(reason, 1),
            Self::Http2GoAway(reason) => http2_word(reason, 2),
        }
    }

    /// The fault of an HTTP/2 stream or connection that ended before the response.
    pub(crate) fn of_http2(error: &h2::Error) -> Self {
        match error.reason() {
            None => Self::Lost,
            Some(reason) if !error.is_remote() => Self::Http2(reason),
            Some(reason) if error.is_go_away() => Self::Http2GoAway(reason),
            Some(reason) => Self::Http2Reset(reason),
        }
    }

    /// The fault for a departure from strict HTTP/1.1.
    pub(crate) fn of_reason(reason: DesyncReason) -> Self {
        match reason {
            DesyncReason::MultilineHeader => Self::FoldedHeader,
            DesyncReason::MissingHeaderColon => Self::HeaderWithoutColon,
            DesyncReason::NonCrLfLineTermination => Self::BareLineFeed,
            DesyncReason::BothTeClPresent => Self::LengthAndCoding,
            DesyncReason::DuplicateContentLength | DesyncReason::MultipleContentLength => {
                Self::SeveralLengths
            }
            DesyncReason::BadContentLength => Self::BadLength,
            DesyncReason::MultipleTransferEncodingChunked => Self::SeveralCodings,
            DesyncReason::BadTransferEncoding => Self::BadCoding,
            DesyncReason::SuspiciousHeader | DesyncReason::SuspiciousTeClPresent => {
                Self::SuspiciousHeader
            }
            DesyncReason::PartialHeaderLine | DesyncReason::MissingLastEmptyLine => {
                Self::IncompleteHead
            }
            _ => Self::BadHeader,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http2_errors_are_named_by_who_ended_what() {
        let check = |fault: ResponseFault, word| assert_eq!(fault.word(), word);
        check(ResponseFault::Http2(h2::Reason::PROTOCOL_ERROR), "http2_protocol_error");
        check(ResponseFault::Http2Reset(h2::Reason::CANCEL), "http2_reset_cancel");
        check(ResponseFault::Http2GoAway(h2::Reason::NO_ERROR), "http2_goaway_no_error");
        check(ResponseFault::Http2Reset(h2::Reason::from(99)), "http2_unknown_error");
    }
}
