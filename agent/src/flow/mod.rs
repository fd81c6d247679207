//! Which UDP flows exist.

mod table;

pub use table::{FlowTable, TableFull};
