//! What every weft process is: worker threads, sockets, draining, metrics, logs and the admin port.
//!
//! The data plane runs on [`worker`] threads, each with its own runtime, its own listening sockets
//! and its own table of open files; they share nothing that they write. Everything else (the admin
//! port, the control plane's stream, signals) runs on threads of its own.

pub mod access;
pub mod admin;
pub mod clock;
pub mod drain;
pub mod listening;
pub mod log;
pub mod log_limit;
pub mod memory;
pub mod metrics;
pub mod open_files;
pub mod problems;
mod raw;
pub mod socket;
pub mod syn;
pub mod worker;
