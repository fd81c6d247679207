//! Policies: which rule decides, what it matches on, and the order of filters.

use weft_model::{
    AmbiguousPath, Cidr, ForwardedFor, HeaderCheck, HeaderMatch, Name, Permission, Principal,
    RbacPolicy, StringMatch,
};

use super::*;
use crate::http::test_head::{get, request};
use crate::plan::test_pki::TestPki;

/// The decision about a request, with the policy that decides and that of the dry run.
fn judged(setup: &Setup, head: RequestHead) -> String {
    setup.inspect(head, &TokenCache::default(), |decision, _, log| {
        let decision = match decision {
            Ok(_) => "allowed",
            Err(RefusedRequest { denial, .. }) => denial.reason(),
        };
        let by = |policy: Option<&Name>| policy.map_or("no policy", |name| &**name).to_owned();
        let enforced = format!("{decision} by {}", by(log.policy.as_ref()));
        match log.dry_run_denial() {
            None => enforced,
            Some(policy) => format!("{enforced}, dry run denied by {}", by(policy)),
        }
    })
}

/// Rules whose policies match on a path prefix, by the name of the policy.
fn rules(action: RbacAction, paths: &[(&str, &str)]) -> Rbac {
    let policy = |(name, path): &(&str, &str)| {
        let path = Permission::Path(StringMatch::Prefix((*path).into()));
        ((*name).into(), RbacPolicy { permissions: vec![path], principals: vec![Principal::Any] })
    };
    Rbac { action, policies: paths.iter().map(policy).collect() }
}

/// Rules that allow what one policy matches.
fn allow(permission: Permission, principal: Principal) -> HttpFilter {
    let policy = RbacPolicy { permissions: vec![permission], principals: vec![principal] };
    enforced(Rbac { action: RbacAction::Allow, policies: [("allow".into(), policy)].into() })
}

#[test]
fn first_refusing_filter_decides_otherwise_the_last_allowing_one() {
    use RbacAction::{Allow, Deny, Log};
    let setup = |filters: &[Rbac]| {
        Setup::default().http(|http| http.filters = filters.iter().cloned().map(enforced).collect())
    };
    let deny = || rules(Deny, &[("deny-admin", "/admin"), ("deny-tmp", "/tmp")]);
    let allow = || rules(Allow, &[("allow-a", "/a"), ("allow-b", "/b"), ("z-allow-a", "/a")]);
    let log = || rules(Log, &[("log-x", "/x")]);
    let rows = [
        ("no filter", setup(&[]), "/x", "allowed by no policy"),
        ("allowed", setup(&[allow()]), "/b", "allowed by allow-b"),
        ("first of two policies by name", setup(&[allow()]), "/a", "allowed by allow-a"),
        ("not allowed", setup(&[allow()]), "/x", "not_allowed by no policy"),
        ("denied", setup(&[deny()]), "/tmp", "not_allowed by deny-tmp"),
        ("not denied", setup(&[deny()]), "/x", "allowed by no policy"),
        ("denied before allowed", setup(&[deny(), allow()]), "/admin", "not_allowed by deny-admin"),
        ("denied after allowed", setup(&[allow(), deny()]), "/admin", "not_allowed by deny-admin"),
        (
            "not allowed before denied",
            setup(&[allow(), deny()]),
            "/tmp",
            "not_allowed by no policy",
        ),
        ("allowed by both", setup(&[deny(), allow()]), "/b", "allowed by allow-b"),
        ("only logged", setup(&[log()]), "/x", "allowed by log-x"),
        ("logged and not allowed", setup(&[log(), allow()]), "/x", "not_allowed by no policy"),
        ("policy without rules", setup(&[rules(Allow, &[])]), "/x", "not_allowed by no policy"),
    ];
    for (name, setup, path, expected) in rows {
        assert_eq!(judged(&setup, get(path)), expected, "{name}");
    }
}

