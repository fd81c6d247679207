//! The rules for nf_tables: one table for both families, replaced in one transaction.

use super::{Chain, Family, MARK_MASK, Redirect, UDP_MARK, join};

/// The name of our table.
pub(super) const TABLE: &str = "weft";

/// The text for `nft -f`. Declaring, deleting and declaring again makes it replace whatever was
/// there, in one transaction.
pub(super) fn render(redirect: &Redirect) -> String {
    let mut text =
        format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    text += &format!("\tcomment \"{}\"\n", redirect.comment());
    for chain in chains(redirect) {
        text += &format!("\tchain {} {{\n\t\t{}\n", chain.name, chain.hook);
        for rule in &chain.rules {
            text += &format!("\t\t{rule}\n");
        }
        text += "\t}\n";
    }
    text + "}\n"
}

/// The text that removes everything.
pub(super) fn render_removal() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// The chains that are wanted. Priority -101 runs just before other tools' NAT, so that what we
/// take is ours and what we leave is theirs.
pub(super) fn chains(redirect: &Redirect) -> Vec<Chain> {
    let all = [
        Chain {
            name: "arriving",
            hook: "type nat hook prerouting priority -101; policy accept;",
            rules: arriving(redirect),
        },
        Chain {
            name: "leaving",
            hook: "type nat hook output priority -101; policy accept;",
            rules: leaving(redirect),
        },
        Chain {
            name: "arriving_udp",
            hook: "type filter hook prerouting priority -150; policy accept;",
            rules: arriving_udp(redirect),
        },
        Chain {
            name: "leaving_udp",
            hook: "type route hook output priority -150; policy accept;",
            rules: leaving_udp(redirect),
        },
    ];
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn arriving(redirect: &Redirect) -> Vec<String> {
    if redirect.inbound.is_none() && redirect.forwarded.is_none() {
        return Vec::new();
    }
    let mut rules = vec!["iifname \"lo\" return".to_owned()];
    if let Some(port) = redirect.forwarded {
        for services in service_matches(redirect) {
            rules.push(format!("{services} meta l4proto tcp counter redirect to :{port}"));
        }
    }
    if let Some(port) = redirect.inbound {
        rules.push("fib daddr type != local return".to_owned());
        rules.push(format!("tcp dport {} return", ports(&redirect.exclude_inbound_ports)));
        rules.push(format!("meta l4proto tcp counter redirect to :{port}"));
    }
    rules
}

fn leaving(redirect: &Redirect) -> Vec<String> {
    let Some(port) = redirect.outbound else {
        return Vec::new();
    };
    let mut rules = own(redirect);
    // The whole of loopback, and the namespace's own addresses, stay as they are.
    rules.push("ip daddr 127.0.0.0/8 return".to_owned());
    rules.push("ip6 daddr ::1 return".to_owned());
    rules.push("fib daddr type local counter return".to_owned());
    for family in Family::BOTH {
        let exclusions = redirect.exclusions_of(family);
        if !exclusions.is_empty() {
            rules.push(format!("{} daddr {{ {} }} return", keyword(family), join(exclusions)));
        }
    }
    if !redirect.exclude_outbound_ports.is_empty() {
        rules.push(format!("tcp dport {{ {} }} return", join(&redirect.exclude_outbound_ports)));
    }
    if redirect.services.is_empty() {
        rules.push(format!("meta l4proto tcp counter redirect to :{port}"));
    }
    for services in service_matches(redirect) {
        rules.push(format!("{services} meta l4proto tcp counter redirect to :{port}"));
    }
    rules
}

fn arriving_udp(redirect: &Redirect) -> Vec<String> {
    let Some(port) = redirect.udp else {
        return Vec::new();
    };
    let mut rules = Vec::new();
    if redirect.forwarded.is_some() {
        for services in service_matches(redirect) {
            rules.push(format!("iifname != \"lo\" {services} meta l4proto udp {}", set_mark()));
        }
    }
    rules.push(format!(
        "meta mark & {MARK_MASK:#010x} == {UDP_MARK:#x} meta l4proto udp counter tproxy to :{port} accept"
    ));
    rules
}

fn leaving_udp(redirect: &Redirect) -> Vec<String> {
    if redirect.udp.is_none() {
        return Vec::new();
    }
    let mut rules = own(redirect);
    for services in service_matches(redirect) {
        rules.push(format!("{services} meta l4proto udp counter {}", set_mark()));
    }
    rules
}

/// What breaks loops: the mark first, the user second.
fn own(redirect: &Redirect) -> Vec<String> {
    let mut rules =
        vec![format!("meta mark & {MARK_MASK:#010x} == {:#x} counter return", redirect.mark)];
    if let Some(uid) = redirect.uid {
        rules.push(format!("meta skuid {uid} counter return"));
    }
    rules
}

fn service_matches(redirect: &Redirect) -> Vec<String> {
    Family::BOTH
        .into_iter()
        .map(|family| (family, redirect.services_of(family)))
        .filter(|(_, services)| !services.is_empty())
        .map(|(family, services)| format!("{} daddr {{ {} }}", keyword(family), join(services)))
        .collect()
}

fn ports(excluded: &[u16]) -> String {
    let (first, last) = Redirect::OWN_PORTS;
    let own = format!("{first}-{last}");
    let others =
        excluded.iter().filter(|port| !(first..=last).contains(port)).map(ToString::to_string);
    format!("{{ {} }}", join([own].into_iter().chain(others)))
}

fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn set_mark() -> String {
    format!("meta mark set meta mark & {:#010x} | {UDP_MARK:#x}", !MARK_MASK)
}
