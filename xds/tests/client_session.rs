//! What the client session asks, acknowledges and keeps: the rules of the xDS protocol
//! (envoyproxy/envoy, `docs/root/api-docs/xds_protocol.rst`) and, for what to keep, Envoy's ways.

mod client_script;
mod world;

use client_script::{check, respond, session};
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use prost::Message as _;
use weft_model::MissingReference;
use weft_xds::client::XdsVariant::{Delta, StateOfTheWorld};
use weft_xds::client::{ClientSession, XdsRequest};
use weft_xds::translate::{Notes, ResourceKind};

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
fn unreferenced_resource_is_unsubscribed() {
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
fn delta_a_long_list_of_names_is_split_and_only_its_first_request_has_versions() {
    const NAMES: usize = 200;
    let long = "x".repeat(20_000);
    let names: Vec<String> = (0..NAMES).map(|number| format!("{number:03}{long}")).collect();
    let endpoints_of = |requests: Vec<XdsRequest>| -> Vec<DeltaDiscoveryRequest> {
        let delta = requests.into_iter().map(|request| match request {
            XdsRequest::Delta(request) => *request,
            XdsRequest::StateOfTheWorld(_) => panic!("delta is spoken"),
        });
        let is_asked = |request: &DeltaDiscoveryRequest| {
            request.type_url.ends_with("ClusterLoadAssignment") && request.response_nonce.is_empty()
        };
        delta.filter(is_asked).collect()
    };
    let check = |requests: &[DeltaDiscoveryRequest]| {
        let sizes: Vec<usize> = requests.iter().map(|request| request.encoded_len()).collect();
        assert!(sizes.iter().all(|size| *size < 3 << 20), "{sizes:?}");
        let asked = requests.iter().flat_map(|request| &request.resource_names_subscribe);
        assert!(asked.eq(&names));
    };
    let mut session = session(Delta);
    session.open();
    let clusters: Vec<String> =
        names.iter().enumerate().map(|(number, name)| format!("{number}:1>e/{name}")).collect();
    let asked = respond(&mut session, &format!("c#1 {}", clusters.join(" "))).requests;
    let asked = endpoints_of(asked);
    assert_eq!(asked.len(), 2);
    check(&asked);
    let endpoints: Vec<String> = names.iter().map(|name| format!("{name}:1")).collect();
    respond(&mut session, &format!("e#2 {}", endpoints.join(" ")));
    let asked = endpoints_of(session.open());
    check(&asked);
    let versions: Vec<usize> =
        asked.iter().map(|request| request.initial_resource_versions.len()).collect();
    let [first, rest @ ..] = versions.as_slice() else { panic!("{versions:?}") };
    assert!(*first > 0 && !rest.is_empty() && rest.iter().all(|count| *count == 0));
    assert_eq!(asked.first().map(|request| request.resource_names_subscribe.len()), Some(*first));
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

// --- What is refused, and what is gone ------------------------------------------------------------

fn refused(session: &ClientSession) -> Vec<String> {
    session.rejected().into_keys().collect()
}

#[test]
fn delta_a_refused_resource_is_listed_until_a_good_version_or_its_removal() {
    let mut session = session(Delta);
    session.open();
    for (response, listed) in [
        ("c#1 a:1>e/x b:1", &[][..]),
        ("c#2 a:bad", &["Cluster a"]),
        ("l#3 l:1", &["Cluster a"]),
        ("c#4 a:2>e/x b:bad", &["Cluster b"]),
        ("c#5 b:junk", &["Cluster b"]),
        ("e#6 x:bad", &["Cluster b", "ClusterLoadAssignment x"]),
        ("c#7 -b", &["ClusterLoadAssignment x"]),
        ("c#8 a:3", &[]),
    ] {
        respond(&mut session, response);
        assert_eq!(refused(&session), listed, "{response}");
    }
}

#[test]
fn state_a_refused_resource_is_listed_until_a_response_without_it() {
    let mut session = session(StateOfTheWorld);
    session.open();
    for (response, listed) in [
        ("c#1 v=1 a:1 b:bad", &["Cluster b"][..]),
        ("c#2 v=2 a:junk", &["Cluster ", "Cluster b"]),
        ("l#3 v=1 l:1", &["Cluster ", "Cluster b"]),
        ("c#4 v=3 a:1 b:bad", &["Cluster b"]),
        ("c#5 v=4 a:1", &[]),
    ] {
        respond(&mut session, response);
        assert_eq!(refused(&session), listed, "{response}");
    }
}

#[test]
fn notes_of_resources_that_are_gone_are_replaced_by_none() {
    let mut session = session(Delta);
    session.open();
    respond(&mut session, "c#1 a:1>e/x");
    respond(&mut session, "e#2 x:1");
    let gone = respond(&mut session, "c#3 -a").notes;
    let none = |kind, name: &str| (kind, name.into(), Notes::default());
    assert_eq!(gone, [none(ResourceKind::Cluster, "a"), none(ResourceKind::Endpoints, "x")]);
}

#[test]
fn names_of_removed_clusters_are_kept_up_to_a_limit() {
    let mut session = session(Delta);
    session.open();
    let names: Vec<String> = (0..12_000).map(|number| format!("-{number}")).collect();
    respond(&mut session, &format!("c#1 {}", names.join(" ")));
    let is_absent =
        |name: &&String| session.is_absent(&MissingReference::Cluster(name[1..].into()));
    assert_eq!(names.iter().filter(is_absent).count(), 10_000);
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
fn rejection_names_the_resource_and_the_field() {
    let mut session = session(Delta);
    session.open();
    let outcome = respond(&mut session, "l#1 good:1 evil:bad");
    let Some(XdsRequest::Delta(request)) = outcome.requests.first() else {
        panic!("a delta request: {outcome:?}")
    };
    let status = request.error_detail.as_ref().expect("a refusal");
    assert_eq!(
        (status.code, status.message.as_str()),
        (3, "Listener \"evil\": address: this field is missing")
    );
    assert_eq!(outcome.rejections.len(), 1);
}

#[test]
fn unrequested_resource_is_ignored() {
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
fn identical_response_changes_nothing() {
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
