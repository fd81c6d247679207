//! `RouteMatch`: which requests a route or a rule matches.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use serde_json::{Value, json};
use weft_model::{
    HeaderCheck, HeaderMatch, PathMatch, Pattern, QueryCheck, QueryMatch, RouteMatch, StringMatch,
    has_query_or_fragment,
};

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

/// A match in JSON form.
pub(super) fn encode(matches: &RouteMatch) -> Value {
    let mut json = path_json(&matches.path);
    json["headers"] = matches.headers.iter().map(header_json).collect();
    json["query_parameters"] = matches.query.iter().map(query_json).collect();
    json
}

fn path_json(path: &PathMatch) -> Value {
    match path {
        PathMatch::Prefix(text) => json!({"prefix": text}),
        PathMatch::Exact(text) => json!({"path": text}),
        // Envoy accepts neither `/` nor a trailing slash in path_separated_prefix.
        PathMatch::Segments(text) => match text.trim_end_matches('/') {
            "" => json!({"prefix": "/"}),
            bare => json!({"path_separated_prefix": bare}),
        },
        PathMatch::IgnoreCase(inner) => {
            let mut json = path_json(inner);
            json["case_sensitive"] = json!(false);
            json
        }
        PathMatch::Regex(pattern) => json!({"safe_regex": {"regex": pattern.source()}}),
        PathMatch::Template(template) => {
            json!({"path_match_policy": values::path_template_json(template)})
        }
        PathMatch::Connect => json!({"connect_matcher": {}}),
    }
}

fn query_json(parameter: &QueryMatch) -> Value {
    let mut json = json!({"name": parameter.name});
    match &parameter.check {
        QueryCheck::Present => json["present_match"] = json!(true),
        QueryCheck::Absent => json["present_match"] = json!(false),
        QueryCheck::Value(value) => json["string_match"] = values::string_match_json(value),
    }
    json
}

/// A condition on a header in JSON form.
pub(super) fn header_json(header: &HeaderMatch) -> Value {
    let mut json = json!({"name": header.name, "invert_match": header.invert});
    match &header.check {
        HeaderCheck::Present => json["present_match"] = json!(true),
        HeaderCheck::Value(value) => json["string_match"] = values::string_match_json(value),
        HeaderCheck::Range { start, end } => {
            json["range_match"] = json!({"start": start.to_string(), "end": end.to_string()});
        }
    }
    if header.missing_is_empty {
        json["treat_missing_header_as_empty"] = json!(true);
    }
    json
}
