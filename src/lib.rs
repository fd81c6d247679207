//! The `weft` command: every role of the mesh in one binary.
//!
//! [`command`] holds a module per subcommand. What the two data planes share as processes is here:
//! [`identity`] gets and renews the workload's certificate, [`configuration`] turns a bootstrap file
//! and a control plane into one stream of snapshots, [`resolver`] looks up the host names in them,
//! [`process`] runs workers around it. [`redirects`]
//! keeps the rules of a node in force, [`sds`] serves secrets to other proxies, [`agent_role`] tells of what only an agent has. [`demo`] is a
//! whole mesh on one machine.

pub mod agent_role;
mod client;
pub mod command;
pub mod configuration;
pub mod demo;
pub mod identity;
pub mod process;
pub mod redirects;
pub mod resolver;
pub mod sds;
