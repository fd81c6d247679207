//! How bytes are moved once it is decided where to.

pub(crate) mod pace;
pub(crate) mod tcp;
pub(crate) mod udp;
