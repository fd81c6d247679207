//! The routes of `mesh.yaml` as they are written, in the shape of the Gateway API's HTTPRoute. An unknown field is a
//! mistake.

use serde::Deserialize;

use super::raw_number;

/// A route, in the shape of `gateway.networking.k8s.io/v1` HTTPRoute's spec.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRoute {
    /// Its name.
    pub name: String,
    /// The services whose requests it takes.
    pub parent_refs: Vec<RawParentRef>,
    /// The host names.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// The rules.
    pub rules: Vec<RawRule>,
}

/// A service by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawParentRef {
    /// Its name.
    pub name: String,
    /// The port whose requests the route takes; those of all ports when not given.
    #[serde(default, deserialize_with = "raw_number::optional_port")]
    pub port: Option<u16>,
}

/// A rule.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRule {
    /// Which requests; none: all.
    #[serde(default)]
    pub matches: Vec<RawMatch>,
    /// What is done with them.
    #[serde(default)]
    pub filters: Vec<RawFilter>,
    /// Where they go.
    #[serde(default)]
    pub backend_refs: Vec<RawBackendRef>,
    /// How long they may take; as long as they like when not given.
    pub timeouts: Option<RawTimeouts>,
}

/// A match.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawMatch {
    /// The path.
    pub path: Option<RawPathMatch>,
    /// The method, compared without case.
    pub method: Option<String>,
    /// The headers.
    #[serde(default)]
    pub headers: Vec<RawValueMatch>,
    /// The query parameters.
    #[serde(default)]
    pub query_params: Vec<RawValueMatch>,
}

/// A path.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPathMatch {
    /// `PathPrefix` or `Exact`.
    #[serde(rename = "type", default = "path_prefix")]
    pub kind: String,
    /// The path.
    pub value: String,
}

/// A name and its value.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawValueMatch {
    /// `Exact`.
    #[serde(rename = "type", default = "exact")]
    pub kind: String,
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

/// A filter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawFilter {
    /// `URLRewrite` or `RequestRedirect`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For `URLRewrite`.
    pub url_rewrite: Option<RawUrlRewrite>,
    /// For `RequestRedirect`.
    pub request_redirect: Option<RawRequestRedirect>,
}

/// A rewrite.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawUrlRewrite {
    /// The path.
    pub path: RawPathModifier,
}

/// What becomes of a path.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawPathModifier {
    /// `ReplacePrefixMatch` or `ReplaceFullPath`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For `ReplacePrefixMatch`.
    pub replace_prefix_match: Option<String>,
    /// For `ReplaceFullPath`.
    pub replace_full_path: Option<String>,
}

/// A redirect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRequestRedirect {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// The host.
    pub hostname: Option<String>,
    /// The path.
    pub path: Option<RawPathModifier>,
    /// 301, 302, 303, 307 or 308; 302 when not given.
    pub status_code: Option<u16>,
}

/// A port of a service, with its share.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawBackendRef {
    /// The service.
    pub name: String,
    /// The port.
    #[serde(deserialize_with = "raw_number::port")]
    pub port: u16,
    /// Its share, 1 when not given.
    pub weight: Option<u32>,
}

/// How long things may take.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTimeouts {
    /// Until the whole response, such as `10s`; `0s`: without limit.
    pub request: String,
}

fn path_prefix() -> String {
    "PathPrefix".into()
}

fn exact() -> String {
    "Exact".into()
}
