//! Headers that a route table adds and removes, responses of refused requests, redirects that change the path, and the
//! client address by trusted hops of `x-forwarded-for`, compared with Envoy.

#![expect(clippy::needless_pass_by_value, reason = "JSON values are passed where they are made")]

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, with};

use crate::comparison::{Case, Difference, Outcome, both, case, compare, get, outcome, serving};

/// A header to add.
fn add(name: &str, value: &str, action: &str) -> Value {
    json!({"header": {"key": name, "value": value}, "append_action": action})
}

/// Header changes of one level of the route table. The values name the level.
fn level(name: &str) -> Value {
    let own = |header: &str, action: &str| add(header, &format!("{name} level"), action);
    let additions = [
        own("x-append", "APPEND_IF_EXISTS_OR_ADD"),
        own("x-absent", "ADD_IF_ABSENT"),
        own("x-overwrite", "OVERWRITE_IF_EXISTS_OR_ADD"),
        own("x-existing", "OVERWRITE_IF_EXISTS"),
        own(&format!("x-removed-by-{name}"), "APPEND_IF_EXISTS_OR_ADD"),
    ];
    let removals = [format!("x-removed-by-{name}"), "X-Secret".to_owned()];
    json!({
        "request_headers_to_remove": removals, "request_headers_to_add": additions,
        "response_headers_to_remove": ["x-answer", "x-nothing"], "response_headers_to_add": additions,
    })
}

fn with_all(value: Value, fields: Value) -> Value {
    let fields = fields.as_object().expect("fields are a JSON object").clone();
    fields.into_iter().fold(value, |value, (name, field)| with(value, &name, field))
}

