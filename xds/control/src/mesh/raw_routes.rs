//! The types that the routes of `mesh.yaml` are deserialized to. They have the fields of the Gateway API's HTTPRoute
//! (`gateway.networking.k8s.io/v1`). Unknown fields are errors.

use serde::Deserialize;

use super::raw_number;

/// A route: a name, and the spec of an HTTPRoute.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRoute {
    /// The name of the route.
    pub name: String,
    /// The services that it applies to.
    pub parent_refs: Vec<RawParentRef>,
    /// The host names that it applies to; empty: all.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// The rules.
    pub rules: Vec<RawRule>,
}

/// A reference to a service that a route applies to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawParentRef {
    /// The service.
    pub name: String,
    /// The port; all ports by default.
    #[serde(default, deserialize_with = "raw_number::optional_port")]
    pub port: Option<u16>,
}

/// A rule of a route.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRule {
    /// The matches: a request needs one of them. Empty: all requests.
    #[serde(default)]
    pub matches: Vec<RawMatch>,
    /// Rewrites and redirects.
    #[serde(default)]
    pub filters: Vec<RawFilter>,
    /// The ports of services that requests are forwarded to.
    #[serde(default)]
    pub backend_refs: Vec<RawBackendRef>,
    /// The timeouts; no limit by default.
    pub timeouts: Option<RawTimeouts>,
}

/// Conditions for a request. All of them must match.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawMatch {
    /// The path.
    pub path: Option<RawPathMatch>,
    /// The method, compared case-insensitively.
    pub method: Option<String>,
    /// The headers.
    #[serde(default)]
    pub headers: Vec<RawValueMatch>,
    /// The query parameters.
    #[serde(default)]
    pub query_params: Vec<RawValueMatch>,
}

/// A condition for the path.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPathMatch {
    /// `PathPrefix` or `Exact`.
    #[serde(rename = "type", default = "path_prefix")]
    pub kind: String,
    /// The path.
    pub value: String,
}

/// A condition for a header or a query parameter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawValueMatch {
    /// The comparison; only `Exact` is supported.
    #[serde(rename = "type", default = "exact")]
    pub kind: String,
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

/// A rewrite or a redirect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawFilter {
    /// `URLRewrite` or `RequestRedirect`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The rewrite, for `URLRewrite`.
    pub url_rewrite: Option<RawUrlRewrite>,
    /// The redirect, for `RequestRedirect`.
    pub request_redirect: Option<RawRequestRedirect>,
}

/// A rewrite of the path.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawUrlRewrite {
    /// The new path.
    pub path: RawPathModifier,
}

/// A replacement of a path or of its matched prefix (`HTTPPathModifier`).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawPathModifier {
    /// `ReplacePrefixMatch` or `ReplaceFullPath`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The replacement of the matched prefix, for `ReplacePrefixMatch`.
    pub replace_prefix_match: Option<String>,
    /// The new path, for `ReplaceFullPath`.
    pub replace_full_path: Option<String>,
}

/// A redirect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRequestRedirect {
    /// The new scheme: `http` or `https`; the same by default.
    pub scheme: Option<String>,
    /// The new host; the same by default.
    pub hostname: Option<String>,
    /// The new path; the same by default.
    pub path: Option<RawPathModifier>,
    /// The status code: 301, 302, 303, 307 or 308; 302 by default.
    pub status_code: Option<u16>,
}

/// A port of a service, with a weight.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawBackendRef {
    /// The service.
    pub name: String,
    /// The port.
    #[serde(deserialize_with = "raw_number::port")]
    pub port: u16,
    /// The weight, 1 by default.
    pub weight: Option<u32>,
}

/// The timeouts of a rule.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTimeouts {
    /// The timeout of the whole response, such as `10s`; `0s`: no limit.
    pub request: String,
}

fn path_prefix() -> String {
    "PathPrefix".into()
}

fn exact() -> String {
    "Exact".into()
}
