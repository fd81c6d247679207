//! A conversation with the server session, written down.
//!
//! A script is what is put in and what must come out, one line each:
//!
//! ```text
//! = c/a:1 c/b:1      these resources are in force from now on (see `world`)
//! > c +a -b @1 !     the client's request: the type's letter, then in any order
//!                      +a    subscribe (delta)       a    name (state of the world)
//!                      -a    unsubscribe (delta)     @1   the nonce it answers
//!                      has:a:1   holds this (delta)  !    it refuses
//! < c#1 a:1 -b       the server's response: letter and nonce, resources, removed names
//! ```
//!
//! `x` is the letter of a type that nobody publishes. Lines that begin with `//` say why.

use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc::Status;
use weft_xds::client::XdsVariant;
use weft_xds::server::{ResourceSet, ServerSession, XdsResponse};
use weft_xds::translate::ResourceKind;

use crate::world;

/// Plays what is put in and compares what comes out.
pub(crate) fn check(variant: XdsVariant, script: &str) {
    let script: Vec<&str> = script
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .collect();
    let mut session = ServerSession::new(variant);
    let mut set = Arc::new(ResourceSet::default());
    let mut transcript = Vec::new();
    for line in &script {
        let responses = match line.split_at(1) {
            ("<", _) => continue,
            ("=", text) => {
                set = Arc::new(publish(text));
                Ok(session.flush(&set))
            }
            (_, text) => match variant {
                XdsVariant::Delta => session.on_delta(delta(text), &set),
                XdsVariant::StateOfTheWorld => session.on_state_of_the_world(state(text), &set),
            },
        };
        transcript.push((*line).to_owned());
        transcript.extend(responses.expect("within the limit").iter().map(line_of));
    }
    assert_eq!(transcript.join("\n"), script.join("\n"), "left is what happened");
}

fn publish(text: &str) -> ResourceSet {
    ResourceSet::new(world::snapshot(text), &["default"]).expect("a closed configuration")
}

fn type_url(letter: &str) -> String {
    if letter == "x" { "type.googleapis.com/x".into() } else { world::kind(letter).type_url() }
}

fn refusal() -> Status {
    Status { code: 3, message: "refused".into(), details: Vec::new() }
}

fn delta(text: &str) -> DeltaDiscoveryRequest {
    let mut words = text.split_whitespace();
    let letter = words.next().expect("the letter of a type");
    let mut request =
        DeltaDiscoveryRequest { type_url: type_url(letter), ..DeltaDiscoveryRequest::default() };
    for word in words {
        if let Some(held) = word.strip_prefix("has:") {
            let set = publish(&format!("{letter}/{held}"));
            let (name, held) = set.of(world::kind(letter)).next().expect("one resource");
            request.initial_resource_versions.insert(name.to_string(), held.version.to_string());
            continue;
        }
        match word.split_at(1) {
            ("+", name) => request.resource_names_subscribe.push(name.into()),
            ("-", name) => request.resource_names_unsubscribe.push(name.into()),
            ("@", nonce) => request.response_nonce = nonce.into(),
            _ => request.error_detail = Some(refusal()),
        }
    }
    request
}

fn state(text: &str) -> DiscoveryRequest {
    let mut words = text.split_whitespace();
    let letter = words.next().expect("the letter of a type");
    let mut request =
        DiscoveryRequest { type_url: type_url(letter), ..DiscoveryRequest::default() };
    for word in words {
        match word.split_at(1) {
            ("@", nonce) => request.response_nonce = nonce.into(),
            ("!", _) => request.error_detail = Some(refusal()),
            _ => request.resource_names.push(word.into()),
        }
    }
    request
}

fn line_of(response: &XdsResponse) -> String {
    let (type_url, nonce, resources, removed) = match response {
        XdsResponse::Delta(response) => {
            let bodies: Vec<_> =
                response.resources.iter().filter_map(|r| r.resource.clone()).collect();
            (&response.type_url, &response.nonce, bodies, response.removed_resources.clone())
        }
        XdsResponse::StateOfTheWorld(response) => {
            (&response.type_url, &response.nonce, response.resources.clone(), Vec::new())
        }
    };
    let kind = ResourceKind::from_type_url(type_url);
    let mut line = format!("< {}#{nonce}", kind.map_or("x", world::letter));
    for any in resources {
        let kind = ResourceKind::from_type_url(&any.type_url).expect("a known type");
        line += &format!(" {}", world::shown(kind, &any.value));
    }
    for name in removed {
        line += &format!(" -{name}");
    }
    line
}
