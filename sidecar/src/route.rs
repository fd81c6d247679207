//! Chooses the route of a request: the cluster that serves it, or a redirect or fixed response.

use std::time::SystemTime;

use weft_model::{MatchedRoute, PathMatch, PathRewrite, Redirect, RouteIndex};

use crate::authorize::{AuthorizationInputs, Authorized};
use crate::denial::Denial;
use crate::http::head::{RequestHead, path_of, query_part_of, scheme};

/// A request with its route. Only [`route`] makes one.
#[derive(Debug)]
pub(crate) struct Routed<'a, 'p> {
    pub(crate) found: MatchedRoute<'p>,
    /// When the stream must end because its token expires.
    pub(crate) stream_deadline: Option<SystemTime>,
    /// What the request was authorized with.
    pub(crate) inputs: AuthorizationInputs,
    _allowed: std::marker::PhantomData<Authorized<'a>>,
}

/// Finds the route of a request.
///
/// # Errors
/// [`Denial::NoRoute`] when the route table is missing or no route matches.
pub(crate) fn route<'a, 'p>(
    request: Authorized<'a>,
    table: Option<&'p RouteIndex>,
) -> Result<Routed<'a, 'p>, Denial> {
    let found = table.and_then(|table| table.route(&request.facts())).ok_or(Denial::NoRoute)?;
    let stream_deadline = request.stream_deadline();
    let inputs = request.into_inputs();
    Ok(Routed { found, stream_deadline, inputs, _allowed: std::marker::PhantomData })
}

/// The target of a request after a rewrite; none where it does not change.
pub(crate) fn rewritten_target(
    rewrite: Option<&PathRewrite>,
    matched: &PathMatch,
    head: &RequestHead,
) -> Option<String> {
    rewrite?.target(matched, &head.target, head.readings.as_deref())
}

/// The parts of a request that a redirect depends on.
#[derive(Debug, Clone, Copy)]
struct RedirectInput<'a> {
    scheme: &'a str,
    authority: &'a str,
    target: &'a str,
}

impl<'a> RedirectInput<'a> {
    fn of(head: &'a RequestHead, is_tls: bool) -> Self {
        Self { scheme: scheme(is_tls), authority: &head.authority, target: &head.target }
    }
}

/// The `location` of a redirect.
pub(crate) fn redirect_location(
    redirect: &Redirect,
    matched: &PathMatch,
    head: &RequestHead,
    is_tls: bool,
) -> String {
    let rewritten = rewritten_target(redirect.path_rewrite.as_ref(), matched, head);
    location(redirect, rewritten.as_deref(), RedirectInput::of(head, is_tls))
}

/// The `location` of a redirect. `rewritten` is the target after the redirect's rewrite.
fn location(redirect: &Redirect, rewritten: Option<&str>, before: RedirectInput<'_>) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or(before.scheme);
    let port = redirect.port.map(|port| format!(":{port}")).unwrap_or_default();
    let host = match redirect.host.as_deref() {
        Some(host) => host,
        None => host_for(before, scheme, redirect.port.is_some()),
    };
    let query = query_part_of(before.target);
    let query = if redirect.strip_query { "" } else { query };
    match (&redirect.path, rewritten) {
        (Some(path), _) if path.contains('?') => format!("{scheme}://{host}{port}{path}"),
        (Some(path), _) => format!("{scheme}://{host}{port}{path}{query}"),
        (None, rewritten) => {
            let target = rewritten.unwrap_or(before.target);
            let target = if redirect.strip_query { path_of(target) } else { target };
            format!("{scheme}://{host}{port}{target}")
        }
    }
}

/// The host of the request, without its port where the redirect sets a port or where it is the default port of a scheme that
/// the redirect changes.
fn host_for<'a>(before: RedirectInput<'a>, scheme: &str, is_replaced: bool) -> &'a str {
    let Some((host, port)) = before.authority.rsplit_once(':') else {
        return before.authority;
    };
    // The colon may be part of an IPv6 address.
    if port.ends_with(']') {
        return before.authority;
    }
    let is_default = matches!((before.scheme, port), ("http", "80") | ("https", "443"));
    if is_replaced || (is_default && scheme != before.scheme) { host } else { before.authority }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::{Pattern, Substitution};

    fn regex(pattern: &str, to: &str) -> PathRewrite {
        let pattern = Pattern::parse(pattern).expect("an expression");
        PathRewrite::Regex(Substitution::parse(pattern, to).expect("a substitution").into())
    }

    #[test]
    fn redirect_location_has_the_parts_that_the_redirect_replaces() {
        let plain = Redirect {
            status: 301,
            scheme: None,
            host: None,
            port: None,
            path: None,
            path_rewrite: None,
            strip_query: false,
        };
        let check = |change: &dyn Fn(&mut Redirect), authority: &str, expected: &str| {
            let mut redirect = plain.clone();
            change(&mut redirect);
            let before = RedirectInput { scheme: "http", authority, target: "/a/b?c" };
            let matched = PathMatch::Prefix("/a".into());
            let rewrite = redirect.path_rewrite.as_ref();
            let rewritten =
                rewrite.and_then(|rewrite| rewrite.target(&matched, before.target, None));
            assert_eq!(location(&redirect, rewritten.as_deref(), before), expected);
        };
        let https = |redirect: &mut Redirect| redirect.scheme = Some("https".into());
        check(&https, "h:80", "https://h/a/b?c");
        check(&https, "h:8080", "https://h:8080/a/b?c");
        check(&https, "[::1]", "https://[::1]/a/b?c");
        check(&https, "[::1]:80", "https://[::1]/a/b?c");
        check(&|r| r.scheme = Some("http".into()), "h:80", "http://h:80/a/b?c");
        check(&|r| r.port = Some(8443), "h:80", "http://h:8443/a/b?c");
        check(&|r| r.host = Some("i:1".into()), "h:80", "http://i:1/a/b?c");
        check(&|r| r.path = Some("/x".into()), "h", "http://h/x?c");
        check(&|r| r.path = Some("/x?y".into()), "h", "http://h/x?y");
        let prefix = |r: &mut Redirect| r.path_rewrite = Some(PathRewrite::Prefix("/new".into()));
        check(&prefix, "h", "http://h/new/b?c");
        check(&|r| r.path_rewrite = Some(regex("^/a/(.)", r"/\1")), "h", "http://h/b?c");
        check(&|r| r.strip_query = true, "h", "http://h/a/b");
        let both = |r: &mut Redirect| {
            prefix(r);
            r.strip_query = true;
        };
        check(&both, "h", "http://h/new/b");
    }
}
