//! Which cluster serves a request, or what answers it at once.

use std::time::SystemTime;

use weft_model::path::canonical;
use weft_model::{Action, Route, RouteIndex};

use crate::authorize::{Authorized, Case};
use crate::denial::Denial;
use crate::http::head::{RequestHead, path_of};

/// A request with the route it takes. Made only by [`route`].
#[derive(Debug)]
pub(crate) struct Routed<'a, 'p> {
    pub(crate) route: &'p Route,
    /// When the stream ends, where its token says so.
    pub(crate) ends: Option<SystemTime>,
    /// What it was allowed by.
    pub(crate) case: Case,
    _allowed: std::marker::PhantomData<Authorized<'a>>,
}

/// Finds the route of a request.
///
/// # Errors
/// [`Denial::NoRoute`].
#[allow(
    clippy::needless_pass_by_value,
    reason = "the proof is used up: what follows holds the next one"
)]
pub(crate) fn route<'a, 'p>(
    request: Authorized<'a>,
    table: Option<&'p RouteIndex>,
) -> Result<Routed<'a, 'p>, Denial> {
    let route = table.and_then(|table| table.route(&request.facts())).ok_or(Denial::NoRoute)?;
    let (ends, case) = (request.ends(), request.into_case());
    Ok(Routed { route, ends, case, _allowed: std::marker::PhantomData })
}

/// The target of a request after the route's rewrite. A path that came in another form than the one
/// that was routed keeps its form where the rewrite means the same for both.
pub(crate) fn rewritten_target(route: &Route, head: &RequestHead) -> Option<String> {
    let Some(normal) = head.readings.as_ref().and_then(|readings| readings.get(0)) else {
        return rewritten(route, &head.target);
    };
    let routed = rewritten(route, &format!("{}{}", normal.path(), head.query_part()))?;
    let as_sent = rewritten(route, &head.target)
        .filter(|_| route.matches.path.matches(head.path()))
        .filter(|target| canonical(path_of(target)) == canonical(path_of(&routed)));
    Some(as_sent.unwrap_or(routed))
}

/// A target after the route's rewrite.
fn rewritten(route: &Route, target: &str) -> Option<String> {
    let Action::Forward { prefix_rewrite: Some(prefix), .. } = &route.action else {
        return None;
    };
    let rest = target.get(route.matches.path.matched_bytes()..)?;
    let joined = format!("{prefix}{rest}");
    // `/` put before `/x` must not become `//x`, nor an empty path.
    let clean = if joined.starts_with("//") { joined.split_at(1).1.to_owned() } else { joined };
    Some(if clean.starts_with('/') { clean } else { format!("/{clean}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::{PathMatch, RouteMatch};

    #[test]
    fn a_rewrite_replaces_what_matched_and_keeps_the_rest() {
        let check = |path: PathMatch, prefix: &str, target: &str, expected: &str| {
            let route = Route {
                name: "r".into(),
                matches: RouteMatch { path, ..RouteMatch::any() },
                action: Action::Forward {
                    clusters: Vec::new(),
                    prefix_rewrite: Some(prefix.into()),
                    host_rewrite: None,
                    timeout: None,
                    ends_tunnels: false,
                },
            };
            assert_eq!(rewritten(&route, target).as_deref(), Some(expected));
        };
        check(PathMatch::Segments("/v1".into()), "/", "/v1/x?y", "/x?y");
        check(PathMatch::Segments("/v1".into()), "/", "/v1", "/");
        check(PathMatch::Prefix("/v1/".into()), "/v2/", "/v1/x", "/v2/x");
        check(PathMatch::Exact("/a".into()), "/b", "/a?q", "/b?q");
    }
}
