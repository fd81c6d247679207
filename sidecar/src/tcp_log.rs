//! Collects the access log record of a TCP connection.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Instant;

use weft_certs::VerifiedPeer;
use weft_model::{AccessLogSinks, Name, SpiffeId};
use weft_runtime::access::{AccessRecord, RecordKind, TerminationDetails};
use weft_runtime::clock::{now, unix_ms};

use crate::connection_info::ConnectionInfo;
use crate::denial::Denial;
use crate::worker::SidecarWorker;

/// The access log record of a connection, written when it is dropped.
pub(crate) struct TcpLog<'a> {
    pub(crate) connection: ConnectionInfo<'a>,
    sinks: &'a AccessLogSinks,
    started: Instant,
    worker: &'a SidecarWorker,
    pub(crate) service: Option<Name>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// The policy that allowed or denied the connection.
    pub(crate) policy: Option<Name>,
    pub(crate) moved: ByteCounts,
    denial: Option<Denial>,
    /// How the connection ended, if it was not denied.
    pub(crate) end: TerminationDetails,
}

/// The bytes sent to the endpoint and received from it.
#[derive(Debug, Default)]
pub(crate) struct ByteCounts {
    pub(crate) to_endpoint: Cell<u64>,
    pub(crate) to_client: Cell<u64>,
}

impl<'a> TcpLog<'a> {
    pub(crate) fn new(
        connection: ConnectionInfo<'a>,
        sinks: &'a AccessLogSinks,
        worker: &'a SidecarWorker,
    ) -> Self {
        Self {
            connection,
            sinks,
            started: now(),
            worker,
            service: None,
            endpoint: None,
            policy: None,
            moved: ByteCounts::default(),
            denial: None,
            // If a changed policy or a drain closes the connection, nothing else sets the end.
            end: TerminationDetails::Aborted,
        }
    }

    /// Counts and records that the connection was denied.
    pub(crate) fn deny(&mut self, denial: Denial) {
        self.worker.metrics.count_denial(denial);
        self.denial = Some(denial);
    }
}

impl Drop for TcpLog<'_> {
    fn drop(&mut self) {
        if self.sinks.is_off() {
            return;
        }
        let ConnectionInfo { peer, client, destination, tls_version, trace } = self.connection;
        let peer = peer.and_then(VerifiedPeer::identity);
        let duration = now() - self.started;
        let record = AccessRecord::new(RecordKind::Tcp, unix_ms(), duration, client);
        let details = self.denial.map_or_else(|| self.end.word(), |denial| denial.info().details);
        let record = AccessRecord {
            downstream_local_address: Some(destination),
            protocol: Some("TCP"),
            response_flags: self.denial.map_or_else(|| self.end.flag(), Denial::flag),
            connection_termination_details: Some(details),
            upstream_failure_reason: self.denial.and_then(Denial::upstream_failure),
            bytes_received: Some(self.moved.to_endpoint.get()),
            bytes_sent: Some(self.moved.to_client.get()),
            service: self.service.as_deref(),
            upstream_cluster: self.service.as_deref(),
            upstream_host: self.endpoint,
            matched_policy: self.policy.as_deref(),
            downstream_tls_version: tls_version,
            downstream_peer_uri_san: peer.map(SpiffeId::as_str),
            conn_trace_id: trace,
            ..record
        };
        self.worker.access.line(self.sinks, &record);
    }
}