/// A route table with header changes at each level.
fn table(fields: Value) -> Value {
    let clusters =
        json!({"clusters": [with_all(json!({"name": "service", "weight": 1}), level("cluster"))]});
    let forward = |prefix: &str, to: Value| {
        with_all(json!({"name": "r", "match": {"prefix": prefix}, "route": to}), level("route"))
    };
    let values = [
        ("x-method", "%REQ(:METHOD)% %REQ(:path)% %REQ(:authority)% %PROTOCOL%"),
        ("x-other", "%REQ(x-none?x-one)%"),
        ("x-short", "%REQ(x-one):3%"),
        ("x-gone", "%REQ(x-none)%"),
        ("x-percent", "100%%"),
        ("x-peer", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"),
        ("x-cluster", "%UPSTREAM_CLUSTER%"),
        ("x-half", "a-%REQ(x-none)%"),
        ("x-upstream", "%UPSTREAM_HOST%"),
    ];
    let values: Vec<Value> =
        values.iter().map(|(name, value)| add(name, value, "APPEND_IF_EXISTS_OR_ADD")).collect();
    let response_values = [
        add("x-status", "%RESPONSE_CODE% %RESP(x-answer)%", "APPEND_IF_EXISTS_OR_ADD"),
        add("x-request", "%REQ(x-one)%", "APPEND_IF_EXISTS_OR_ADD"),
        add("x-upstream", "%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS%", "ADD_IF_ABSENT"),
        add(
            "x-parts",
            "%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%",
            "ADD_IF_ABSENT",
        ),
    ];
    let old = json!({"header": {"key": "x-old", "value": "new"}, "append": false});
    let empty = json!({"header": {"key": "x-empty", "value": ""}, "keep_empty_value": true});
    let routes = json!([
        forward("/weighted", json!({"weighted_clusters": clusters})),
        {"match": {"prefix": "/values"}, "route": {"cluster": "service"},
         "request_headers_to_add": values, "response_headers_to_add": response_values},
        {"match": {"prefix": "/old"}, "route": {"cluster": "service"},
         "request_headers_to_add": [old, empty]},
        {"match": {"prefix": "/rewritten"}, "route": {"cluster": "service", "prefix_rewrite": "/new",
            "host_rewrite_literal": "new.example"},
         "request_headers_to_add": [add("x-path", "%REQ(:PATH)% %REQ(:AUTHORITY)%", "ADD_IF_ABSENT")]},
        forward("/nowhere", json!({"cluster": "nowhere"})),
        with_all(json!({"match": {"prefix": "/answer"},
            "direct_response": {"status": 200, "body": {"inline_string": "here"}}}), level("route")),
        with_all(json!({"match": {"prefix": "/moved"}, "redirect": {"host_redirect": "b.example"}}),
            level("route")),
        forward("/", json!({"cluster": "service"})),
    ]);
    let host = with_all(json!({"name": "all", "domains": ["*"], "routes": routes}), level("host"));
    with_all(with_all(json!({"name": "all", "virtual_hosts": [host]}), level("table")), fields)
}

fn request(listener: &'static str, target: &str, lines: &str) -> Case {
    let name = format!("{listener} {target} {}", lines.replace("\r\n", " + "));
    case(listener, &name, format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n\r\n"))
}

#[test]
fn headers_are_added_and_removed_in_the_same_order_as_by_envoy() {
    let least_specific = serving(json!({"route_config": table(json!({}))}));
    let most_specific = json!({"most_specific_header_mutations_wins": true});
    let most_specific = serving(json!({"route_config": table(most_specific)}));
    let mut cases = Vec::new();
    for listener in ["least", "most"] {
        for target in ["/", "/weighted", "/answer", "/moved/x", "/nowhere", "/404", "/chunked"] {
            cases.push(get(listener, target));
            let lines = "x-append: client\r\nx-absent: client\r\nx-overwrite: a\r\nx-overwrite: b\r\n\
                x-existing: client\r\nx-secret: 1\r\nX-Secret: 2\r\nx-removed-by-route: client\r\n\
                x-removed-by-host: client";
            cases.push(request(listener, target, lines));
        }
        cases.push(request(listener, "/values/x?y", "x-one: yes, it is"));
        cases.push(request(listener, "/rewritten/x", "x-one: 1"));
        cases.push(request(listener, "/old", "x-old: 1\r\nx-old: 2"));
    }
    compare(&[("least", least_specific), ("most", most_specific)], &cases, &[], true);
}

/// A public key (RFC 7517, appendix A.1).
const KEYS: &str = r#"{"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1",
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"#;

/// A listener that refuses requests below `/denied` by a policy, and requests below `/token` without a token.
fn refusing(table: Value) -> Value {
    let rules = json!({"action": "DENY", "policies": {"p": {
        "permissions": [{"url_path": {"path": {"prefix": "/denied"}}}],
        "principals": [{"any": true}]}}});
    let rbac = any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}));
    let issuer = json!({"issuer": "i", "audiences": ["a"], "local_jwks": {"inline_string": KEYS}});
    let rule = json!({"match": {"prefix": "/token"}, "requires": {"provider_name": "i"}});
    let message = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
    let tokens = any(message, json!({"providers": {"i": issuer}, "rules": [rule]}));
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let filters = [("tokens", tokens), ("rbac", rbac), ("router", router)];
    let filters = filters.map(|(name, config)| json!({"name": name, "typed_config": config}));
    serving(json!({"route_config": table, "http_filters": filters}))
}

