//! What the client session asks, acknowledges and keeps: the rules of the xDS protocol
//! (envoyproxy/envoy, `docs/root/api-docs/xds_protocol.rst`) and, for what to keep, Envoy's ways.
//!
//! A script is what is put in and what must come out, one line each:
//!
//! ```text
//! open               a stream begins
//! < c#1 a:1 -b       the server's response: the type's letter and the nonce, resources as in
//!                    `world`, removed names; `v=7` is the version of a state of the world
//! > c node +a        a request: the type's letter, then what it carries
//!                      node      who we are            has:a=1   holds this version (delta)
//!                      +a -a     (un)subscribe (delta) a         name (state of the world)
//!                      v=7       accepted version      @1 !      the nonce answered; refused
//! = c/a:1            these resources are in force now, after a response that changed them
//! ? e/a              whether the server said that it does not exist: the next line has the answer
//! ```
//!
//! `a:bad` is a resource that is refused, `a:junk` no message at all, `a:foreign` one of another
//! type, `a:alive` a heartbeat, which has no body; `~a:1` comes wrapped in a `Resource`. A resource's
//! version is its form. Lines that begin with `//` say why.

mod world;

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::{
    cluster::v3 as cluster, endpoint::v3 as endpoint, listener::v3 as listener, route::v3 as route,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryResponse, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use weft_model::{Missing, Snapshot};
use weft_xds::client::Variant::{self, Delta, StateOfTheWorld};
use weft_xds::client::{ClientSession, Node, Outcome, Request};
use weft_xds::server::ResourceSet;
use weft_xds::translate::Kind;

/// Plays what is put in and compares what comes out.
fn check(variant: Variant, script: &str) {
    let script: Vec<&str> = script
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .collect();
    let mut session = session(variant);
    let mut transcript = Vec::new();
    for line in &script {
        let answers = match line.split_at(1) {
            ("o", _) => session.open().iter().map(line_of).collect(),
            ("<", text) => {
                let outcome = respond(&mut session, text);
                let mut answers: Vec<String> = outcome.requests.iter().map(line_of).collect();
                answers.extend(outcome.changed.then(|| in_force(&session)));
                answers
            }
            ("?", text) => vec![is_absent(&session, text.trim()).to_string()],
            _ => continue,
        };
        transcript.push((*line).to_owned());
        transcript.extend(answers);
    }
    assert_eq!(transcript.join("\n"), script.join("\n"), "left is what happened");
}

fn session(variant: Variant) -> ClientSession {
    let node = Node { id: "me".into(), cluster: "mine".into() };
    ClientSession::new(variant, node, BTreeSet::from(["default".into()]))
}

fn respond(session: &mut ClientSession, text: &str) -> Outcome {
    let mut words = text.split_whitespace();
    let (letter, nonce) = words.next().and_then(|w| w.split_once('#')).expect("letter#nonce");
    let type_url =
        if letter == "x" { "type.googleapis.com/x".into() } else { world::kind(letter).type_url() };
    let (mut resources, mut removed, mut version) = (Vec::new(), Vec::new(), String::new());
    for word in words {
        if let Some(name) = word.strip_prefix('-') {
            removed.push(name.to_owned());
        } else if let Some(text) = word.strip_prefix("v=") {
            version = text.to_owned();
        } else {
            resources.push(match word.strip_prefix('~') {
                Some(inner) => wrapped(&resource(letter, inner)),
                None => resource(letter, word),
            });
        }
    }
    match session.variant() {
        Delta => session.on_delta(DeltaDiscoveryResponse {
            type_url,
            nonce: nonce.into(),
            resources,
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        }),
        StateOfTheWorld => session.on_state(DiscoveryResponse {
            type_url,
            nonce: nonce.into(),
            version_info: version,
            resources: resources.into_iter().filter_map(|r| r.resource).collect(),
            ..DiscoveryResponse::default()
        }),
    }
}

fn resource(letter: &str, word: &str) -> Resource {
    let (name, form) = word.split_once(':').expect("name:form");
    let kind = world::kind(letter);
    let mut type_url = kind.type_url();
    let value = match form {
        "bad" => bad(kind, name),
        "junk" => vec![0xff],
        "alive" => Vec::new(),
        "foreign" => {
            type_url = "type.googleapis.com/google.protobuf.Empty".into();
            Vec::new()
        }
        _ => {
            // What a resource refers to is published with it; a secret has to be put there.
            let trust = "s/t:1 s/u:1";
            let snapshot = world::snapshot(&format!("{trust} {letter}/{word}"));
            let set = ResourceSet::new(snapshot, &["default"]).expect("a closed configuration");
            set.get(kind, name).expect("it was published").bytes.to_vec()
        }
    };
    let version = form.split('>').next().unwrap_or(form).to_owned();
    let body = Some(Any { type_url, value }).filter(|_| form != "alive");
    Resource { name: name.into(), version, resource: body, ..Resource::default() }
}

fn wrapped(inner: &Resource) -> Resource {
    let type_url = "type.googleapis.com/envoy.service.discovery.v3.Resource".into();
    let any = Any { type_url, value: inner.encode_to_vec() };
    Resource { resource: Some(any), ..Resource::default() }
}

/// A message that bears its name and lacks or spoils something else.
fn bad(kind: Kind, name: &str) -> Vec<u8> {
    let name = name.to_owned();
    match kind {
        Kind::Cluster => cluster::Cluster { name, ..Default::default() }.encode_to_vec(),
        Kind::Endpoints => {
            let member = endpoint::LbEndpoint::default();
            let locality =
                endpoint::LocalityLbEndpoints { lb_endpoints: vec![member], ..Default::default() };
            endpoint::ClusterLoadAssignment {
                cluster_name: name,
                endpoints: vec![locality],
                ..Default::default()
            }
            .encode_to_vec()
        }
        Kind::Secret => tls::Secret { name, ..Default::default() }.encode_to_vec(),
        Kind::Listener => listener::Listener { name, ..Default::default() }.encode_to_vec(),
        Kind::Routes => {
            let host = route::VirtualHost::default();
            route::RouteConfiguration { name, virtual_hosts: vec![host], ..Default::default() }
                .encode_to_vec()
        }
    }
}

fn in_force(session: &ClientSession) -> String {
    let mut snapshot = Snapshot::default();
    session.fill(&mut snapshot);
    let set = ResourceSet::new(snapshot.clone(), &["default", "t", "u"]).expect("good resources");
    let mut line = "=".to_owned();
    for kind in Kind::ALL {
        for (name, published) in set.of(kind) {
            let here = match kind {
                Kind::Routes => snapshot.routes.contains_key(name),
                Kind::Endpoints => snapshot.endpoints.contains_key(name),
                Kind::Cluster | Kind::Secret | Kind::Listener => true,
            };
            if here {
                line +=
                    &format!(" {}/{}", world::letter(kind), world::shown(kind, &published.bytes));
            }
        }
    }
    line
}

fn is_absent(session: &ClientSession, what: &str) -> bool {
    let (letter, name) = what.split_once('/').expect("letter/name");
    session.is_absent(&match world::kind(letter) {
        Kind::Cluster | Kind::Listener => Missing::Cluster(name.into()),
        Kind::Endpoints => Missing::Endpoints(name.into()),
        Kind::Secret => Missing::Secret(name.into()),
        Kind::Routes => Missing::Routes(name.into()),
    })
}

fn line_of(request: &Request) -> String {
    let (type_url, node, nonce, error) = match request {
        Request::Delta(r) => (&r.type_url, &r.node, &r.response_nonce, &r.error_detail),
        Request::StateOfTheWorld(r) => (&r.type_url, &r.node, &r.response_nonce, &r.error_detail),
    };
    let mut line = format!("> {}", Kind::from_type_url(type_url).map_or("x", world::letter));
    if node.is_some() {
        line += " node";
    }
    match request {
        Request::Delta(request) => {
            let names = request.resource_names_subscribe.iter().map(|name| format!(" +{name}"));
            line.extend(names);
            let names = request.resource_names_unsubscribe.iter().map(|name| format!(" -{name}"));
            line.extend(names);
            let mut held: Vec<_> = request.initial_resource_versions.iter().collect();
            held.sort();
            line.extend(held.iter().map(|(name, version)| format!(" has:{name}={version}")));
        }
        Request::StateOfTheWorld(request) => {
            if !request.version_info.is_empty() {
                line += &format!(" v={}", request.version_info);
            }
            line.extend(request.resource_names.iter().map(|name| format!(" {name}")));
        }
    }
    if !nonce.is_empty() {
        line += &format!(" @{nonce}");
    }
    if error.is_some() {
        line += " !";
    }
    line
}

// --- Asking -------------------------------------------------------------------------------------

#[test]
fn delta_clusters_and_listeners_are_asked_for_and_then_what_they_refer_to() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>e/x,s/t b:1
         > c @1
         > e +x
         > s +t
         = c/a:1 c/b:1
         < l#2 l:1>r/r,r/q
         > l @2
         > r +q +r
         = c/a:1 c/b:1 l/l:1
         < e#3 x:1
         > e @3
         = c/a:1 c/b:1 e/x:1 l/l:1",
    );
}

