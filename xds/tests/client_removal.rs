//! What the client session takes for removed, and what it keeps: the rules of the xDS protocol
//! (envoyproxy/envoy, `docs/root/api-docs/xds_protocol.rst`), and of what is in use.

mod client_script;
mod world;

use client_script::check;
use weft_xds::client::XdsVariant::{Delta, StateOfTheWorld};

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
fn removed_resource_is_missing_until_it_is_sent() {
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
