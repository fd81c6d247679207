//! In which order the server session sends what belongs together, and takes it back: the rules of the
//! xDS protocol (envoyproxy/envoy, `docs/root/api-docs/xds_protocol.rst`), "eventual consistency".

mod transcript;
mod world;

use transcript::check;
use weft_xds::client::XdsVariant::{Delta, StateOfTheWorld};

#[test]
fn referenced_resources_are_sent_first() {
    check(
        Delta,
        "> r +r
         < r#1 -r
         > r @1
         > l
         < l#2
         > l @2
         > s +s
         < s#3 -s
         > s @3
         > e +a
         < e#4 -a
         > e @4
         > c
         < c#5
         > c @5
         = l/l:1>r/r r/r:1 c/a:1>e/a,s/s e/a:1 s/s:1
         < c#6 a:1
         < e#7 a:1
         < s#8 s:1
         < l#9 l:1
         < r#10 r:1",
    );
}

#[test]
fn delta_the_endpoints_of_a_changed_cluster_follow_unasked_and_unchanged() {
    check(
        Delta,
        "= c/a:1>e/x c/b:1>e/y e/x:1 e/y:1
         > c
         < c#1 a:1 b:1
         > e +x +y
         < e#2 x:1 y:1
         > c @1
         > e @2
         = c/a:2>e/x c/b:1>e/y e/x:1 e/y:1
         < c#3 a:2
         < e#4 x:1
         // Envoy acknowledges the cluster only when it has the endpoints.
         > e @4
         > c @3",
    );
}

#[test]
fn state_the_endpoints_of_a_changed_cluster_follow_unasked_and_unchanged() {
    check(
        StateOfTheWorld,
        "= c/a:1>e/x c/b:1>e/y e/x:1 e/y:1
         > c
         < c#1 a:1 b:1
         > e x y
         < e#2 x:1 y:1
         > c @1
         > e x y @2
         = c/a:2>e/x c/b:1>e/y e/x:1 e/y:1
         < c#3 a:2 b:1
         < e#4 x:1
         // Envoy asks for them as well, with the nonce it knew.
         > e x y @2
         > e x y @4",
    );
}

#[test]
fn the_endpoints_of_a_changed_cluster_wait_for_a_response_that_is_unanswered() {
    check(
        Delta,
        "= c/a:1>e/a e/a:1
         > c
         < c#1 a:1
         > c @1
         > e +a
         < e#2 a:1
         = c/a:2>e/a e/a:1
         < c#3 a:2
         > e @2
         < e#4 a:1",
    );
}

#[test]
fn clusters_are_removed_after_what_used_them_was_acknowledged() {
    check(
        Delta,
        "= c/a:1 c/b:1 l/l:1>r/r r/r:1
         > c
         < c#1 a:1 b:1
         > l
         < l#2 l:1
         > r +r
         < r#3 r:1
         > c @1
         > l @2
         > r @3
         = c/a:2 l/l:2>r/r r/r:2
         < c#4 a:2
         < l#5 l:2
         < r#6 r:2
         > c @4
         > l @5
         > r @6
         < c#7 -b",
    );
    check(
        StateOfTheWorld,
        "= c/a:1 c/b:1 l/l:1
         > c
         < c#1 a:1 b:1
         > l
         < l#2 l:1
         > c @1
         > l @2
         = c/a:1 l/l:2
         < l#3 l:2
         > l @3
         < c#4 a:1",
    );
}

#[test]
fn state_routes_that_are_gone_do_not_keep_clusters() {
    check(
        StateOfTheWorld,
        "= c/a:1 r/r:1
         > c
         < c#1 a:1
         > c @1
         > r r missing
         < r#2 r:1
         > r r missing @2
         =
         < c#3",
    );
}

#[test]
fn delta_a_missing_cluster_is_said_while_removals_wait() {
    check(
        Delta,
        "= c/a:1 l/l:1
         > c +a
         < c#1 a:1
         > c @1
         > l
         < l#2 l:1
         =
         > c +lazy
         < c#3 -lazy
         > c @3
         > l @2
         < l#4 -l
         > l @4
         < c#5 -a",
    );
}
