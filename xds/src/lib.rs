//! The xDS client, the xDS server, and Envoy bootstrap files.
//!
//! Configuration comes from an Envoy [`bootstrap`] file or from any xDS server ([`client`]); weft's own control plane
//! publishes it with [`server`]. [`translate`] converts between protobuf and [`weft_model`]; no other crate handles
//! protobuf.

pub mod authority;
pub mod bootstrap;
pub mod client;
mod descriptor;
pub mod dial;
mod json_form;
pub mod located;
mod map_order;
pub mod recover;
pub mod server;
pub mod translate;
