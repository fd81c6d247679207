//! The xDS server: sends each client the resources that it may see.
//!
//! A [`ResourceSet`] holds the resources of one kind of client, complete with everything they refer to, and encoded
//! once. [`session`] decides what to send on a stream; [`serve`] does the I/O.

mod guard;
mod known_resources;
mod read_back;
mod resource_set;
mod serve;
mod session;
mod subscribers;

pub(crate) use guard::RequestGate;
pub use guard::{MessageLimits, RequestLimits};
pub use resource_set::{EncodedResource, Fragment, ResourceSet};
pub use serve::{
    IncomingConnection, Peer, ResourceProvider, XdsServerConfig, serve, serve_resources,
};
pub use session::{ServerSession, XdsResponse};
pub use subscribers::{AckState, ResourceSubscribers};
