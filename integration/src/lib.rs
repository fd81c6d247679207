//! Shared library of the integration tests: starts real processes, writes their configuration
//! files, and provides HTTP and TLS clients for requests that no command-line tool can make.
//!
//! Each test process has its own network namespace (see `in-namespace`), so ports on loopback never
//! collide between tests. A process that a test starts is stopped when its value is dropped.

pub mod agent;
pub mod authority;
pub mod bootstrap;
pub mod crafted_pki;
pub mod curl;
pub mod dns_server;
pub mod echo_flow;
pub mod fake_clock;
pub mod generated_page;
pub mod http1;
pub mod http2;
pub mod http2_client;
pub mod http2_frames;
pub mod http2_probe;
pub mod load;
pub mod mesh;
pub mod mesh_file;
pub mod mesh_pki;
pub mod metrics;
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
pub mod tls_contexts;
pub mod wait;
