//! UDP flows, and the table of them.

mod table;
mod udp_flow;

pub use table::{FlowTable, TableFull};
pub(crate) use udp_flow::{OpenUdpFlow, UdpFlow};