#[test]
fn dry_run_rules_are_noted_and_refuse_nothing() {
    use RbacAction::{Allow, Deny};
    let filter = |rules: Option<Rbac>, shadow: Rbac| {
        HttpFilter::Rbac(Arc::new(RbacFilter { rules, shadow: Some(shadow) }))
    };
    let deny = rules(Deny, &[("deny-admin", "/admin")]);
    let allow = rules(Allow, &[("allow-b", "/b")]);
    let setup = |rules: Option<&Rbac>, shadow: &Rbac| {
        Setup::default().filter(filter(rules.cloned(), shadow.clone()))
    };
    let rows = [
        (setup(None, &deny), "/admin", "allowed by no policy, dry run denied by deny-admin"),
        (setup(None, &deny), "/b", "allowed by no policy"),
        (setup(None, &allow), "/x", "allowed by no policy, dry run denied by no policy"),
        (setup(Some(&deny), &allow), "/b", "allowed by no policy"),
        (
            setup(Some(&deny), &allow),
            "/admin",
            "not_allowed by deny-admin, dry run denied by no policy",
        ),
        (
            setup(Some(&allow), &deny),
            "/admin",
            "not_allowed by no policy, dry run denied by deny-admin",
        ),
    ];
    for (setup, path, expected) in rows {
        assert_eq!(judged(&setup, get(path)), expected, "{path}");
    }
}

#[test]
fn connection_policies_of_the_filter_chain_apply_to_requests_before_other_filters() {
    let denying = |model: Model| {
        let rules = rules(RbacAction::Deny, &[("deny-admin", "/admin")]);
        let filter = RbacFilter { rules: Some(rules), shadow: None };
        model.change_chain(|chain| chain.rules.push(Arc::new(filter)))
    };
    let setup = Setup { change_model: denying, ..Setup::default() }.allowing_nothing();
    assert_eq!(judged(&setup, get("/admin")), "not_allowed by deny-admin");
    assert_eq!(judged(&setup, get("/x")), "not_allowed by no policy");
}

#[test]
fn every_reading_of_an_ambiguous_path_must_be_allowed() {
    let deny = || enforced(rules(RbacAction::Deny, &[("deny-admin", "/admin")]));
    let allow = || enforced(rules(RbacAction::Allow, &[("allow-public", "/public")]));
    for ambiguous in [AmbiguousPath::RouteAsSent, AmbiguousPath::RouteNormalized] {
        let setup =
            |filter| Setup::default().http(|http| http.path.ambiguous = ambiguous).filter(filter);
        for path in
            ["/admin", "/public/../admin", "/public/..%2fadmin", "//admin", "/%61dmin", "/admin;x"]
        {
            let name = format!("{ambiguous:?} {path}");
            assert_eq!(judged(&setup(deny()), get(path)), "not_allowed by deny-admin", "{name}");
            assert_eq!(judged(&setup(allow()), get(path)), "not_allowed by no policy", "{name}");
        }
        for path in ["/public/a", "/public//a", "/public/%61"] {
            let name = format!("{ambiguous:?} {path}");
            assert_eq!(judged(&setup(allow()), get(path)), "allowed by allow-public", "{name}");
        }
    }
}

