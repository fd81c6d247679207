//! `RouteMatch`: which requests a route or a rule matches.

use weft_model::{
    HeaderCheck, HeaderMatch, PathMatch, Pattern, QueryCheck, QueryMatch, RouteMatch, StringMatch,
    has_query_or_fragment,
};

use super::pb::route as pb;
use super::pb::types;
use super::reader::MISSING;
use super::values::StringMatchConstructor;
use super::{FieldError, MessageReader, values};

/// Content types of gRPC calls, as in Envoy's `grpc` matcher.
const GRPC: &str = r"application/grpc(\+.*)?";

/// Reads the match of a route.
pub(super) fn decode(mut matches: MessageReader<'_>) -> Result<RouteMatch, FieldError> {
    let is_grpc = matches.child("grpc").is_some();
    runtime_fraction(&mut matches)?;
    let mut covered = decode_rule(matches)?;
    if is_grpc {
        let kind =
            Pattern::parse(GRPC).map_err(|reason| FieldError { path: "grpc".into(), reason })?;
        covered.headers.push(HeaderMatch::new("content-type", StringMatch::Regex(kind)));
    }
    Ok(covered)
}

/// Reads the match of a JWT rule. Envoy ignores everything except path, headers and query parameters there: a rule that
/// should require a token for gRPC calls would require one for every request. Other conditions are therefore refused.
pub(super) fn decode_rule(mut matches: MessageReader<'_>) -> Result<RouteMatch, FieldError> {
    let path = path(&mut matches)?;
    let headers = values::each(matches.children("headers"), header)?;
    let query = values::each(matches.children("query_parameters"), query)?;
    Ok(RouteMatch { path, headers, query })
}

fn path(matches: &mut MessageReader<'_>) -> Result<PathMatch, FieldError> {
    let ignores_case = matches.flag("case_sensitive") == Some(false);
    // In Envoy, templates and regular expressions are always case-sensitive.
    if let Some(extension) = matches.child("path_match_policy") {
        return values::path_template(extension).map(PathMatch::Template);
    }
    if let Some(regex) = matches.child("safe_regex") {
        return values::pattern(regex).map(PathMatch::Regex);
    }
    if matches.child("connect_matcher").is_some() {
        return Ok(PathMatch::Connect);
    }
    let path = if matches.has("prefix") {
        PathMatch::Prefix(matches.text("prefix"))
    } else if matches.has("path") {
        PathMatch::Exact(matches.text("path"))
    } else if matches.has("path_separated_prefix") {
        let text = matches.text("path_separated_prefix");
        if has_query_or_fragment(&text) || text.len() < 2 || text.ends_with('/') {
            let reason = format!(
                "invalid prefix {text:?}: must have two characters or more, no ? and #, and no / at its end"
            );
            return Err(matches.refuse("path_separated_prefix", reason));
        }
        PathMatch::Segments(text)
    } else {
        return Err(matches.refuse(
            "",
            "one of prefix, path, path_separated_prefix, safe_regex, path_match_policy and connect_matcher must be set",
        ));
    };
    Ok(if ignores_case { PathMatch::IgnoreCase(path.into()) } else { path })
}

/// Checks that a route's runtime fraction is 100 %; other fractions are not supported.
fn runtime_fraction(matches: &mut MessageReader<'_>) -> Result<(), FieldError> {
    let Some(mut fraction) = matches.child("runtime_fraction") else { return Ok(()) };
    // There is no runtime layer that could override the value.
    fraction.harmless(&["runtime_key"]);
    let mut value = fraction.required_child("default_value")?;
    let whole = match value.choice("denominator").as_str() {
        "TEN_THOUSAND" => 10_000,
        "MILLION" => 1_000_000,
        _ => 100,
    };
    if value.number("numerator").unwrap_or(0) >= whole {
        return Ok(());
    }
    let reason = "only 100 % is supported: use weighted_clusters to split traffic";
    Err(matches.refuse("runtime_fraction", reason))
}

fn query(mut parameter: MessageReader<'_>) -> Result<QueryMatch, FieldError> {
    let name = parameter.required_text("name")?;
    let check = match parameter.child("string_match") {
        Some(matcher) => QueryCheck::Value(values::string_match(matcher)?),
        None if parameter.flag("present_match") == Some(false) => QueryCheck::Absent,
        None => QueryCheck::Present,
    };
    Ok(QueryMatch { name, check })
}

/// Reads a condition on a header.
pub(super) fn header(mut header: MessageReader<'_>) -> Result<HeaderMatch, FieldError> {
    let name = header.required_text("name")?.to_ascii_lowercase();
    let mut invert = header.flag("invert_match").unwrap_or(false);
    let missing_is_empty = header.flag("treat_missing_header_as_empty").unwrap_or(false);
    let check = if header.flag("present_match") == Some(false) {
        invert = !invert;
        HeaderCheck::Present
    } else {
        header_check(&mut header)?
    };
    Ok(HeaderMatch { name, check, invert, missing_is_empty })
}

