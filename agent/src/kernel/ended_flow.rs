//! The access log record of a connection or flow that the kernel carried.

use weft_model::{Name, Transport};
use weft_runtime::access::{AccessRecord, RecordKind, TerminationDetails};
use weft_runtime::clock::unix_ms;

use crate::netlink::conntrack::EndedConnection;

/// The record of a conntrack entry that was removed. The kernel removes the entry of a TCP connection two minutes after
/// its end.
pub(super) fn record<'a>(ended: &EndedConnection, service: &'a Name) -> AccessRecord<'a> {
    let flow = ended.entry.flow;
    let (kind, protocol) = match flow.transport {
        Transport::Tcp => (RecordKind::Tcp, "TCP"),
        Transport::Udp => (RecordKind::Udp, "UDP"),
    };
    let duration = ended.duration.unwrap_or_default();
    let record = AccessRecord::new(kind, unix_ms(), duration, flow.client);
    AccessRecord {
        duration_us: record.duration_us.filter(|_| ended.duration.is_some()),
        downstream_local_address: Some(flow.destination),
        protocol: Some(protocol),
        connection_termination_details: Some(TerminationDetails::ConntrackEntryRemoved.word()),
        bytes_received: Some(ended.bytes_sent),
        bytes_sent: Some(ended.bytes_received),
        service: Some(service),
        upstream_cluster: Some(service),
        upstream_host: Some(ended.entry.endpoint),
        data_path: Some("kernel"),
        endpoint_selection: Some("flow_hash"),
        ..record
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weft_model::FlowTuple;

    use super::*;
    use crate::netlink::conntrack::ConntrackEntry;
    use crate::test_plan::{SERVICE, address};

    #[test]
    fn flow_whose_start_is_unknown_has_no_duration() {
        let flow = FlowTuple {
            transport: Transport::Udp,
            client: address("10.0.0.9:4000"),
            destination: address(SERVICE),
        };
        let duration_us = |duration| {
            let entry = ConntrackEntry::example(flow, address("10.0.1.1:53"));
            let ended = EndedConnection { entry, bytes_sent: 1, bytes_received: 2, duration };
            record(&ended, &Name::from("dns")).duration_us
        };
        assert_eq!(duration_us(None), None);
        assert_eq!(duration_us(Some(Duration::from_millis(2))), Some(2000));
    }
}
