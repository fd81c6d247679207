//! The line a request leaves behind.

use std::net::SocketAddr;

use serde::Serialize;

/// One access line. The field names equal the type names of the path.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    pub(crate) kind: &'static str,
    pub(crate) time_ms: u128,
    pub(crate) client: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    pub(crate) peer: Option<&'a str>,
    pub(crate) subject: Option<&'a str>,
    pub(crate) version: &'static str,
    pub(crate) method: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
    pub(crate) denial: Option<&'static str>,
    pub(crate) detail: Option<&'static str>,
    pub(crate) desync: Option<&'static str>,
    pub(crate) service: Option<&'a str>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) duration_us: u128,
    pub(crate) outcome: &'static str,
}
