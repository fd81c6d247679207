//! Installs, verifies and removes, by the kernel or by a tool, in any network namespace.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::SockProtocol;

use super::iptables::IptablesChain;
use super::{
    IpFamily, LOCAL_DELIVERY_MARK, MARK_MASK, ROUTE_TABLE, RedirectConfig, generation, iptables,
    native, nft, rules,
};
use crate::kernel::remove_services;
use crate::netlink::route::{self, MarkedRoute};
use crate::netlink::{Netlink, nf_tables};

/// What installs rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectBackend {
    /// The kernel's nf_tables, told by ourselves.
    Native,
    /// The same, told by `nft`.
    Nft,
    /// `iptables-restore` and `ip6tables-restore`.
    Iptables,
}

/// What is to install them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// The kernel's nf_tables; iptables where the kernel has none.
    #[default]
    Auto,
    /// This one.
    Only(RedirectBackend),
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Namespace {
    /// The one we are in.
    #[default]
    Own,
    /// The one behind a file, such as `/run/netns/web` or `/proc/42/ns/net`.
    At(PathBuf),
}

/// What is installed, compared with what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedirectState {
    /// It is just that.
    InSync,
    /// Nothing of ours is there.
    NotInstalled,
    /// Something else is there: in what it differs.
    Drifted(Vec<String>),
}

impl RedirectState {
    /// The verdict on something that is there.
    pub(super) fn of(differences: Vec<String>) -> Self {
        if differences.is_empty() { Self::InSync } else { Self::Drifted(differences) }
    }
}

/// Why rules could not be installed, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The host has nothing that could do it.
    #[error(
        "this kernel has no nf_tables, and iptables is not installed: apt-get install iptables"
    )]
    NoBackend,
    /// The kernel refused.
    #[error("{doing}: {reason}{}", hint(.reason))]
    Kernel {
        /// What it was asked to do.
        doing: &'static str,
        /// Why not.
        reason: std::io::Error,
    },
    /// The chosen tool is not there.
    #[error("{0} is not installed; install it, or choose --backend auto")]
    Missing(&'static str),
    /// What is wanted cannot be done.
    #[error("{0}")]
    Invalid(String),
    /// The namespace cannot be entered.
    #[error("network namespace {path}: {reason}", path = .path.display())]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nobody answers DNS where it is to be handed over.
    #[error(
        "nobody answers DNS at port {0} of loopback there, and programs would be without; start the server first, or use weft redirect guard, which waits for it"
    )]
    NoDns(u16),
    /// A tool failed.
    #[error("{command} failed: {output}")]
    Failed {
        /// What was run.
        command: String,
        /// What it said.
        output: String,
    },
}

impl BackendChoice {
    /// The tool this host has.
    ///
    /// # Errors
    /// When it has none, or not the one that was chosen.
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
                    Err(RedirectError::Kernel { doing: "talking to the packet filter", reason })
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

/// What to do about the kernel's refusal, where that can be told.
fn hint(reason: &std::io::Error) -> &'static str {
    match reason.kind() {
        ErrorKind::PermissionDenied => "; it takes the capability NET_ADMIN",
        ErrorKind::NetworkDown => "; its loopback device is down: ip link set lo up",
        ErrorKind::NotFound => {
            "; a module of the kernel is missing, such as nft_redir or nft_tproxy"
        }
        _ => "",
    }
}

impl fmt::Display for RedirectBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "the kernel",
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        })
    }
}

/// What would be installed, as text for the tool; for the kernel, as text for `nft`.
///
/// # Errors
/// When it cannot be done.
pub fn plan(redirect: &RedirectConfig, backend: RedirectBackend) -> Result<String, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    Ok(match backend {
        RedirectBackend::Native | RedirectBackend::Nft => nft::render(redirect, 1),
        RedirectBackend::Iptables => {
            let text = |tool, family| {
                format!("# {tool}\n{}", iptables::render(redirect, family, 1, &iptables::ALL))
            };
            text("iptables-restore --noflush", IpFamily::V4)
                + &text("ip6tables-restore --noflush", IpFamily::V6)
        }
    })
}

