//! Installs, verifies and removes rules, in the kernel or with a tool, in any network namespace.

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::comment::generation;
use super::config::{IpFamily, LOCAL_DELIVERY_MARK, MARK_MASK, ROUTE_TABLE, RedirectConfig};
use super::iptables::IptablesChain;
use super::namespace::{Namespace, in_namespace};
use super::types::{BackendChoice, RedirectBackend, RedirectError, RedirectState, kernel_error};
use super::{iptables, native, nft, rules};
use crate::netlink::route::{self, MarkedRoute};
use crate::netlink::{Netlink, nf_tables};

impl BackendChoice {
    /// Selects a backend that this host has.
    ///
    /// # Errors
    /// When the host has no backend, or not the selected one, or this process may not use nf_tables.
    pub fn resolve(self) -> Result<RedirectBackend, RedirectError> {
        let has = |tool: &str| {
            Command::new(tool)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        };
        match self {
            Self::Auto => match native::probe() {
                Ok(()) => Ok(RedirectBackend::Native),
                Err(reason) if reason.kind() == ErrorKind::PermissionDenied => {
                    Err(RedirectError::Kernel { doing: "opening the packet filter", reason })
                }
                Err(_) if has("iptables-restore") => Ok(RedirectBackend::Iptables),
                Err(_) => Err(RedirectError::NoBackend),
            },
            Self::Only(RedirectBackend::Native) => Ok(RedirectBackend::Native),
            Self::Only(RedirectBackend::Nft) if has("nft") => Ok(RedirectBackend::Nft),
            Self::Only(RedirectBackend::Nft) => Err(RedirectError::Missing("nft")),
            Self::Only(RedirectBackend::Iptables) if has("iptables-restore") => {
                Ok(RedirectBackend::Iptables)
            }
            Self::Only(RedirectBackend::Iptables) => {
                Err(RedirectError::Missing("iptables-restore"))
            }
        }
    }
}

/// Renders the rules that would be installed, as text for the tool; for the kernel backend, as text for `nft`.
///
/// # Errors
/// When the configuration is invalid.
pub fn plan(redirect: &RedirectConfig, backend: RedirectBackend) -> Result<String, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    Ok(match backend {
        RedirectBackend::Native | RedirectBackend::Nft => {
            nft::render(redirect, &redirect.comment(1))
        }
        RedirectBackend::Iptables => {
            let text = |tool, family| {
                format!("# {tool}\n{}", iptables::render(redirect, family, 1, &iptables::ALL))
            };
            text("iptables-restore --noflush", IpFamily::V4)
                + &text("ip6tables-restore --noflush", IpFamily::V6)
        }
    })
}

/// Installs the rules, replacing existing ones.
///
/// # Errors
/// The operation that failed; existing rules then stay in force.
pub fn apply(
    redirect: &RedirectConfig,
    backend: RedirectBackend,
    namespace: &Namespace,
) -> Result<(), RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    in_namespace(namespace, || {
        if redirect.needs_marked_route() {
            MARKED_ROUTE
                .install()
                .map_err(kernel_error("installing the route of marked packets"))?;
        }
        let generation = || native::installed_generation().map_or(1, |generation| generation + 1);
        match backend {
            RedirectBackend::Native => {
                native::apply(redirect, generation())
                    .map_err(kernel_error("installing the rules"))?;
            }
            RedirectBackend::Nft => {
                drop(run_tool_with_input(
                    "nft",
                    &["-f", "-"],
                    &nft::render(redirect, &redirect.comment(generation())),
                )?);
            }
            RedirectBackend::Iptables => apply_iptables(redirect)?,
        }
        // Rules that another backend installed earlier would capture the same packets. They are removed last,
        // so no packet escapes in between.
        match backend {
            RedirectBackend::Native | RedirectBackend::Nft if may_have_iptables_rules() => {
                remove_iptables()
            }
            RedirectBackend::Iptables if has_nf_tables() => {
                native::remove().map_err(kernel_error("removing the earlier rules"))
            }
            RedirectBackend::Native | RedirectBackend::Nft | RedirectBackend::Iptables => Ok(()),
        }
    })
}

