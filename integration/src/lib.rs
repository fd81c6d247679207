//! What the integration tests share: real processes, the files they are started with, and the few
//! requests that no tool makes.
//!
//! Every test process has a network namespace of its own (see `in-namespace`), so loopback belongs to
//! it alone. Whatever a test starts ends with the value that stands for it.

pub mod agent;
pub mod authority;
pub mod bootstrap;
pub mod crafted_pki;
pub mod curl;
pub mod dns_server;
pub mod fake_clock;
pub mod http1;
pub mod http2;
pub mod http2_client;
pub mod http2_frames;
pub mod http2_probe;
pub mod load;
pub mod mesh;
pub mod mesh_pki;
pub mod nginx;
pub mod origin_server;
pub mod port;
pub mod process;
pub mod recording_server;
pub mod resource_usage;
pub mod role_process;
pub mod scripted_server;
pub mod sidecar_pair;
pub mod single_sidecar;
pub mod tls_client;
pub mod wait;
