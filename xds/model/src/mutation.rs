//! Header changes that a route table makes to requests and responses.

use std::fmt;

/// Header changes of one level: a route table, a virtual host, a route or a weighted cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeaderMutations {
    /// Changes to the request before it is forwarded.
    pub request: HeaderMutation,
    /// Changes to the response before it is sent to the client.
    pub response: HeaderMutation,
}

/// Removes headers, then adds others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeaderMutation {
    /// Names to remove, lower case (`request_headers_to_remove`, `response_headers_to_remove`).
    pub remove: Vec<String>,
    /// Headers to add (`request_headers_to_add`, `response_headers_to_add`).
    pub add: Vec<HeaderAddition>,
}

impl HeaderMutation {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

/// A header to add (`envoy.config.core.v3.HeaderValueOption`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderAddition {
    /// The name, lower case.
    pub name: String,
    /// The value.
    pub value: HeaderFormat,
    /// What happens when the header exists.
    pub action: AppendAction,
    /// Whether the header is added with an empty value (`keep_empty_value`).
    pub keep_empty: bool,
}

/// What happens when a header to add exists (`HeaderAppendAction`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AppendAction {
    /// The value is added beside those that exist (`APPEND_IF_EXISTS_OR_ADD`).
    #[default]
    Append,
    /// The header stays as it is (`ADD_IF_ABSENT`).
    AddIfAbsent,
    /// The value replaces all that exist (`OVERWRITE_IF_EXISTS_OR_ADD`).
    Overwrite,
    /// The value replaces all that exist; without any, nothing is added (`OVERWRITE_IF_EXISTS`).
    OverwriteIfExists,
}

impl AppendAction {
    /// Each action with its name in Envoy's files.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("APPEND_IF_EXISTS_OR_ADD", Self::Append),
        ("ADD_IF_ABSENT", Self::AddIfAbsent),
        ("OVERWRITE_IF_EXISTS_OR_ADD", Self::Overwrite),
        ("OVERWRITE_IF_EXISTS", Self::OverwriteIfExists),
    ];
}

/// A header value: text and variables, such as `%PROTOCOL%` or `%REQ(x-user?x-name):20%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderFormat {
    /// The parts, in order.
    pub parts: Vec<FormatPart>,
}

/// A part of a header value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormatPart {
    /// Text.
    Text(String),
    /// The value of a variable; empty when it has none.
    Variable(FormatVariable),
}

/// A variable of a header value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormatVariable {
    /// `%REQ(NAME?OTHER):LIMIT%`.
    RequestHeader(HeaderSource),
    /// `%RESP(NAME?OTHER):LIMIT%`.
    ResponseHeader(HeaderSource),
    /// A variable without an argument.
    Plain(PlainVariable),
}

/// Which header a variable takes its value from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderSource {
    /// The name, lower case.
    pub name: String,
    /// The header to use when the first one is missing.
    pub otherwise: Option<String>,
    /// The most bytes to take.
    pub limit: Option<usize>,
}

/// A variable without an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlainVariable {
    /// The HTTP version of the request.
    Protocol,
    /// The client's address and port, after trusted hops of `x-forwarded-for`.
    ClientAndPort,
    /// The client's address.
    Client,
    /// The client's port.
    ClientPort,
    /// The peer's address and port.
    PeerAndPort,
    /// The peer's address.
    Peer,
    /// The peer's port.
    PeerPort,
    /// Address and port that the client connected to.
    LocalAndPort,
    /// Address that the client connected to.
    Local,
    /// Port that the client connected to.
    LocalPort,
    /// The URI SAN of the client's verified certificate.
    PeerUri,
    /// The SHA-256 of the client's certificate.
    PeerFingerprint,
    /// The serial number of the client's certificate.
    PeerSerial,
    /// The name of the route.
    RouteName,
    /// The name of the cluster.
    Cluster,
    /// The status of the response.
    Status,
    /// The endpoint that the request was sent to; empty in requests, and where none was chosen.
    Upstream(AddressPart),
}

/// Which part of an address a variable gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressPart {
    /// Address and port.
    Both,
    /// The address.
    Address,
    /// The port.
    Port,
}

