//! Decides what happens to a new flow, and whether an old one may stay. The decisions do no I/O: they depend on the plan,
//! the flow, the sequence number of its SYN, and whether there is room for it.

use std::net::SocketAddr;

use weft_model::{FlowKey, FlowTuple, Listener, TcpProxy, UdpProxy};

use crate::plan::{AgentPlan, AgentTarget, EndpointChoice};
use crate::refusal::FlowRefusal;

/// The target of a flow, and the hash that selects among the target's endpoints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlowDecision<'a> {
    pub(crate) target: &'a AgentTarget,
    pub(crate) flow: &'a FlowTuple,
    pub(crate) flow_key: FlowKey,
    pub(crate) hash: u32,
}

/// A UDP flow that is to start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UdpDecision<'a> {
    /// The listener of the service.
    pub(crate) listener: &'a Listener,
    pub(crate) proxy: &'a UdpProxy,
    pub(crate) target: &'a AgentTarget,
    pub(crate) choice: EndpointChoice,
    pub(crate) endpoint: SocketAddr,
}

/// Finds the service of a flow that `accepted` has accepted, and checks that its security group admits the client. The
/// kernel checks the same where it has a rule for the service.
///
/// # Errors
/// [`FlowRefusal::NotAllowed`].
pub(crate) fn admit<'a>(
    plan: &'a AgentPlan,
    accepted: &'a Listener,
    flow: &FlowTuple,
) -> Result<&'a Listener, FlowRefusal> {
    let listener = plan.listener_for(accepted, flow.destination);
    if listener.admits(flow.client.ip()) { Ok(listener) } else { Err(FlowRefusal::NotAllowed) }
}

/// Chooses the target of a TCP flow, whose SYN has this sequence number.
///
/// # Errors
/// [`FlowRefusal::NoService`].
pub(crate) fn choose_tcp<'a>(
    plan: &'a AgentPlan,
    tcp: &TcpProxy,
    flow: &'a FlowTuple,
    sequence: u32,
) -> Result<FlowDecision<'a>, FlowRefusal> {
    let target = plan.target(tcp, flow, sequence).ok_or(FlowRefusal::NoService)?;
    Ok(FlowDecision {
        target,
        flow,
        flow_key: tcp.flow_key,
        hash: plan.hash(flow, tcp.flow_key, sequence),
    })
}

/// Chooses the target of a UDP flow.
///
/// # Errors
/// [`FlowRefusal::NoService`].
pub(crate) fn choose_udp<'a>(
    plan: &'a AgentPlan,
    udp: &UdpProxy,
    flow: &'a FlowTuple,
) -> Result<FlowDecision<'a>, FlowRefusal> {
    let target = plan.target_named(&udp.cluster).ok_or(FlowRefusal::NoService)?;
    Ok(FlowDecision {
        target,
        flow,
        flow_key: udp.flow_key,
        hash: plan.hash(flow, udp.flow_key, 0),
    })
}

/// Decides whether a UDP flow starts, and at which endpoint. `has_room` says whether the flow table can take it.
///
/// # Errors
/// Why the flow is refused.
pub(crate) fn start_udp<'a>(
    plan: &'a AgentPlan,
    accepted: &'a Listener,
    flow: &'a FlowTuple,
    has_room: bool,
) -> Result<UdpDecision<'a>, FlowRefusal> {
    let listener = admit(plan, accepted, flow)?;
    let proxy = plan.udp(listener).ok_or(FlowRefusal::NoService)?;
    let decision = choose_udp(plan, proxy, flow)?;
    let choice = decision.endpoint(0);
    let endpoint = choice.endpoint().ok_or(FlowRefusal::NoEndpoint)?;
    if !has_room {
        return Err(FlowRefusal::Limit);
    }
    Ok(UdpDecision { listener, proxy, target: decision.target, choice, endpoint })
}

/// Whether a flow of a service may stay on an endpoint.
pub(crate) fn may_stay(plan: &AgentPlan, service: &str, choice: EndpointChoice) -> bool {
    let target = plan.target_named(service);
    target.zip(choice.endpoint()).is_some_and(|(target, endpoint)| target.retains(endpoint))
}

