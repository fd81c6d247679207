//! Values that several resources share: addresses, ranges, string matches, data sources, access logs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use envoy_types::util::pack_any;
use weft_model::{
    AccessLogSink, AccessLogSinks, Cidr, DataSource, PathTemplate, Pattern, StringMatch, Transport,
    is_uri_part,
};

use super::pb::{access_log, core, file_log, google, matcher, stream_log, uri_template};
use super::{FieldError, MessageReader};

const STDERR_LOG: &str = "envoy.extensions.access_loggers.stream.v3.StderrAccessLog";
const STDOUT_LOG: &str = "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog";
const FILE_LOG: &str = "envoy.extensions.access_loggers.file.v3.FileAccessLog";

/// The limit of a `max_headers_count`.
pub(super) fn header_count(options: &MessageReader<'_>, count: u32) -> Result<usize, FieldError> {
    match usize::try_from(count) {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err(options
            .refuse("max_headers_count", format!("invalid number {count}: must be 1 to 1024"))),
    }
}

/// Encodes a duration. One that is too long becomes the longest, which readers refuse.
pub(super) fn duration(value: Duration) -> google::Duration {
    google::Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(value.subsec_nanos()).unwrap_or_default(),
    }
}

/// Encodes an optional number that is set.
pub(super) fn number(value: u32) -> Option<google::UInt32Value> {
    Some(google::UInt32Value { value })
}

/// Encodes an optional count or size that is set. One that is too large becomes the largest.
pub(super) fn count(value: usize) -> Option<google::UInt32Value> {
    number(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Encodes an optional flag that is set.
pub(super) fn flag(value: bool) -> Option<google::BoolValue> {
    Some(google::BoolValue { value })
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

/// Encodes an address.
pub(super) fn encode_socket(address: SocketAddr, transport: Transport) -> core::Address {
    encode_host(address.ip().to_string(), address.port(), transport)
}

/// Encodes the address or name of a host, and its port.
pub(super) fn encode_host(host: String, port: u16, transport: Transport) -> core::Address {
    let protocol = match transport {
        Transport::Tcp => core::socket_address::Protocol::Tcp,
        Transport::Udp => core::socket_address::Protocol::Udp,
    };
    let socket = core::SocketAddress {
        protocol: protocol.into(),
        address: host,
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port.into())),
        ..core::SocketAddress::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
}

/// A `core.v3.CidrRange`.
pub(super) fn cidr(mut range: MessageReader<'_>) -> Result<Cidr, FieldError> {
    let text = range.required_text("address_prefix")?;
    let bits = range.number("prefix_len").unwrap_or(0);
    Cidr::parse(&format!("{text}/{bits}")).map_err(|error| range.refuse("", error.to_string()))
}

/// Encodes a range.
pub(super) fn encode_cidr(range: &Cidr) -> core::CidrRange {
    core::CidrRange {
        address_prefix: range.address().to_string(),
        prefix_len: number(range.prefix_bits().into()),
    }
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

/// Encodes a template.
pub(super) fn encode_path_template(template: &PathTemplate) -> core::TypedExtensionConfig {
    let config = uri_template::UriTemplateMatchConfig { path_template: template.to_string() };
    core::TypedExtensionConfig {
        name: "envoy.path.match.uri_template.uri_template_matcher".into(),
        typed_config: Some(pack_any(config)),
    }
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

/// Encodes data: text as text, so that a dump can be read.
pub(super) fn encode_data(source: &DataSource) -> core::DataSource {
    let specifier = match source {
        DataSource::File(path) => {
            Some(core::data_source::Specifier::Filename(path.to_string_lossy().into_owned()))
        }
        DataSource::Inline(bytes) => Some(match std::str::from_utf8(bytes) {
            Ok(text) => core::data_source::Specifier::InlineString(text.into()),
            Err(_) => core::data_source::Specifier::InlineBytes(bytes.to_vec()),
        }),
        // Not an Envoy `DataSource`: system roots have their own field.
        DataSource::SystemRoots => None,
    };
    core::DataSource { specifier, ..core::DataSource::default() }
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

/// Encodes a text match.
pub(super) fn encode_string_match(value: &StringMatch) -> matcher::StringMatcher {
    use matcher::string_matcher::MatchPattern;
    let pattern = match value {
        StringMatch::Exact(text) | StringMatch::ExactIgnoreCase(text) => {
            MatchPattern::Exact(text.clone())
        }
        StringMatch::Prefix(text) | StringMatch::PrefixIgnoreCase(text) => {
            MatchPattern::Prefix(text.clone())
        }
        StringMatch::Suffix(text) | StringMatch::SuffixIgnoreCase(text) => {
            MatchPattern::Suffix(text.clone())
        }
        StringMatch::Contains(text) | StringMatch::ContainsIgnoreCase(text) => {
            MatchPattern::Contains(text.clone())
        }
        StringMatch::Regex(pattern) => MatchPattern::SafeRegex(encode_pattern(pattern)),
    };
    let ignore_case = match value {
        StringMatch::Exact(_)
        | StringMatch::Prefix(_)
        | StringMatch::Suffix(_)
        | StringMatch::Contains(_)
        | StringMatch::Regex(_) => false,
        StringMatch::ExactIgnoreCase(_)
        | StringMatch::PrefixIgnoreCase(_)
        | StringMatch::SuffixIgnoreCase(_)
        | StringMatch::ContainsIgnoreCase(_) => true,
    };
    matcher::StringMatcher { ignore_case, match_pattern: Some(pattern) }
}

/// Encodes a regular expression.
pub(super) fn encode_pattern(pattern: &Pattern) -> matcher::RegexMatcher {
    matcher::RegexMatcher { regex: pattern.source().into(), ..matcher::RegexMatcher::default() }
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

/// The config source for resources over ADS.
pub(super) fn ads() -> core::ConfigSource {
    let ads = core::AggregatedConfigSource::default();
    core::ConfigSource {
        resource_api_version: core::ApiVersion::V3.into(),
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(ads)),
        ..core::ConfigSource::default()
    }
}

/// Encodes the sinks of an access log.
pub(super) fn encode_access_log(sinks: &AccessLogSinks) -> Vec<access_log::AccessLog> {
    let loggers = sinks.iter().map(|sink| {
        let config = match sink {
            AccessLogSink::Stdout => pack_any(stream_log::StdoutAccessLog::default()),
            AccessLogSink::Stderr => pack_any(stream_log::StderrAccessLog::default()),
            AccessLogSink::File(path) => pack_any(file_log::FileAccessLog {
                path: path.to_string_lossy().into_owned(),
                ..file_log::FileAccessLog::default()
            }),
        };
        access_log::AccessLog {
            name: "weft".into(),
            config_type: Some(access_log::access_log::ConfigType::TypedConfig(config)),
            ..access_log::AccessLog::default()
        }
    });
    loggers.collect()
}
