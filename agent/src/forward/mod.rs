//! How bytes are moved once it is decided where to.

pub(crate) mod pacer;
pub(crate) mod tcp;
pub(crate) mod udp;
