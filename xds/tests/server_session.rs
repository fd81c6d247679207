//! What the server session answers: the rules of the xDS protocol (envoyproxy/envoy,
//! `docs/root/api-docs/xds_protocol.rst`), and what real clients were seen to need.

mod transcript;
mod world;

use std::sync::Arc;

use transcript::check;
use weft_xds::client::XdsVariant::{Delta, StateOfTheWorld};

// --- Who gets what ------------------------------------------------------------------------------

#[test]
fn delta_a_first_request_without_names_means_everything() {
    check(
        Delta,
        "= c/a:1 c/b:1
         > c
         < c#1 a:1 b:1
         > c @1
         = c/a:2 c/b:1 c/d:1
         < c#2 a:2 d:1",
    );
}

#[test]
fn delta_a_star_means_everything_until_it_is_unsubscribed() {
    check(
        Delta,
        "= l/a:1
         > l +*
         < l#1 a:1
         > l @1
         = l/a:2
         < l#2 a:2
         > l @2
         > l -*
         = l/a:3 l/b:1",
    );
}

#[test]
fn delta_names_added_later_keep_the_wildcard_and_outlive_it() {
    check(
        Delta,
        "= c/a:1 c/b:1
         > c
         < c#1 a:1 b:1
         > c @1
         > c +a
         < c#2 a:1
         > c @2
         = c/a:1 c/b:2
         < c#3 b:2
         > c @3
         > c -*
         = c/a:1 c/b:3
         = c/a:2 c/b:3
         < c#4 a:2",
    );
}

#[test]
fn delta_a_star_given_and_taken_in_one_message_means_nothing() {
    check(
        Delta,
        "= c/a:1 c/b:1
         > c +* -*
         > c +a
         < c#1 a:1
         > c @1
         // The name goes with the star that covered it: nothing is owed for it.
         > c +* -a -*",
    );
}

#[test]
fn delta_a_name_unsubscribed_under_a_wildcard_is_answered() {
    check(
        Delta,
        "= c/a:1
         > c +* +a +gone
         < c#1 a:1 -gone
         > c @1
         > c -a -gone
         < c#2 a:1 -gone",
    );
}

#[test]
fn delta_an_invented_name_unsubscribed_under_a_wildcard_is_ignored() {
    check(
        Delta,
        "= c/a:1
         > c
         < c#1 a:1
         > c -b -d
         > c @1",
    );
}

#[test]
fn delta_a_star_after_names_sends_all_but_those() {
    check(
        Delta,
        "= c/a:1 c/b:1
         > c +a
         < c#1 a:1
         > c @1
         > c +*
         < c#2 b:1
         > c @2
         > c -*
         > c +*
         < c#3 b:1",
    );
}

#[test]
fn delta_no_names_mean_nothing_where_no_wildcard_exists() {
    check(
        Delta,
        "= e/a:1 s/a:1 r/a:1
         > e
         > s
         > r
         = e/a:2 s/a:2 r/a:2",
    );
}

#[test]
fn state_no_names_mean_everything_until_something_was_named() {
    check(
        StateOfTheWorld,
        "= c/a:1 c/b:1
         > c
         < c#1 a:1 b:1
         > c @1
         > c a @1
         < c#2 a:1
         > c a @2
         > c @2
         = c/a:2 c/b:2",
    );
}

#[test]
fn state_a_star_beside_names_sends_nothing_twice() {
    check(
        StateOfTheWorld,
        "= l/a:1 l/b:1
         > l * a
         < l#1 a:1 b:1
         > l * a @1
         = l/a:1 l/b:2
         < l#2 a:1 b:2
         > l a @2
         = l/a:1 l/b:3
         = l/a:2 l/b:3
         < l#3 a:2",
    );
}

#[test]
fn a_type_that_nobody_publishes_does_not_exist() {
    check(
        Delta,
        "= c/a:1
         > x +a +b
         < x#1 -a -b
         > x @1
         > x @1 !",
    );
    check(
        StateOfTheWorld,
        "= c/a:1
         > x a",
    );
}

// --- Missing, gone, forgotten ---------------------------------------------------------------------

#[test]
fn delta_what_is_missing_is_said_at_once_and_sent_when_it_is_there() {
    check(
        Delta,
        "= e/a:1
         > e +a +b
         < e#1 a:1 -b
         > e @1
         = e/a:1 e/b:1
         < e#2 b:1",
    );
}