impl PlainVariable {
    /// Each variable with its name in Envoy's files.
    pub const NAMES: [(&'static str, Self); 20] = [
        ("PROTOCOL", Self::Protocol),
        ("DOWNSTREAM_REMOTE_ADDRESS", Self::ClientAndPort),
        ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Self::Client),
        ("DOWNSTREAM_REMOTE_PORT", Self::ClientPort),
        ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", Self::PeerAndPort),
        ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Self::Peer),
        ("DOWNSTREAM_DIRECT_REMOTE_PORT", Self::PeerPort),
        ("DOWNSTREAM_LOCAL_ADDRESS", Self::LocalAndPort),
        ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Self::Local),
        ("DOWNSTREAM_LOCAL_PORT", Self::LocalPort),
        ("DOWNSTREAM_PEER_URI_SAN", Self::PeerUri),
        ("DOWNSTREAM_PEER_FINGERPRINT_256", Self::PeerFingerprint),
        ("DOWNSTREAM_PEER_SERIAL", Self::PeerSerial),
        ("ROUTE_NAME", Self::RouteName),
        ("UPSTREAM_CLUSTER", Self::Cluster),
        ("RESPONSE_CODE", Self::Status),
        ("UPSTREAM_HOST", Self::Upstream(AddressPart::Both)),
        ("UPSTREAM_REMOTE_ADDRESS", Self::Upstream(AddressPart::Both)),
        ("UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Self::Upstream(AddressPart::Address)),
        ("UPSTREAM_REMOTE_PORT", Self::Upstream(AddressPart::Port)),
    ];
}

impl HeaderFormat {
    /// Parses a value.
    ///
    /// # Errors
    /// When the text has a control character, an unpaired `%`, or an unsupported variable.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.bytes().any(|byte| byte == 127 || (byte < 32 && byte != b'\t')) {
            return Err(format!(
                "invalid header value {text:?}: control characters are not allowed"
            ));
        }
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('%') {
            plain.push_str(before);
            if let Some(behind) = behind.strip_prefix('%') {
                plain.push('%');
                rest = behind;
                continue;
            }
            let (variable, behind) = behind.split_once('%').ok_or_else(|| {
                format!("invalid header value {text:?}: a single %; write %% for the character")
            })?;
            if !plain.is_empty() {
                parts.push(FormatPart::Text(std::mem::take(&mut plain)));
            }
            parts.push(FormatPart::Variable(FormatVariable::parse(variable)?));
            rest = behind;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(FormatPart::Text(plain));
        }
        Ok(Self { parts })
    }

    /// Whether the value depends on the response.
    #[must_use]
    pub fn needs_response(&self) -> bool {
        self.parts.iter().any(|part| {
            let FormatPart::Variable(variable) = part else { return false };
            match variable {
                FormatVariable::ResponseHeader(_) => true,
                FormatVariable::Plain(plain) => *plain == PlainVariable::Status,
                FormatVariable::RequestHeader(_) => false,
            }
        })
    }
}

impl FormatVariable {
    fn parse(text: &str) -> Result<Self, String> {
        if let Some(source) = text.strip_prefix("REQ(") {
            return HeaderSource::parse(source, text).map(Self::RequestHeader);
        }
        if let Some(source) = text.strip_prefix("RESP(") {
            return HeaderSource::parse(source, text).map(Self::ResponseHeader);
        }
        let plain = PlainVariable::NAMES.iter().find(|(name, _)| *name == text);
        plain.map(|(_, plain)| Self::Plain(*plain)).ok_or_else(|| {
            let known: Vec<&str> = PlainVariable::NAMES.iter().map(|(name, _)| *name).collect();
            format!(
                "unsupported variable %{text}%: REQ(NAME), RESP(NAME), {} are supported",
                known.join(", ")
            )
        })
    }
}

