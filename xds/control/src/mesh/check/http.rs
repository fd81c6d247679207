//! Checks the HTTP settings of services and ports: paths, headers, limits and timeouts.

use std::ops::RangeInclusive;

use weft_model::{AmbiguousPath, EscapedSlashes, HeadersWithUnderscores, PathRules, StreamIdle};

use super::diagnostics::Diagnostics;
use crate::mesh::{HttpTuning, Protocol, duration, raw};

/// The accepted size limits of message heads, in KiB; as in Envoy.
const HEADERS_KIB: RangeInclusive<u32> = 1..=8192;
/// The accepted limits of the number of headers.
const HEADERS: RangeInclusive<u32> = 1..=1024;

pub(super) fn path_rules(
    service: &raw::RawService,
    path: &str,
    errors: &mut Diagnostics,
) -> PathRules {
    let default = raw::RawPaths::default();
    let paths = service.http.as_ref().map_or(&default, |http| &http.paths);
    let escaped_slashes = match paths.escaped_slashes.as_deref() {
        None | Some("keep") => EscapedSlashes::Keep,
        Some("reject") => EscapedSlashes::Reject,
        Some("unescape_and_redirect") => EscapedSlashes::Redirect,
        Some(other) => {
            let accepted = "must be keep, reject or unescape_and_redirect";
            let reason = format!("invalid value {other:?}: {accepted}");
            errors.add(format!("{path}.http.paths.escaped_slashes"), reason);
            EscapedSlashes::Reject
        }
    };
    PathRules {
        normalize: paths.normalize,
        merge_slashes: paths.merge_slashes,
        escaped_slashes,
        ambiguous: AmbiguousPath::RouteNormalized,
    }
}

pub(super) fn underscores(
    service: &raw::RawService,
    path: &str,
    errors: &mut Diagnostics,
) -> HeadersWithUnderscores {
    let words = service.http.as_ref().and_then(|http| http.headers_with_underscores.as_deref());
    match words {
        None | Some("allow") => HeadersWithUnderscores::Allow,
        Some("drop") => HeadersWithUnderscores::Drop,
        Some("reject") => HeadersWithUnderscores::Reject,
        Some(other) => {
            let reason = format!("invalid value {other:?}: must be allow, drop or reject");
            errors.add(format!("{path}.http.headers_with_underscores"), reason);
            HeadersWithUnderscores::Reject
        }
    }
}

/// The HTTP limits and timeouts of a service. `path` is its field path.
pub(super) fn of_service(
    service: &raw::RawService,
    path: &str,
    errors: &mut Diagnostics,
) -> HttpTuning {
    let Some(raw::RawHttp { limits, timeouts, .. }) = &service.http else {
        return HttpTuning::default();
    };
    let is_flow = |port: &raw::RawPort| matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
    if service.ports.iter().all(is_flow) {
        let reason = "no effect: the service has no http, http2 or grpc port";
        errors.add(format!("{path}.http"), reason);
    }
    tuning(HttpTuning::default(), limits, timeouts, &format!("{path}.http"), errors)
}

/// The HTTP limits and timeouts of a port: its own settings override those of the service.
pub(super) fn of_port(
    port: &raw::RawPort,
    service: HttpTuning,
    path: &str,
    errors: &mut Diagnostics,
) -> HttpTuning {
    let Some(raw::RawPortHttp { limits, timeouts }) = &port.http else { return service };
    if matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
        let reason = "no effect on this port: requires http, http2 or grpc";
        errors.add(format!("{path}.http"), reason);
    }
    tuning(service, limits, timeouts, &format!("{path}.http"), errors)
}

fn tuning(
    before: HttpTuning,
    limits: &raw::RawHttpLimits,
    timeouts: &raw::RawHttpTimeouts,
    path: &str,
    errors: &mut Diagnostics,
) -> HttpTuning {
    let mut number =
        |field: &str, value: Option<u32>, range: RangeInclusive<u32>, before: usize| {
            let Some(value) = value else { return before };
            if !range.contains(&value) {
                let least = range.start();
                let most = range.end();
                let reason = format!("invalid value {value}: must be {least} to {most}");
                errors.add(format!("{path}.limits.{field}"), reason);
                return before;
            }
            usize::try_from(value).unwrap_or(before)
        };
    let kib = |bytes: usize| bytes / 1024;
    let request_headers_kib = kib(before.request_head_bytes);
    let response_headers_kib = kib(before.response_head_bytes);
    let raw::RawHttpLimits { request_headers_kib: request_kib, request_headers, .. } = *limits;
    let raw::RawHttpLimits { response_headers_kib: response_kib, response_headers, .. } = *limits;
    let request_head_bytes =
        number("request_headers_kib", request_kib, HEADERS_KIB, request_headers_kib) * 1024;
    let request_headers =
        number("request_headers", request_headers, HEADERS, before.request_headers);
    let response_head_bytes =
        number("response_headers_kib", response_kib, HEADERS_KIB, response_headers_kib) * 1024;
    let response_headers =
        number("response_headers", response_headers, HEADERS, before.response_headers);
    let stream_idle = timeouts.stream_idle.as_ref().map(|text| {
        let parsed = duration::parse(text);
        if parsed.is_none() {
            let accepted = duration::ACCEPTED;
            let reason = format!("invalid duration {text:?}: must be {accepted}; 0s: no limit");
            errors.add(format!("{path}.timeouts.stream_idle"), reason);
        }
        StreamIdle::Set(parsed.filter(|limit| !limit.is_zero()))
    });
    HttpTuning {
        request_head_bytes,
        request_headers,
        response_head_bytes,
        response_headers,
        stream_idle: stream_idle.unwrap_or(before.stream_idle),
    }
}
