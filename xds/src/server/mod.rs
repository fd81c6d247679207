//! The xDS server: publishes resource sets to whoever may see them.
//!
//! [`ResourceSet`] is what one kind of client sees at one moment, closed under its references and
//! encoded once. [`session`] decides what to send to one stream; [`serve`] carries it out.

mod guard;
mod holders;
mod known;
mod read_back;
mod resource_set;
mod serve;
mod session;

pub(crate) use guard::Gate;
pub use guard::{MessageLimits, RequestLimits};
pub use holders::{Holders, Taken};
pub use resource_set::{Fragment, Published, ResourceSet};
pub use serve::{Directory, Incoming, Peer, Served, serve, serve_resources};
pub use session::{Response, ServerSession};