/// Routes whose requests are refused, with header changes at each level.
fn refused_routes() -> Value {
    let clusters =
        json!({"clusters": [with_all(json!({"name": "service", "weight": 1}), level("cluster"))]});
    let typed = [
        add("content-type", "text/html", "OVERWRITE_IF_EXISTS_OR_ADD"),
        add("www-authenticate", "Basic", "OVERWRITE_IF_EXISTS_OR_ADD"),
        add("x-request", "%REQ(x-one)%", "APPEND_IF_EXISTS_OR_ADD"),
    ];
    let route = |prefix: &str, to: Value| json!({"match": {"prefix": prefix}, "route": to});
    let service = || json!({"cluster": "service"});
    let weighted = || json!({"weighted_clusters": clusters});
    let routes = json!([
        with_all(route("/denied/plain", service()), level("route")),
        with_all(route("/denied/weighted", weighted()), level("route")),
        with(route("/denied/typed", service()), "response_headers_to_add", json!(typed)),
        with_all(route("/token/plain", service()), level("route")),
        with(route("/token/typed", service()), "response_headers_to_add", json!(typed)),
        with_all(route("/nowhere", json!({"cluster": "nowhere"})), level("route")),
        with_all(json!({"match": {"path": "/"}, "route": service()}), level("route")),
    ]);
    let host = with_all(json!({"name": "all", "domains": ["*"], "routes": routes}), level("host"));
    with_all(json!({"name": "all", "virtual_hosts": [host]}), level("table"))
}

#[test]
fn refusals_get_the_response_headers_of_their_route_as_with_envoy() {
    let targets = [
        ("/denied/plain", 403),
        ("/denied/weighted", 403),
        ("/denied/typed", 403),
        ("/denied/none", 403),
        ("/token/plain", 401),
        ("/token/typed", 401),
        ("/nowhere", 503),
        ("/none", 404),
        ("/", 200),
    ];
    let cases = |lines: &str| targets.map(|(target, _)| request("refusing", target, lines));
    let cases: Vec<Case> =
        ["x-one: 1", "content-type: application/grpc"].into_iter().flat_map(cases).collect();
    let (envoys, wefts) = both(&[("refusing", refusing(refused_routes()))], |setup, service| {
        cases.iter().map(|case| outcome(setup.port("refusing"), case, service)).collect()
    });
    // The other parts of a refusal may differ: the body, the challenge, the length.
    let compared = |outcome: &Outcome| -> Vec<String> {
        let names = ["x-", "content-type:", "grpc-status:"];
        let is_compared = |line: &&String| {
            // `text/plain` describes a body that only the sidecar sends.
            *line != "content-type: text/plain" && names.iter().any(|name| line.starts_with(name))
        };
        outcome.headers.iter().filter(is_compared).cloned().collect()
    };
    let statuses = targets.iter().map(|(_, status)| *status);
    let outcomes = envoys.iter().zip(&wefts);
    for (at, (case, (envoy, weft))) in cases.iter().zip(outcomes).enumerate() {
        assert_eq!(compared(envoy), compared(weft), "{}: {envoy:?} / {weft:?}", case.name);
        if at < targets.len() {
            assert_eq!(statuses.clone().nth(at), Some(weft.status), "{}", case.name);
        }
    }
    let challenge = |outcome: &&Outcome| {
        let mut challenges = outcome.headers.iter().filter(|f| f.starts_with("www-authenticate:"));
        outcome.status == 401
            && challenges.clone().count() == 1
            && challenges.any(|c| c.contains("Bearer"))
    };
    let typed = wefts.iter().filter(challenge).count();
    assert_eq!(typed, 2, "the route must not replace the challenge: {wefts:?}");
}

