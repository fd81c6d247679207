//! Applies the header changes of a route table to requests and responses, in Envoy's order: each level removes, then
//! overwrites, then appends. All values of a level are computed before any of them is set.

use std::borrow::Cow;
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, HeaderValue};
use weft_certs::VerifiedPeer;
use weft_model::{
    AddressPart, AppendAction, FormatPart, FormatVariable, HeaderAddition, HeaderFormat,
    HeaderMutation, HeaderMutations, HeaderSource, PlainVariable,
};

use crate::http::head::{RequestHead, ResponseHead, scheme};
use crate::http::header_filter::is_same_header_name;
use crate::http::headers::Headers;

/// The longest value in bytes. Longer values are truncated.
const VALUE_LIMIT_BYTES: usize = 64 * 1024;

/// What the variables in header formats refer to, apart from headers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeaderVariables<'a> {
    /// The client address, after trusted hops.
    pub(crate) client: IpAddr,
    /// The address of the other end of the client connection.
    pub(crate) peer_address: SocketAddr,
    /// The destination address of the client connection.
    pub(crate) local: SocketAddr,
    /// The verified client certificate.
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) is_tls: bool,
    pub(crate) route: &'a str,
    pub(crate) cluster: &'a str,
}

/// The header changes of one request and its response.
#[derive(Debug)]
pub(crate) struct HeaderChanges<'a> {
    levels: Vec<&'a HeaderMutations>,
    variables: HeaderVariables<'a>,
    /// The endpoint that the request is sent to.
    endpoint: Cell<Option<SocketAddr>>,
}

impl<'a> HeaderChanges<'a> {
    /// The changes of a request; none, without an allocation, where no level changes anything. `variables` is called only where
    /// one does.
    pub(crate) fn of(
        levels: impl Iterator<Item = &'a HeaderMutations>,
        variables: impl FnOnce() -> HeaderVariables<'a>,
    ) -> Option<Box<Self>> {
        let changing =
            |level: &&HeaderMutations| !level.request.is_empty() || !level.response.is_empty();
        let levels: Vec<_> = levels.filter(changing).collect();
        if levels.is_empty() {
            return None;
        }
        Some(Box::new(Self { levels, variables: variables(), endpoint: Cell::new(None) }))
    }

    /// Records the endpoint that the request is sent to.
    pub(crate) fn note_endpoint(&self, endpoint: SocketAddr) {
        self.endpoint.set(Some(endpoint));
    }

    /// Whether the request headers change.
    pub(crate) fn change_request(&self) -> bool {
        self.levels.iter().any(|level| !level.request.is_empty())
    }

    /// The names of the request headers that are removed or overwritten, which trailers must not contain.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.levels.iter().flat_map(|level| {
            let replaces = |addition: &&HeaderAddition| addition.action != AppendAction::Append;
            let added = level.request.add.iter().filter(replaces).map(|added| added.name.as_str());
            level.request.remove.iter().map(String::as_str).chain(added)
        })
    }

    /// Changes the request headers, and returns the original ones.
    pub(crate) fn apply_to_request(&self, head: &mut RequestHead) -> Headers {
        let before = head.headers.clone();
        for level in &self.levels {
            remove(&level.request, &mut head.headers);
            let made = made(&level.request, &head.headers, |format| self.value(format, head, None));
            set(made, &mut head.headers);
        }
        before
    }

    /// Changes the response headers.
    pub(crate) fn apply_to_response(&self, request: &RequestHead, head: &mut ResponseHead) {
        for level in &self.levels {
            remove(&level.response, &mut head.headers);
            let made = made(&level.response, &head.headers, |format| {
                self.value(format, request, Some(head))
            });
            set(made, &mut head.headers);
        }
    }

    /// The value of a header format.
    fn value(
        &self,
        format: &HeaderFormat,
        request: &RequestHead,
        response: Option<&ResponseHead>,
    ) -> Vec<u8> {
        let variables = &self.variables;
        let mut out = Vec::new();
        for part in &format.parts {
            match part {
                FormatPart::Text(text) => out.extend_from_slice(text.as_bytes()),
                FormatPart::Variable(FormatVariable::RequestHeader(source)) => {
                    let header = |name: &str| request_header(name, request, variables);
                    out.extend_from_slice(&of_header(source, header));
                }
                FormatPart::Variable(FormatVariable::ResponseHeader(source)) => {
                    let header = |name: &str| response?.headers.get(name).map(Cow::Borrowed);
                    out.extend_from_slice(&of_header(source, header));
                }
                FormatPart::Variable(FormatVariable::Plain(PlainVariable::Upstream(part))) => {
                    let text = self.endpoint.get().map(|endpoint| address_part(endpoint, *part));
                    out.extend_from_slice(text.unwrap_or_default().as_bytes());
                }
                FormatPart::Variable(FormatVariable::Plain(plain)) => {
                    out.extend_from_slice(
                        plain_value(*plain, request, response, variables).as_bytes(),
                    );
                }
            }
        }
        out.truncate(VALUE_LIMIT_BYTES);
        out
    }
}

