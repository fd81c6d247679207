//! Runs the tools: installs, verifies and removes, in any network namespace.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::{Family, MARK_MASK, ROUTE_TABLE, Redirect, UDP_MARK, iptables, nft};

/// A tool that installs rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `nft`.
    Nft,
    /// `iptables-restore` and `ip6tables-restore`.
    Iptables,
}

/// Which tool to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// nft where it is installed, iptables otherwise.
    #[default]
    Auto,
    /// This one.
    Only(Backend),
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Namespace {
    /// The one we are in.
    #[default]
    Own,
    /// The one behind a file, such as `/run/netns/web` or `/proc/42/ns/net`.
    At(PathBuf),
}

/// What is installed, compared with what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is just that.
    AsWanted,
    /// Nothing of ours is there.
    Absent,
    /// Something else is there.
    Differs(String),
}

/// Why rules could not be installed, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The host has no tool.
    #[error("neither nft nor iptables is installed; install one: apt-get install nftables")]
    NoTool,
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
    pub fn resolve(self) -> Result<Backend, RedirectError> {
        let has = |tool: &str| {
            Command::new(tool)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        };
        match self {
            Self::Auto if has("nft") => Ok(Backend::Nft),
            Self::Auto if has("iptables-restore") => Ok(Backend::Iptables),
            Self::Auto => Err(RedirectError::NoTool),
            Self::Only(Backend::Nft) if has("nft") => Ok(Backend::Nft),
            Self::Only(Backend::Nft) => Err(RedirectError::Missing("nft")),
            Self::Only(Backend::Iptables) if has("iptables-restore") => Ok(Backend::Iptables),
            Self::Only(Backend::Iptables) => Err(RedirectError::Missing("iptables-restore")),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        })
    }
}

/// What would be installed, as the tool's own text.
///
/// # Errors
/// When it cannot be done.
pub fn plan(redirect: &Redirect, backend: Backend) -> Result<String, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    Ok(match backend {
        Backend::Nft => nft::render(redirect),
        Backend::Iptables => {
            let all: Vec<&str> = iptables::ALL.iter().map(|(_, _, name)| *name).collect();
            let text =
                |tool, family| format!("# {tool}\n{}", iptables::render(redirect, family, &all));
            text("iptables-restore --noflush", Family::V4)
                + &text("ip6tables-restore --noflush", Family::V6)
        }
    })
}

/// Installs it, replacing what was there.
///
/// # Errors
/// What failed; what was there before is then still in force.
pub fn apply(
    redirect: &Redirect,
    backend: Backend,
    namespace: &Namespace,
) -> Result<(), RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    inside(namespace, || {
        if redirect.udp.is_some() {
            route_marked()?;
        }
        match backend {
            Backend::Nft => feed("nft", &["-f", "-"], &nft::render(redirect)).map(drop),
            Backend::Iptables => apply_iptables(redirect),
        }
    })
}

/// Compares what is installed with what is wanted.
///
/// # Errors
/// When it cannot be read.
pub fn verify(
    redirect: &Redirect,
    backend: Backend,
    namespace: &Namespace,
) -> Result<Verdict, RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    inside(namespace, || match backend {
        Backend::Nft => Ok(verify_nft(redirect)),
        Backend::Iptables => Ok(verify_iptables(redirect)),
    })
}

/// Removes all of ours, whichever tool installed it. Removing nothing is no mistake.
///
/// # Errors
/// What failed.
pub fn remove(namespace: &Namespace) -> Result<(), RedirectError> {
    inside(namespace, || {
        if BackendChoice::Only(Backend::Nft).resolve().is_ok() {
            feed("nft", &["-f", "-"], &nft::render_removal())?;
        }
        if BackendChoice::Only(Backend::Iptables).resolve().is_ok() {
            for family in Family::BOTH {
                let (list, restore) = iptables_tools(family);
                let present = present_chains(list);
                if !present.is_empty() {
                    feed(restore, &["--noflush", "-w"], &iptables::render_removal(&present))?;
                }
            }
        }
        unroute_marked();
        Ok(())
    })
}

