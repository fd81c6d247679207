//! Header changes, at each level of a route table.

use std::sync::Arc;

use weft_model::{
    AppendAction, HeaderAddition, HeaderFormat, HeaderMutation, HeaderMutations, is_header_name,
    is_identity_header,
};

use super::pb::core::header_value_option::HeaderAppendAction;
use super::pb::core::{HeaderValue, HeaderValueOption};
use super::{FieldError, MessageReader, values};

/// The most headers that one level adds, and the most that it removes. Envoy has the same limit.
const LIMIT: usize = 1000;

/// Headers that frame a message: a change would alter how the message is parsed.
const FRAMING: [&str; 5] =
    ["connection", "content-length", "sec-websocket-key", "transfer-encoding", "upgrade"];
/// Hop-by-hop headers, which must not be added.
const HOP_BY_HOP: [&str; 6] =
    ["expect", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer"];

/// Reads the header changes of a level; none when it has none.
pub(super) fn decode(
    level: &mut MessageReader<'_>,
) -> Result<Option<Arc<HeaderMutations>>, FieldError> {
    let request = one(level, "request_headers_to_remove", "request_headers_to_add")?;
    let response = one(level, "response_headers_to_remove", "response_headers_to_add")?;
    if let Some(index) = request.add.iter().position(|addition| addition.value.needs_response()) {
        let field = format!("request_headers_to_add[{index}].header.value");
        return Err(level
            .refuse(&field, "unsupported variable: a request header must not use the response"));
    }
    let is_empty = request.is_empty() && response.is_empty();
    Ok((!is_empty).then(|| Arc::new(HeaderMutations { request, response })))
}

fn one(
    level: &mut MessageReader<'_>,
    remove_field: &str,
    add_field: &str,
) -> Result<HeaderMutation, FieldError> {
    let mut remove = level.texts(remove_field);
    for (index, name) in remove.iter_mut().enumerate() {
        name.make_ascii_lowercase();
        if let Err(reason) = may_change(name) {
            return Err(level.refuse(&format!("{remove_field}[{index}]"), reason));
        }
    }
    let add = values::each(level.children(add_field), addition)?;
    for (field, count) in [(remove_field, remove.len()), (add_field, add.len())] {
        if count > LIMIT {
            return Err(
                level.refuse(field, format!("{count} headers: at most {LIMIT} are accepted"))
            );
        }
    }
    Ok(HeaderMutation { remove, add })
}

fn may_change(name: &str) -> Result<(), String> {
    if name.starts_with(':') || name == "host" {
        return Err(format!(
            "invalid header {name:?}: must not be a pseudo-header or host, which the route's rewrites \
             change"
        ));
    }
    if FRAMING.contains(&name) {
        return Err(format!(
            "invalid header {name:?}: must not be a header that frames the message"
        ));
    }
    if is_header_name(name) { Ok(()) } else { Err(format!("invalid header name {name:?}")) }
}

fn addition(mut option: MessageReader<'_>) -> Result<HeaderAddition, FieldError> {
    let mut header = option.required_child("header")?;
    let name = header.required_text("key")?.to_ascii_lowercase();
    may_change(&name).map_err(|reason| header.refuse("key", reason))?;
    if HOP_BY_HOP.contains(&name.as_str()) {
        let reason = format!("invalid header {name:?}: must not be a hop-by-hop header");
        return Err(header.refuse("key", reason));
    }
    if is_identity_header(name.as_bytes()) {
        let reason = format!(
            "invalid header {name:?}: must not be an identity header, which is set from the client's \
             certificate (forward_client_cert_details)"
        );
        return Err(header.refuse("key", reason));
    }
    let value_field = if header.has("raw_value") { "raw_value" } else { "value" };
    let text = if value_field == "raw_value" {
        String::from_utf8(header.bytes("raw_value"))
            .map_err(|_| header.refuse("raw_value", "must be UTF-8"))?
    } else {
        header.text("value")
    };
    let value = HeaderFormat::parse(&text).map_err(|reason| header.refuse(value_field, reason))?;
    let said = option.choice("append_action");
    let known = AppendAction::NAMES.iter().find(|(name, _)| *name == said);
    let action = known.map(|(_, action)| *action);
    let mut action =
        action.ok_or_else(|| option.refuse("append_action", format!("unknown action {said}")))?;
    match option.flag("append") {
        None => {}
        Some(_) if action != AppendAction::Append => {
            return Err(option.refuse("append", "must not be set together with append_action"));
        }
        Some(true) => {}
        Some(false) => action = AppendAction::Overwrite,
    }
    let keep_empty = option.flag("keep_empty_value").unwrap_or(false);
    Ok(HeaderAddition { name, value, action, keep_empty })
}

/// The header changes of a level: fields that four messages have.
#[derive(Debug, Default)]
pub(super) struct EncodedMutations {
    pub(super) request_remove: Vec<String>,
    pub(super) request_add: Vec<HeaderValueOption>,
    pub(super) response_remove: Vec<String>,
    pub(super) response_add: Vec<HeaderValueOption>,
}

/// Encodes the header changes of a level.
pub(super) fn encode(mutations: Option<&HeaderMutations>) -> EncodedMutations {
    let Some(HeaderMutations { request, response }) = mutations else {
        return EncodedMutations::default();
    };
    EncodedMutations {
        request_remove: request.remove.clone(),
        request_add: request.add.iter().map(encode_addition).collect(),
        response_remove: response.remove.clone(),
        response_add: response.add.iter().map(encode_addition).collect(),
    }
}

fn encode_addition(addition: &HeaderAddition) -> HeaderValueOption {
    let action = match addition.action {
        AppendAction::Append => HeaderAppendAction::AppendIfExistsOrAdd,
        AppendAction::AddIfAbsent => HeaderAppendAction::AddIfAbsent,
        AppendAction::Overwrite => HeaderAppendAction::OverwriteIfExistsOrAdd,
        AppendAction::OverwriteIfExists => HeaderAppendAction::OverwriteIfExists,
    };
    let header = HeaderValue {
        key: addition.name.clone(),
        value: addition.value.to_string(),
        ..HeaderValue::default()
    };
    HeaderValueOption {
        header: Some(header),
        append_action: action.into(),
        keep_empty_value: addition.keep_empty,
        ..HeaderValueOption::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ResourceKind, read};
    use crate::json_form;
    use crate::located::Located;

    fn refused(fields: &str, path: &str, reason: &str) {
        let yaml = format!("{{name: r, {fields}}}");
        let kind = ResourceKind::Routes;
        let file = Located::parse(&yaml).expect("a document");
        let (message, mistakes) = json_form::read(kind.message(), &file);
        assert_eq!(mistakes, []);
        let message = message.expect("a message");
        let rejection = read(kind, message, String::new()).expect_err(fields);
        assert_eq!(rejection.error.path, path, "{rejection}");
        assert!(rejection.error.reason.contains(reason), "{rejection}");
    }

    #[test]
    fn header_that_must_not_change_is_refused_with_its_path() {
        for name in [":path", "host", "Host", "Content-Length", "transfer-encoding", "upgrade"] {
            let remove = format!("request_headers_to_remove: [x-a, {name:?}]");
            refused(&remove, "request_headers_to_remove[1]", "invalid header");
        }
        for name in [":authority", "Host", "content-length", "te", "X-Weft-Peer", "bad name"] {
            let add = format!("response_headers_to_add: [{{header: {{key: {name:?}, value: a}}}}]");
            refused(&add, "response_headers_to_add[0].header.key", "invalid header");
        }
        let claim = "request_headers_to_add: [{header: {key: x_forwarded_client_cert, value: a}}]";
        refused(claim, "request_headers_to_add[0].header.key", "identity header");
    }

    #[test]
    fn unsupported_value_is_refused_with_its_path() {
        for value in ["%HOSTNAME%", "50%", "%REQ(a b)%", "a\\nb"] {
            let add =
                format!("request_headers_to_add: [{{header: {{key: x, value: \"{value}\"}}}}]");
            refused(&add, "request_headers_to_add[0].header.value", "");
        }
        let early = "request_headers_to_add: [{header: {key: x, value: '%RESP(a)%'}}]";
        refused(early, "request_headers_to_add[0].header.value", "must not use the response");
        let both = "request_headers_to_add: [{header: {key: x, value: a}, append: true, \
            append_action: ADD_IF_ABSENT}]";
        refused(both, "request_headers_to_add[0].append", "append_action");
    }
}