/// A part of an address as text.
fn address_part(address: SocketAddr, part: AddressPart) -> String {
    match part {
        AddressPart::Both => address.to_string(),
        AddressPart::Address => address.ip().to_string(),
        AddressPart::Port => address.port().to_string(),
    }
}

fn remove(mutation: &HeaderMutation, headers: &mut Headers) {
    if !mutation.remove.is_empty() {
        // A service that treats `_` as `-` must not see the header under another spelling.
        let is_named = |name: &[u8]| {
            mutation.remove.iter().any(|removed| is_same_header_name(name, removed.as_bytes()))
        };
        headers.remove(is_named);
    }
}

/// A header to set.
struct NewHeader {
    name: HeaderName,
    value: HeaderValue,
    replaces: bool,
}

fn made(
    mutation: &HeaderMutation,
    headers: &Headers,
    value: impl Fn(&HeaderFormat) -> Vec<u8>,
) -> Vec<NewHeader> {
    let one = |addition: &HeaderAddition| {
        let exists = || headers.get(&addition.name).is_some();
        // A service that treats `_` as `-` reads these as the same header.
        let seems_to_exist =
            || headers.any_name(|name| is_same_header_name(name, addition.name.as_bytes()));
        let replaces = match addition.action {
            AppendAction::Append => false,
            AppendAction::AddIfAbsent if exists() => return None,
            AppendAction::AddIfAbsent => false,
            AppendAction::OverwriteIfExists if !seems_to_exist() => return None,
            AppendAction::Overwrite | AppendAction::OverwriteIfExists => true,
        };
        let value = value(&addition.value);
        if value.is_empty() && !addition.keep_empty {
            return None;
        }
        let name = HeaderName::from_bytes(addition.name.as_bytes()).ok()?;
        Some(NewHeader { name, value: HeaderValue::from_bytes(&value).ok()?, replaces })
    };
    mutation.add.iter().filter_map(one).collect()
}

fn set(made: Vec<NewHeader>, headers: &mut Headers) {
    let (replacing, added): (Vec<NewHeader>, Vec<NewHeader>) =
        made.into_iter().partition(|made| made.replaces);
    for NewHeader { name, value, .. } in replacing {
        // As for removed headers, a client must not set the value under another spelling.
        headers.remove(|held| is_same_header_name(held, name.as_str().as_bytes()));
        headers.add(name, value);
    }
    for NewHeader { name, value, .. } in added {
        headers.add(name, value);
    }
}

fn of_header<'h>(
    source: &HeaderSource,
    header: impl Fn(&str) -> Option<Cow<'h, [u8]>>,
) -> Cow<'h, [u8]> {
    let found = header(&source.name)
        .or_else(|| source.otherwise.as_deref().and_then(&header))
        .unwrap_or_default();
    match source.limit {
        Some(limit) if found.len() > limit => {
            Cow::Owned(found.get(..limit).unwrap_or_default().to_vec())
        }
        _ => found,
    }
}

