//! The protobuf descriptors of every message that a configuration may contain; decoding by them.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;

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
/// When the type is unknown, or the bytes are not a valid message of it.
pub(crate) fn decode(type_url: &str, bytes: &[u8]) -> Result<DynamicMessage, String> {
    let name = type_url.rsplit('/').next().unwrap_or(type_url);
    let kind = message(name).ok_or_else(|| format!("unsupported type {name:?}"))?;
    DynamicMessage::decode(kind, bytes).map_err(|error| format!("invalid {name} message: {error}"))
}

/// The JSON form of an encoded message, with the field names of the protobuf definition.
///
/// # Errors
/// When the type is unknown, or the bytes are not a valid message of it.
pub(crate) fn json(full_name: &str, bytes: &[u8]) -> Result<Value, String> {
    let message = decode(full_name, bytes)?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| format!("{full_name} has no JSON form: {error}"))
}

/// Encodes a message from its JSON form, with which tests describe resources.
#[cfg(test)]
pub(crate) fn encode_json(full_name: &str, value: Value) -> Vec<u8> {
    use prost_reflect::prost::Message as _;
    let kind = message(full_name).expect("a known message");
    let options = prost_reflect::DeserializeOptions::new().deny_unknown_fields(true);
    DynamicMessage::deserialize_with_options(kind, value, &options)
        .expect("a message of this kind")
        .encode_to_vec()
}
