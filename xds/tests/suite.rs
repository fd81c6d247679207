//! The scenarios of ii/xds-test-harness (`features/delta.feature`, `subscribing.feature`,
//! `unsubcribing.feature`), all 18, each for every type in its table.
//!
//! A test has its scenario's name. The tables differ only in the names of their resources, so one
//! table's names stand for all. "The service never responds more than necessary" holds throughout,
//! since a conversation must go exactly as written. `$` stands for the type's letter.

mod transcript;
mod world;

use weft_xds::client::XdsVariant::{self, Delta, StateOfTheWorld};

/// Plays a conversation once for each type.
fn check(variant: XdsVariant, letters: &str, script: &str) {
    for letter in letters.chars() {
        transcript::check(variant, &script.replace('$', &letter.to_string()));
    }
}

// --- delta.feature ------------------------------------------------------------------------------

#[test]
fn subscribe_to_resources_one_after_the_other() {
    check(
        Delta,
        "clre",
        "= $/A:1 $/B:1 $/C:1
         > $ +A
         < $#1 A:1
         > $ @1
         > $ +B
         < $#2 B:1
         > $ @2",
    );
}

#[test]
fn when_a_resource_is_updated_receive_response_for_only_that_resource() {
    check(
        Delta,
        "lcre",
        "= $/A:1 $/B:1 $/C:1
         > $ +A +B +C
         < $#1 A:1 B:1 C:1
         > $ @1
         = $/A:2 $/B:1 $/C:1
         < $#2 A:2
         > $ @2",
    );
}

#[test]
fn client_is_told_if_resource_does_not_exist_and_is_notified_if_it_is_created() {
    check(
        Delta,
        "clre",
        "= $/A:1
         > $ +A +B
         < $#1 A:1 -B
         > $ @1
         = $/A:1 $/B:1
         < $#2 B:1
         > $ @2",
    );
}

#[test]
fn client_is_told_when_a_resource_is_removed_via_removed_resources_field() {
    check(
        Delta,
        "clre",
        "= $/A:1 $/B:1
         > $ +A +B
         < $#1 A:1 B:1
         > $ @1
         = $/A:1
         < $#2 -B
         > $ @2
         = $/A:1 $/B:2
         < $#3 B:2
         > $ @3",
    );
}

#[test]
fn client_can_incrementally_unsubscribe_from_resources() {
    check(
        Delta,
        "clre",
        "= $/A:1 $/B:1
         > $ +A +B
         < $#1 A:1 B:1
         > $ @1
         > $ -B
         = $/A:1 $/B:2
         > $ -A
         = $/A:2 $/B:2",
    );
}

#[test]
fn delta_client_can_subscribe_to_multiple_services_via_ads() {
    for (first, second) in [("c", "l"), ("l", "c"), ("r", "e"), ("e", "r")] {
        let script = "= $/A:1 $/B:1 $/C:1 %/A:1 %/B:1 %/C:1
             > $ +B
             < $#1 B:1
             > $ @1
             > % +B
             < %#2 B:1
             > % @2
             = $/A:1 $/B:2 $/C:1 %/A:1 %/B:1 %/C:1
             < $#3 B:2
             > $ @3
             = $/A:1 $/B:2 $/C:1 %/A:1 %/B:2 %/C:1
             < %#4 B:2
             > % @4";
        check(Delta, first, &script.replace('%', second));
    }
}

// --- subscribing.feature ------------------------------------------------------------------------

#[test]
fn the_service_should_send_all_resources_on_a_wildcard_request() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1
         > $
         < $#1 A:1 B:1 C:1
         > $ @1",
    );
}

#[test]
fn the_service_should_send_updates_to_the_client() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1
         > $
         < $#1 A:1 B:1 C:1
         > $ @1
         = $/A:2 $/B:1 $/C:1
         < $#2 A:2 B:1 C:1
         > $ @2",
    );
}

#[test]
fn wildcard_subscriptions_receive_updates_when_new_resources_are_added() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1
         > $
         < $#1 A:1 B:1 C:1
         > $ @1
         = $/A:1 $/B:1 $/C:1 $/D:2
         < $#2 A:1 B:1 C:1 D:2
         > $ @2",
    );
}