#[test]
fn policies_match_on_the_client_after_trusted_hops_and_on_the_peer() {
    let range = |text: &str| Cidr::parse(text).expect(text);
    let client = |text: &str| allow(Permission::Any, Principal::ClientAddress(range(text)));
    let peer = |text: &str| allow(Permission::Any, Principal::RemoteAddress(range(text)));
    let setup = |is_edge, trusted_hops, filter| {
        Setup::default().filter(filter).http(|http| {
            http.forwarded.is_edge = is_edge;
            http.forwarded.trusted_hops = trusted_hops;
        })
    };
    let head = || request("GET", "/", &[("x-forwarded-for", "1.1.1.1, 2.2.2.2")]);
    let rows = [
        ("edge", setup(true, 0, client("10.0.0.9")), true),
        ("edge without trusted hops", setup(true, 0, client("2.2.2.2")), false),
        ("edge with a trusted hop", setup(true, 1, client("2.2.2.2")), true),
        ("edge with two trusted hops", setup(true, 2, client("1.1.1.1")), true),
        ("more trusted hops than addresses", setup(true, 3, client("10.0.0.9")), true),
        ("inner hop", setup(false, 0, client("2.2.2.2")), true),
        ("inner hop with a trusted hop", setup(false, 1, client("1.1.1.1")), true),
        ("peer", setup(true, 2, peer("10.0.0.9")), true),
        ("peer is not the client", setup(true, 2, peer("1.1.1.1")), false),
    ];
    for (name, setup, is_allowed) in rows {
        let expected = if is_allowed { "allowed by allow" } else { "not_allowed by no policy" };
        assert_eq!(judged(&setup, head()), expected, "{name}");
    }
    for addresses in [ForwardedFor::Append, ForwardedFor::Remove] {
        let setup = setup(true, 1, client("2.2.2.2"));
        let setup = setup.http(|http| http.forwarded.addresses = addresses);
        assert_eq!(judged(&setup, head()), "allowed by allow", "{addresses:?}");
    }
    let setup = setup(true, 0, client("10.0.0.9"));
    let mapped = Setup { client: "[::ffff:10.0.0.9]:4711".parse().expect("an address"), ..setup };
    assert_eq!(judged(&mapped, head()), "allowed by allow", "IPv4-mapped address");
}

#[test]
fn policies_match_on_the_identity_of_the_verified_peer() {
    let peer = |id: &str| {
        let id = StringMatch::Exact(format!("spiffe://mesh.test/ns/a/sa/{id}"));
        Setup::default().filter(allow(Permission::Any, Principal::Authenticated(Some(id))))
    };
    let verified = |setup: Setup| {
        let peer = TestPki::new().certificate().peer();
        Setup { peer: Some(peer), ..setup }
    };
    assert_eq!(judged(&verified(peer("web")), get("/")), "allowed by allow");
    assert_eq!(judged(&verified(peer("db")), get("/")), "not_allowed by no policy");
    assert_eq!(judged(&peer("web"), get("/")), "not_allowed by no policy");
}

#[test]
fn policies_see_headers_that_the_service_does_not_get_and_no_claims_of_the_client() {
    let has = |name: &str| {
        let header = HeaderMatch {
            check: HeaderCheck::Present,
            ..HeaderMatch::new(name, StringMatch::Exact(String::new()))
        };
        Setup::default().filter(allow(Permission::Header(header), Principal::Any))
    };
    let head = || {
        let lines = [
            ("connection", "x-a"),
            ("x-a", "1"),
            ("x-forwarded-client-cert", "By=x"),
            ("x_forwarded_client_cert", "By=x"),
            ("x-weft-peer", "x"),
            ("x-envoy-internal", "true"),
            ("proxy-authorization", "x"),
        ];
        request("GET", "/", &lines)
    };
    assert_eq!(has("x-a").decide(head()), "forward web GET a.test/");
    for name in [
        "x-forwarded-client-cert",
        "x-weft-peer",
        "x-envoy-internal",
        "proxy-authorization",
        "connection",
    ] {
        assert_eq!(judged(&has(name), head()), "not_allowed by no policy", "{name}");
    }
}

#[test]
fn policies_match_on_the_request_before_the_route_rewrites_it() {
    let setup = Setup::default().with(|setup| {
        let route = &mut setup.table.hosts[0].routes[0];
        route.mutations = on_request(overwrite("x-a", "route"));
    });
    let is = |value: &str| {
        let header = HeaderMatch::new("x-a", StringMatch::Exact(value.into()));
        allow(Permission::Header(header), Principal::Any)
    };
    let setup = setup.filter(is("client"));
    let head = request("GET", "/", &[("x-a", "client")]);
    assert_eq!(setup.decide(head), "forward web GET a.test/ [x-a: route]");
    assert_eq!(judged(&setup, get("/")), "not_allowed by no policy");
}
