//! The rules for `iptables-restore`, where nft is missing: chains of our own in the tables that
//! are there, one transaction a family.

use super::{Chain, Family, MARK_MASK, Redirect, UDP_MARK};

/// A chain of ours, and the built-in chain that jumps to it.
pub(super) struct Hooked {
    pub(super) table: &'static str,
    pub(super) chain: Chain,
}

/// The text for `iptables-restore --noflush`. Declaring a chain empties it, so it replaces what was
/// there. `jumps` are the chains that are not jumped to yet.
pub(super) fn render(redirect: &Redirect, family: Family, jumps: &[&str]) -> String {
    let mut text = String::new();
    for table in ["nat", "mangle"] {
        let hooked: Vec<Hooked> =
            chains(redirect, family).into_iter().filter(|h| h.table == table).collect();
        if hooked.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for Hooked { chain, .. } in &hooked {
            text += &format!(":{} - [0:0]\n", chain.name);
        }
        for Hooked { chain, .. } in &hooked {
            for rule in &chain.rules {
                text += &format!("-A {} {rule}\n", chain.name);
            }
            if jumps.contains(&chain.name) {
                text += &format!("-I {} 1 -j {}\n", chain.hook, chain.name);
            }
        }
        text += "COMMIT\n";
    }
    text
}

/// The text that removes the chains that `present` names with the jumps to them.
pub(super) fn render_removal(present: &[(&'static str, &'static str, &'static str)]) -> String {
    let mut text = String::new();
    for table in ["nat", "mangle"] {
        let here: Vec<_> = present.iter().filter(|(t, _, _)| *t == table).collect();
        if here.is_empty() {
            continue;
        }
        text += &format!("*{table}\n");
        for (_, hook, chain) in &here {
            text += &format!("-D {hook} -j {chain}\n-F {chain}\n-X {chain}\n");
        }
        text += "COMMIT\n";
    }
    text
}

/// Every chain that this renderer may have made: table, hook, name.
pub(super) const ALL: [(&str, &str, &str); 4] = [
    ("nat", "PREROUTING", "WEFT_ARRIVING"),
    ("nat", "OUTPUT", "WEFT_LEAVING"),
    ("mangle", "PREROUTING", "WEFT_ARRIVING_UDP"),
    ("mangle", "OUTPUT", "WEFT_LEAVING_UDP"),
];

/// The chains that are wanted for a family.
pub(super) fn chains(redirect: &Redirect, family: Family) -> Vec<Hooked> {
    let rules = [
        arriving(redirect, family),
        leaving(redirect, family),
        arriving_udp(redirect, family),
        leaving_udp(redirect, family),
    ];
    ALL.into_iter()
        .zip(rules)
        .filter(|(_, rules)| !rules.is_empty())
        .map(|((table, hook, name), rules)| {
            let comment = format!("-m comment --comment \"{}\"", redirect.comment());
            Hooked { table, chain: Chain { name, hook, rules: [vec![comment], rules].concat() } }
        })
        .collect()
}

fn arriving(redirect: &Redirect, family: Family) -> Vec<String> {
    if redirect.inbound.is_none() && redirect.forwarded.is_none() {
        return Vec::new();
    }
    let mut rules = vec!["-i lo -j RETURN".to_owned()];
    if let Some(port) = redirect.forwarded {
        for service in redirect.services_of(family) {
            rules.push(format!("-d {service} -p tcp -j REDIRECT --to-ports {port}"));
        }
    }
    if let Some(port) = redirect.inbound {
        let (first, last) = Redirect::OWN_PORTS;
        rules.push("-m addrtype ! --dst-type LOCAL -j RETURN".to_owned());
        rules.push(format!("-p tcp --dport {first}:{last} -j RETURN"));
        for excluded in &redirect.exclude_inbound_ports {
            rules.push(format!("-p tcp --dport {excluded} -j RETURN"));
        }
        rules.push(format!("-p tcp -j REDIRECT --to-ports {port}"));
    }
    rules
}

fn leaving(redirect: &Redirect, family: Family) -> Vec<String> {
    let Some(port) = redirect.outbound else {
        return Vec::new();
    };
    let mut rules = own(redirect);
    rules.push(match family {
        Family::V4 => "-d 127.0.0.0/8 -j RETURN".to_owned(),
        Family::V6 => "-d ::1/128 -j RETURN".to_owned(),
    });
    rules.push("-m addrtype --dst-type LOCAL -j RETURN".to_owned());
    for excluded in redirect.exclusions_of(family) {
        rules.push(format!("-d {excluded} -j RETURN"));
    }
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(format!("-p tcp --dport {excluded} -j RETURN"));
    }
    if redirect.services.is_empty() {
        rules.push(format!("-p tcp -j REDIRECT --to-ports {port}"));
    }
    for service in redirect.services_of(family) {
        rules.push(format!("-d {service} -p tcp -j REDIRECT --to-ports {port}"));
    }
    rules
}

fn arriving_udp(redirect: &Redirect, family: Family) -> Vec<String> {
    let Some(port) = redirect.udp else {
        return Vec::new();
    };
    let mut rules = Vec::new();
    if redirect.forwarded.is_some() {
        for service in redirect.services_of(family) {
            rules.push(format!(
                "! -i lo -d {service} -p udp -j MARK --set-xmark {UDP_MARK:#x}/{MARK_MASK:#x}"
            ));
        }
    }
    rules.push(format!(
        "-p udp -m mark --mark {UDP_MARK:#x}/{MARK_MASK:#x} -j TPROXY --on-port {port} --tproxy-mark {UDP_MARK:#x}/{MARK_MASK:#x}"
    ));
    rules
}

fn leaving_udp(redirect: &Redirect, family: Family) -> Vec<String> {
    if redirect.udp.is_none() {
        return Vec::new();
    }
    let mut rules = own(redirect);
    for service in redirect.services_of(family) {
        rules.push(format!("-d {service} -p udp -j MARK --set-xmark {UDP_MARK:#x}/{MARK_MASK:#x}"));
    }
    rules
}

/// What breaks loops: the mark first, the user second.
fn own(redirect: &Redirect) -> Vec<String> {
    let mut rules = vec![format!("-m mark --mark {:#x}/{MARK_MASK:#x} -j RETURN", redirect.mark)];
    if let Some(uid) = redirect.uid {
        rules.push(format!("-m owner --uid-owner {uid} -j RETURN"));
    }
    rules
}
