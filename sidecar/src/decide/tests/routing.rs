//! Routes: clusters by weight, redirects, fixed responses, rewrites, header changes and timeouts.

use std::collections::BTreeMap;
use std::time::Duration;

use weft_model::{
    ChainMatch, Filter, FlowKey, HeaderMatch, HeaderMutation, HeadersWithUnderscores, PathRewrite,
    Pattern, Redirect, RequestFacts, Route, RouteAction, StreamIdle, StringMatch, Substitution,
    TcpProxy, WeightedCluster,
};

use super::*;
use crate::authorize::AuthorizationInputs;
use crate::http::head::Upgrade;
use crate::http::test_head::{get, http2_request, request};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn request_without_listener_or_route_is_refused() {
    let model = |change_model: fn(Model) -> Model| Setup { change_model, ..Setup::default() };
    let tcp = |model: Model| {
        let clusters = Vec::new();
        let access_log = AccessLogSinks::Off;
        let flow_key = FlowKey::FiveTuple;
        let tcp = TcpProxy { clusters, idle_timeout: None, flow_key, access_log };
        model.change_chain(|chain| chain.filter = Filter::Tcp(tcp))
    };
    let other_port = |model: Model| {
        let matches = ChainMatch { destination_port: Some(81), ..ChainMatch::default() };
        model.change_chain(|chain| chain.matches = matches)
    };
    let other_domain = Setup::default().with(|setup| {
        setup.table.hosts = vec![host("b.test", vec![route(prefix("/"), respond(""))])];
    });
    let routes = |routes| Setup::default().routes(routes);
    let no_endpoint = "refuse 503 no_endpoint";
    let no_route = "refuse 404 no_route";
    check([
        ("listener", Setup::default(), get("/x"), "forward web GET a.test/x"),
        ("no listener", model(|model| model.without("in")), get("/x"), no_endpoint),
        ("listener for TCP", model(tcp), get("/x"), no_endpoint),
        ("filter chain for another port", model(other_port), get("/x"), no_endpoint),
        ("no route table", model(|model| model.without("routes")), get("/x"), no_route),
        ("virtual host for another domain", other_domain, get("/x"), no_route),
        (
            "route for another path",
            routes(vec![route(prefix("/b"), respond(""))]),
            get("/a"),
            no_route,
        ),
        ("no routes", routes(Vec::new()), get("/x"), no_route),
        ("no clusters", routes(vec![route(prefix("/"), forward(&[]))]), get("/x"), no_route),
    ]);
}

#[test]
fn first_matching_route_of_the_host_is_used() {
    let by_header = {
        let mut by_header = route(prefix("/"), forward(&[("header", 1)]));
        let condition = HeaderMatch::new("x-route", StringMatch::Exact("yes".into()));
        by_header.matches.headers.push(condition);
        by_header
    };
    let routes = vec![
        route(PathMatch::Exact("/exact".into()), forward(&[("exact", 1)])),
        by_header,
        route(prefix("/p"), forward(&[("prefix", 1)])),
        route(prefix("/"), forward(&[("any", 1)])),
    ];
    let setup = Setup::default().with(|setup| {
        let other = vec![route(prefix("/"), forward(&[("host", 1)]))];
        setup.table.hosts = vec![host("*", routes), host("b.test", other)];
    });
    let check = |head: RequestHead, cluster: &str| {
        let name = format!("{head:?}");
        assert_eq!(
            &*setup.forwarded(head, |request, _| request.cluster.clone()),
            cluster,
            "{name}"
        );
    };
    check(get("/exact?q"), "exact");
    check(get("/exact/"), "any");
    check(get("/path"), "prefix");
    check(request("GET", "/path", &[("X-Route", "yes")]), "header");
    check(http2_request("GET", "/path", &[("x-route", "no")]), "prefix");
    check(RequestHead { authority: "B.test".into(), ..get("/exact") }, "host");
}

/// Forwards to three clusters, of which the second has the weight 0.
fn weighted() -> RouteAction {
    forward(&[("a", 1), ("none", 0), ("b", 3)])
}

#[test]
fn cluster_is_chosen_by_weight_and_random_number() {
    let setup = |random| {
        let setup = Setup { random, ..Setup::default() };
        setup.routes(vec![route(prefix("/"), weighted())])
    };
    let a = "forward a GET a.test/";
    let b = "forward b GET a.test/";
    check([
        ("smallest number", setup(0), get("/"), a),
        ("last number of the first quarter", setup((1 << 30) - 1), get("/"), a),
        ("first number of the second quarter", setup(1 << 30), get("/"), b),
        ("largest number", setup(u32::MAX), get("/"), b),
    ]);
    let mut draws = BTreeMap::<String, u32>::new();
    for number in 0..256 {
        *draws.entry(setup(number << 24).decide(get("/"))).or_default() += 1;
    }
    assert_eq!(draws, BTreeMap::from([(a.to_owned(), 64), (b.to_owned(), 192)]));
}

