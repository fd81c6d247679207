//! The table of UDP flows.

mod table;

pub use table::{FlowTable, TableFull};
