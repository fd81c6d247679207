//! Renders the rules as text for the `nft` command: one table for both address families, replaced in one transaction.

use super::config::{IpFamily, MARK_MASK, RedirectConfig};
use super::rules::{RedirectChain, RedirectHook, RedirectRule, RuleAction, RuleMatch, chains};

/// The name of the table.
pub(super) const TABLE: &str = "weft";

/// The text for `nft -f`. It declares, deletes and declares the table again, which replaces an existing table in one
/// transaction.
pub(super) fn render(redirect: &RedirectConfig, comment: &str) -> String {
    let chains = render_chains(redirect);
    format!(
        "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n\tcomment \"{comment}\"\n{chains}}}\n"
    )
}

/// The text of the chains with their rules.
pub(super) fn render_chains(redirect: &RedirectConfig) -> String {
    let mut text = String::new();
    for RedirectChain { place, rules } in chains(redirect) {
        text += &format!("\tchain {} {{\n\t\t{}\n", name(place), hook(place));
        for rule in &rules {
            text += &format!("\t\t{}\n", render_rule(rule));
        }
        text += "\t}\n";
    }
    text
}

/// The name of a chain.
pub(super) fn name(place: RedirectHook) -> &'static str {
    match place {
        RedirectHook::Arriving => "arriving",
        RedirectHook::Leaving => "leaving",
        RedirectHook::Answers => "answers",
        RedirectHook::ArrivingUdp => "arriving_udp",
        RedirectHook::LeavingUdp => "leaving_udp",
        RedirectHook::ArrivingStrict => "arriving_strict",
        RedirectHook::LeavingStrict => "leaving_strict",
    }
}

/// The hook of a chain. Priority -101 runs just before NAT of other tools, so our rules decide first and
/// other tools see what we skip. -99 runs just after NAT, so UDP packets that the kernel path carries already
/// have their endpoint's address and are skipped. 0 runs after both and sees which packets were redirected.
fn hook(place: RedirectHook) -> &'static str {
    match place {
        RedirectHook::Arriving => "type nat hook prerouting priority -101; policy accept;",
        RedirectHook::Leaving => "type nat hook output priority -101; policy accept;",
        RedirectHook::Answers | RedirectHook::ArrivingUdp => {
            "type filter hook prerouting priority -99; policy accept;"
        }
        RedirectHook::LeavingUdp => "type route hook output priority -99; policy accept;",
        RedirectHook::ArrivingStrict => "type filter hook input priority 0; policy accept;",
        RedirectHook::LeavingStrict => "type filter hook output priority 0; policy accept;",
    }
}

fn render_rule(rule: &RedirectRule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(render_match).collect();
    if rule.counted {
        words.push("counter".to_owned());
    }
    words.push(render_action(rule.action));
    words.join(" ")
}

fn render_match(condition: &RuleMatch) -> String {
    match condition {
        RuleMatch::Mark(mark) => format!("meta mark & {MARK_MASK:#010x} == {mark:#x}"),
        RuleMatch::User(user) => format!("meta skuid {user}"),
        RuleMatch::LocalDestination(true) => "fib daddr type local".to_owned(),
        RuleMatch::LocalDestination(false) => "fib daddr type != local".to_owned(),
        RuleMatch::Destination(range) => match condition.family() {
            Some(IpFamily::V6) => format!("ip6 daddr {range}"),
            Some(IpFamily::V4) | None => format!("ip daddr {range}"),
        },
        RuleMatch::Protocol(transport) => format!("meta l4proto {}", transport.word()),
        RuleMatch::Port(transport, ports) if ports.start() == ports.end() => {
            format!("{} dport {}", transport.word(), ports.start())
        }
        RuleMatch::Port(transport, ports) => {
            format!("{} dport {}-{}", transport.word(), ports.start(), ports.end())
        }
        RuleMatch::InputInterface(name, true) => format!("iifname \"{name}\""),
        RuleMatch::InputInterface(name, false) => format!("iifname != \"{name}\""),
        RuleMatch::OutputInterface(name) => format!("oifname \"{name}\""),
        RuleMatch::TransparentSocket => "socket transparent 1 socket wildcard 0".to_owned(),
        RuleMatch::Reply => "ct direction reply".to_owned(),
        RuleMatch::Related => "ct state related".to_owned(),
        RuleMatch::Icmpv6 { kind, hop_limit } => {
            format!("ip6 hoplimit {hop_limit} icmpv6 type {kind}")
        }
    }
}

fn render_action(action: RuleAction) -> String {
    match action {
        RuleAction::Return => "return".to_owned(),
        RuleAction::Redirect(port) => format!("redirect to :{port}"),
        RuleAction::Mark(mark) => {
            format!("meta mark set meta mark & {:#010x} | {mark:#x}", !MARK_MASK)
        }
        RuleAction::Tproxy(port) => format!("tproxy to :{port} accept"),
        RuleAction::Drop => "drop".to_owned(),
    }
}
