//! What the integration tests share: real processes, the files they are started with, and the few
//! requests that no tool makes.
//!
//! Every test process has a network namespace of its own (see `in-namespace`), so loopback belongs to
//! it alone. Whatever a test starts ends with the value that stands for it.

pub mod agent;
pub mod alone;
pub mod authority;
pub mod backend;
pub mod bootstrap;
pub mod clock;
pub mod curl;
pub mod dns_server;
pub mod frames;
pub mod handmade;
pub mod http1;
pub mod http2;
pub mod http2_client;
pub mod http2_probe;
pub mod load;
pub mod mesh;
pub mod mesh_pki;
pub mod nginx;
pub mod origin;
pub mod pair;
pub mod port;
pub mod process;
pub mod recording;
pub mod role;
pub mod tls_caller;
pub mod usage;
pub mod wait;
