//! The `weft` command: all roles of the mesh in one binary.
//!
//! [`command`] has a module per subcommand. The other modules are shared by the data planes: [`process`] runs the workers,
//! [`identity`] obtains and renews the workload certificate, [`configuration`] merges a bootstrap file and a control plane
//! into one stream of snapshots, and [`resolver`] looks up host names. [`redirects`] maintains the redirect rules of a
//! node, [`agent_role`] reports the state of an agent, [`sds`] serves secrets to other proxies, and [`demo`] runs a mesh
//! on one machine.

pub mod agent_role;
mod client;
pub mod command;
pub mod configuration;
pub mod demo;
mod dial;
pub mod identity;
pub mod process;
pub mod redirects;
pub mod resolver;
pub mod sds;
