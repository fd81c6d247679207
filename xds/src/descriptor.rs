//! The descriptors of every message a configuration may hold, and their forms as text and bytes.

use std::sync::LazyLock;

use prost_reflect::prost::Message as _;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor};

/// The prefix of a type URL; what follows is the full name of the message.
pub(crate) const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin")).as_ref())
        .expect("the build script wrote a complete descriptor set")
});

/// The descriptor of a message by its full name, such as `envoy.config.listener.v3.Listener`.
pub(crate) fn message(full_name: &str) -> Option<MessageDescriptor> {
    POOL.get_message_by_name(full_name)
}

/// Decodes the bytes of a message of a known type.
///
/// # Errors
/// Says that the type is unknown, or why the bytes are no such message.
pub(crate) fn decode(type_url: &str, bytes: &[u8]) -> Result<DynamicMessage, String> {
    let name = type_url.rsplit('/').next().unwrap_or(type_url);
    let kind = message(name)
        .ok_or_else(|| format!("no implementation for the type {type_url:?} is registered here"))?;
    DynamicMessage::decode(kind, bytes).map_err(|error| format!("the bytes are no {name}: {error}"))
}

/// How many values a file may have, and how much text is in them: 100,000 services fit.
const NODE_LIMIT: usize = 10_000_000;
const SCALAR_LIMIT_BYTES: usize = 256 * 1024 * 1024;

/// Reads a message from YAML or JSON, which is YAML too. Unknown fields are refused.
///
/// # Errors
/// A text with the line and the column.
pub(crate) fn from_yaml(full_name: &str, text: &str) -> Result<DynamicMessage, String> {
    let kind = message(full_name).ok_or_else(|| format!("unknown message {full_name}"))?;
    let strict = DeserializeOptions::new().deny_unknown_fields(true);
    // The file is the operator's own, and 10,000 services are more nodes than the reader expects.
    let budget = serde_saphyr::budget! {
        max_nodes: NODE_LIMIT,
        max_events: 2 * NODE_LIMIT,
        max_total_scalar_bytes: SCALAR_LIMIT_BYTES,
    };
    // Never with the lines around a mistake: a private key may stand in them.
    let options = serde_saphyr::options! { budget: budget, with_snippet: false };
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
        DynamicMessage::deserialize_with_options(kind, yaml, &strict)
    })
    .map_err(|error| error.to_string())
}

/// Builds a message from its proto3 JSON form, as written by this crate itself.
///
/// # Errors
/// When the form does not fit the message: a mistake of ours.
pub(crate) fn from_json(full_name: &str, value: serde_json::Value) -> Result<Vec<u8>, String> {
    let kind = message(full_name).ok_or_else(|| format!("unknown message {full_name}"))?;
    let strict = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(kind, value, &strict)
        .map_err(|error| format!("{full_name}: {error}"))?;
    Ok(message.encode_to_vec())
}
