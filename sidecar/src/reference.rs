//! The closed sets of this crate, for the reference pages of the documentation.

use weft_runtime::access::{RefusalInfo, WordInfo};

use crate::denial::Denial;
use crate::http::desync::DesyncReason;
use crate::request_log::OUTCOME_DETAILS;
use crate::tls::failure::TlsFailure;
use crate::upstream_failure::{ConnectFailure, ResponseFault, http2_words};

/// A deviation from strict HTTP/1.1.
#[derive(Debug, Clone, Copy)]
pub struct DeviationInfo {
    /// The name in logs and metrics.
    pub name: &'static str,
    /// What the request has.
    pub meaning: &'static str,
}

/// Every refusal of a request.
pub fn refusals() -> impl Iterator<Item = RefusalInfo> {
    Denial::all()
}

/// The `response_code_details` of requests that were not refused.
#[must_use]
pub fn outcome_details() -> &'static [WordInfo] {
    OUTCOME_DETAILS
}

/// Why an endpoint could not be connected to, TLS apart.
#[must_use]
pub fn connect_failures() -> &'static [WordInfo] {
    ConnectFailure::WORDS
}

/// Why a TLS handshake with an endpoint failed, received alerts apart.
#[must_use]
pub fn handshake_failures() -> &'static [WordInfo] {
    TlsFailure::own_words()
}

/// The words for alerts that an endpoint sent.
pub fn alerts() -> impl Iterator<Item = &'static str> {
    TlsFailure::words().skip(handshake_failures().len())
}

/// What makes an endpoint's response malformed, HTTP/2 errors apart.
#[must_use]
pub fn response_faults() -> &'static [WordInfo] {
    ResponseFault::WORDS
}

/// The words for errors of HTTP/2.
pub fn http2_errors() -> impl Iterator<Item = &'static str> {
    http2_words()
}

/// Every deviation from strict HTTP/1.1.
pub fn deviations() -> impl Iterator<Item = DeviationInfo> {
    let info =
        |reason: &DesyncReason| DeviationInfo { name: reason.word(), meaning: reason.detail() };
    DesyncReason::ALL.iter().map(info)
}
