//! Values that several resources share: addresses, ranges, string matches, data sources, access logs.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{
    AccessLogSink, AccessLogSinks, Cidr, DataSource, PathTemplate, Pattern, StringMatch, Transport,
    is_uri_part,
};

use super::{FieldError, MessageReader};

const STDERR_LOG: &str = "envoy.extensions.access_loggers.stream.v3.StderrAccessLog";
const STDOUT_LOG: &str = "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog";
const FILE_LOG: &str = "envoy.extensions.access_loggers.file.v3.FileAccessLog";

/// An `Any` in JSON form.
pub(super) fn any(message: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/{message}"));
    fields
}

/// The limit of a `max_headers_count`.
pub(super) fn header_count(options: &MessageReader<'_>, count: u32) -> Result<usize, FieldError> {
    match usize::try_from(count) {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err(options
            .refuse("max_headers_count", format!("invalid number {count}: must be 1 to 1024"))),
    }
}

/// A duration in JSON form.
pub(super) fn duration(value: Duration) -> Value {
    json!(format!("{}.{:09}s", value.as_secs(), value.subsec_nanos()))
}

/// The `socket_address` of a `core.v3.Address`.
pub(crate) fn socket(
    mut address: MessageReader<'_>,
) -> Result<(SocketAddr, Transport), FieldError> {
    let Some(mut socket) = address.child("socket_address") else {
        return Err(address.refuse("", "unsupported address: must be a socket_address"));
    };
    let transport = match socket.choice("protocol").as_str() {
        "UDP" => Transport::Udp,
        _ => Transport::Tcp,
    };
    let text = socket.required_text("address")?;
    let ip: IpAddr = text.parse().map_err(|_| {
        socket
            .refuse("address", format!("invalid address {text:?}: must be an IPv4 or IPv6 address"))
    })?;
    Ok((SocketAddr::new(ip, port(&mut socket)?), transport))
}

/// The `port_value` of a `SocketAddress`.
pub(super) fn port(socket: &mut MessageReader<'_>) -> Result<u16, FieldError> {
    let port = socket.number("port_value").unwrap_or(0);
    u16::try_from(port).map_err(|_| {
        socket.refuse("port_value", format!("invalid port {port}: must be at most 65535"))
    })
}

/// A `socket_address` in JSON form.
pub(super) fn socket_json(address: SocketAddr, transport: Transport) -> Value {
    let protocol = match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
    };
    json!({"socket_address": {
        "protocol": protocol, "address": address.ip().to_string(), "port_value": address.port()}})
}

/// A `core.v3.CidrRange`.
pub(super) fn cidr(mut range: MessageReader<'_>) -> Result<Cidr, FieldError> {
    let text = range.required_text("address_prefix")?;
    let bits = range.number("prefix_len").unwrap_or(0);
    Cidr::parse(&format!("{text}/{bits}")).map_err(|error| range.refuse("", error.to_string()))
}

/// A range in JSON form.
pub(super) fn cidr_json(range: &Cidr) -> Value {
    json!({"address_prefix": range.address().to_string(), "prefix_len": range.prefix_bits()})
}

const URI_TEMPLATE: &str = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";

/// The template of a `core.v3.TypedExtensionConfig` that matches paths.
pub(super) fn path_template(mut extension: MessageReader<'_>) -> Result<PathTemplate, FieldError> {
    extension.harmless(&["name"]);
    let config = extension.any("typed_config")?;
    let Some(mut config) = config.filter(|config| config.kind() == URI_TEMPLATE) else {
        return Err(extension.refuse("typed_config", format!("must be {URI_TEMPLATE}")));
    };
    let text = config.required_text("path_template")?;
    PathTemplate::parse(&text).map_err(|error| {
        config.refuse("path_template", format!("unsupported path template {text:?}: {error}"))
    })
}

/// A template in JSON form.
pub(super) fn path_template_json(template: &PathTemplate) -> Value {
    json!({
        "name": "envoy.path.match.uri_template.uri_template_matcher",
        "typed_config": any(URI_TEMPLATE, json!({"path_template": template.to_string()})),
    })
}

/// A `core.v3.DataSource`.
pub(super) fn data(mut source: MessageReader<'_>) -> Result<DataSource, FieldError> {
    // Files are watched in any directory.
    source.unenforced(&["watched_directory"]);
    if source.has("filename") {
        return Ok(DataSource::File(source.text("filename").into()));
    }
    if source.has("inline_bytes") {
        return Ok(DataSource::inline(source.bytes("inline_bytes")));
    }
    if source.has("inline_string") {
        return Ok(DataSource::inline(source.text("inline_string")));
    }
    Err(source.refuse("", "one of filename, inline_string and inline_bytes must be set"))
}

/// Data in JSON form: text as text, so that a dump can be read.
pub(super) fn data_json(source: &DataSource) -> Value {
    match source {
        DataSource::File(path) => json!({"filename": path.to_string_lossy()}),
        DataSource::Inline(bytes) => json!({"inline_string": String::from_utf8_lossy(bytes)}),
        // Not an Envoy `DataSource`: system roots have their own field.
        DataSource::SystemRoots => json!({}),
    }
}

/// A constructor of [`StringMatch`].
pub(super) type StringMatchConstructor = fn(String) -> StringMatch;