#[test]
fn when_subscribing_to_specific_resources_receive_only_these_resources() {
    check(
        StateOfTheWorld,
        "clre",
        "= $/B:1 $/D:1 $/G:1 $/L:1
         > $ L G
         < $#1 G:1 L:1
         > $ L G @1",
    );
    check(
        Delta,
        "clre",
        "= $/B:1 $/D:1 $/G:1 $/L:1
         > $ +L +G
         < $#1 G:1 L:1
         > $ @1",
    );
}

#[test]
fn when_subscribing_to_specific_resources_receive_all_of_them_when_those_resources_change() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1 $/D:1
         > $ B D
         < $#1 B:1 D:1
         > $ B D @1
         = $/A:1 $/B:2 $/C:1 $/D:1
         < $#2 B:2 D:1
         > $ B D @2",
    );
}

#[test]
fn when_subscribing_to_specific_resources_receive_response_when_those_resources_change() {
    check(
        StateOfTheWorld,
        "re",
        "= $/A:1 $/B:1 $/C:1 $/D:1
         > $ B D
         < $#1 B:1 D:1
         > $ B D @1
         = $/A:1 $/B:2 $/C:1 $/D:1
         < $#2 B:2
         > $ B D @2",
    );
}

#[test]
fn when_subscribing_to_resources_that_dont_exist_receive_all_when_they_are_created() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1
         > $ A Z
         < $#1 A:1
         > $ A Z @1
         = $/A:1 $/B:1 $/C:1 $/Z:2
         < $#2 A:1 Z:2
         > $ A Z @2",
    );
}

#[test]
fn when_subscribing_to_resources_that_dont_exist_receive_response_when_they_are_created() {
    check(
        StateOfTheWorld,
        "re",
        "= $/A:1 $/B:1 $/C:1 $/D:1
         > $ A Z
         < $#1 A:1
         > $ A Z @1
         = $/A:1 $/B:1 $/C:1 $/D:1 $/Z:2
         < $#2 Z:2
         > $ A Z @2",
    );
}

#[test]
fn state_client_can_subscribe_to_multiple_services_via_ads() {
    // Of clusters and listeners, a response always holds all that is subscribed.
    for (first, second) in [("c", "l"), ("r", "e")] {
        let script = "= $/A:1 $/B:1 $/C:1 %/A:1 %/B:1 %/C:1
             > $ B
             < $#1 B:1
             > $ B @1
             > % B
             < %#2 B:1
             > % B @2
             = $/A:1 $/B:2 $/C:1 %/A:1 %/B:1 %/C:1
             < $#3 B:2
             > $ B @3";
        check(StateOfTheWorld, first, &script.replace('%', second));
    }
}

// --- unsubcribing.feature -----------------------------------------------------------------------

#[test]
fn client_can_unsubscribe_from_some_resources() {
    check(
        StateOfTheWorld,
        "cl",
        "= $/A:1 $/B:1 $/C:1 $/D:1 $/F:1
         > $ C A B
         < $#1 A:1 B:1 C:1
         > $ A @1
         = $/A:2 $/B:1 $/C:1 $/D:1 $/F:1
         < $#2 A:2
         > $ A @2",
    );
}

#[test]
fn client_can_unsubscribe_from_some_resources_and_receives_only_the_others() {
    check(
        StateOfTheWorld,
        "re",
        "= $/A:1 $/B:1 $/C:1 $/D:1
         > $ B D
         < $#1 B:1 D:1
         > $ B @1
         = $/A:1 $/B:2 $/C:1 $/D:1
         < $#2 B:2
         > $ B @2",
    );
}

#[test]
fn client_can_unsubscribe_from_all_resources() {
    check(
        StateOfTheWorld,
        "crle",
        "= $/A:1 $/B:1 $/C:1 $/D:1
         > $ A B
         < $#1 A:1 B:1
         > $ A B @1
         > $ @1
         = $/A:1 $/B:2 $/C:1 $/D:1",
    );
}