#[test]
fn state_what_is_missing_is_sent_when_it_is_there() {
    check(
        StateOfTheWorld,
        "= r/a:1
         > r b
         = r/a:1 r/b:1
         < r#1 b:1
         > r b @1
         > l b
         // Of a listener the whole state is told, and so its absence.
         < l#2
         > l b @2
         = r/a:1 r/b:1 l/b:1
         < l#3 b:1",
    );
}

#[test]
fn delta_a_name_subscribed_again_is_answered() {
    check(
        Delta,
        "= r/a:1
         > r +a
         < r#1 a:1
         > r @1
         > r +a
         < r#2 a:1
         > r @2
         > r -a
         > r +a
         < r#3 a:1",
    );
}

#[test]
fn delta_a_client_that_was_away_hears_of_changes_and_removals_only() {
    check(
        Delta,
        "= c/same:1 c/other:2 c/new:1 e/same:1
         > c has:same:1 has:other:1 has:gone:1
         < c#1 new:1 other:2 -gone
         > e +same +gone has:same:1 has:gone:1
         < e#2 -gone",
    );
}

#[test]
fn delta_a_client_that_missed_nothing_is_answered_empty() {
    check(
        Delta,
        "= c/a:1
         > c has:a:1
         < c#1
         > c @1",
    );
}

#[test]
fn state_a_client_that_was_away_gets_everything_again() {
    check(
        StateOfTheWorld,
        "= c/a:1 e/a:1
         > c
         < c#1 a:1
         > e a
         < e#2 a:1",
    );
}

#[test]
fn state_the_absence_of_a_cluster_or_listener_is_its_removal() {
    check(
        StateOfTheWorld,
        "= c/a:1 c/b:1
         > c
         < c#1 a:1 b:1
         > c @1
         = c/a:1
         < c#2 a:1
         > c @2
         =
         < c#3
         > c @3",
    );
}

#[test]
fn state_only_what_changed_is_sent_of_the_other_types() {
    check(
        StateOfTheWorld,
        "= e/a:1 e/b:1
         > e a b
         < e#1 a:1 b:1
         > e a b @1
         = e/a:2 e/b:1
         < e#2 a:2
         > e a b @2
         // There is no way to say this one.
         = e/a:2
         = e/a:2 e/b:2
         < e#3 b:2",
    );
}

#[test]
fn an_empty_answer_to_everything_is_given_exactly_once() {
    for variant in [Delta, StateOfTheWorld] {
        check(
            variant,
            "=
             > c
             < c#1
             > c @1
             > l
             < l#2
             > l @2
             =
             = e/a:1",
        );
    }
}

// --- Answers ------------------------------------------------------------------------------------

#[test]
fn delta_what_was_refused_is_not_sent_again_until_it_changes() {
    check(
        Delta,
        "= l/a:1 l/b:1
         > l
         < l#1 a:1 b:1
         > l @1 !
         = l/a:1 l/b:1 c/c:1
         = l/a:1 l/b:2
         < l#2 b:2
         > l @2
         = l/a:2 l/b:2
         < l#3 a:2",
    );
}

#[test]
fn state_what_was_refused_is_not_sent_again_until_something_changes() {
    check(
        StateOfTheWorld,
        "= l/a:1 e/e:1
         > l
         < l#1 a:1
         > l @1 !
         > l @1 !
         > e e
         < e#2 e:1
         > e e @2 !
         > e e @2 !
         = l/a:1 e/e:1 c/c:1
         = l/a:2 e/e:2
         < e#3 e:2
         < l#4 a:2",
    );
}

#[test]
fn delta_a_stale_nonce_acknowledges_nothing_and_still_subscribes() {
    check(
        Delta,
        "= r/a:1 r/b:1 r/c:1
         > r +a
         < r#1 a:1
         > r @1
         = r/a:2 r/b:1 r/c:1
         < r#2 a:2
         > r @1 +b -a
         = r/a:3 r/b:1 r/c:1
         > r @2
         < r#3 b:1",
    );
}