/// Runs `work` on a thread that has entered the namespace. Children of that thread are in it too.
fn inside<T: Send>(
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

fn apply_iptables(redirect: &Redirect) -> Result<(), RedirectError> {
    for family in Family::BOTH {
        let (list, restore) = iptables_tools(family);
        // Chains of an earlier wish that this one does not have go first.
        let wanted: Vec<&str> =
            iptables::chains(redirect, family).iter().map(|hooked| hooked.chain.name).collect();
        let stale: Vec<_> = present_chains(list)
            .into_iter()
            .filter(|(_, _, name)| !wanted.contains(name))
            .collect();
        if !stale.is_empty() {
            feed(restore, &["--noflush", "-w"], &iptables::render_removal(&stale))?;
        }
        let jumps: Vec<&str> = iptables::ALL
            .iter()
            .filter(|(table, hook, name)| !has_jump(list, table, hook, name))
            .map(|(_, _, name)| *name)
            .collect();
        feed(restore, &["--noflush", "-w"], &iptables::render(redirect, family, &jumps))?;
    }
    Ok(())
}

fn iptables_tools(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("iptables", "iptables-restore"),
        Family::V6 => ("ip6tables", "ip6tables-restore"),
    }
}

fn present_chains(list: &str) -> Vec<(&'static str, &'static str, &'static str)> {
    iptables::ALL
        .into_iter()
        .filter(|(table, hook, name)| has_jump(list, table, hook, name))
        .collect()
}

fn has_jump(list: &str, table: &str, hook: &str, name: &str) -> bool {
    run(list, &["-w", "-t", table, "-C", hook, "-j", name]).is_ok()
}

fn verify_nft(redirect: &Redirect) -> Verdict {
    let Ok(listing) = run("nft", &["-s", "list", "table", "inet", nft::TABLE]) else {
        return Verdict::Absent;
    };
    let comment = listing.lines().find_map(|line| line.trim().strip_prefix("comment "));
    let wanted = format!("\"{}\"", redirect.comment());
    if comment != Some(wanted.as_str()) {
        return Verdict::Differs(format!(
            "its comment is {}, not {wanted}",
            comment.unwrap_or("missing")
        ));
    }
    for chain in nft::chains(redirect) {
        let here = listing
            .split(&format!("chain {} {{", chain.name))
            .nth(1)
            .and_then(|rest| rest.split('}').next());
        // Sets in a rule end with a brace too, so lines are counted up to the chain's own.
        let rules = listing
            .lines()
            .skip_while(|line| line.trim() != format!("chain {} {{", chain.name))
            .skip(2)
            .take_while(|line| line.trim() != "}")
            .count();
        if here.is_none() || rules != chain.rules.len() {
            return Verdict::Differs(format!(
                "chain {} has {rules} rules, not {}",
                chain.name,
                chain.rules.len()
            ));
        }
    }
    Verdict::AsWanted
}

fn verify_iptables(redirect: &Redirect) -> Verdict {
    let mut absent = 0;
    let mut wanted = 0;
    for family in Family::BOTH {
        let (list, _) = iptables_tools(family);
        for iptables::Hooked { table, chain } in iptables::chains(redirect, family) {
            wanted += 1;
            let Ok(listing) = run(list, &["-w", "-t", table, "-S", chain.name]) else {
                absent += 1;
                continue;
            };
            let rules = listing.lines().filter(|line| line.starts_with("-A")).count();
            if !listing.contains(&redirect.comment()) || rules != chain.rules.len() {
                return Verdict::Differs(format!("{list} chain {} holds other rules", chain.name));
            }
            if !has_jump(list, table, chain.hook, chain.name) {
                return Verdict::Differs(format!(
                    "{list} {} does not jump to {}",
                    chain.hook, chain.name
                ));
            }
        }
    }
    match absent {
        0 => Verdict::AsWanted,
        all if all == wanted => Verdict::Absent,
        some => Verdict::Differs(format!("{some} of {wanted} chains are missing")),
    }
}

/// Routes marked packets to this host, once for each family.
fn route_marked() -> Result<(), RedirectError> {
    let (mark, table) = (format!("{UDP_MARK:#x}/{MARK_MASK:#x}"), ROUTE_TABLE.to_string());
    for family in ["-4", "-6"] {
        let rules = run("ip", &[family, "rule", "list", "fwmark", &mark])?;
        if rules.trim().is_empty() {
            run("ip", &[family, "rule", "add", "fwmark", &mark, "lookup", &table])?;
        }
        run("ip", &[family, "route", "replace", "local", "default", "dev", "lo", "table", &table])?;
    }
    Ok(())
}

fn unroute_marked() {
    let (mark, table) = (format!("{UDP_MARK:#x}/{MARK_MASK:#x}"), ROUTE_TABLE.to_string());
    for family in ["-4", "-6"] {
        // Either may be absent, which is what is wanted.
        drop(run("ip", &[family, "rule", "del", "fwmark", &mark, "lookup", &table]));
        drop(run(
            "ip",
            &[family, "route", "del", "local", "default", "dev", "lo", "table", &table],
        ));
    }
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
