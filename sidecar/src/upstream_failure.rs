//! Why an endpoint could not be connected to or sent an invalid response: one word for each reason, from a closed set.

use std::io;

use weft_runtime::access::{ResponseFlag, WordInfo};

use crate::http::desync::DesyncReason;
use crate::tls::failure::TlsFailure;

/// Defines the failures that have a word of their own.
macro_rules! failures {
    ($(#[doc = $doc:literal])+ $enum:ident {
        $($(#[doc = $meaning:literal])+ $name:ident: $word:literal;)+
    } or {
        $($(#[doc = $other_doc:literal])+ $other:ident($payload:ty),)+
    }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $enum {
            $($(#[doc = $meaning])+ $name,)+
            $($(#[doc = $other_doc])+ $other($payload),)+
        }

        impl $enum {
            /// The failures that have a word of their own.
            pub(crate) const WORDS: &[WordInfo] =
                &[$(WordInfo { word: $word, meaning: &[$($meaning),+] },)+];

            fn own_word(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some($word),)+
                    $(Self::$other(_) => None,)+
                }
            }
        }
    };
}

failures! {
    /// Why an endpoint could not be connected to.
    ConnectFailure {
        /// The endpoint refused the TCP connection.
        Refused: "connection_refused";
        /// No route to the endpoint exists.
        NoRoute: "no_route_to_host";
        /// The endpoint did not accept the TCP connection in time.
        Timeout: "connection_timeout";
        /// The TCP connection failed in another way.
        Failed: "connect_failed";
    } or {
        /// The TLS handshake failed.
        Tls(TlsFailure),
    }
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

    /// The word in the access log.
    pub(crate) fn word(self) -> Option<&'static str> {
        match self {
            Self::Tls(failure) => Some(failure.word()),
            other => other.own_word(),
        }
    }
}

failures! {
    /// What makes an endpoint's response malformed.
    ResponseFault {
        /// The endpoint closed the connection without a response.
        Closed: "closed_before_response";
        /// The connection was reset or lost before a response.
        Lost: "connection_lost";
        /// The endpoint closed the connection within the head.
        IncompleteHead: "incomplete_head";
        /// The head is larger than the cluster allows.
        HeadTooLarge: "head_too_large";
        /// There are more headers than the cluster allows.
        TooManyHeaders: "too_many_headers";
        /// The first line is not a status line of HTTP/1.
        BadStatusLine: "bad_status_line";
        /// A header continues on the next line.
        FoldedHeader: "folded_header";
        /// A line of the head has no colon.
        HeaderWithoutColon: "header_without_colon";
        /// A header has a character that no header may have.
        BadHeader: "bad_header";
        /// A header's name looks like one that frames the message.
        SuspiciousHeader: "suspicious_header";
        /// A line ends without a carriage return.
        BareLineFeed: "bare_line_feed";
        /// Both `content-length` and `transfer-encoding` are there.
        LengthAndCoding: "content_length_and_transfer_encoding";
        /// There is more than one `content-length`.
        SeveralLengths: "several_content_lengths";
        /// The `content-length` is not a number.
        BadLength: "bad_content_length";
        /// There is more than one `transfer-encoding`.
        SeveralCodings: "several_transfer_encodings";
        /// The `transfer-encoding` is not `chunked`.
        BadCoding: "bad_transfer_encoding";
        /// The announced body is larger than the limit.
        BodyTooLarge: "body_too_large";
        /// There are more interim responses than are forwarded.
        TooManyInterim: "too_many_interim_responses";
        /// The response to an upgrade neither accepts nor declines it.
        BadUpgrade: "bad_upgrade_response";
        /// The `sec-websocket-accept` does not match the key of the request.
        BadWebSocketAccept: "bad_websocket_accept";
    } or {
        /// The endpoint sent this alert instead of a response.
        Tls(TlsFailure),
        /// The h2 crate found this error in the frames of the endpoint.
        Http2(h2::Reason),
        /// The endpoint reset the stream.
        Http2Reset(h2::Reason),
        /// The endpoint closed the connection with a GOAWAY.
        Http2GoAway(h2::Reason),
    }
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

/// The words for HTTP/2 error codes.
pub(crate) fn http2_words() -> impl Iterator<Item = &'static str> {
    HTTP2_WORDS.iter().flat_map(|(_, words)| *words).chain([OTHER_HTTP2_ERROR])
}

/// The word for other codes.
const OTHER_HTTP2_ERROR: &str = "http2_unknown_error";

fn http2_word(reason: h2::Reason, place: usize) -> &'static str {
    let known = HTTP2_WORDS.iter().find(|(known, _)| *known == reason);
    known.and_then(|(_, words)| words.get(place).copied()).unwrap_or(OTHER_HTTP2_ERROR)
}

impl ResponseFault {
    /// The word in the access log.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Tls(failure) => failure.word(),
            Self::Http2(reason) => http2_word(reason, 0),
            Self::Http2Reset(reason) => http2_word(reason, 1),
            Self::Http2GoAway(reason) => http2_word(reason, 2),
            own => own.own_word().unwrap_or_default(),
        }
    }

    /// The response flag in the access log.
    pub(crate) fn flag(self) -> ResponseFlag {
        match self {
            Self::Closed | Self::Lost | Self::Http2GoAway(_) => {
                ResponseFlag::UpstreamConnectionTermination
            }
            Self::Tls(_) => ResponseFlag::UpstreamConnectionFailure,
            Self::Http2Reset(_) => ResponseFlag::UpstreamRemoteReset,
            _ => ResponseFlag::UpstreamProtocolError,
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
