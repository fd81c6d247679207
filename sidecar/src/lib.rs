//! The service's application load balancer.
//!
//! Read [`pipeline`] first: it is the path of a connection and of a request, a line a stage. Each
//! stage takes the proof of the one before, so none can be skipped:
//! `VerifiedPeer -> Authenticated -> Authorized -> Routed`. [`plan`] is what a snapshot of the
//! configuration means for this tier, [`worker`] the thread that does the work.

mod admission;
mod authenticate;
mod authorize;
mod balance;
mod buffers;
mod changes;
mod config_map;
mod connection;
mod decide;
mod denial;
mod detect;
mod fetch;
mod forwarded;
mod http;
mod identity_headers;
mod list_store;
pub mod metrics;
mod mutate;
mod opaque;
mod patience;
mod pipeline;
pub mod plan;
pub mod planner;
mod record;
mod refused;
mod reply;
mod route;
mod serve;
mod serve_http2;
mod standing;
mod story;
mod stream;
mod tls;
mod underscores;
mod upstream;
mod upstream_failure;
mod windows;
mod worker;

pub use worker::{Limits, Shared, run};
