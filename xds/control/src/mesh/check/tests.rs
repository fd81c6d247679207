//! Values that translation refuses are mistakes with their line and field.

use std::path::Path;

use crate::mesh::Mesh;

fn mesh(route_match: &str, filter: &str, issuer: &str) -> String {
    format!(
        r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: api, addresses: [10.96.0.2], ports: [{{port: 80, target: 8000, protocol: http}}]}}
routes:
- name: r
  parentRefs: [{{name: api}}]
  rules:
  - matches: [{route_match}]
    filters: [{filter}]
    backendRefs: [{{name: api, port: 80}}]
- name: elsewhere
  parentRefs: [{{name: api}}]
  rules:
  - filters: [{{type: RequestRedirect, requestRedirect: {{hostname: a.example}}}}]
security:
  issuers:
    login: {{issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80', {issuer}}}
  policies:
  - {{service: api, allow: [{{from: [api], token: login}}]}}
"#
    )
}

fn check(text: &str, expected: Option<&str>) {
    let problems = Mesh::parse(text, Path::new(".")).err().unwrap_or_default();
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    match expected {
        None => assert_eq!(problems, Vec::<String>::new(), "{text}"),
        Some(expected) => {
            assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:#?}");
        }
    }
}

#[test]
fn header_of_a_claim_that_sidecars_refuse_is_a_mistake() {
    let claim = |header: &str| mesh("", "", &format!("claim_headers: {{email: '{header}'}}"));
    for good in ["x-user", "X-User", "x.user"] {
        check(&claim(good), None);
    }
    let at = "line 18: security.issuers[\"login\"].claim_headers[\"email\"]: invalid header";
    for header in ["Expect", "trailer", "HOST", "te", "Content-Length", "", "x_user", "x user"] {
        check(&claim(header), Some(at));
    }
    check(&mesh("", "", "claim_headers: {'': x-user}"), Some("line 18: security.issuers"));
    let claims = "claims: [{name: scope, values: ['']}]";
    check(&mesh("", "", claims), Some("line 18: security.issuers[\"login\"].claims[0].values: "));
}

#[test]
fn match_that_sidecars_refuse_or_that_covers_no_request_is_a_mistake() {
    let at = "line 9: routes[0].rules[0].matches[0]";
    let good = "{path: {value: /a/}, method: GET, headers: [{name: X-A, value: ''}], queryParams: [{name: q, value: ''}]}";
    check(&mesh(good, "", ""), None);
    for (wrong, place) in [
        ("{path: {value: '/a?b'}}", "path.value: invalid path \"/a?b\": must start with /"),
        ("{path: {type: Exact, value: '/a#b'}}", "path.value: invalid path"),
        ("{path: {value: a}}", "path.value: invalid path"),
        ("{method: ''}", "method: invalid method"),
        ("{headers: [{name: '', value: a}]}", "headers[0].name: invalid header name"),
        ("{headers: [{name: 'x a', value: a}]}", "headers[0].name: invalid header name"),
        ("{queryParams: [{name: '', value: a}]}", "queryParams[0].name: invalid name"),
    ] {
        check(&mesh(wrong, "", ""), Some(&format!("{at}.{place}")));
    }
}

#[test]
fn rewrite_or_redirect_that_would_be_lost_is_a_mistake() {
    let rewrite = |prefix: &str| {
        let path = format!("{{type: ReplacePrefixMatch, replacePrefixMatch: '{prefix}'}}");
        mesh("", &format!("{{type: URLRewrite, urlRewrite: {{path: {path}}}}}"), "")
    };
    check(&rewrite("/"), None);
    let at = "line 10: routes[0].rules[0].filters[0].urlRewrite.path.replacePrefixMatch: invalid";
    for prefix in ["", "a", "/a b"] {
        check(&rewrite(prefix), Some(at));
    }
    let redirect = |fields: &str| mesh("", "", "").replace("hostname: a.example", fields);
    let at = "line 15: routes[1].rules[0].filters[0].requestRedirect";
    for (fields, place) in [
        ("scheme: ftp", "scheme: invalid scheme"),
        ("hostname: ''", "hostname: invalid host name"),
        ("hostname: 'a b'", "hostname: invalid host name"),
        (
            "path: {type: ReplaceFullPath, replaceFullPath: ''}",
            "path.replaceFullPath: invalid path",
        ),
    ] {
        check(&redirect(fields), Some(&format!("{at}.{place}")));
    }
    check(&redirect("scheme: https, path: {type: ReplaceFullPath, replaceFullPath: /a}"), None);
}
