//! The types of redirects: backends, states and errors.

use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;

/// The program or interface that installs rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectBackend {
    /// The kernel's nf_tables, over netlink.
    Native,
    /// The kernel's nf_tables, with the `nft` command.
    Nft,
    /// `iptables-restore` and `ip6tables-restore`.
    Iptables,
}

/// The selection of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// The kernel's nf_tables over netlink, or iptables where the kernel has no nf_tables.
    #[default]
    Auto,
    /// This backend only.
    Only(RedirectBackend),
}

/// The installed rules compared with the desired ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedirectState {
    /// The installed rules match.
    InSync,
    /// No rules of weft are installed.
    NotInstalled,
    /// The installed rules differ, as described.
    Drifted(Vec<String>),
}

impl RedirectState {
    /// The state of an installed table with these differences.
    pub(super) fn of(differences: Vec<String>) -> Self {
        if differences.is_empty() { Self::InSync } else { Self::Drifted(differences) }
    }
}

/// Why rules could not be installed, compared or removed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The host has neither nf_tables nor iptables.
    #[error(
        "this kernel has no nf_tables, and iptables is not installed: apt-get install iptables"
    )]
    NoBackend,
    /// The kernel refused an operation.
    #[error("{doing}: {reason}{}", hint(.reason))]
    Kernel {
        /// The operation.
        doing: &'static str,
        /// The error of the kernel.
        reason: std::io::Error,
    },
    /// The selected tool is not installed.
    #[error("{0} is not installed; install it, or choose --backend auto")]
    Missing(&'static str),
    /// The configuration is invalid, or cannot be installed.
    #[error("{0}")]
    Invalid(String),
    /// The rules were installed, and still differ from the desired ones: another program changes them.
    #[error("rules differ after installation: {0}")]
    NotInForce(RedirectState),
    /// The namespace cannot be entered.
    #[error("network namespace {path}: {reason}", path = .path.display())]
    Namespace {
        /// The file of the namespace.
        path: PathBuf,
        /// The error.
        reason: String,
    },
    /// No DNS server answers at the port that queries are redirected to.
    #[error(
        "no DNS server answers at port {0} of loopback in this namespace: start the server first, or use weft redirect guard, which waits for it"
    )]
    NoDns(u16),
    /// A tool failed.
    #[error("{command} failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its error output.
        output: String,
    },
}

/// Wraps an error of the kernel with the operation that failed.
pub(crate) fn kernel_error(doing: &'static str) -> impl FnOnce(std::io::Error) -> RedirectError {
    move |reason| RedirectError::Kernel { doing, reason }
}

/// Advice about an error of the kernel.
fn hint(reason: &std::io::Error) -> &'static str {
    match reason.kind() {
        ErrorKind::PermissionDenied => "; needs the capability NET_ADMIN",
        ErrorKind::NetworkDown => "; the loopback device is down: ip link set lo up",
        ErrorKind::NotFound => "; a kernel module is missing, such as nft_redir or nft_tproxy",
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

impl fmt::Display for RedirectState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InSync => f.write_str("in sync"),
            Self::NotInstalled => f.write_str("no rules of weft are installed"),
            Self::Drifted(how) => f.write_str(&how.join("; ")),
        }
    }
}
