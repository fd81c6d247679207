//! The control plane: it turns `mesh.yaml` into xDS resources and serves them to agents and sidecars.
//!
//! - [`mesh`] reads and checks `mesh.yaml`.
//! - [`resources`] generates the xDS resources of each client.
//! - [`store`] keeps the authority's keys and certificates, revocations and join tokens on disk.
//! - [`issue`] decides which certificate requests are signed.
//! - [`admin_socket`] executes the commands of an operator (`weft ca`).
//! - [`ca_rotation`] replaces the authority without an interruption.
//! - [`run`] is the server around them.
//!
//! An invalid file changes nothing: the last valid mesh stays in force.

mod accept;
pub mod admin_socket;
mod audit;
mod audit_limit;
pub mod ca_rotation;
mod client_connection;
mod clock;
mod fair_pool;
mod file_watch;
pub mod issue;
pub mod mesh;
mod publisher;
pub mod resources;
mod server;
mod server_certificate;
mod status;
pub mod store;

pub use server::{ControlOptions, run};
pub use status::ControlStatus;
