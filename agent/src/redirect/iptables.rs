//! The rules as text for `iptables-restore`: chains of our own in the tables that are there, one
//! transaction a family.

use super::rules::{Action, Match, Place, Rule, chains as wanted};
use super::{Family, HERE_MARK, MARK_MASK, Redirect};

/// Where a chain of ours is, and what jumps to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) table: &'static str,
    /// The built-in chain that jumps to it.
    pub(super) hook: &'static str,
    pub(super) name: &'static str,
}

/// Every chain that this renderer may have made.
pub(super) const ALL: [Spot; 7] = [
    spot(Place::Arriving),
    spot(Place::Leaving),
    spot(Place::Answers),
    spot(Place::ArrivingUdp),
    spot(Place::LeavingUdp),
    spot(Place::ArrivingStrict),
    spot(Place::LeavingStrict),
];

/// The tables that hold them, in the order in which they are filled.
const TABLES: [&str; 3] = ["nat", "mangle", "filter"];

const fn spot(place: Place) -> Spot {
    match place {
        Place::Arriving => Spot { table: "nat", hook: "PREROUTING", name: "WEFT_ARRIVING" },
        Place::Leaving => Spot { table: "nat", hook: "OUTPUT", name: "WEFT_LEAVING" },
        Place::Answers => Spot { table: "mangle", hook: "PREROUTING", name: "WEFT_ANSWERS" },
        Place::ArrivingUdp => {
            Spot { table: "mangle", hook: "PREROUTING", name: "WEFT_ARRIVING_UDP" }
        }
        Place::LeavingUdp => Spot { table: "mangle", hook: "OUTPUT", name: "WEFT_LEAVING_UDP" },
        Place::ArrivingStrict => {
            Spot { table: "filter", hook: "INPUT", name: "WEFT_ARRIVING_STRICT" }
        }
        Place::LeavingStrict => {
            Spot { table: "filter", hook: "OUTPUT", name: "WEFT_LEAVING_STRICT" }
        }
    }
}

/// The chains that are wanted for a family, each with its rules as text.
pub(super) fn chains(
    redirect: &Redirect,
    family: Family,
    generation: u64,
) -> Vec<(Spot, Vec<String>)> {
    let comment = format!("-m comment --comment \"{}\"", redirect.comment(generation));
    let chains = wanted(redirect).into_iter();
    chains
        .map(|chain| {
            let applies = |rule: &&Rule| {
                rule.matches.iter().all(|asked| asked.family().is_none_or(|own| own == family))
            };
            let rules = chain.rules.iter().filter(applies).map(render_rule);
            (spot(chain.place), [comment.clone()].into_iter().chain(rules).collect())
        })
        .collect()
}

/// The text for `iptables-restore --noflush`. Declaring a chain empties it, so it replaces what was
/// there. `jumps` are the chains that are not jumped to yet.
pub(super) fn render(
    redirect: &Redirect,
    family: Family,
    generation: u64,
    jumps: &[Spot],
) -> String {
    let mut text = String::new();
    for table in TABLES {
        let all = chains(redirect, family, generation).into_iter();
        let here: Vec<_> = all.filter(|(spot, _)| spot.table == table).collect();
        if here.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for (Spot { name, .. }, _) in &here {
            text += &format!(":{name} - [0:0]\n");
        }
        for (spot, rules) in &here {
            for rule in rules {
                text += &format!("-A {} {rule}\n", spot.name);
            }
            if jumps.contains(spot) {
                text += &format!("-I {} 1 -j {}\n", spot.hook, spot.name);
            }
        }
        text += "COMMIT\n";
    }
    text
}

/// The text that removes chains that are there, with the jumps to them.
pub(super) fn render_removal(present: &[Spot]) -> String {
    let mut text = String::new();
    for table in TABLES {
        let here: Vec<_> = present.iter().filter(|spot| spot.table == table).collect();
        if here.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for Spot { hook, name, .. } in here {
            text += &format!("-D {hook} -j {name}\n-F {name}\n-X {name}\n");
        }
        text += "COMMIT\n";
    }
    text
}

fn render_rule(rule: &Rule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(render_match).collect();
    words.push(match rule.action {
        Action::Return => "-j RETURN".to_owned(),
        Action::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        Action::Mark(mark) => format!("-j MARK --set-xmark {mark:#x}/{MARK_MASK:#x}"),
        Action::Drop => "-j DROP".to_owned(),
        Action::HandTo(port) => {
            format!("-j TPROXY --on-port {port} --tproxy-mark {HERE_MARK:#x}/{MARK_MASK:#x}")
        }
    });
    words.join(" ")
}

fn render_match(asked: &Match) -> String {
    match asked {
        Match::Mark(mark) => format!("-m mark --mark {mark:#x}/{MARK_MASK:#x}"),
        Match::User(user) => format!("-m owner --uid-owner {user}"),
        Match::ToThisHost(true) => "-m addrtype --dst-type LOCAL".to_owned(),
        Match::ToThisHost(false) => "-m addrtype ! --dst-type LOCAL".to_owned(),
        Match::To(range) => format!("-d {range}"),
        Match::Over(transport) => format!("-p {}", transport.word()),
        Match::Port(transport, ports) => {
            format!("-p {} --dport {}:{}", transport.word(), ports.start(), ports.end())
        }
        Match::FromInterface(name, true) => format!("-i {name}"),
        Match::FromInterface(name, false) => format!("! -i {name}"),
        Match::ToInterface(name) => format!("-o {name}"),
        Match::ForTransparentSocket => "-m socket --transparent".to_owned(),
        Match::Reply => "-m conntrack --ctdir REPLY".to_owned(),
        Match::Related => "-m conntrack --ctstate RELATED".to_owned(),
        Match::Icmpv6 { kind, hop_limit } => {
            format!("-p icmpv6 --icmpv6-type {kind} -m hl --hl-eq {hop_limit}")
        }
    }
}