fn redirect(change: impl FnOnce(&mut Redirect)) -> RouteAction {
    let mut redirect = Redirect {
        status: 301,
        scheme: None,
        host: None,
        port: None,
        path: None,
        path_rewrite: None,
        strip_query: false,
    };
    change(&mut redirect);
    RouteAction::Redirect(redirect)
}

#[test]
fn redirects_and_fixed_responses_are_answered_without_an_endpoint() {
    let to = |action| Setup::default().routes(vec![route(prefix("/a"), action)]);
    let tls = |action| Setup { is_tls: true, ..to(action) };
    let https = || redirect(|to| to.scheme = Some("https".into()));
    let rewrite = || redirect(|to| to.path_rewrite = Some(PathRewrite::Prefix("/new".into())));
    check([
        ("scheme", to(https()), get("/a?q=1"), "answer 301 https://a.test/a?q=1"),
        (
            "scheme of the connection",
            tls(redirect(|_| ())),
            get("/a"),
            "answer 301 https://a.test/a",
        ),
        (
            "host and status",
            to(redirect(|to| {
                to.host = Some("b.test".into());
                to.status = 308;
            })),
            get("/a/b"),
            "answer 308 http://b.test/a/b",
        ),
        ("prefix", to(rewrite()), get("/a/b?q"), "answer 301 http://a.test/new/b?q"),
        (
            "no query",
            to(redirect(|to| to.strip_query = true)),
            get("/a?q"),
            "answer 301 http://a.test/a",
        ),
        ("fixed response", to(respond("hello")), get("/a"), "answer 200 \"hello\""),
        (
            "status without a body",
            to(RouteAction::Respond { status: 204, body: String::new() }),
            request("POST", "/a", &[]),
            "answer 204",
        ),
    ]);
}

#[test]
fn header_changes_of_the_route_apply_to_every_answer() {
    let changed = |action| {
        let mut changed = route(prefix("/"), action);
        changed.mutations = on_response(overwrite("x-via", "%ROUTE_NAME% %REQ(:path)%"));
        Setup::default().routes(vec![changed])
    };
    let strict =
        |setup: Setup| setup.http(|http| http.underscores = HeadersWithUnderscores::Reject);
    let response = "response [x-via: route /x]";
    let expect = |decision: &str| format!("{decision} {response}");
    let check = |setup: Setup, decision: String| assert_eq!(setup.decide(get("/x")), decision);
    check(changed(forward(&[("web", 1)])), expect("forward web GET a.test/x"));
    check(changed(redirect(|_| ())), expect("answer 301 http://a.test/x"));
    check(changed(respond("hello")), expect("answer 200 \"hello\""));
    let denied = "refuse 403 not_allowed";
    check(changed(forward(&[("web", 1)])).allowing_nothing(), expect(denied));
    check(changed(respond("hello")).allowing_nothing(), expect(denied));
    let unrouted = changed(respond("")).with(|setup| setup.table.hosts.clear());
    check(unrouted.allowing_nothing(), denied.to_owned());
    let setup = strict(changed(respond("")));
    let malformed = "refuse 400 malformed: a header name contains an underscore";
    assert_eq!(setup.decide(request("GET", "/x", &[("x_a", "1")])), malformed);
}

#[test]
fn refused_request_gets_the_response_headers_of_the_drawn_cluster() {
    let setup = |random| {
        let cluster = |name: &str| WeightedCluster {
            mutations: on_response(overwrite("x-cluster", name)),
            ..WeightedCluster::new(name.into(), 1)
        };
        let setup = one_route(|route| {
            change_forward(route, |action| *action.clusters = vec![cluster("a"), cluster("b")]);
        });
        Setup { random, ..setup }
    };
    for (random, cluster) in [(0, "a"), (u32::MAX, "b")] {
        let response = format!("response [x-cluster: {cluster}]");
        let forwarded = format!("forward {cluster} GET a.test/ {response}");
        assert_eq!(setup(random).decide(get("/")), forwarded);
        let refused = format!("refuse 403 not_allowed {response}");
        assert_eq!(setup(random).allowing_nothing().decide(get("/")), refused);
    }
}

/// A setup with one route, which is changed.
fn one_route(change: impl FnOnce(&mut Route)) -> Setup {
    Setup::default().with(|setup| change(&mut setup.table.hosts[0].routes[0]))
}