#[test]
fn state_clusters_and_listeners_are_asked_for_and_then_what_they_refer_to() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=7 a:1>e/x,s/t
         > c v=7 @1
         > e x
         > s t
         = c/a:1
         < l#2 v=1 l:1>r/r
         > l v=1 @2
         > r r
         = c/a:1 l/l:1
         < e#3 v=5 x:1
         > e v=5 x @3
         = c/a:1 e/x:1 l/l:1",
    );
}

#[test]
fn what_nothing_refers_to_is_no_longer_asked_for() {
    check(
        Delta,
        "open
         > c node
         > l
         < l#1 l:1>r/a,r/b
         > l @1
         > r +a +b
         = l/l:1
         < r#2 a:1 b:1
         > r @2
         = l/l:1 r/a:1 r/b:1
         < l#3 l:2>r/b,r/d
         > l @3
         > r +d -a
         = l/l:2 r/b:1",
    );
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < l#1 v=1 l:1>r/a,r/b
         > l v=1 @1
         > r a b
         = l/l:1
         < r#2 v=1 a:1 b:1
         > r v=1 a b @2
         = l/l:1 r/a:1 r/b:1
         < l#3 v=2
         > l v=2 @3
         > r v=1 @2
         =",
    );
}

#[test]
fn the_workloads_own_identity_is_not_asked_for() {
    // Every cluster of these tests that speaks TLS also names the secret `default`.
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>s/t
         > c @1
         > s +t
         = c/a:1
         < s#2 t:1 default:1
         > s @2
         = c/a:1 s/t:1",
    );
}