impl FlowDecision<'_> {
    /// The endpoint of the flow. Attempt 0 gives the flow's own; later attempts give the endpoints to try when it
    /// cannot be reached.
    pub(crate) fn endpoint(&self, attempt: usize) -> EndpointChoice {
        self.target.pick(self.flow, self.hash, attempt)
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{AccessLogSinks, Health, Transport, WeightedCluster};

    use super::*;
    use crate::test_plan::{SERVICE, address, capture, cluster, plan};

    fn flow(transport: Transport, client: &str, destination: &str) -> FlowTuple {
        FlowTuple { transport, client: address(client), destination: address(destination) }
    }

    /// The endpoint that a captured flow goes to, by the stages of its path.
    fn decided(plan: &AgentPlan, flow: &FlowTuple) -> Result<SocketAddr, FlowRefusal> {
        let capture = capture(flow.transport);
        match flow.transport {
            Transport::Tcp => {
                let listener = admit(plan, &capture, flow)?;
                let tcp = plan.tcp(listener, flow.destination).ok_or(FlowRefusal::NoService)?;
                let choice = choose_tcp(plan, tcp, flow, 0)?.endpoint(0);
                choice.endpoint().ok_or(FlowRefusal::NoEndpoint)
            }
            Transport::Udp => Ok(start_udp(plan, &capture, flow, true)?.endpoint),
        }
    }

    #[test]
    fn new_flow_is_sent_to_an_endpoint_or_refused_with_a_reason() {
        const ONE: &[(&str, Health)] = &[("10.0.1.1:53", Health::Healthy)];
        const DRAINING: &[(&str, Health)] = &[("10.0.1.1:53", Health::Draining)];
        let served = Ok(address("10.0.1.1:53"));
        let rows = [
            ("allowed client", "10.0.0.9:4000", SERVICE, Some(ONE), served),
            ("mapped address", "[::ffff:10.0.0.9]:4000", SERVICE, Some(ONE), served),
            (
                "client outside the group",
                "10.0.7.9:4000",
                SERVICE,
                Some(ONE),
                Err(FlowRefusal::NotAllowed),
            ),
            (
                "no service at the destination",
                "10.0.0.9:4000",
                "10.96.0.2:53",
                Some(ONE),
                Err(FlowRefusal::NoService),
            ),
            ("no cluster", "10.0.0.9:4000", SERVICE, None, Err(FlowRefusal::NoService)),
            ("no endpoint", "10.0.0.9:4000", SERVICE, Some(&[]), Err(FlowRefusal::NoEndpoint)),
            (
                "draining endpoint only",
                "10.0.0.9:4000",
                SERVICE,
                Some(DRAINING),
                Err(FlowRefusal::NoEndpoint),
            ),
        ];
        for transport in [Transport::Tcp, Transport::Udp] {
            for (case, client, destination, endpoints, expected) in rows {
                let plan = plan(transport, endpoints.map(|endpoints| cluster("dns", endpoints)));
                let outcome = decided(&plan, &flow(transport, client, destination));
                assert_eq!(outcome, expected, "{transport:?}: {case}");
            }
        }
    }

    #[test]
    fn full_flow_table_refuses_a_new_flow_that_has_an_endpoint() {
        let capture = capture(Transport::Udp);
        let new = flow(Transport::Udp, "10.0.0.9:4000", SERVICE);
        let refused = |endpoints| {
            let plan = plan(Transport::Udp, [cluster("dns", endpoints)]);
            start_udp(&plan, &capture, &new, false).map(|decision| decision.endpoint)
        };
        assert_eq!(refused(&[("10.0.1.1:53", Health::Healthy)]), Err(FlowRefusal::Limit));
        assert_eq!(refused(&[]), Err(FlowRefusal::NoEndpoint));
    }

    #[test]
    fn decision_depends_on_the_flow_and_the_sequence_number_alone() {
        let endpoints: Vec<String> = (1..=9).map(|host| format!("10.0.1.{host}:53")).collect();
        let endpoints: Vec<_> = endpoints.iter().map(|at| (at.as_str(), Health::Healthy)).collect();
        let plan = plan(Transport::Tcp, [cluster("dns", &endpoints)]);
        let tcp = TcpProxy {
            clusters: vec![WeightedCluster::new("dns".into(), 1)],
            idle_timeout: None,
            flow_key: FlowKey::WithSequence,
            access_log: AccessLogSinks::Off,
        };
        let flow = flow(Transport::Tcp, "10.0.0.9:4000", SERVICE);
        let at = |sequence, attempt| {
            let decision = choose_tcp(&plan, &tcp, &flow, sequence).expect("the plan has it");
            decision.endpoint(attempt).endpoint().expect("the cluster has endpoints")
        };
        assert_eq!(at(1, 0), at(1, 0));
        assert_ne!(at(1, 0), at(1, 1), "the second attempt is for another endpoint");
        assert!((2..40).any(|sequence| at(sequence, 0) != at(1, 0)));
    }

    #[test]
    fn flow_stays_on_its_endpoint_until_that_is_removed() {
        let chosen = EndpointChoice::ByFlowHash(address("10.0.1.1:53"));
        let stays = |endpoints: &[(&str, Health)]| {
            may_stay(&plan(Transport::Udp, [cluster("dns", endpoints)]), "dns", chosen)
        };
        assert!(stays(&[("10.0.1.1:53", Health::Healthy), ("10.0.1.2:53", Health::Healthy)]));
        assert!(stays(&[("10.0.1.1:53", Health::Draining)]));
        assert!(!stays(&[("10.0.1.1:53", Health::Unhealthy)]));
        assert!(!stays(&[("10.0.1.2:53", Health::Healthy)]));
        assert!(!may_stay(&plan(Transport::Udp, []), "dns", chosen), "the service is removed");
    }
}
