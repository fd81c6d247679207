//! The rules as text for the `nft` command: one table for both families, replaced in one transaction.

use super::rules::{Action, Chain, Match, Place, Rule, chains};
use super::{Family, MARK_MASK, Redirect};

/// The name of our table.
pub(super) const TABLE: &str = "weft";

/// The text for `nft -f`. Declaring, deleting and declaring again makes it replace whatever was
/// there, in one transaction.
pub(super) fn render(redirect: &Redirect, generation: u64) -> String {
    let mut text =
        format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    text += &format!("\tcomment \"{}\"\n", redirect.comment(generation));
    for Chain { place, rules } in chains(redirect) {
        text += &format!("\tchain {} {{\n\t\t{}\n", name(place), hook(place));
        for rule in &rules {
            text += &format!("\t\t{}\n", render_rule(rule));
        }
        text += "\t}\n";
    }
    text + "}\n"
}

/// The name of a chain.
pub(super) fn name(place: Place) -> &'static str {
    match place {
        Place::Arriving => "arriving",
        Place::Leaving => "leaving",
        Place::Answers => "answers",
        Place::ArrivingUdp => "arriving_udp",
        Place::LeavingUdp => "leaving_udp",
        Place::ArrivingStrict => "arriving_strict",
        Place::LeavingStrict => "leaving_strict",
    }
}

/// Priority -101 runs just before other tools' NAT, so that what we take is ours and what we leave is
/// theirs; -99 just behind it, so that datagrams to services which the kernel carries itself bear
/// their endpoint's address already and are left alone. 0 is behind both, where it shows what was taken.
fn hook(place: Place) -> &'static str {
    match place {
        Place::Arriving => "type nat hook prerouting priority -101; policy accept;",
        Place::Leaving => "type nat hook output priority -101; policy accept;",
        Place::Answers | Place::ArrivingUdp => {
            "type filter hook prerouting priority -99; policy accept;"
        }
        Place::LeavingUdp => "type route hook output priority -99; policy accept;",
        Place::ArrivingStrict => "type filter hook input priority 0; policy accept;",
        Place::LeavingStrict => "type filter hook output priority 0; policy accept;",
    }
}

fn render_rule(rule: &Rule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(render_match).collect();
    if rule.counted {
        words.push("counter".to_owned());
    }
    words.push(render_action(rule.action));
    words.join(" ")
}

fn render_match(asked: &Match) -> String {
    match asked {
        Match::Mark(mark) => format!("meta mark & {MARK_MASK:#010x} == {mark:#x}"),
        Match::User(user) => format!("meta skuid {user}"),
        Match::ToThisHost(true) => "fib daddr type local".to_owned(),
        Match::ToThisHost(false) => "fib daddr type != local".to_owned(),
        Match::To(range) => match asked.family() {
            Some(Family::V6) => format!("ip6 daddr {range}"),
            Some(Family::V4) | None => format!("ip daddr {range}"),
        },
        Match::Over(transport) => format!("meta l4proto {}", transport.word()),
        Match::Port(transport, ports) if ports.start() == ports.end() => {
            format!("{} dport {}", transport.word(), ports.start())
        }
        Match::Port(transport, ports) => {
            format!("{} dport {}-{}", transport.word(), ports.start(), ports.end())
        }
        Match::FromInterface(name, true) => format!("iifname \"{name}\""),
        Match::FromInterface(name, false) => format!("iifname != \"{name}\""),
        Match::ToInterface(name) => format!("oifname \"{name}\""),
        Match::ForTransparentSocket => "socket transparent 1 socket wildcard 0".to_owned(),
        Match::Reply => "ct direction reply".to_owned(),
        Match::Related => "ct state related".to_owned(),
        Match::Icmpv6 { kind, hop_limit } => {
            format!("ip6 hoplimit {hop_limit} icmpv6 type {kind}")
        }
    }
}

fn render_action(action: Action) -> String {
    match action {
        Action::Return => "return".to_owned(),
        Action::Redirect(port) => format!("redirect to :{port}"),
        Action::Mark(mark) => format!("meta mark set meta mark & {:#010x} | {mark:#x}", !MARK_MASK),
        Action::HandTo(port) => format!("tproxy to :{port} accept"),
        Action::Drop => "drop".to_owned(),
    }
}