/// A `matcher.v3.StringMatcher`.
pub(super) fn string_match(mut matcher: MessageReader<'_>) -> Result<StringMatch, FieldError> {
    let ignores_case = matcher.flag("ignore_case") == Some(true);
    if let Some(regex) = matcher.child("safe_regex") {
        if ignores_case {
            let reason = "must not be set together with safe_regex: write (?i) in the expression";
            return Err(matcher.refuse("ignore_case", reason));
        }
        return pattern(regex).map(StringMatch::Regex);
    }
    let forms: [(&str, StringMatchConstructor, StringMatchConstructor); 4] = [
        ("exact", StringMatch::Exact, StringMatch::ExactIgnoreCase),
        ("prefix", StringMatch::Prefix, StringMatch::PrefixIgnoreCase),
        ("suffix", StringMatch::Suffix, StringMatch::SuffixIgnoreCase),
        ("contains", StringMatch::Contains, StringMatch::ContainsIgnoreCase),
    ];
    for (field, kept, ignored) in forms {
        if matcher.has(field) {
            let form = if ignores_case { ignored } else { kept };
            // Only `exact` may be empty: an empty prefix, suffix or part would match everything.
            let text = if field == "exact" {
                matcher.text(field)
            } else {
                matcher.required_text(field)?
            };
            return Ok(form(text));
        }
    }
    Err(matcher.refuse("", "one of exact, prefix, suffix, contains and safe_regex must be set"))
}

/// A `matcher.v3.RegexMatcher`. There is only one engine, so `google_re2` is ignored.
pub(super) fn pattern(mut matcher: MessageReader<'_>) -> Result<Pattern, FieldError> {
    matcher.harmless(&["google_re2"]);
    let source = matcher.required_text("regex")?;
    Pattern::parse(&source).map_err(|reason| matcher.refuse("regex", reason))
}

/// A text match in JSON form.
pub(super) fn string_match_json(value: &StringMatch) -> Value {
    match value {
        StringMatch::Exact(text) => json!({"exact": text}),
        StringMatch::ExactIgnoreCase(text) => json!({"exact": text, "ignore_case": true}),
        StringMatch::Prefix(text) => json!({"prefix": text}),
        StringMatch::PrefixIgnoreCase(text) => json!({"prefix": text, "ignore_case": true}),
        StringMatch::Suffix(text) => json!({"suffix": text}),
        StringMatch::SuffixIgnoreCase(text) => json!({"suffix": text, "ignore_case": true}),
        StringMatch::Contains(text) => json!({"contains": text}),
        StringMatch::ContainsIgnoreCase(text) => json!({"contains": text, "ignore_case": true}),
        StringMatch::Regex(pattern) => json!({"safe_regex": {"regex": pattern.source()}}),
    }
}

/// A text for a part of a URI; none when it is empty.
///
/// # Errors
/// When a character is not allowed in a URI: a space or a line end would allow request injection.
pub(super) fn uri_part(
    reader: &mut MessageReader<'_>,
    field: &str,
) -> Result<Option<String>, FieldError> {
    let text = reader.text(field);
    if is_uri_part(&text) {
        return Ok(Some(text).filter(|text| !text.is_empty()));
    }
    let reason = "must be printable ASCII without spaces";
    Err(reader.refuse(field, format!("invalid value {text:?}: {reason}")))
}

/// Reads every item; returns the values or the first error.
pub(super) fn each<'f, T>(
    readers: Vec<MessageReader<'f>>,
    read: impl Fn(MessageReader<'f>) -> Result<T, FieldError>,
) -> Result<Vec<T>, FieldError> {
    let mut items = readers.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
    // The list lives as long as the configuration, and most lists have one item but a capacity of four.
    items.shrink_to_fit();
    Ok(items)
}

/// The sinks of `access_log`. Lines have weft's own format: formats, filters and loggers of other kinds are listed as not
/// honoured.
pub(super) fn access_log(reader: &mut MessageReader<'_>) -> Result<AccessLogSinks, FieldError> {
    let mut sinks = Vec::new();
    for mut log in reader.children("access_log") {
        log.harmless(&["name"]);
        let Some(config) = log.child("typed_config") else { continue };
        let kind = config.any_kind();
        if ![STDERR_LOG, STDOUT_LOG, FILE_LOG].contains(&kind.as_str()) {
            log.not_honoured("typed_config", &format!("{kind} is not supported"));
            config.set_aside();
            continue;
        }
        // Its unread fields, such as a format, are listed as not honoured.
        let mut config = config.unpacked()?;
        sinks.push(match kind.as_str() {
            STDOUT_LOG => AccessLogSink::Stdout,
            STDERR_LOG => AccessLogSink::Stderr,
            _ => AccessLogSink::for_path(&config.required_text("path")?),
        });
    }
    Ok(AccessLogSinks::new(sinks))
}

/// Reads a config source. Resources always come over ADS; any other source is listed as not honoured.
pub(super) fn config_source(reader: &mut MessageReader<'_>, field: &str) {
    let Some(mut source) = reader.child(field) else { return };
    source.harmless(&["resource_api_version"]);
    if source.child("ads").is_none() && source.child("self").is_none() {
        reader.not_honoured(field, "resources are requested over ADS");
        source.set_aside();
    }
}

/// The JSON form of an access log.
pub(super) fn access_log_json(sinks: &AccessLogSinks) -> Value {
    let loggers = sinks.iter().map(|sink| {
        let config = match sink {
            AccessLogSink::Stdout => any(STDOUT_LOG, json!({})),
            AccessLogSink::Stderr => any(STDERR_LOG, json!({})),
            AccessLogSink::File(path) => any(FILE_LOG, json!({"path": path.to_string_lossy()})),
        };
        json!({"name": "weft", "typed_config": config})
    });
    loggers.collect()
}
