//! The node's network load balancer: it takes what was intercepted, hashes the 5-tuple, and moves
//! bytes without opening them.
//!
//! Read [`pipeline`] first: it is the path of a connection and of a datagram, a line a stage.
//! [`plan`] is what a snapshot of the configuration means for this tier, [`worker`] the thread that
//! does the work. What needs nobody to look at its bytes goes by [`kernel`] instead. [`redirect`] is
//! how the kernel is told to hand traffic over, [`netlink`] the words for both.

mod clock;
mod explanation;
pub mod flow;
mod flow_counts;
mod forward;
pub mod kernel;
pub mod metrics;
mod netlink;
pub mod node;
mod pipeline;
pub mod plan;
mod record;
pub mod redirect;
mod refusal;
mod source;
mod worker;

pub use explanation::{FlowExplanation, GroupAdmission};
pub use worker::{AgentLimits, AgentShared, run};
