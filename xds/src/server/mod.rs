//! The xDS server: publishes resource sets to whoever may see them.
//!
//! [`ResourceSet`] is what one kind of client sees at one moment, closed under its references and
//! encoded once. [`session`] decides what to send to one stream; [`serve`] carries it out.

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
