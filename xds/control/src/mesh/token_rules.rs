//! Computes which requests to a port need a token, by path and method.

use std::cmp::Reverse;

use weft_model::PathMatch;

use super::Clause;

/// Requests that a clause covers: a path match, and a method if the clause lists methods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CoveredRequests {
    pub(crate) path: PathMatch,
    pub(crate) method: Option<String>,
}

impl CoveredRequests {
    /// The covered requests of a clause: one item for each pair of path and method.
    pub(crate) fn all_of(clause: &Clause) -> Vec<Self> {
        let methods: Vec<Option<String>> = match clause.methods.as_slice() {
            [] => vec![None],
            methods => methods.iter().cloned().map(Some).collect(),
        };
        let of_path = |path: PathMatch| {
            methods.iter().map(move |method| Self { path: path.clone(), method: method.clone() })
        };
        clause.route_paths().into_iter().flat_map(of_path).collect()
    }

    /// How specific it is: a longer literal prefix is more specific, then an exact path, then a method.
    fn specificity(&self) -> (usize, bool, bool) {
        let is_exact = matches!(self.path, PathMatch::Exact(_));
        (self.path.literal_prefix().len(), is_exact, self.method.is_some())
    }

    fn may_overlap(&self, other: &Self) -> bool {
        let methods =
            self.method.is_none() || other.method.is_none() || self.method == other.method;
        methods && self.path.may_overlap(&other.path)
    }

    /// Whether this covers every request of `other`. False if that is not certain.
    fn covers(&self, other: &Self) -> bool {
        let methods = self.method.is_none() || self.method == other.method;
        let begins = other.path.literal_prefix();
        let paths = match &self.path {
            PathMatch::Prefix(all) if all == "/" => other.path != PathMatch::Connect,
            PathMatch::Prefix(start) => begins.starts_with(start),
            PathMatch::Segments(start) => {
                let rest = begins.strip_prefix(start.trim_end_matches('/'));
                let is_whole = matches!(other.path, PathMatch::Exact(_) | PathMatch::Segments(_));
                rest.is_some_and(|rest| rest.starts_with('/') || (rest.is_empty() && is_whole))
            }
            _ => false,
        };
        methods && (paths || self.path == other.path)
    }
}

/// The token that requests need.
#[derive(Debug)]
pub(crate) struct TokenRule<'m> {
    pub(crate) requests: CoveredRequests,
    /// The accepted issuers; empty: tokens are not examined.
    pub(crate) issuers: Vec<&'m str>,
    /// Whether a request without a token is accepted.
    pub(crate) is_optional: bool,
}

/// The token rules of the clauses that are enforced at a port. The first rule that covers a request applies.
///
/// An allow clause requires its token for the requests that it covers. The most specific clause applies, and of equally
/// specific ones the clause with a token. If only a deny clause names an issuer, the token is optional, but a token that
/// is sent is verified, so that the deny clause can evaluate its claims.
pub(crate) fn token_rules<'m>(allow: &[&'m Clause], deny: &[&'m Clause]) -> Vec<TokenRule<'m>> {
    let mut allowed: Vec<(CoveredRequests, Vec<&str>)> = Vec::new();
    for clause in allow {
        for requests in CoveredRequests::all_of(clause) {
            let known = allowed.iter().position(|(known, _)| *known == requests);
            let token = clause.token.as_deref();
            match known.and_then(|index| allowed.get_mut(index)) {
                Some((_, tokens)) => tokens.extend(token),
                None => allowed.push((requests, token.into_iter().collect())),
            }
        }
    }
    allowed.sort_by_key(|(requests, tokens)| (Reverse(requests.specificity()), tokens.is_empty()));
    let denied: Vec<(CoveredRequests, &str)> = deny
        .iter()
        .filter_map(|clause| Some((clause, clause.token.as_deref()?)))
        .flat_map(|(clause, token)| {
            CoveredRequests::all_of(clause).into_iter().map(move |a| (a, token))
        })
        .collect();
    let rule = |(requests, mut issuers): (CoveredRequests, Vec<&'m str>)| {
        let is_optional = issuers.is_empty();
        if is_optional {
            let overlapping = denied.iter().filter(|(denied, _)| denied.may_overlap(&requests));
            issuers.extend(overlapping.map(|(_, token)| *token));
        }
        issuers.sort_unstable();
        issuers.dedup();
        TokenRule { requests, issuers, is_optional }
    };
    allowed.into_iter().map(rule).collect()
}

/// Whether a token of an issuer is verified for every request in `requests` that any rule allows.
pub(crate) fn verifies(rules: &[TokenRule<'_>], requests: &CoveredRequests, issuer: &str) -> bool {
    for rule in rules.iter().filter(|rule| rule.requests.may_overlap(requests)) {
        if !rule.issuers.contains(&issuer) {
            return false;
        }
        if rule.requests.covers(requests) {
            break;
        }
    }
    true
}
