//! The runtime that every weft role shares: worker threads, sockets, draining, metrics, logs and the admin
//! port.
//!
//! The data plane runs on [`worker`] threads. Each worker has its own runtime, its own listening sockets and
//! its own table of open files; workers share no data that they write. The admin port, the xDS stream of the
//! control plane and signal handling run on separate threads.

pub mod access;
pub mod admin;
pub mod clock;
pub mod clock_watch;
pub mod connections;
pub mod drain;
pub mod listener_sockets;
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