#[test]
fn request_headers_are_removed_and_set_by_the_route() {
    let removing = HeaderMutation { remove: vec!["x-a".into()], add: Vec::new() };
    let setup = |change: HeaderMutation| one_route(|route| route.mutations = on_request(change));
    let client = || overwrite("x-client", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%");
    let a = || request("GET", "/", &[("x-a", "1"), ("x_a", "2"), ("x-b", "3")]);
    let named = request("GET", "/", &[("connection", "x-a"), ("x-a", "1"), ("x-b", "2")]);
    let forwarded = request("GET", "/", &[("x-forwarded-for", "1.1.1.1")]);
    let cluster = overwrite("x-a", "%UPSTREAM_CLUSTER%");
    check([
        ("removed", setup(removing), a(), "forward web GET a.test/ [x-b: 3]"),
        ("overwritten", setup(cluster), a(), "forward web GET a.test/ [x-a: web, x-b: 3]"),
        ("peer", setup(client()), get("/"), "forward web GET a.test/ [x-client: 10.0.0.9]"),
        (
            "client that the trusted hop reports",
            setup(client()),
            forwarded,
            "forward web GET a.test/ [x-client: 1.1.1.1, x-forwarded-for: 1.1.1.1]",
        ),
        ("named by connection", Setup::default(), named, "forward web GET a.test/ [x-b: 2]"),
    ]);
}

#[test]
fn header_changes_apply_from_cluster_to_table_unless_the_most_specific_wins() {
    let level = |name: &str| {
        let mut mutation = overwrite("x-level", name);
        mutation.add[0].action = AppendAction::Append;
        on_request(mutation)
    };
    let levels = |most_specific_wins| {
        let setup = one_route(|route| {
            let web = WeightedCluster::new("web".into(), 1);
            let web = WeightedCluster { mutations: level("cluster"), ..web };
            route.mutations = level("route");
            change_forward(route, |action| *action.clusters = vec![web]);
        });
        let setup = setup.with(|setup| {
            setup.table.mutations = level("table");
            setup.table.hosts[0].mutations = level("host");
            setup.table.most_specific_mutations_win = most_specific_wins;
        });
        setup.forwarded(get("/"), |_, head| {
            let mut values = Vec::new();
            head.headers.each("x-level", |value| values.push(value.to_vec()));
            String::from_utf8(values.join(&b' ')).expect("a text")
        })
    };
    assert_eq!(levels(false), "cluster route host table");
    assert_eq!(levels(true), "cluster table host route");
}

/// The settings of a route that forwards.
struct ForwardSettings<'r> {
    clusters: &'r mut Vec<WeightedCluster>,
    path_rewrite: &'r mut Option<PathRewrite>,
    host_rewrite: &'r mut Option<String>,
    timeout: &'r mut Option<Duration>,
    ends_tunnels: &'r mut bool,
}

