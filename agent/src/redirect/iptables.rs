//! Renders the rules as text for `iptables-restore`: chains of our own in the existing tables, one
//! transaction per address family.

use super::config::{IpFamily, LOCAL_DELIVERY_MARK, MARK_MASK, RedirectConfig};
use super::rules::{RedirectHook, RedirectRule, RuleAction, RuleMatch, chains as desired};

/// A chain of ours, its table, and the built-in chain that jumps to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IptablesChain {
    pub(super) table: &'static str,
    /// The built-in chain that jumps to this chain.
    pub(super) hook: &'static str,
    pub(super) name: &'static str,
}

/// All chains that this renderer may have created.
pub(super) const ALL: [IptablesChain; 7] = [
    iptables_chain(RedirectHook::Arriving),
    iptables_chain(RedirectHook::Leaving),
    iptables_chain(RedirectHook::Answers),
    iptables_chain(RedirectHook::ArrivingUdp),
    iptables_chain(RedirectHook::LeavingUdp),
    iptables_chain(RedirectHook::ArrivingStrict),
    iptables_chain(RedirectHook::LeavingStrict),
];

/// The tables of these chains, in the order in which they are filled.
const TABLES: [&str; 3] = ["nat", "mangle", "filter"];

const fn iptables_chain(place: RedirectHook) -> IptablesChain {
    match place {
        RedirectHook::Arriving => {
            IptablesChain { table: "nat", hook: "PREROUTING", name: "WEFT_ARRIVING" }
        }
        RedirectHook::Leaving => {
            IptablesChain { table: "nat", hook: "OUTPUT", name: "WEFT_LEAVING" }
        }
        RedirectHook::Answers => {
            IptablesChain { table: "mangle", hook: "PREROUTING", name: "WEFT_ANSWERS" }
        }
        RedirectHook::ArrivingUdp => {
            IptablesChain { table: "mangle", hook: "PREROUTING", name: "WEFT_ARRIVING_UDP" }
        }
        RedirectHook::LeavingUdp => {
            IptablesChain { table: "mangle", hook: "OUTPUT", name: "WEFT_LEAVING_UDP" }
        }
        RedirectHook::ArrivingStrict => {
            IptablesChain { table: "filter", hook: "INPUT", name: "WEFT_ARRIVING_STRICT" }
        }
        RedirectHook::LeavingStrict => {
            IptablesChain { table: "filter", hook: "OUTPUT", name: "WEFT_LEAVING_STRICT" }
        }
    }
}

/// The desired chains for an address family, each with its rules as text.
pub(super) fn chains(
    redirect: &RedirectConfig,
    family: IpFamily,
    generation: u64,
) -> Vec<(IptablesChain, Vec<String>)> {
    let comment = format!("-m comment --comment \"{}\"", redirect.comment(generation));
    let chains = desired(redirect).into_iter();
    chains
        .map(|chain| {
            let applies = |rule: &&RedirectRule| {
                rule.matches
                    .iter()
                    .all(|condition| condition.family().is_none_or(|own| own == family))
            };
            let rules = chain.rules.iter().filter(applies).map(render_rule);
            (iptables_chain(chain.place), [comment.clone()].into_iter().chain(rules).collect())
        })
        .collect()
}

/// The text for `iptables-restore --noflush`. Declaring a chain empties it, so the text replaces existing
/// rules. `jumps` are the chains that no built-in chain jumps to yet.
pub(super) fn render(
    redirect: &RedirectConfig,
    family: IpFamily,
    generation: u64,
    jumps: &[IptablesChain],
) -> String {
    let mut text = String::new();
    for table in TABLES {
        let all = chains(redirect, family, generation).into_iter();
        let here: Vec<_> = all.filter(|(chain, _)| chain.table == table).collect();
        if here.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for (IptablesChain { name, .. }, _) in &here {
            text += &format!(":{name} - [0:0]\n");
        }
        for (chain, rules) in &here {
            for rule in rules {
                text += &format!("-A {} {rule}\n", chain.name);
            }
            if jumps.contains(chain) {
                text += &format!("-I {} 1 -j {}\n", chain.hook, chain.name);
            }
        }
        text += "COMMIT\n";
    }
    text
}

/// The text that deletes existing chains and the jumps to them.
pub(super) fn render_removal(present: &[IptablesChain]) -> String {
    let mut text = String::new();
    for table in TABLES {
        let here: Vec<_> = present.iter().filter(|chain| chain.table == table).collect();
        if here.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for IptablesChain { hook, name, .. } in here {
            text += &format!("-D {hook} -j {name}\n-F {name}\n-X {name}\n");
        }
        text += "COMMIT\n";
    }
    text
}

fn render_rule(rule: &RedirectRule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(render_match).collect();
    words.push(match rule.action {
        RuleAction::Return => "-j RETURN".to_owned(),
        RuleAction::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        RuleAction::Mark(mark) => format!("-j MARK --set-xmark {mark:#x}/{MARK_MASK:#x}"),
        RuleAction::Drop => "-j DROP".to_owned(),
        RuleAction::Tproxy(port) => {
            format!(
                "-j TPROXY --on-port {port} --tproxy-mark {LOCAL_DELIVERY_MARK:#x}/{MARK_MASK:#x}"
            )
        }
    });
    words.join(" ")
}

fn render_match(condition: &RuleMatch) -> String {
    match condition {
        RuleMatch::Mark(mark) => format!("-m mark --mark {mark:#x}/{MARK_MASK:#x}"),
        RuleMatch::User(user) => format!("-m owner --uid-owner {user}"),
        RuleMatch::LocalDestination(true) => "-m addrtype --dst-type LOCAL".to_owned(),
        RuleMatch::LocalDestination(false) => "-m addrtype ! --dst-type LOCAL".to_owned(),
        RuleMatch::Destination(range) => format!("-d {range}"),
        RuleMatch::Protocol(transport) => format!("-p {}", transport.word()),
        RuleMatch::Port(transport, ports) => {
            format!("-p {} --dport {}:{}", transport.word(), ports.start(), ports.end())
        }
        RuleMatch::InputInterface(name, true) => format!("-i {name}"),
        RuleMatch::InputInterface(name, false) => format!("! -i {name}"),
        RuleMatch::OutputInterface(name) => format!("-o {name}"),
        RuleMatch::TransparentSocket => "-m socket --transparent".to_owned(),
        RuleMatch::Reply => "-m conntrack --ctdir REPLY".to_owned(),
        RuleMatch::Related => "-m conntrack --ctstate RELATED".to_owned(),
        RuleMatch::Icmpv6 { kind, hop_limit } => {
            format!("-p icmpv6 --icmpv6-type {kind} -m hl --hl-eq {hop_limit}")
        }
    }
}
