//! A conversation with the client session, written down.
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

use std::collections::BTreeSet;

use crate::world;
use envoy_types::pb::envoy::config::{
    cluster::v3 as cluster, endpoint::v3 as endpoint, listener::v3 as listener, route::v3 as route,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryResponse, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use weft_model::{MissingReference, Snapshot};
use weft_xds::client::XdsVariant::{self, Delta, StateOfTheWorld};
use weft_xds::client::{ClientSession, ResponseOutcome, XdsNode, XdsRequest};
use weft_xds::server::ResourceSet;
use weft_xds::translate::ResourceKind;

/// Plays what is put in and compares what comes out.
pub(crate) fn check(variant: XdsVariant, script: &str) {
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

pub(crate) fn session(variant: XdsVariant) -> ClientSession {
    let node = XdsNode { id: "me".into(), cluster: "mine".into(), ..XdsNode::default() };
    ClientSession::new(variant, node, BTreeSet::from(["default".into()]))
}

pub(crate) fn respond(session: &mut ClientSession, text: &str) -> ResponseOutcome {
    let mut words = text.split_whitespace();
    let (letter, nonce) = words.next().and_then(|w| w.split_once('#')).expect("letter#nonce");
    let type_url =
        if letter == "x" { "type.googleapis.com/x".into() } else { world::kind(letter).type_url() };
    let mut resources = Vec::new();
    let mut removed = Vec::new();
    let mut version = String::new();
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
        StateOfTheWorld => session.on_state_of_the_world(DiscoveryResponse {
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
fn bad(kind: ResourceKind, name: &str) -> Vec<u8> {
    let name = name.to_owned();
    match kind {
        ResourceKind::Cluster => cluster::Cluster { name, ..Default::default() }.encode_to_vec(),
        ResourceKind::Endpoints => {
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
        ResourceKind::Secret => tls::Secret { name, ..Default::default() }.encode_to_vec(),
        ResourceKind::Listener => listener::Listener { name, ..Default::default() }.encode_to_vec(),
        ResourceKind::Routes => {
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
    for kind in ResourceKind::ALL {
        for (name, published) in set.of(kind) {
            let here = match kind {
                ResourceKind::Routes => snapshot.routes.contains_key(name),
                ResourceKind::Endpoints => snapshot.endpoints.contains_key(name),
                ResourceKind::Cluster | ResourceKind::Secret | ResourceKind::Listener => true,
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
        ResourceKind::Cluster | ResourceKind::Listener => MissingReference::Cluster(name.into()),
        ResourceKind::Endpoints => MissingReference::Endpoints(name.into()),
        ResourceKind::Secret => MissingReference::Secret(name.into()),
        ResourceKind::Routes => MissingReference::Routes(name.into()),
    })
}

fn line_of(request: &XdsRequest) -> String {
    let (type_url, node, nonce, error) = match request {
        XdsRequest::Delta(r) => (&r.type_url, &r.node, &r.response_nonce, &r.error_detail),
        XdsRequest::StateOfTheWorld(r) => {
            (&r.type_url, &r.node, &r.response_nonce, &r.error_detail)
        }
    };
    let mut line =
        format!("> {}", ResourceKind::from_type_url(type_url).map_or("x", world::letter));
    if node.is_some() {
        line += " node";
    }
    match request {
        XdsRequest::Delta(request) => {
            let names = request.resource_names_subscribe.iter().map(|name| format!(" +{name}"));
            line.extend(names);
            let names = request.resource_names_unsubscribe.iter().map(|name| format!(" -{name}"));
            line.extend(names);
            let mut held: Vec<_> = request.initial_resource_versions.iter().collect();
            held.sort();
            line.extend(held.iter().map(|(name, version)| format!(" has:{name}={version}")));
        }
        XdsRequest::StateOfTheWorld(request) => {
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