fn request_header<'h>(
    name: &str,
    request: &'h RequestHead,
    variables: &HeaderVariables<'_>,
) -> Option<Cow<'h, [u8]>> {
    match name {
        ":path" => Some(Cow::Borrowed(request.target.as_bytes())),
        ":method" => Some(Cow::Borrowed(request.method.as_str().as_bytes())),
        ":authority" | "host" => Some(Cow::Borrowed(request.authority.as_bytes())),
        ":scheme" => Some(Cow::Borrowed(scheme(variables.is_tls).as_bytes())),
        name => request.headers.get(name).map(Cow::Borrowed),
    }
}

fn plain_value<'v>(
    variable: PlainVariable,
    request: &RequestHead,
    response: Option<&ResponseHead>,
    variables: &HeaderVariables<'v>,
) -> Cow<'v, str> {
    let owned = |value: &dyn ToString| Cow::Owned(value.to_string());
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let peer_address = canonical(variables.peer_address);
    let local = canonical(variables.local);
    // An address from `x-forwarded-for` has no port.
    let client_port = if variables.client == peer_address.ip() { peer_address.port() } else { 0 };
    match variable {
        PlainVariable::Protocol => Cow::Borrowed(request.version.word()),
        PlainVariable::ClientAndPort => owned(&SocketAddr::new(variables.client, client_port)),
        PlainVariable::Client => owned(&variables.client),
        PlainVariable::ClientPort => owned(&client_port),
        PlainVariable::PeerAndPort => owned(&peer_address),
        PlainVariable::Peer => owned(&peer_address.ip()),
        PlainVariable::PeerPort => owned(&peer_address.port()),
        PlainVariable::LocalAndPort => owned(&local),
        PlainVariable::Local => owned(&local.ip()),
        PlainVariable::LocalPort => owned(&local.port()),
        PlainVariable::PeerUri => {
            let identity = variables.peer.and_then(VerifiedPeer::identity);
            identity.map_or(Cow::Borrowed(""), |identity| owned(&identity))
        }
        PlainVariable::PeerFingerprint => {
            variables.peer.map_or(Cow::Borrowed(""), |peer| owned(&peer.fingerprint()))
        }
        PlainVariable::PeerSerial => variables
            .peer
            .map_or(Cow::Borrowed(""), |peer| Cow::Owned(peer.serial_hex().to_lowercase())),
        PlainVariable::RouteName => Cow::Borrowed(variables.route),
        PlainVariable::Cluster => Cow::Borrowed(variables.cluster),
        // `HeaderChanges::value` handles this variable, since it knows the endpoint.
        PlainVariable::Upstream(_) => Cow::Borrowed(""),
        PlainVariable::Status => {
            response.map_or(Cow::Borrowed(""), |response| owned(&response.status))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::HttpVersion;
    use crate::http::test_head::{buffered_headers, get, header_lines, header_map};

    fn variables<'a>() -> HeaderVariables<'a> {
        let peer_address = ([10, 0, 0, 9], 7).into();
        let local = ([10, 0, 0, 1], 80).into();
        let client = IpAddr::from([1, 1, 1, 1]);
        HeaderVariables {
            client,
            peer_address,
            local,
            peer: None,
            is_tls: true,
            route: "r",
            cluster: "c",
        }
    }

    fn head(headers: Headers) -> RequestHead {
        RequestHead { headers, version: HttpVersion::Http2, ..get("/x?y") }
    }

    /// The same headers as received over HTTP/1.1 and over HTTP/2.
    fn both(lines: &[(&str, &str)]) -> [Headers; 2] {
        [buffered_headers(lines), Headers::from(header_map(lines))]
    }

    fn addition(name: &str, value: &str, action: AppendAction) -> HeaderAddition {
        let value = HeaderFormat::parse(value).expect("a format");
        HeaderAddition { name: name.into(), value, action, keep_empty: false }
    }

    #[test]
    fn request_headers_of_both_versions_are_removed_then_overwritten_then_appended() {
        let before = [("X-Secret", "1"), ("x_secret", "2"), ("x-tenant", "a"), ("X-Tenant", "b")];
        let request = HeaderMutation {
            remove: vec!["x-secret".into()],
            add: vec![
                addition("x-copy", "%REQ(x-tenant)%", AppendAction::Append),
                addition("x-tenant", "%REQ(x-secret)%own", AppendAction::Overwrite),
                addition("x-tenant", "more", AppendAction::Append),
                addition("x-none", "%REQ(x-secret)%", AppendAction::Append),
                addition("x-copy", "late", AppendAction::AddIfAbsent),
                addition("x-other", "none", AppendAction::OverwriteIfExists),
            ],
        };
        let level = HeaderMutations { request, response: HeaderMutation::default() };
        let changes =
            HeaderChanges::of([&level].into_iter(), variables).expect("the level changes headers");
        assert!(changes.change_request());
        for headers in both(&before) {
            let mut head = head(headers);
            changes.apply_to_request(&mut head);
            // All values of a level are computed from the headers before that level.
            let expected = ["x-copy: a", "x-copy: late", "x-tenant: more", "x-tenant: own"];
            assert_eq!(header_lines(&head.headers), expected);
        }
        let names: Vec<&str> = changes.names().collect();
        assert_eq!(names, ["x-secret", "x-tenant", "x-copy", "x-other"]);
    }

    #[test]
    fn overwritten_header_is_removed_under_spellings_with_underscores() {
        let before = [("X_Tenant", "evil"), ("x_Role-name", "evil"), ("x_other", "kept")];
        let request = HeaderMutation {
            remove: Vec::new(),
            add: vec![
                addition("x-tenant", "own", AppendAction::Overwrite),
                addition("x-role-name", "own", AppendAction::OverwriteIfExists),
                addition("x-none", "own", AppendAction::OverwriteIfExists),
                addition("x-other", "own", AppendAction::Append),
            ],
        };
        let level = HeaderMutations { request, response: HeaderMutation::default() };
        let changes =
            HeaderChanges::of([&level].into_iter(), variables).expect("the level changes headers");
        for headers in both(&before) {
            let mut head = head(headers);
            changes.apply_to_request(&mut head);
            let expected = ["x-other: own", "x-role-name: own", "x-tenant: own", "x_other: kept"];
            assert_eq!(header_lines(&head.headers), expected);
        }
    }

    #[test]
    fn variables_in_header_formats_are_replaced_by_their_values() {
        let check = |text: &str, expected: &str| {
            let [headers, _] = both(&[("x-one", "abcdef")]);
            let request = head(headers);
            let [headers, _] = both(&[("server", "s")]);
            let response = ResponseHead { status: 201, headers, content_length: None };
            let format = HeaderFormat::parse(text).expect("a format");
            let endpoint = Cell::new(None);
            let changes = HeaderChanges { levels: Vec::new(), variables: variables(), endpoint };
            changes.note_endpoint(([10, 0, 0, 2], 8080).into());
            let value = changes.value(&format, &request, Some(&response));
            assert_eq!(String::from_utf8_lossy(&value), expected, "{text}");
        };
        check("%REQ(x-one):3%|%REQ(x-two?x-one)%|%REQ(x-two)%", "abc|abcdef|");
        check("%REQ(:method)% %REQ(:SCHEME)%://%REQ(host)%%REQ(:path)%", "GET https://a.test/x?y");
        check("%PROTOCOL% %ROUTE_NAME% %UPSTREAM_CLUSTER%", "HTTP/2 r c");
        check(
            "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
            "1.1.1.1:0 10.0.0.9:7",
        );
        check("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%", "10.0.0.1 80");
        check(
            "%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%",
            "10.0.0.2:8080 10.0.0.2 8080",
        );
        check("%RESPONSE_CODE% %RESP(server)% %DOWNSTREAM_PEER_URI_SAN%%%", "201 s %");
    }
}
