//! The options of a listener for one HTTP version: `Http1ProtocolOptions`, `Http2ProtocolOptions`.

use std::time::Duration;

use weft_model::{HeaderCase, Http1Options, HttpLimits, HttpService, Keepalive};

use super::super::pb::core::http1_protocol_options::HeaderKeyFormat;
use super::super::pb::core::http1_protocol_options::header_key_format::{
    HeaderFormat, ProperCaseWords,
};
use super::super::pb::core::{Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings};
use super::super::pb::types::Percent;
use super::super::reader::MISSING;
use super::super::{FieldError, MessageReader, values};

const HTTP1: &str = "http_protocol_options";
const HTTP2: &str = "http2_protocol_options";
const PRESERVE_CASE: &str =
    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig";
/// The shortest duration in `KeepaliveSettings`.
const SHORTEST: Duration = Duration::from_millis(1);
/// The default jitter of an interval, the same as Envoy's.
const DEFAULT_JITTER_PERCENT: u8 = 15;

/// Reads `http_protocol_options`.
pub(super) fn http1_options(manager: &mut MessageReader<'_>) -> Result<Http1Options, FieldError> {
    let Some(mut options) = manager.child(HTTP1) else {
        return Ok(Http1Options::default());
    };
    // HTTP/1.0 is always served, and trailers are always forwarded.
    options.harmless(&["accept_http_10", "enable_trailers"]);
    if options.flag("allow_absolute_url") == Some(false) {
        options.not_honoured("allow_absolute_url", "absolute URLs are always understood");
    }
    if options.flag("allow_chunked_length") == Some(true) {
        options.not_honoured("allow_chunked_length", "desync_mode decides");
    }
    let default_host = options.text("default_host_for_http_10");
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~[]:".contains(&byte);
    if !default_host.bytes().all(is_host) {
        let reason = format!(
            "invalid host {default_host:?}: must be a host name or address, with or without a port"
        );
        return Err(options.refuse("default_host_for_http_10", reason));
    }
    let header_case = match options.child("header_key_format") {
        Some(format) => header_case(format)?,
        None => HeaderCase::AsReceived,
    };
    Ok(Http1Options {
        default_host: Some(default_host).filter(|host| !host.is_empty()),
        header_case,
    })
}

fn header_case(mut format: MessageReader<'_>) -> Result<HeaderCase, FieldError> {
    if format.child("proper_case_words").is_some() {
        return Ok(HeaderCase::Words);
    }
    let Some(mut formatter) = format.child("stateful_formatter") else {
        return Err(
            format.refuse("", "one of proper_case_words and stateful_formatter must be set")
        );
    };
    formatter.harmless(&["name"]);
    let config = formatter.required_child("typed_config")?;
    if config.any_kind() == PRESERVE_CASE {
        config.set_aside();
    } else {
        let kind = config.any_kind();
        formatter
            .not_honoured("", &format!("{kind} is not supported, names are written as received"));
        config.set_aside();
    }
    Ok(HeaderCase::AsReceived)
}

/// Reads `http2_protocol_options`.
pub(super) fn http2_options(
    manager: &mut MessageReader<'_>,
    limits: &mut HttpLimits,
) -> Result<Option<Keepalive>, FieldError> {
    let Some(mut options) = manager.child(HTTP2) else {
        return Ok(None);
    };
    options.harmless(&["allow_connect"]);
    if let Some(streams) = options.number("max_concurrent_streams") {
        if streams == 0 || streams > 0x7fff_ffff {
            return Err(options.refuse(
                "max_concurrent_streams",
                format!("invalid number {streams}: must be 1 to 2147483647"),
            ));
        }
        limits.streams = streams;
    }
    options.child("connection_keepalive").map_or(Ok(None), keepalive)
}

fn keepalive(mut settings: MessageReader<'_>) -> Result<Option<Keepalive>, FieldError> {
    // Envoy sends this PING before it opens a stream; a listener opens none.
    settings.harmless(&["connection_idle_interval"]);
    let at_least =
        |settings: &MessageReader<'_>, field: &str, duration: Option<Duration>| match duration {
            Some(short) if short < SHORTEST => {
                let reason = format!("invalid duration {short:?}: must be 0.001s or more");
                Err(settings.refuse(field, reason))
            }
            duration => Ok(duration),
        };
    let timeout = settings.duration("timeout")?;
    let timeout = at_least(&settings, "timeout", timeout)?
        .ok_or_else(|| settings.refuse("timeout", MISSING))?;
    let interval = settings.duration("interval")?;
    let interval = at_least(&settings, "interval", interval)?;
    let jitter_percent = match settings.child("interval_jitter") {
        None => DEFAULT_JITTER_PERCENT,
        Some(mut percent) => match percent.decimal("value") {
            Some(value) if (0.0..=100.0).contains(&value) => whole_percent(value),
            value => {
                let value = value.unwrap_or_default();
                let reason = format!("invalid percentage {value}: must be 0 to 100");
                return Err(percent.refuse("value", reason));
            }
        },
    };
    Ok(interval.map(|interval| Keepalive { interval, timeout, jitter_percent }))
}

/// A percentage of 0 to 100, rounded to a whole one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller checked the range"
)]
fn whole_percent(value: f64) -> u8 {
    value.round() as u8
}

/// Encodes `http_protocol_options`; none when all have their defaults.
pub(super) fn encode_http1(http: &HttpService) -> Option<Http1ProtocolOptions> {
    let header_format = match http.http1.header_case {
        HeaderCase::AsReceived => None,
        HeaderCase::Words => Some(HeaderFormat::ProperCaseWords(ProperCaseWords::default())),
    };
    (http.http1 != Http1Options::default()).then(|| Http1ProtocolOptions {
        accept_http_10: true,
        default_host_for_http_10: http.http1.default_host.clone().unwrap_or_default(),
        header_key_format: header_format
            .map(|format| HeaderKeyFormat { header_format: Some(format) }),
        ..Http1ProtocolOptions::default()
    })
}

/// Encodes `http2_protocol_options`; none when all have their defaults.
pub(super) fn encode_http2(http: &HttpService) -> Option<Http2ProtocolOptions> {
    let mut options = Http2ProtocolOptions::default();
    if http.limits.streams != HttpLimits::default().streams {
        options.max_concurrent_streams = values::number(http.limits.streams);
    }
    options.connection_keepalive = http.keepalive.map(|keepalive| KeepaliveSettings {
        interval: Some(values::duration(keepalive.interval)),
        timeout: Some(values::duration(keepalive.timeout)),
        interval_jitter: Some(Percent { value: keepalive.jitter_percent.into() }),
        ..KeepaliveSettings::default()
    });
    (options != Http2ProtocolOptions::default()).then_some(options)
}
