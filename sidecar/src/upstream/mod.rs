//! The way to the endpoint: connections that are used again, and one exchange over one of them.

mod exchange;
mod pool;
mod tunnel;

pub(crate) use exchange::{Call, Outcome, exchange};
pub(crate) use pool::Pools;