#[test]
fn delta_a_new_stream_reports_what_was_accepted_and_nothing_else() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>e/x b:1 d:bad
         > c @1 !
         > e +x
         = c/a:1 c/b:1
         < c#2 b:bad
         > c @2 !
         < e#3 x:1
         > e @3
         = c/a:1 c/b:1 e/x:1
         open
         > c node has:a=1 has:b=1
         > e +x has:x=1
         > l",
    );
}

#[test]
fn state_a_new_stream_reports_the_version_and_no_nonce() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=7 a:1>e/x
         > c v=7 @1
         > e x
         = c/a:1
         open
         > c node v=7
         > e x
         > l",
    );
}

// --- Accepting ----------------------------------------------------------------------------------

#[test]
fn delta_the_good_ones_of_a_refused_response_are_used_and_the_last_good_are_kept() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1 b:1
         > c @1
         = c/a:1 c/b:1
         < c#2 a:bad b:2
         > c @2 !
         = c/a:1 c/b:2
         < c#3 a:junk
         > c @3 !
         < c#4 a:3
         > c @4
         = c/a:3 c/b:2",
    );
}

#[test]
fn state_the_good_ones_of_a_refused_response_are_used_and_the_last_good_are_kept() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=1 a:1 b:1
         > c v=1 @1
         = c/a:1 c/b:1
         // The version is that of the last response accepted whole.
         < c#2 v=2 a:bad b:2
         > c v=1 @2 !
         = c/a:1 c/b:2
         < c#3 v=3 a:3
         > c v=3 @3
         = c/a:3",
    );
}

#[test]
fn state_a_resource_without_a_readable_name_deletes_nothing() {
    // It may be any of those that seem to be absent.
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=1 a:1 b:1
         > c v=1 @1
         = c/a:1 c/b:1
         < c#2 v=2 a:2 b:junk
         > c v=1 @2 !
         = c/a:2 c/b:1
         < c#3 v=3 b:foreign
         > c v=1 @3 !
         < c#4 v=4 b:2
         > c v=4 @4
         = c/b:2",
    );
}

#[test]
fn a_response_that_holds_a_name_twice_is_refused() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1 a:2
         > c @1 !
         = c/a:1",
    );
}

