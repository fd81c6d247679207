//! Tests of the rules as rendered for both tools.

use weft_model::Cidr;

use super::*;

pub(super) fn workload() -> RedirectConfig {
    RedirectConfig {
        owner: "weft".into(),
        inbound: Some(15006),
        outbound: Some(15001),
        forwarded: None,
        udp: None,
        services: vec![
            Cidr::parse("10.96.0.0/16").expect("the range is valid"),
            Cidr::parse("fd00:96::/64").expect("the range is valid"),
        ],
        dns: None,
        resolvers: Vec::new(),
        exclude_inbound_ports: vec![22, 15020],
        exclude_outbound_ports: Vec::new(),
        exclude_destinations: vec![Cidr::parse("169.254.169.254").expect("the range is valid")],
        exclude_interfaces: Vec::new(),
        exclude_users: Vec::new(),
        strict: false,
        keep_source: false,
        mark: 0x539,
        uid: Some(1337),
    }
}

pub(super) fn node() -> RedirectConfig {
    RedirectConfig {
        inbound: None,
        outbound: None,
        forwarded: Some(15001),
        udp: Some(15099),
        uid: None,
        ..workload()
    }
}

#[test]
fn mark_is_matched_before_the_user_and_both_before_any_redirect() {
    for text in [
        plan(&workload(), RedirectBackend::Nft).expect("the plan is rendered"),
        plan(&workload(), RedirectBackend::Iptables).expect("the plan is rendered"),
    ] {
        let mark = text.find("0x539").expect("the mark is matched");
        let user = text.find("1337").expect("the user is matched");
        let redirect = text.rfind("15001").expect("the port is redirected to");
        assert!(mark < user && user < redirect, "{text}");
    }
}

#[test]
fn both_address_families_are_redirected() {
    let nft = plan(&workload(), RedirectBackend::Nft).expect("the plan is rendered");
    assert!(
        nft.contains("meta l4proto tcp ip daddr 10.96.0.0/16 counter redirect to :15001"),
        "{nft}"
    );
    assert!(
        nft.contains("meta l4proto tcp ip6 daddr fd00:96::/64 counter redirect to :15001"),
        "{nft}"
    );
    for excluded in ["15000-15099", "22", "15020"] {
        assert!(nft.contains(&format!("tcp dport {excluded} return\n")), "{nft}");
    }
    let iptables = plan(&workload(), RedirectBackend::Iptables).expect("the plan is rendered");
    let (v4, v6) = iptables.split_once("# ip6tables-restore").expect("both families are rendered");
    assert!(
        v4.contains("-p tcp -d 10.96.0.0/16 -j REDIRECT --to-ports 15001") && !v4.contains("fd00"),
        "{v4}"
    );
    assert!(
        v6.contains("-p tcp -d fd00:96::/64 -j REDIRECT --to-ports 15001") && !v6.contains("10.96"),
        "{v6}"
    );
}

#[test]
fn table_has_the_comment_that_recognises_it() {
    let text = plan(&node(), RedirectBackend::Nft).expect("the plan is rendered");
    assert!(text.contains(&node().comment(1)));
}

#[test]
fn invalid_configuration_is_refused() {
    let check = |redirect: RedirectConfig, part: &str| {
        let error = plan(&redirect, RedirectBackend::Nft).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    };
    check(RedirectConfig { forwarded: None, udp: None, ..node() }, "nothing to redirect");
    check(RedirectConfig { services: Vec::new(), ..node() }, "need services");
    check(RedirectConfig { owner: "a\"b".into(), ..node() }, "owner");
    check(RedirectConfig { udp: Some(0), ..node() }, "port 0");
    check(RedirectConfig { exclude_inbound_ports: vec![0], ..node() }, "port 0");
}
