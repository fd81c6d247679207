//! Matchers of routes, virtual hosts, RBAC and token rules, evaluated by weft and by Envoy 1.40: generated
//! configurations, the same file for both proxies, and generated requests. For each pair of a matcher and a request,
//! status and body must be equal.
//!
//! The generator leaves out cases in which weft is stricter by design or decides before any matcher:
//! - paths that services read in several ways (escapes, empty and dot segments, `;`): policies must allow every
//!   reading, see `tests/desync/paths.rs`;
//! - requests that weft refuses as ambiguous (`tests/desync`), names with `_`, and hop-by-hop headers;
//! - headers that only Envoy adds (`x-request-id`) or removes (`x-envoy-*`, `x-forwarded-client-cert`, a `referer` that
//!   is not a URL), and an empty `x-forwarded-proto`, with which Envoy finds no route at all;
//! - `https://` as the scheme of a target over a connection without TLS: weft uses the scheme of the connection.

mod comparison;
mod domains;
mod policies;
mod principals;
mod random;
mod routes;
mod tokens;
