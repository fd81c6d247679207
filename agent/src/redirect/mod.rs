//! Rules that redirect traffic to the agent or a sidecar.
//!
//! [`RedirectConfig`] says what to redirect. [`rules`] turns it into rules, as values. [`native`] installs
//! the rules in the kernel itself, without a tool; [`nft`] and [`iptables`] render them as text for these
//! tools, the latter for kernels without nf_tables. Each installs one transaction in tables or chains of its
//! own, so installing twice changes nothing, and removing leaves nothing. [`apply`] chooses among them and
//! works in any network namespace. [`guard`] keeps the rules installed, in each [`managed_namespace`].

mod apply;
mod comment;
mod config;
mod dns;
mod guard;
mod iptables;
mod managed_namespace;
mod namespace;
mod native;
mod nft;
mod probe;
mod redirect_kernel;
mod report;
mod rules;
mod types;

pub use apply::{apply, plan, remove, verify};
pub(crate) use apply::{has_nf_tables, may_have_iptables_rules};
pub(crate) use config::MARK_MASK;
pub use config::RedirectConfig;
pub use dns::apply_once;
pub use guard::RedirectGuard;
pub use managed_namespace::DesiredRedirects;
pub use namespace::Namespace;
pub(crate) use namespace::in_namespace;
pub use probe::{ProbeOutcome, probe};
pub use report::{RedirectReport, RedirectStatus};
pub(crate) use types::kernel_error;
pub use types::{BackendChoice, RedirectBackend, RedirectError, RedirectState};

#[cfg(test)]
mod tests;
