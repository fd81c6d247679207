//! The sidecar: a service's L7 load balancer.
//!
//! Start reading at [`pipeline`], the path of a connection and of a request. Each stage takes the result of the
//! stage before as an argument, so no stage can be skipped:
//! `VerifiedPeer -> Authenticated -> Authorized -> Routed`. [`plan`] turns a configuration snapshot into the data that
//! requests are served with; [`worker`] is the thread that serves them.

mod accept;
mod authenticate;
mod authorize;
mod buffers;
mod certificate_index;
mod config_map;
mod connection;
mod connection_info;
mod crl_store;
mod decide;
mod decision_context;
mod denial;
mod detect;
mod fetch;
mod fetch_schedule;
mod forwarded;
mod forwarded_request;
mod header_mutation;
mod http;
mod http2_windows;
mod identity_headers;
mod load_balancer;
pub mod metrics;
mod normalize;
mod pipeline;
pub mod plan;
mod plan_changes;
pub mod planner;
pub mod reference;
mod refused_request;
mod request_facts;
mod request_log;
mod request_metrics;
mod responder;
mod revocation_history;
mod route;
mod serve_http1;
mod serve_http2;
mod serve_request;
mod server_first_cache;
mod stream;
mod tcp_log;
mod tcp_proxy;
mod timeouts;
mod tls;
mod underscore_headers;
mod upstream;
mod upstream_failure;
mod worker;

pub use accept::run;
pub use worker::{SidecarLimits, SidecarShared};
