//! How a mesh process hears of its configuration.
//!
//! Three sources lead to the same place: an Envoy [`bootstrap`] file, a stream from any xDS server
//! ([`client`]), and what our own control plane publishes ([`server`]). All of them pass
//! [`translate`], which is where protobuf ends: what leaves this crate is [`weft_model`].

pub mod authority;
pub mod bootstrap;
pub mod client;
mod descriptor;
pub mod dial;
mod json_form;
pub mod located;
pub mod recover;
pub mod server;
pub mod translate;
mod wire;