#[test]
fn a_refusal_names_the_resource_and_the_place() {
    let mut session = session(Delta);
    session.open();
    let outcome = respond(&mut session, "l#1 good:1 evil:bad");
    let Some(Request::Delta(request)) = outcome.requests.first() else {
        panic!("a delta request: {outcome:?}")
    };
    let status = request.error_detail.as_ref().expect("a refusal");
    assert_eq!(
        (status.code, status.message.as_str()),
        (3, "Listener \"evil\": address: it is missing")
    );
    assert_eq!(outcome.rejections.len(), 1);
}

#[test]
fn what_nobody_asked_for_is_ignored() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>e/x
         > c @1
         > e +x
         = c/a:1
         < e#2 x:1 stranger:1
         > e @2
         = c/a:1 e/x:1
         < e#3 stranger:2
         > e @3",
    );
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < r#1 v=1 stranger:1
         > r v=1 @1",
    );
}

#[test]
fn a_type_that_nobody_asked_for_is_refused_once() {
    check(
        Delta,
        "open
         > c node
         > l
         < x#1
         > x @1 !",
    );
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < x#1 v=3
         > x v=3 @1 !",
    );
}

#[test]
fn what_is_the_same_changes_nothing() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1
         > c @1
         = c/a:1
         < c#2 a:1
         > c @2
         < c#3
         > c @3",
    );
}

#[test]
fn delta_a_heartbeat_is_acknowledged_and_changes_nothing() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1
         > c @1
         = c/a:1
         < c#2 a:alive
         > c @2",
    );
}

#[test]
fn state_a_wrapped_resource_is_unwrapped() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=1 ~a:1 b:1
         > c v=1 @1
         = c/a:1 c/b:1",
    );
}

// --- Removing -----------------------------------------------------------------------------------

#[test]
fn delta_removed_clusters_and_listeners_go() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1 b:1
         > c @1
         = c/a:1 c/b:1
         < l#2 l:1
         > l @2
         = c/a:1 c/b:1 l/l:1
         < c#3 -a
         > c @3
         = c/b:1 l/l:1
         < l#4 -l
         > l @4
         = c/b:1
         ? c/a
         true",
    );
}

#[test]
fn state_clusters_and_listeners_that_are_absent_go() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=1 a:1>e/x b:1
         > c v=1 @1
         > e x
         = c/a:1 c/b:1
         < e#2 v=1 x:1
         > e v=1 x @2
         = c/a:1 c/b:1 e/x:1
         < c#3 v=2 b:1
         > c v=2 @3
         > e v=1 @2
         = c/b:1
         < c#4 v=3
         > c v=3 @4
         =",
    );
}

#[test]
fn delta_the_removal_of_what_is_in_use_is_not_obeyed() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>e/x,s/t
         > c @1
         > e +x
         > s +t
         = c/a:1
         < e#2 x:1
         > e @2
         = c/a:1 e/x:1
         < s#3 t:1
         > s @3
         = c/a:1 e/x:1 s/t:1
         < l#4 l:1>r/r
         > l @4
         > r +r
         = c/a:1 e/x:1 s/t:1 l/l:1
         < r#5 r:1
         > r @5
         = c/a:1 e/x:1 s/t:1 l/l:1 r/r:1
         < e#6 -x
         > e @6
         < s#7 -t
         > s @7
         < r#8 -r
         > r @8
         // It takes a cluster without them to let them go.
         < c#9 a:2
         > c @9
         > e -x
         > s -t
         = c/a:2 l/l:1 r/r:1",
    );
}

#[test]
fn state_absence_means_nothing_for_endpoints_secrets_and_routes() {
    check(
        StateOfTheWorld,
        "open
         > c node
         > l
         < c#1 v=1 a:1>e/x b:1>e/y
         > c v=1 @1
         > e x y
         = c/a:1 c/b:1
         < e#2 v=1 x:1 y:1
         > e v=1 x y @2
         = c/a:1 c/b:1 e/x:1 e/y:1
         < e#3 v=2 x:2
         > e v=2 x y @3
         = c/a:1 c/b:1 e/x:2 e/y:1
         < e#4 v=3
         > e v=3 x y @4",
    );
}

#[test]
fn what_the_server_says_does_not_exist_is_known_until_it_comes() {
    check(
        Delta,
        "open
         > c node
         > l
         < c#1 a:1>e/x
         > c @1
         > e +x
         = c/a:1
         ? e/x
         false
         < e#2 -x -stranger
         > e @2
         = c/a:1
         ? e/x
         true
         ? e/stranger
         false
         < e#3 x:1
         > e @3
         = c/a:1 e/x:1
         ? e/x
         false",
    );
}
