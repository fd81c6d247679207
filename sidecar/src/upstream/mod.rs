//! Exchanges with endpoints: connection pools, sending a request and forwarding the response, upgrades and tunnels.

mod call;
mod exchange;
mod failure;
mod http2_exchange;
mod interim;
mod outcome;
mod pinned;
mod pool;
mod slots;
#[cfg(test)]
mod tests;
mod tunnel;
mod upgrade;
mod upload;
mod upstream_response;
mod websocket;

pub(crate) use call::Call;
pub(crate) use exchange::exchange;
pub(crate) use outcome::{ExchangeAbort, ExchangeOutcome};
pub(crate) use pinned::PinnedConnection;
pub(crate) use pool::Pools;
pub(crate) use slots::{Slot, Slots};
