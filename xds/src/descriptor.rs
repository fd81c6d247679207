//! The protobuf descriptors of every message that a configuration may contain; decoding by them.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

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
