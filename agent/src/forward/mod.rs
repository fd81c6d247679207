//! Forwarding of bytes and datagrams to a chosen endpoint.

pub(crate) mod pacer;
pub(crate) mod tcp;
pub(crate) mod udp;