/// Compares the installed rules with the desired ones.
///
/// # Errors
/// When the installed rules cannot be read.
pub fn verify(
    redirect: &RedirectConfig,
    backend: RedirectBackend,
    namespace: &Namespace,
) -> Result<RedirectState, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    in_namespace(namespace, || {
        let rules = match backend {
            RedirectBackend::Native => {
                native::verify(redirect).map_err(kernel_error("reading the rules"))?
            }
            RedirectBackend::Nft => verify_nft(redirect),
            RedirectBackend::Iptables => verify_iptables(redirect),
        };
        let missing = match redirect.needs_marked_route() {
            true => MARKED_ROUTE.missing().map_err(kernel_error("reading the routes"))?,
            false => Vec::new(),
        };
        Ok(match rules {
            RedirectState::NotInstalled => RedirectState::NotInstalled,
            RedirectState::InSync => RedirectState::of(missing),
            RedirectState::Drifted(differences) => {
                RedirectState::of([differences, missing].concat())
            }
        })
    })
}

/// The number of packets that strict rules of nf_tables have dropped since they were installed.
///
/// # Errors
/// When the rules cannot be read.
pub(super) fn dropped_packets(namespace: &Namespace) -> Result<u64, RedirectError> {
    in_namespace(namespace, || native::dropped_packets().map_err(kernel_error("reading the rules")))
}

/// Removes all redirects, by any backend. Removing what does not exist is not an error.
///
/// # Errors
/// The operation that failed.
pub fn remove(namespace: &Namespace) -> Result<(), RedirectError> {
    in_namespace(namespace, || {
        match BackendChoice::Auto.resolve()? {
            RedirectBackend::Native => {
                native::remove().map_err(kernel_error("removing the rules"))?
            }
            // Without nf_tables the table cannot exist.
            RedirectBackend::Nft | RedirectBackend::Iptables => {}
        }
        if may_have_iptables_rules() {
            remove_iptables()?;
        }
        MARKED_ROUTE.remove().map_err(kernel_error("removing the route of marked packets"))
    })
}

/// Opens the sockets for notifications about changes that may affect the redirects. They stay in the namespace.
pub(super) fn subscribe(
    redirect: &RedirectConfig,
    namespace: &Namespace,
) -> Result<Vec<Netlink>, RedirectError> {
    in_namespace(namespace, || {
        let mut parts = vec![(SockProtocol::NetlinkNetFilter, nf_tables::CHANGES)];
        if redirect.needs_marked_route() {
            parts.push((SockProtocol::NetlinkRoute, route::CHANGES));
        }
        let subscribe = |(part, groups)| match Netlink::listen(part, groups) {
            // The kernel has no nf_tables, and sends no notifications about legacy iptables.
            Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => None,
            listening => Some(listening),
        };
        let listening: Result<_, _> = parts.into_iter().filter_map(subscribe).collect();
        listening.map_err(kernel_error("subscribing to changes"))
    })
}

fn apply_iptables(redirect: &RedirectConfig) -> Result<(), RedirectError> {
    for family in IpFamily::BOTH {
        let (list, restore) = iptables_tools(family);
        let generation = installed_generation(list) + 1;
        // Chains of an earlier configuration that this one lacks are removed first.
        let desired: Vec<IptablesChain> = iptables::chains(redirect, family, generation)
            .iter()
            .map(|(chain, _)| *chain)
            .collect();
        let stale: Vec<IptablesChain> =
            present_chains(list).into_iter().filter(|chain| !desired.contains(chain)).collect();
        if !stale.is_empty() {
            run_tool_with_input(restore, &RESTORE, &iptables::render_removal(&stale))?;
        }
        let jumps: Vec<IptablesChain> =
            iptables::ALL.into_iter().filter(|chain| !has_jump(list, *chain)).collect();
        run_tool_with_input(
            restore,
            &RESTORE,
            &iptables::render(redirect, family, generation, &jumps),
        )?;
    }
    Ok(())
}

/// The generation of the installed chains; 0 when there is none.
fn installed_generation(list: &str) -> u64 {
    let mut spots = iptables::ALL.into_iter();
    let listing =
        spots.find_map(|chain| run_tool(list, &[WAIT, "-t", chain.table, "-S", chain.name]).ok());
    listing.map_or(0, |listing| generation(&listing))
}

/// Whether the kernel has nf_tables and this process may use it.
pub(crate) fn has_nf_tables() -> bool {
    native::probe().is_ok()
}

