//! The options of a listener for one HTTP version: `Http1ProtocolOptions`, `Http2ProtocolOptions`.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{HeaderCase, Http1Options, HttpLimits, HttpService, Keepalive};

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
                let reason =
                    format!("invalid duration {}: must be 0.001s or more", values::duration(short));
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

/// Adds the options that differ from the defaults.
pub(super) fn add_options(http: &HttpService, fields: &mut Value) {
    if http.http1 != Http1Options::default() {
        let mut options = json!({"accept_http_10": true});
        if let Some(host) = &http.http1.default_host {
            options["default_host_for_http_10"] = json!(host);
        }
        if http.http1.header_case == HeaderCase::Words {
            options["header_key_format"] = json!({"proper_case_words": {}});
        }
        fields[HTTP1] = options;
    }
    let mut http2 = json!({});
    if http.limits.streams != HttpLimits::default().streams {
        http2["max_concurrent_streams"] = json!(http.limits.streams);
    }
    if let Some(keepalive) = http.keepalive {
        http2["connection_keepalive"] = json!({
            "interval": values::duration(keepalive.interval),
            "timeout": values::duration(keepalive.timeout),
            "interval_jitter": {"value": keepalive.jitter_percent},
        });
    }
    if http2 != json!({}) {
        fields[HTTP2] = http2;
    }
}
