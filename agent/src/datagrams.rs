//! The path of a datagram through the agent.
//!
//! ```text
//! receive -> known flow: its endpoint
//!         -> new flow: service -> security group -> endpoint -> add to table -> forward
//! ```

use std::cell::Cell;
use std::rc::Rc;

use tokio::net::UdpSocket;
use weft_model::{FlowTuple, Listener, Transport};
use weft_runtime::access::{AccessRecord, RecordKind, TerminationDetails};
use weft_runtime::clock::{now, unix_ms};
use weft_runtime::metrics::GaugeGuard;
use weft_runtime::socket::connect_udp;

use crate::decide::{self, UdpDecision};
use crate::flow::{OpenUdpFlow, UdpFlow};
use crate::forward::pacer::ReadSide;
use crate::forward::tcp::RelayedBytes;
use crate::forward::udp::{BatchSize, Datagram, enable_gro, send_all};
use crate::refusal::{FlowRefusal, connect_refusal};
use crate::source::first_not_out_of_ports;
use crate::worker::AgentWorker;

/// Forwards received datagrams to the endpoints of their flows, and starts new flows. Datagrams of one flow
/// keep their order and are sent together.
pub(crate) fn forward_datagrams(
    taken: &[Datagram<'_>],
    listener: &Listener,
    listening_socket: &Rc<UdpSocket>,
    worker: &Rc<AgentWorker>,
) {
    worker.pacer.count(taken.len(), now());
    let mut flows: Vec<(Rc<UdpFlow>, Vec<&[u8]>)> = Vec::new();
    for datagram in taken {
        let client = datagram.client;
        let destination = datagram.destination;
        let tuple = FlowTuple { transport: Transport::Udp, client, destination };
        if let Some((_, bytes)) = flows.iter_mut().rev().find(|(flow, _)| flow.tuple == tuple) {
            bytes.push(datagram.bytes);
            continue;
        }
        let known = worker.flows.borrow_mut().get(&tuple, now()).cloned();
        match known.map_or_else(|| start_flow(tuple, listener, listening_socket, worker), Ok) {
            Ok(flow) => flows.push((flow, vec![datagram.bytes])),
            Err(refusal) => worker.metrics.count_refusal(refusal),
        }
    }
    for (flow, bytes) in flows {
        let sent = send_all(&flow.endpoint, &bytes, None);
        worker.metrics.datagrams_to_endpoint.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.relayed.to_endpoint.set(flow.relayed.to_endpoint.get() + sent.bytes);
    }
}

fn start_flow(
    tuple: FlowTuple,
    listener: &Listener,
    listening_socket: &Rc<UdpSocket>,
    worker: &Rc<AgentWorker>,
) -> Result<Rc<UdpFlow>, FlowRefusal> {
    let plan = worker.plan();
    let has_room = worker.flows.borrow().has_room();
    let decision = decide::start_udp(&plan, listener, &tuple, has_room)?;
    let UdpDecision { proxy, endpoint: address, .. } = decision;
    let mark = worker.shared.mark;
    let source = decision.listener.source_address;
    let connect_options = worker.sources.connect_options(address, tuple.client, source, mark);
    let endpoint =
        first_not_out_of_ports(connect_options.map(|options| connect_udp(address, options)));
    let endpoint = endpoint.map_err(|error| connect_refusal(&error))?;
    enable_gro(&endpoint);
    let response_socket = if listener.use_original_destination {
        let socket = worker.reply_sockets.socket_for(tuple.destination, mark);
        socket.map_err(|error| connect_refusal(&error))?
    } else {
        listening_socket.clone()
    };
    let flow = Rc::new(UdpFlow {
        tuple,
        service: decision.target.name.clone(),
        choice: decision.choice,
        endpoint,
        response_socket,
        relayed: RelayedBytes::default(),
        started: now(),
        sinks: proxy.access_log.clone(),
        open: Cell::new(None),
        ended: Cell::new(false),
        stopped: tokio::sync::Notify::new(),
    });
    worker
        .flows
        .borrow_mut()
        .insert(tuple, flow.clone(), proxy.idle_timeout, now())
        .map_err(|_| FlowRefusal::Limit)?;
    worker.metrics.flows.increment();
    flow.open.set(Some(OpenUdpFlow {
        _of_worker: GaugeGuard::new(worker.metrics.flows_open.clone()),
        _of_service: worker.flow_counts(decision.listener).begin(),
    }));
    tokio::task::spawn_local(forward_responses(flow.clone(), worker.clone()));
    Ok(flow)
}

/// Forwards responses of a flow to its client until the flow ends.
async fn forward_responses(flow: Rc<UdpFlow>, worker: Rc<AgentWorker>) {
    let mut batch_size = BatchSize::new();
    while !flow.ended.get() {
        tokio::select! {
            ready = flow.endpoint.readable() => if ready.is_err() { break },
            () = flow.stopped.notified() => break,
        }
        if !batch_size.is_behind {
            worker.pause_before_read(ReadSide::Endpoint);
        }
        let to = Some(flow.tuple.client);
        let sent = worker.receive_buffer.borrow_mut().responses(
            &flow.endpoint,
            &mut batch_size,
            |responses| send_all(&flow.response_socket, responses, to),
        );
        // An ICMP error says that the endpoint has no such port. The endpoint may come back, so the flow stays.
        let Ok(sent) = sent else { continue };
        worker.flows.borrow_mut().touch(&flow.tuple, now());
        worker.pacer.count(usize::try_from(sent.datagrams).unwrap_or(usize::MAX), now());
        worker.metrics.datagrams_to_client.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.relayed.to_client.set(flow.relayed.to_client.get() + sent.bytes);
    }
}

/// Ends the flows whose endpoint is not in the current plan. Their next datagram starts a new flow.
pub(crate) fn end_flows_of_removed_endpoints(worker: &AgentWorker) {
    let plan = worker.plan();
    let is_orphaned = |flow: &Rc<UdpFlow>| !decide::may_stay(&plan, &flow.service, flow.choice);
    let lost = worker.flows.borrow_mut().remove_if(is_orphaned);
    for flow in lost {
        end_flow(&flow, TerminationDetails::EndpointRemoved, worker);
    }
}

/// Ends the flows that were silent for their idle timeout.
pub(crate) fn expire(worker: &AgentWorker) {
    let removed = worker.flows.borrow_mut().expire(now());
    for (_, flow) in removed {
        end_flow(&flow, TerminationDetails::IdleTimeout, worker);
    }
}

fn end_flow(flow: &UdpFlow, end: TerminationDetails, worker: &AgentWorker) {
    flow.end();
    if flow.sinks.is_off() {
        return;
    }
    let duration = now().saturating_duration_since(flow.started);
    let record = AccessRecord::new(RecordKind::Udp, unix_ms(), duration, flow.tuple.client);
    let record = AccessRecord {
        downstream_local_address: Some(flow.tuple.destination),
        protocol: Some("UDP"),
        response_flags: end.flag(),
        connection_termination_details: Some(end.word()),
        bytes_received: Some(flow.relayed.to_endpoint.get()),
        bytes_sent: Some(flow.relayed.to_client.get()),
        service: Some(&flow.service),
        upstream_cluster: Some(&flow.service),
        upstream_host: flow.choice.endpoint(),
        data_path: Some("proxy"),
        endpoint_selection: Some(flow.choice.word()),
        ..record
    };
    worker.access.line(&flow.sinks, &record);
}