fn change_forward(route: &mut Route, change: impl FnOnce(ForwardSettings<'_>)) {
    match &mut route.action {
        RouteAction::Forward { clusters, path_rewrite, host_rewrite, timeout, ends_tunnels } => {
            change(ForwardSettings { clusters, path_rewrite, host_rewrite, timeout, ends_tunnels });
        }
        other => panic!("the route does not forward: {other:?}"),
    }
}

#[test]
fn path_and_host_are_rewritten() {
    let setup = |path: &str, rewrite: PathRewrite| {
        one_route(|route| {
            route.matches.path = prefix(path);
            change_forward(route, |action| *action.path_rewrite = Some(rewrite));
        })
    };
    let regex = {
        let pattern = Pattern::parse("^/v1/(.*)$").expect("an expression");
        let substitution = Substitution::parse(pattern, r"/\1/v2").expect("a substitution");
        PathRewrite::Regex(substitution.into())
    };
    let host = one_route(|route| {
        change_forward(route, |action| *action.host_rewrite = Some("b.test".into()));
    });
    let new = || PathRewrite::Prefix("/new".into());
    check([
        ("prefix", setup("/v1", new()), get("/v1/a?q"), "forward web GET a.test/new/a?q"),
        ("expression", setup("/", regex), get("/v1/a?q"), "forward web GET a.test/a/v2?q"),
        ("escaped", setup("/v1", new()), get("/v1/%61"), "forward web GET a.test/new/%61"),
        ("host", host, get("/v1"), "forward web GET b.test/v1"),
    ]);
}

/// The target, authority and `x-a` that authorization is repeated with, and which of them are copies.
fn inputs(setup: &Setup, head: RequestHead) -> (String, [bool; 3]) {
    let connection = setup.connection();
    setup.forwarded(head, |request, head| {
        let AuthorizationInputs { target, authority, headers, .. } = &request.inputs;
        let copies = [target.is_some(), authority.is_some(), headers.is_some()];
        let facts = request.inputs.facts(head, connection.client_info(setup.client.ip()));
        let mut values = Vec::new();
        facts.has_header("x-a", &mut |value| {
            values.push(String::from_utf8_lossy(value).into_owned());
            false
        });
        let target = format!("{}{}", facts.authority(), facts.target);
        (format!("{target} {}", values.join(",")), copies)
    })
}

#[test]
fn authorization_is_repeated_with_the_original_of_what_was_rewritten() {
    let removing = || HeaderMutation { remove: vec!["x-a".into()], add: Vec::new() };
    let setup = |change: fn(ForwardSettings<'_>)| one_route(|route| change_forward(route, change));
    let path = || setup(|action| *action.path_rewrite = Some(PathRewrite::Prefix("/new/".into())));
    let host = setup(|action| *action.host_rewrite = Some("b.test".into()));
    let headers = one_route(|route| route.mutations = on_request(removing()));
    let all = path().with(|setup| setup.table.mutations = on_request(removing()));
    let head = |lines| request("GET", "/x?q", lines);
    let a = [("x-a", "1")];
    let named = [("connection", "x-a"), ("x-a", "1")];
    let announced = [("trailer", "x-b"), ("x-a", "1")];
    let rows = [
        ("nothing", Setup::default(), head(&a), [false, false, false]),
        ("path", path(), head(&a), [true, false, false]),
        ("host", host, head(&a), [false, true, false]),
        ("header of the route", headers, head(&a), [false, false, true]),
        ("path and header", all, head(&a), [true, false, true]),
        ("header named by connection", Setup::default(), head(&named), [false, false, true]),
        ("announced trailer", Setup::default(), head(&announced), [false, false, true]),
    ];
    for (name, setup, head, copies) in rows {
        assert_eq!(inputs(&setup, head), ("a.test/x?q 1".to_owned(), copies), "{name}");
    }
}

#[test]
fn original_headers_are_those_before_the_first_of_several_changes() {
    let setup = one_route(|route| {
        route.mutations = on_request(overwrite("x-a", "route"));
    });
    let head = request("GET", "/", &[("connection", "x-a"), ("x-a", "1"), ("trailer", "x-b")]);
    assert_eq!(inputs(&setup, head), ("a.test/ 1".to_owned(), [false, false, true]));
}

#[test]
fn timeouts_come_from_route_and_listener() {
    let timeouts = |setup: &Setup, content_type: &str| {
        let head = request("POST", "/", &[("content-type", content_type)]);
        setup.forwarded(head, |request, _| {
            let timeouts = request.timeouts;
            assert_eq!(timeouts.until, None);
            let seconds = |limit: Option<Duration>| limit.map(|limit| limit.as_secs());
            let limits = [timeouts.response, timeouts.request, timeouts.idle];
            (limits.map(seconds), timeouts.stall.as_secs())
        })
    };
    let default = Setup::default();
    assert_eq!(timeouts(&default, "text/plain"), ([Some(15), None, Some(300)], 300));
    // A stream of gRPC may wait for events.
    assert_eq!(timeouts(&default, "application/grpc+proto"), ([Some(15), None, None], 300));
    assert_eq!(timeouts(&default, "application/grpc-web"), ([Some(15), None, Some(300)], 300));
    let set = one_route(|route| change_forward(route, |action| *action.timeout = None));
    let set = set.http(|http| {
        http.timeouts.request = Some(SECOND * 2);
        http.timeouts.stream_idle = StreamIdle::Set(Some(SECOND * 3));
        http.timeouts.stall = Some(SECOND * 4);
    });
    for content_type in ["text/plain", "application/grpc"] {
        assert_eq!(timeouts(&set, content_type), ([None, Some(2), Some(3)], 4), "{content_type}");
    }
}

#[test]
fn tunnel_ends_at_the_sidecar_only_where_the_route_says_so() {
    let ends = |ends_tunnels, head: RequestHead| {
        let setup = one_route(|route| {
            route.matches.path = PathMatch::Connect;
            change_forward(route, |action| *action.ends_tunnels = ends_tunnels);
        });
        let setup = setup.http(|http| http.upgrades.connect = true);
        setup.forwarded(head, |request, _| request.ends_tunnel)
    };
    let connect = || RequestHead { upgrade: Some(Upgrade::Tunnel), ..request("CONNECT", "", &[]) };
    assert!(ends(true, connect()));
    assert!(!ends(false, connect()));
    let plain = one_route(|route| change_forward(route, |action| *action.ends_tunnels = true));
    assert!(!plain.forwarded(get("/"), |request, _| request.ends_tunnel));
}