/// Installs it, replacing what was there.
///
/// # Errors
/// What failed; what was there before is then still in force.
pub fn apply(
    redirect: &RedirectConfig,
    backend: RedirectBackend,
    namespace: &Namespace,
) -> Result<(), RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    in_namespace(namespace, || {
        if redirect.needs_marked_route() {
            MARKED_ROUTE.install().map_err(kernel("routing marked packets"))?;
        }
        let generation = || native::installed_generation().map_or(1, |generation| generation + 1);
        match backend {
            RedirectBackend::Native => {
                native::apply(redirect, generation()).map_err(kernel("installing the rules"))?;
            }
            RedirectBackend::Nft => {
                drop(feed("nft", &["-f", "-"], &nft::render(redirect, generation()))?);
            }
            RedirectBackend::Iptables => apply_iptables(redirect)?,
        }
        // What another backend installed earlier would take the same packets. It goes last, so that
        // none passes in between.
        match backend {
            RedirectBackend::Native | RedirectBackend::Nft if is_in_iptables() => remove_iptables(),
            RedirectBackend::Iptables if native::probe().is_ok() => {
                native::remove().map_err(kernel("removing the earlier rules"))
            }
            RedirectBackend::Native | RedirectBackend::Nft | RedirectBackend::Iptables => Ok(()),
        }
    })
}

/// Compares what is installed with what is wanted.
///
/// # Errors
/// When it cannot be read.
pub fn verify(
    redirect: &RedirectConfig,
    backend: RedirectBackend,
    namespace: &Namespace,
) -> Result<RedirectState, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    in_namespace(namespace, || {
        let rules = match backend {
            RedirectBackend::Native => {
                native::verify(redirect).map_err(kernel("reading the rules"))?
            }
            RedirectBackend::Nft => verify_nft(redirect),
            RedirectBackend::Iptables => verify_iptables(redirect),
        };
        let missing = match redirect.needs_marked_route() {
            true => MARKED_ROUTE.missing().map_err(kernel("reading the routes"))?,
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

/// How many packets strict rules of nf_tables have dropped since they were installed.
///
/// # Errors
/// When they cannot be read.
pub(super) fn dropped(namespace: &Namespace) -> Result<u64, RedirectError> {
    in_namespace(namespace, || native::dropped().map_err(kernel("reading the rules")))
}

/// Removes all of ours, whatever installed it, services that an agent left to the kernel among it.
/// Removing nothing is no mistake.
///
/// # Errors
/// What failed.
pub fn remove_all(namespace: &Namespace) -> Result<(), RedirectError> {
    remove(namespace)?;
    in_namespace(namespace, || match native::probe() {
        Ok(()) => remove_services().map_err(kernel("removing the services")),
        // Without nf_tables there are none.
        Err(_) => Ok(()),
    })
}

/// Removes all redirects, whatever installed them. Removing nothing is no mistake.
///
/// # Errors
/// What failed.
pub fn remove(namespace: &Namespace) -> Result<(), RedirectError> {
    in_namespace(namespace, || {
        match BackendChoice::Auto.resolve()? {
            RedirectBackend::Native => native::remove().map_err(kernel("removing the rules"))?,
            // Without nf_tables there is no such table.
            RedirectBackend::Nft | RedirectBackend::Iptables => {}
        }
        if is_in_iptables() {
            remove_iptables()?;
        }
        MARKED_ROUTE.remove().map_err(kernel("removing the route of marked packets"))
    })
}

/// Opens the connections over which the kernel tells that something of a wish may have changed. They
/// stay in the namespace.
pub(super) fn listen(
    redirect: &RedirectConfig,
    namespace: &Namespace,
) -> Result<Vec<Netlink>, RedirectError> {
    in_namespace(namespace, || {
        let mut parts = vec![(SockProtocol::NetlinkNetFilter, nf_tables::CHANGES)];
        if redirect.needs_marked_route() {
            parts.push((SockProtocol::NetlinkRoute, route::CHANGES));
        }
        let listen = |(part, groups)| match Netlink::listen(part, groups) {
            // A kernel without nf_tables; what iptables does there is not told.
            Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => None,
            listening => Some(listening),
        };
        let listening: Result<_, _> = parts.into_iter().filter_map(listen).collect();
        listening.map_err(kernel("listening to changes"))
    })
}

/// Runs `work` on a thread that has entered the namespace. Children of that thread are in it too.
pub(super) fn in_namespace<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> Result<T, RedirectError> + Send,
) -> Result<T, RedirectError> {
    let Namespace::At(path) = namespace else {
        return work();
    };
    let fail = |reason: String| RedirectError::Namespace { path: path.clone(), reason };
    let file = File::open(path).map_err(|error| fail(error.to_string()))?;
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| fail(error.to_string()))?;
            work()
        });
        entered.join().unwrap_or_else(|_| Err(fail("the thread that entered it failed".into())))
    })
}