#[test]
fn state_a_stale_request_is_not_answered() {
    check(
        StateOfTheWorld,
        "= r/a:1 r/b:1
         > r a
         < r#1 a:1
         > r a @1
         = r/a:2 r/b:1
         < r#2 a:2
         > r a b @1
         = r/a:3 r/b:1
         > r a b @2
         < r#3 a:3 b:1",
    );
}

#[test]
fn state_what_a_stale_request_left_out_is_sent_again_when_named_again() {
    // The client let go of `b` and took it up again, both before it saw response 2. It has
    // forgotten `b`, although every request that counts names it.
    check(
        StateOfTheWorld,
        "= r/a:1 r/b:1
         > r a b
         < r#1 a:1 b:1
         > r a b @1
         = r/a:2 r/b:1
         < r#2 a:2
         > r a @1
         > r a b @1
         > r a b @2
         < r#3 b:1",
    );
}

#[test]
fn state_the_same_request_again_asks_for_the_same_again() {
    check(
        StateOfTheWorld,
        "= e/a:1
         > e a
         < e#1 a:1
         > e a @1
         > e a @1
         < e#2 a:1
         > e a @2",
    );
}

#[test]
fn state_a_name_that_is_added_is_sent_alone() {
    check(
        StateOfTheWorld,
        "= e/a:1 e/b:1
         > e a
         < e#1 a:1
         > e a @1
         > e a b @1
         < e#2 b:1
         > e a b @2
         // Left out and taken up again.
         > e b @2
         > e a b @2
         < e#3 a:1",
    );
}

#[test]
fn one_response_of_a_type_is_unanswered_and_later_changes_merge() {
    check(
        Delta,
        "= c/a:1 l/l:1
         > c
         < c#1 a:1
         = c/a:2 l/l:1
         = c/a:3 c/b:1 l/l:1
         // Another type does not wait.
         > l
         < l#2 l:1
         > c @1
         < c#3 a:3 b:1",
    );
    check(
        StateOfTheWorld,
        "= c/a:1
         > c
         < c#1 a:1
         = c/a:2
         = c/a:3 c/b:1
         > c @1
         < c#2 a:3 b:1",
    );
}

// --- Limits -------------------------------------------------------------------------------------

#[test]
fn a_stream_that_asks_for_too_many_names_ends() {
    use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
    use weft_xds::server::ServerSession;
    use weft_xds::translate::ResourceKind;

    let names = |count: u32| (0..count).map(|n| n.to_string()).collect::<Vec<_>>();
    let delta = |count| {
        let request = DeltaDiscoveryRequest {
            type_url: ResourceKind::Endpoints.type_url(),
            resource_names_subscribe: names(count),
            ..DeltaDiscoveryRequest::default()
        };
        ServerSession::new(Delta).on_delta(request, &Arc::default()).is_ok()
    };
    let state = |count| {
        let request = DiscoveryRequest {
            type_url: ResourceKind::Endpoints.type_url(),
            resource_names: names(count),
            ..DiscoveryRequest::default()
        };
        ServerSession::new(StateOfTheWorld).on_state_of_the_world(request, &Arc::default()).is_ok()
    };
    assert!(delta(100_000) && state(100_000));
    assert!(!delta(100_001) && !state(100_001));
}

#[test]
fn a_stream_that_leaves_too_many_names_to_answer_ends() {
    use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
    use weft_xds::server::ServerSession;
    use weft_xds::translate::ResourceKind;

    let mut session = ServerSession::new(Delta);
    let mut ask = |subscribe: &[String], unsubscribe: &[String]| {
        let request = DeltaDiscoveryRequest {
            type_url: ResourceKind::Cluster.type_url(),
            resource_names_subscribe: subscribe.to_vec(),
            resource_names_unsubscribe: unsubscribe.to_vec(),
            ..DeltaDiscoveryRequest::default()
        };
        session.on_delta(request, &Arc::default()).map(|responses| responses.len())
    };
    assert_eq!(ask(&["*".into()], &[]), Ok(1), "never acknowledged");
    let names: Vec<String> = (0..180_000).map(|number| number.to_string()).collect();
    let (first, second) = names.split_at(90_000);
    assert_eq!(ask(first, &[]), Ok(0));
    assert_eq!(ask(&[], first), Ok(0));
    assert_eq!(
        ask(second, &[]),
        Err("too many names of one resource type: at most 100000 are accepted")
    );
}
