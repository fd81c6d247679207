//! The control plane: `mesh.yaml` becomes resources, served over xDS to whoever may see them.
//!
//! [`mesh`] is the file as people write it, [`resources`] what it means for each client, [`store`]
//! what must survive a restart, [`issue`] who gets which certificate, [`desk`] what an operator may
//! ask, [`succession`] how one authority follows another, and [`run`] the server around them. A file with a mistake
//! changes nothing: the last good mesh stays in force.

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
pub mod store;

pub use server::{ControlOptions, ControlStatus, run};
