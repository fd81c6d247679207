//! The small values that several resources share: addresses, ranges, texts, data.

#![allow(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{Cidr, DataSource, PathTemplate, Pattern, StringMatch, Transport, is_uri_part};

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
        _ => Err(options.refuse("max_headers_count", format!("{count} is not between 1 and 1024"))),
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
        return Err(address.refuse("", "only a socket_address is understood"));
    };
    let transport = match socket.choice("protocol").as_str() {
        "UDP" => Transport::Udp,
        _ => Transport::Tcp,
    };
    let text = socket.required_text("address")?;
    let ip: IpAddr = text
        .parse()
        .map_err(|_| socket.refuse("address", format!("{text:?} is no IPv4 or IPv6 address")))?;
    Ok((SocketAddr::new(ip, port(&mut socket)?), transport))
}

/// The `port_value` of a `SocketAddress`.
pub(super) fn port(socket: &mut MessageReader<'_>) -> Result<u16, FieldError> {
    let port = socket.number("port_value").unwrap_or(0);
    u16::try_from(port).map_err(|_| socket.refuse("port_value", format!("{port} is above 65535")))
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
    // Files are read again when they change, in whatever folder they are.
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
        // No `DataSource` of Envoy: only roots are taken from the system, and have a field of their own.
        DataSource::SystemRoots => json!({}),
    }
}

/// What a text becomes a match by.
pub(super) type StringMatchConstructor = fn(String) -> StringMatch;

/// A `matcher.v3.StringMatcher`.
pub(super) fn string_match(mut matcher: MessageReader<'_>) -> Result<StringMatch, FieldError> {
    let ignores_case = matcher.flag("ignore_case") == Some(true);
    if let Some(regex) = matcher.child("safe_regex") {
        if ignores_case {
            let reason =
                "it has no effect on safe_regex, as for Envoy; write (?i) in the expression";
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
            // Only the whole text may be empty: a part that is empty would match everything.
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

/// A `matcher.v3.RegexMatcher`. There is one engine, so the field that names it means nothing.
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

/// A text that becomes a part of a URI; none when it is empty.
///
/// # Errors
/// When a character of it may not be in a URI: a blank or a line end would forge a request.
pub(super) fn uri_part(
    reader: &mut MessageReader<'_>,
    field: &str,
) -> Result<Option<String>, FieldError> {
    let text = reader.text(field);
    if is_uri_part(&text) {
        return Ok(Some(text).filter(|text| !text.is_empty()));
    }
    let reason = "only printable ASCII characters without blanks are accepted";
    Err(reader.refuse(field, format!("invalid value {text:?}: {reason}")))
}

/// Every item read, or the first refusal.
pub(super) fn each<'f, T>(
    readers: Vec<MessageReader<'f>>,
    read: impl Fn(MessageReader<'f>) -> Result<T, FieldError>,
) -> Result<Vec<T>, FieldError> {
    let mut items = readers.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
    // It stays as long as the configuration, and most lists hold one item where there is room for four.
    items.shrink_to_fit();
    Ok(items)
}

/// Whether access logging is asked for. One line per request or connection goes to the output of
/// this process, in our own form: any other place, form or filter is noted as not honoured.
pub(super) fn access_log(reader: &mut MessageReader<'_>) -> Result<bool, FieldError> {
    let mut logs = reader.children("access_log");
    for log in &mut logs {
        log.harmless(&["name"]);
        let Some(config) = log.child("typed_config") else { continue };
        let kind = config.any_kind();
        if ![STDERR_LOG, STDOUT_LOG, FILE_LOG].contains(&kind.as_str()) {
            log.not_honoured("typed_config", &format!("{kind} is not supported"));
            config.set_aside();
            continue;
        }
        // What is not read of it, such as a format, is noted.
        let mut config = config.unpacked()?;
        if kind == FILE_LOG {
            let path = config.text("path");
            if !["/dev/stdout", "/dev/stderr"].contains(&path.as_str()) {
                config.not_honoured("path", "lines go to the output of this process");
            }
        }
    }
    Ok(!logs.is_empty())
}

/// Reads where a resource is asked for: over the one aggregated stream, whatever the source says.
pub(super) fn config_source(reader: &mut MessageReader<'_>, field: &str) {
    let Some(mut source) = reader.child(field) else { return };
    source.harmless(&["resource_api_version"]);
    if source.child("ads").is_none() && source.child("self").is_none() {
        reader.not_honoured(field, "resources are requested over ADS");
        source.set_aside();
    }
}

/// The JSON form of an access log on standard output.
pub(super) fn access_log_json(wanted: bool) -> Value {
    if !wanted {
        return json!([]);
    }
    json!([{"name": "weft", "typed_config": any(STDERR_LOG, json!({}))}])
}
