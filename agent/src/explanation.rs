//! Where a new flow would go and why, as `weft flow explain` prints it.
//!
//! The decisions of [`crate::pipeline`] and of the kernel path, for a flow that need not exist.

use std::net::{IpAddr, SocketAddr};

use weft_model::{FlowTuple, Listener, Transport};

use crate::plan::{AgentPlan, AgentTarget, EndpointChoice, OTHER_ENDPOINTS};

/// Where a flow goes and why, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FlowExplanation {
    /// The listener that answers for the destination.
    pub listener: String,
    /// Whether the listener's security group admits the client.
    pub security_group: GroupAdmission,
    /// The range of the group that holds the client's address, if one does.
    pub admitting_range: Option<String>,
    /// The cluster that the listener's flows go to.
    pub cluster: String,
    /// The hash of the 5-tuple under the mesh's seed.
    pub hash: u32,
    /// The slot on which the hash falls, and of how many; none where no table decides.
    pub slot: Option<(usize, usize)>,
    /// The flow's endpoint, then where the flow goes when that one cannot be reached. Empty for a flow that is not
    /// admitted.
    pub endpoints: Vec<SocketAddr>,
    /// What decided.
    pub choice: &'static str,
}

/// What a security group decides about a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupAdmission {
    /// The listener has no security group: every client is admitted.
    None,
    /// A range of the group holds the client's address.
    Admitted,
    /// No range of the group holds the client's address: the flow is dropped or reset.
    NotAllowed,
}

impl AgentPlan {
    /// Where a new flow would go, whose SYN bears this sequence number.
    ///
    /// # Errors
    /// Why it would go nowhere, or that the sequence number decides and none was given.
    pub fn explain(
        &self,
        flow: &FlowTuple,
        sequence: Option<u32>,
    ) -> Result<FlowExplanation, String> {
        let transport = flow.transport;
        let destination = flow.destination;
        let bound = self.bound().find(|bound| {
            let addressed = bound.address == destination
                || bound.address.ip().is_unspecified()
                    && bound.address.port() == destination.port();
            bound.transport == transport && addressed
        });
        let listener = self.by_destination.get(&(transport, destination)).or(bound);
        let listener = listener.ok_or_else(|| format!("no listener answers for {destination}"))?;
        let (security_group, admitting_range) = admission(listener, flow.client.ip());
        let target = match transport {
            Transport::Tcp => {
                let tcp = self.tcp(listener, destination);
                let number = sequence.unwrap_or_default();
                tcp.and_then(|tcp| Some((self.target(tcp, flow, number)?, tcp.flow_key)))
            }
            Transport::Udp => {
                let udp = self.udp(listener);
                udp.and_then(|udp| Some((self.target_named(&udp.cluster)?, udp.flow_key)))
            }
        };
        let (target, key) =
            target.ok_or_else(|| format!("{:?} leads to no cluster", &*listener.name))?;
        if key.takes_sequence(transport) && sequence.is_none() {
            return Err(format!(
                "{:?} is hashed with the sequence number of a connection's SYN: say which (--sequence)",
                &*listener.name
            ));
        }
        let hash = self.hash(flow, key, sequence.unwrap_or_default());
        let slot = target.table().and_then(|table| Some((table.slot(hash)?, table.size())));
        let choices = self.choices(target, flow, hash);
        let admitted = security_group != GroupAdmission::NotAllowed;
        let choices =
            if admitted { choices } else { [EndpointChoice::NoEndpoint; OTHER_ENDPOINTS + 1] };
        Ok(FlowExplanation {
            listener: listener.name.to_string(),
            security_group,
            admitting_range,
            cluster: target.name.to_string(),
            hash,
            slot,
            endpoints: choices.into_iter().filter_map(EndpointChoice::endpoint).collect(),
            choice: choices[0].word(),
        })
    }

    /// The endpoints that a flow is tried at, one after the other.
    fn choices(
        &self,
        target: &AgentTarget,
        flow: &FlowTuple,
        hash: u32,
    ) -> [EndpointChoice; OTHER_ENDPOINTS + 1] {
        std::array::from_fn(|attempt| self.pick(target, flow, hash, attempt))
    }
}

/// What the security group of a listener decides about a client, and by which range.
fn admission(listener: &Listener, client: IpAddr) -> (GroupAdmission, Option<String>) {
    let Some(ranges) = &listener.allow_from else {
        return (GroupAdmission::None, None);
    };
    let client = client.to_canonical();
    match ranges.iter().find(|range| range.contains(client)) {
        Some(range) => (GroupAdmission::Admitted, Some(range.to_string())),
        None => (GroupAdmission::NotAllowed, None),
    }
}