fn apply_iptables(redirect: &RedirectConfig) -> Result<(), RedirectError> {
    for family in IpFamily::BOTH {
        let (list, restore) = iptables_tools(family);
        let generation = installed_generation(list) + 1;
        // Chains of an earlier wish that this one does not have go first.
        let wanted: Vec<IptablesChain> = iptables::chains(redirect, family, generation)
            .iter()
            .map(|(chain, _)| *chain)
            .collect();
        let stale: Vec<IptablesChain> =
            present_chains(list).into_iter().filter(|chain| !wanted.contains(chain)).collect();
        if !stale.is_empty() {
            feed(restore, &RESTORE, &iptables::render_removal(&stale))?;
        }
        let jumps: Vec<IptablesChain> =
            iptables::ALL.into_iter().filter(|chain| !has_jump(list, *chain)).collect();
        feed(restore, &RESTORE, &iptables::render(redirect, family, generation, &jumps))?;
    }
    Ok(())
}

/// The generation of the chains that are there; 0 when none is.
fn installed_generation(list: &str) -> u64 {
    let mut spots = iptables::ALL.into_iter();
    let listing =
        spots.find_map(|chain| run(list, &[WAIT, "-t", chain.table, "-S", chain.name]).ok());
    listing.map_or(0, |listing| generation(&listing))
}

/// Whether iptables may hold chains of ours: those of the newer one are the kernel's nf_tables, those
/// of the older one are in tables that the kernel lists.
pub(crate) fn is_in_iptables() -> bool {
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
            feed(restore, &RESTORE, &iptables::render_removal(&present))?;
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
    run(list, &[WAIT, "-t", table, "-C", hook, "-j", name]).is_ok()
}

fn verify_nft(redirect: &RedirectConfig) -> RedirectState {
    let Ok(listing) = run("nft", &["-s", "list", "table", "inet", nft::TABLE]) else {
        return RedirectState::NotInstalled;
    };
    let comment = listing.lines().find_map(|line| line.trim().strip_prefix("comment "));
    let mut differences = Vec::new();
    if !comment.is_some_and(|comment| redirect.matches_comment(comment)) {
        let is = comment.unwrap_or("missing");
        differences.push(format!("its comment is {is}, not {:?}", redirect.comment(1)));
    }
    for chain in rules::chains(redirect) {
        let name = nft::name(chain.place);
        // Sets in a rule end with a brace too, so lines are counted up to the chain's own.
        let there = listing
            .lines()
            .skip_while(|line| line.trim() != format!("chain {name} {{"))
            .skip(2)
            .take_while(|line| line.trim() != "}")
            .count();
        if there != chain.rules.len() {
            differences.push(format!("chain {name} has {there} rules, not {}", chain.rules.len()));
        }
    }
    RedirectState::of(differences)
}

fn verify_iptables(redirect: &RedirectConfig) -> RedirectState {
    let mut absent = 0;
    let mut wanted = 0;
    let mut differences = Vec::new();
    for family in IpFamily::BOTH {
        let (list, _) = iptables_tools(family);
        for (chain, rules) in iptables::chains(redirect, family, 1) {
            wanted += 1;
            let IptablesChain { table, hook, name } = chain;
            let Ok(listing) = run(list, &[WAIT, "-t", table, "-S", name]) else {
                absent += 1;
                differences.push(format!("{list} has no chain {name}"));
                continue;
            };
            let there = listing.lines().filter(|line| line.starts_with("-A")).count();
            if !redirect.matches_comment(&listing) || there != rules.len() {
                differences.push(format!("{list} chain {name} holds other rules"));
            }
            if !has_jump(list, chain) {
                differences.push(format!("{list} {hook} does not jump to {name}"));
            }
        }
    }
    if absent == wanted { RedirectState::NotInstalled } else { RedirectState::of(differences) }
}

/// Marked packets are delivered to this host, whatever their destination.
const MARKED_ROUTE: MarkedRoute = MarkedRoute {
    mark: LOCAL_DELIVERY_MARK,
    mask: MARK_MASK,
    table: ROUTE_TABLE,
    priority: 15_099,
};

/// How long iptables waits for somebody else who changes its rules. One that waits for ever would
/// hold up all other namespaces.
const WAIT: &str = "--wait=5";
const RESTORE: [&str; 2] = ["--noflush", WAIT];

pub(super) fn kernel(doing: &'static str) -> impl FnOnce(std::io::Error) -> RedirectError {
    move |reason| RedirectError::Kernel { doing, reason }
}

fn run(tool: &str, arguments: &[&str]) -> Result<String, RedirectError> {
    feed(tool, arguments, "")
}

fn feed(tool: &str, arguments: &[&str], input: &str) -> Result<String, RedirectError> {
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
        // A tool that fails early closes its input; its exit status tells why.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