fn header_check(header: &mut MessageReader<'_>) -> Result<HeaderCheck, FieldError> {
    let old: [(&str, StringMatchConstructor); 4] = [
        ("exact_match", StringMatch::Exact),
        ("prefix_match", StringMatch::Prefix),
        ("suffix_match", StringMatch::Suffix),
        ("contains_match", StringMatch::Contains),
    ];
    for (field, form) in old {
        if !header.has(field) {
            continue;
        }
        let text = header.text(field);
        return match text.is_empty() {
            false => Ok(HeaderCheck::Value(form(text))),
            // Measured: in Envoy an empty exact_match matches any value, but an empty string_match.exact does not.
            true if field == "exact_match" => {
                let any = Pattern::parse("(?s).*").map_err(|reason| header.refuse(field, reason));
                Ok(HeaderCheck::Value(StringMatch::Regex(any?)))
            }
            true => Err(header.refuse(field, MISSING)),
        };
    }
    if let Some(regex) = header.child("safe_regex_match") {
        return Ok(HeaderCheck::Value(StringMatch::Regex(values::pattern(regex)?)));
    }
    if let Some(mut range) = header.child("range_match") {
        return Ok(HeaderCheck::Range { start: range.integer("start"), end: range.integer("end") });
    }
    match header.child("string_match") {
        Some(matcher) => values::string_match(matcher).map(HeaderCheck::Value),
        None => Ok(HeaderCheck::Present),
    }
}

/// Encodes a match.
pub(super) fn encode(matches: &RouteMatch) -> pb::RouteMatch {
    let mut encoded = pb::RouteMatch {
        headers: matches.headers.iter().map(encode_header).collect(),
        query_parameters: matches.query.iter().map(encode_query).collect(),
        ..pb::RouteMatch::default()
    };
    encode_path(&matches.path, &mut encoded);
    encoded
}

fn encode_path(path: &PathMatch, encoded: &mut pb::RouteMatch) {
    use pb::route_match::PathSpecifier;
    let path = match path {
        PathMatch::Prefix(text) => PathSpecifier::Prefix(text.clone()),
        PathMatch::Exact(text) => PathSpecifier::Path(text.clone()),
        // Envoy accepts neither `/` nor a trailing slash in path_separated_prefix.
        PathMatch::Segments(text) => match text.trim_end_matches('/') {
            "" => PathSpecifier::Prefix("/".into()),
            bare => PathSpecifier::PathSeparatedPrefix(bare.into()),
        },
        PathMatch::IgnoreCase(inner) => {
            encoded.case_sensitive = values::flag(false);
            return encode_path(inner, encoded);
        }
        PathMatch::Regex(pattern) => PathSpecifier::SafeRegex(values::encode_pattern(pattern)),
        PathMatch::Template(template) => {
            PathSpecifier::PathMatchPolicy(values::encode_path_template(template))
        }
        PathMatch::Connect => {
            PathSpecifier::ConnectMatcher(pb::route_match::ConnectMatcher::default())
        }
    };
    encoded.path_specifier = Some(path);
}

fn encode_query(parameter: &QueryMatch) -> pb::QueryParameterMatcher {
    use pb::query_parameter_matcher::QueryParameterMatchSpecifier;
    let check = match &parameter.check {
        QueryCheck::Present => QueryParameterMatchSpecifier::PresentMatch(true),
        QueryCheck::Absent => QueryParameterMatchSpecifier::PresentMatch(false),
        QueryCheck::Value(value) => {
            QueryParameterMatchSpecifier::StringMatch(values::encode_string_match(value))
        }
    };
    pb::QueryParameterMatcher {
        name: parameter.name.clone(),
        query_parameter_match_specifier: Some(check),
    }
}

/// Encodes a condition on a header.
pub(super) fn encode_header(header: &HeaderMatch) -> pb::HeaderMatcher {
    use pb::header_matcher::HeaderMatchSpecifier;
    let check = match &header.check {
        HeaderCheck::Present => HeaderMatchSpecifier::PresentMatch(true),
        HeaderCheck::Value(value) => {
            HeaderMatchSpecifier::StringMatch(values::encode_string_match(value))
        }
        HeaderCheck::Range { start, end } => {
            HeaderMatchSpecifier::RangeMatch(types::Int64Range { start: *start, end: *end })
        }
    };
    pb::HeaderMatcher {
        name: header.name.clone(),
        invert_match: header.invert,
        treat_missing_header_as_empty: header.missing_is_empty,
        header_match_specifier: Some(check),
    }
}
