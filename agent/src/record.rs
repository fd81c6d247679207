//! The access log line of a connection or flow.

use std::net::SocketAddr;

use serde::Serialize;
use weft_model::Name;

/// One access line. The field names equal the type names of the path.
#[derive(Debug, Serialize)]
pub(crate) struct AgentAccessRecord<'a> {
    pub(crate) kind: &'static str,
    /// Who moved it: `kernel` or `proxy`.
    pub(crate) path: &'static str,
    pub(crate) time_ms: u128,
    pub(crate) client: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    #[serde(serialize_with = "text")]
    pub(crate) service: Option<&'a Name>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) choice: &'static str,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) duration_ms: u128,
    pub(crate) outcome: &'static str,
}

fn text<S: serde::Serializer>(name: &Option<&Name>, serializer: S) -> Result<S::Ok, S::Error> {
    name.map(|name| &**name).serialize(serializer)
}
