//! The xDS server: sends each client the resources that it may see.
//!
//! A [`ResourceSet`] holds the resources of one kind of client, complete with everything they refer to, and encoded
//! once. [`session`] decides what to send on a stream; [`serve`] does the I/O.

mod ack_state;
mod guard;
mod known_resources;
mod peer;
mod read_back;
mod resource_set;
mod serve;
mod session;
mod subscribers;

pub use ack_state::AckState;
pub(crate) use guard::RequestGate;
pub use guard::{MessageLimits, RequestLimits};
pub use peer::{IncomingConnection, Peer};
pub use resource_set::{EncodedResource, Fragment, ResourceSet};
pub use serve::{ResourceProvider, XdsServerConfig, serve, serve_resources};
pub use session::{ServerSession, XdsResponse};
pub use subscribers::ResourceSubscribers;