/// Whether iptables may have chains of ours. Chains of the nf_tables variant are visible in nf_tables, tables
/// of the legacy variant in procfs.
pub(crate) fn may_have_iptables_rules() -> bool {
    let lists_tables = |file| std::fs::read_to_string(file).is_ok_and(|text| !text.is_empty());
    native::has_chain(|name| iptables::ALL.iter().any(|chain| chain.name == name))
        || lists_tables("/proc/thread-self/net/ip_tables_names")
        || lists_tables("/proc/thread-self/net/ip6_tables_names")
}

fn remove_iptables() -> Result<(), RedirectError> {
    for family in IpFamily::BOTH {
        let (list, restore) = iptables_tools(family);
        let present = present_chains(list);
        if !present.is_empty() {
            run_tool_with_input(restore, &RESTORE, &iptables::render_removal(&present))?;
        }
    }
    Ok(())
}

fn iptables_tools(family: IpFamily) -> (&'static str, &'static str) {
    match family {
        IpFamily::V4 => ("iptables", "iptables-restore"),
        IpFamily::V6 => ("ip6tables", "ip6tables-restore"),
    }
}

fn present_chains(list: &str) -> Vec<IptablesChain> {
    iptables::ALL.into_iter().filter(|chain| has_jump(list, *chain)).collect()
}

fn has_jump(list: &str, IptablesChain { table, hook, name }: IptablesChain) -> bool {
    run_tool(list, &[WAIT, "-t", table, "-C", hook, "-j", name]).is_ok()
}

fn verify_nft(redirect: &RedirectConfig) -> RedirectState {
    let Ok(listing) = run_tool("nft", &["-s", "list", "table", "inet", nft::TABLE]) else {
        return RedirectState::NotInstalled;
    };
    let comment = listing.lines().find_map(|line| line.trim().strip_prefix("comment "));
    let mut differences = Vec::new();
    if !comment.is_some_and(|comment| redirect.matches_comment(comment)) {
        let is = comment.unwrap_or("missing");
        differences.push(format!("table comment is {is}, expected {:?}", redirect.comment(1)));
    }
    for chain in rules::chains(redirect) {
        let name = nft::name(chain.place);
        // Sets in a rule end with a brace too, so the count stops at the line of the chain's own brace.
        let there = listing
            .lines()
            .skip_while(|line| line.trim() != format!("chain {name} {{"))
            .skip(2)
            .take_while(|line| line.trim() != "}")
            .count();
        if there != chain.rules.len() {
            differences
                .push(format!("chain {name}: {there} rules, expected {}", chain.rules.len()));
        }
    }
    RedirectState::of(differences)
}

fn verify_iptables(redirect: &RedirectConfig) -> RedirectState {
    let mut absent = 0;
    let mut desired = 0;
    let mut differences = Vec::new();
    for family in IpFamily::BOTH {
        let (list, _) = iptables_tools(family);
        for (chain, rules) in iptables::chains(redirect, family, 1) {
            desired += 1;
            let IptablesChain { table, hook, name } = chain;
            let Ok(listing) = run_tool(list, &[WAIT, "-t", table, "-S", name]) else {
                absent += 1;
                differences.push(format!("{list}: chain {name} missing"));
                continue;
            };
            let there = listing.lines().filter(|line| line.starts_with("-A")).count();
            if !redirect.matches_comment(&listing) || there != rules.len() {
                differences.push(format!("{list}: chain {name} differs"));
            }
            if !has_jump(list, chain) {
                differences.push(format!("{list}: {hook} has no jump to {name}"));
            }
        }
    }
    if absent == desired { RedirectState::NotInstalled } else { RedirectState::of(differences) }
}

/// The route that delivers marked packets to this host, whatever their destination.
const MARKED_ROUTE: MarkedRoute = MarkedRoute {
    mark: LOCAL_DELIVERY_MARK,
    mask: MARK_MASK,
    table: ROUTE_TABLE,
    priority: 15_099,
};

/// How long iptables waits for another program's lock. Waiting forever would block the other namespaces.
const WAIT: &str = "--wait=5";
const RESTORE: [&str; 2] = ["--noflush", WAIT];

fn run_tool(tool: &str, arguments: &[&str]) -> Result<String, RedirectError> {
    run_tool_with_input(tool, arguments, "")
}

fn run_tool_with_input(
    tool: &str,
    arguments: &[&str],
    input: &str,
) -> Result<String, RedirectError> {
    let failed = |output: String| RedirectError::Failed {
        command: format!("{tool} {}", arguments.join(" ")),
        output,
    };
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that fails early closes its input; its exit status has the reason.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
