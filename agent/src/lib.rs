//! The layer-4 load balancer of a node: it takes redirected connections and datagrams, hashes the 5-tuple to
//! choose an endpoint, and forwards bytes without inspecting them.
//!
//! Start with [`pipeline`], the path of a connection, and [`datagrams`], the path of a datagram; both
//! take their decisions from [`decide`]. [`plan`] is the
//! snapshot of the configuration as this tier uses it. [`accept`] is the loop of a forwarding thread, and
//! [`worker`] the state of that thread. [`kernel`] leaves flows that need no inspection to the kernel.
//! [`redirect`] installs the rules that redirect traffic, and [`netlink`] has the kernel messages for both.

mod accept;
mod datagrams;
mod decide;
mod explanation;
pub mod flow;
mod flow_counts;
mod flow_end;
mod forward;
pub mod kernel;
pub mod metrics;
mod netlink;
pub mod node;
mod pipeline;
pub mod plan;
mod reconcile_loop;
pub mod redirect;
mod refusal;
mod source;
#[cfg(test)]
mod test_plan;
mod worker;

pub use accept::run;
pub use explanation::{FlowExplanation, GroupAdmission};
pub use refusal::refusals;
pub use worker::{AgentLimits, AgentShared};
