//! Reads port numbers of `mesh.yaml`: 1 to 65535.

use std::num::NonZeroU16;

use serde::{Deserialize, Deserializer};

/// Reads a port number.
pub(super) fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    NonZeroU16::deserialize(deserializer).map(NonZeroU16::get)
}

/// Reads a port number that may be absent.
pub(super) fn optional_port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u16>, D::Error> {
    Option::<NonZeroU16>::deserialize(deserializer).map(|port| port.map(NonZeroU16::get))
}

/// Reads a list of port numbers that may be absent.
pub(super) fn optional_ports<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<u16>>, D::Error> {
    let ports = Option::<Vec<NonZeroU16>>::deserialize(deserializer)?;
    Ok(ports.map(|ports| ports.into_iter().map(NonZeroU16::get).collect()))
}