impl HeaderSource {
    fn parse(source: &str, whole: &str) -> Result<Self, String> {
        let invalid = || format!("invalid variable %{whole}%: must be REQ(NAME?OTHER):LIMIT");
        let (names, limit) = source.split_once(')').ok_or_else(invalid)?;
        let limit = match limit.strip_prefix(':') {
            Some(limit) => Some(limit.parse().map_err(|_| invalid())?),
            None if limit.is_empty() => None,
            None => return Err(invalid()),
        };
        let (name, otherwise) = match names.split_once('?') {
            Some((name, otherwise)) => (name, Some(otherwise)),
            None => (names, None),
        };
        let checked = |name: &str| {
            const PSEUDO: [&str; 4] = [":authority", ":method", ":path", ":scheme"];
            let name = name.to_ascii_lowercase();
            let is_known = PSEUDO.contains(&name.as_str()) || is_header_name(&name);
            if is_known { Ok(name) } else { Err(invalid()) }
        };
        let otherwise = otherwise.map(checked).transpose()?;
        Ok(Self { name: checked(name)?, otherwise, limit })
    }
}

impl fmt::Display for HeaderFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts.iter().try_for_each(|part| match part {
            FormatPart::Text(text) => f.write_str(&text.replace('%', "%%")),
            FormatPart::Variable(FormatVariable::RequestHeader(source)) => {
                write!(f, "%REQ{source}%")
            }
            FormatPart::Variable(FormatVariable::ResponseHeader(source)) => {
                write!(f, "%RESP{source}%")
            }
            FormatPart::Variable(FormatVariable::Plain(plain)) => {
                let known = PlainVariable::NAMES.iter().find(|(_, known)| known == plain);
                write!(f, "%{}%", known.map_or("", |(name, _)| name))
            }
        })
    }
}

impl fmt::Display for HeaderSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}", self.name)?;
        if let Some(otherwise) = &self.otherwise {
            write!(f, "?{otherwise}")?;
        }
        f.write_str(")")?;
        if let Some(limit) = self.limit {
            write!(f, ":{limit}")?;
        }
        Ok(())
    }
}

/// Whether a text is a header name (RFC 9110, section 5.1).
#[must_use]
pub fn is_header_name(name: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(is_token)
}

/// Whether a header states the client's identity. Only the data plane sets these headers, from the verified
/// certificate. `_` counts as `-`, because some services treat both as the same.
#[must_use]
pub fn is_identity_header(name: &[u8]) -> bool {
    const EXACT: &[u8] = b"x-forwarded-client-cert";
    const PREFIXES: [&[u8]; 2] = [b"x-weft-", b"x-amzn-mtls-"];
    let same = |a: &u8, b: &u8| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    let starts = |prefix: &[u8]| {
        name.len() >= prefix.len() && name.iter().zip(prefix).all(|(a, b)| same(a, b))
    };
    (name.len() == EXACT.len() && starts(EXACT)) || PREFIXES.into_iter().any(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_value_is_written_as_parsed() {
        for text in [
            "",
            "plain",
            "100%%",
            "a-%REQ(x-user?:authority):20%-%RESP(server)%",
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %PROTOCOL%%%",
        ] {
            let format = HeaderFormat::parse(text).expect(text);
            assert_eq!(format.to_string(), text);
        }
    }

    #[test]
    fn unsupported_or_malformed_header_values_are_refused() {
        for text in ["50%", "%REQ%", "%REQ(a b)%", "%REQ(a):x%", "%HOSTNAME%", "%RES(a)%", "a\nb"] {
            assert!(HeaderFormat::parse(text).is_err(), "{text}");
        }
        let variable = |text: &str| HeaderFormat::parse(text).expect(text).needs_response();
        assert!(variable("a%RESPONSE_CODE%") && variable("%RESP(a)%"));
        assert!(!variable("%REQ(a)%"));
    }

    #[test]
    fn every_spelling_of_an_identity_header_is_recognized() {
        let check = |name: &str, expected: bool| {
            assert_eq!(is_identity_header(name.as_bytes()), expected, "{name}");
        };
        check("X-Forwarded-Client-Cert", true);
        check("x_forwarded_client_cert", true);
        check("X-Weft-Peer", true);
        check("x-weft-anything", true);
        check("X-Amzn_Mtls-Clientcert", true);
        check("x-forwarded-client-certificate", false);
        check("x-forwarded-for", false);
        check("x-wef", false);
    }
}
