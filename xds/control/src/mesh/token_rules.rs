//! Which requests to a port need a token, by paths and methods.

use std::cmp::Reverse;

use weft_model::PathMatch;

use super::Clause;

/// Requests that a clause covers: a path, and a method where the clause names any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CoveredRequests {
    pub(crate) path: PathMatch,
    pub(crate) method: Option<String>,
}

impl CoveredRequests {
    /// The areas of a clause.
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

    /// How narrow it is: the longer its certain beginning, the narrower.
    fn narrowness(&self) -> (usize, bool, bool) {
        let is_exact = matches!(self.path, PathMatch::Exact(_));
        (self.path.literal_prefix().len(), is_exact, self.method.is_some())
    }

    fn may_overlap(&self, other: &Self) -> bool {
        let methods =
            self.method.is_none() || other.method.is_none() || self.method == other.method;
        methods && self.path.may_overlap(&other.path)
    }

    /// Whether every request of another area is of this one. False as well where that is not known.
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

/// Whose token the requests of an area need.
#[derive(Debug)]
pub(crate) struct TokenRule<'m> {
    pub(crate) area: CoveredRequests,
    /// One of these issuers; none: no token is looked at.
    pub(crate) issuers: Vec<&'m str>,
    /// Whether the token may be missing.
    pub(crate) is_optional: bool,
}

/// Which requests need a token, by the clauses that are enforced at a port; the first rule that covers a request counts.
/// An allowance says so for what it covers; the narrowest counts, and of equals the one that needs a token. Where only
/// a denial names an issuer, its token may be missing, but one that is sent is verified, so that the denial sees its
/// claims.
pub(crate) fn token_rules<'m>(allow: &[&'m Clause], deny: &[&'m Clause]) -> Vec<TokenRule<'m>> {
    let mut allowed: Vec<(CoveredRequests, Vec<&str>)> = Vec::new();
    for clause in allow {
        for area in CoveredRequests::all_of(clause) {
            let known = allowed.iter().position(|(known, _)| *known == area);
            let token = clause.token.as_deref();
            match known.and_then(|index| allowed.get_mut(index)) {
                Some((_, tokens)) => tokens.extend(token),
                None => allowed.push((area, token.into_iter().collect())),
            }
        }
    }
    allowed.sort_by_key(|(area, tokens)| (Reverse(area.narrowness()), tokens.is_empty()));
    let denied: Vec<(CoveredRequests, &str)> = deny
        .iter()
        .filter_map(|clause| Some((clause, clause.token.as_deref()?)))
        .flat_map(|(clause, token)| {
            CoveredRequests::all_of(clause).into_iter().map(move |a| (a, token))
        })
        .collect();
    let rule = |(area, mut issuers): (CoveredRequests, Vec<&'m str>)| {
        let is_optional = issuers.is_empty();
        if is_optional {
            let overlapping = denied.iter().filter(|(denied, _)| denied.may_overlap(&area));
            issuers.extend(overlapping.map(|(_, token)| *token));
        }
        issuers.sort_unstable();
        issuers.dedup();
        TokenRule { area, issuers, is_optional }
    };
    allowed.into_iter().map(rule).collect()
}

/// Whether a token of an issuer is verified for every request of an area that any rule allows.
pub(crate) fn verifies(rules: &[TokenRule<'_>], area: &CoveredRequests, issuer: &str) -> bool {
    for rule in rules.iter().filter(|rule| rule.area.may_overlap(area)) {
        if !rule.issuers.contains(&issuer) {
            return false;
        }
        if rule.area.covers(area) {
            break;
        }
    }
    true
}