#[test]
fn redirects_have_the_same_location_as_with_envoy() {
    let redirects = [
        ("/prefix/", json!({"prefix_rewrite": "/new/"})),
        ("/strip", json!({"prefix_rewrite": "/s", "strip_query": true})),
        (
            "/regex",
            json!({"regex_rewrite": {"pattern": {"regex": "^/regex/([^/]+)/(.*)$"},
            "substitution": "/\\2/\\1"}}),
        ),
        ("/port", json!({"port_redirect": 8443})),
        (
            "/both",
            json!({"port_redirect": 8443, "host_redirect": "b.example", "https_redirect": true}),
        ),
        ("/https", json!({"https_redirect": true})),
        ("/path", json!({"path_redirect": "/p", "strip_query": true})),
        ("/query", json!({"path_redirect": "/p?q=1", "strip_query": true})),
        ("/no-query", json!({"strip_query": true, "response_code": "TEMPORARY_REDIRECT"})),
    ];
    let mut routes: Vec<Value> = redirects
        .iter()
        .map(|(prefix, to)| json!({"match": {"prefix": prefix}, "redirect": to}))
        .collect();
    routes.push(json!({"match": {"prefix": "/"}, "route": {"cluster": "service",
        "regex_rewrite": {"pattern": {"regex": "/v(\\d)"}, "substitution": "/version-\\1"}}}));
    let table = json!({"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]});
    let targets = "/prefix/x?y=1 /prefix/ /strip /strip/x?y /regex/a/b?c=/regex/a/b /regex/a /port?x \
        /both/x /https/x?y /path/x?y /query?z /no-query/x?y /v1/x/v2?v=/v3 /vx";
    let cases = targets.split_whitespace().flat_map(|target| {
        ["a.example", "a.example:80", "a.example:8080", "[::1]:80"].map(|host| {
            let name = format!("redirects {target} {host}");
            case("redirects", &name, format!("GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n"))
        })
    });
    let served = serving(json!({"route_config": table}));
    compare(&[("redirects", served)], &cases.collect::<Vec<_>>(), &[], true);
}

/// A listener that admits only the client address 1.1.1.1.
fn trusting(fields: Value) -> Value {
    let rules = json!({"action": "ALLOW", "policies": {"p": {
        "permissions": [{"any": true}],
        "principals": [{"remote_ip": {"address_prefix": "1.1.1.1", "prefix_len": 32}}]}}});
    let rbac = any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}));
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let filters = json!({"http_filters": [
        {"name": "rbac", "typed_config": rbac}, {"name": "router", "typed_config": router}]});
    serving(with_all(filters, fields))
}

#[test]
fn client_address_skips_as_many_trusted_hops_as_with_envoy() {
    let listeners = [
        ("edge", trusting(json!({"use_remote_address": true, "skip_xff_append": true}))),
        (
            "edge of 1",
            trusting(json!({"use_remote_address": true, "skip_xff_append": true,
            "xff_num_trusted_hops": 1})),
        ),
        (
            "edge of 2",
            trusting(json!({"use_remote_address": true, "skip_xff_append": true,
            "xff_num_trusted_hops": 2})),
        ),
        ("inner", trusting(json!({}))),
        ("inner of 1", trusting(json!({"xff_num_trusted_hops": 1}))),
    ];
    let headers = [
        "x-forwarded-for: 1.1.1.1",
        "x-forwarded-for: 1.1.1.1, 2.2.2.2",
        "x-forwarded-for: 2.2.2.2, 1.1.1.1",
        "x-forwarded-for: 1.1.1.1\r\nx-forwarded-for: 2.2.2.2",
        "x-forwarded-for: 1.1.1.1,2.2.2.2,3.3.3.3",
        "x-forwarded-for: 1.1.1.1, unknown",
        "x-forwarded-for: 1.1.1.1:80",
        "x-forwarded-for: 1.1.1.1,",
        "x-forwarded-for:",
        "x-one: 1",
    ];
    let cases: Vec<Case> = listeners
        .iter()
        .flat_map(|(listener, _)| headers.map(|header| request(listener, "/", header)))
        .collect();
    compare(&listeners, &cases, FORWARDED, true);
}

const FORWARDED: &[Difference] = &[(
    "edge of 2 / x-forwarded-for: 1.1.1.1 + x-forwarded-for: 2.2.2.2 | \
     inner of 1 / x-forwarded-for: 1.1.1.1 + x-forwarded-for: 2.2.2.2",
    "service -x-forwarded-for: 1.1.1.1,2.2.2.2; service +x-forwarded-for: 1.1.1.1; \
     service +x-forwarded-for: 2.2.2.2",
    "two header lines are forwarded as two, with the same meaning (RFC 9110, section 5.2)",
)];
