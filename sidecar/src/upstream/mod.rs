//! The way to the endpoint: connections that are used again, and one exchange over one of them.

mod connect;
mod exchange;
mod outcome;
mod pinned;
mod pool;
mod slots;
mod tunnel;
mod upload;
mod upstream_response;
mod websocket;

pub(crate) use exchange::{Call, exchange};
pub(crate) use outcome::ExchangeOutcome;
pub(crate) use pinned::PinnedConnection;
pub(crate) use pool::Pools;
pub(crate) use slots::{Slot, Slots};
