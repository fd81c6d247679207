//! Explains where a new flow would go, for `weft flow explain`.
//!
//! It makes the decisions of [`crate::decide`], which are also those of the kernel path, for a flow that need not exist.

use std::net::{IpAddr, SocketAddr};

use weft_model::{FlowTuple, Listener, Transport};

use crate::decide::{FlowDecision, choose_tcp, choose_udp};
use crate::plan::{AgentPlan, EndpointChoice, OTHER_ENDPOINTS};

/// Where a flow goes, and what decided.
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
    /// The hash of the 5-tuple with the mesh's seed.
    pub hash: u32,
    /// The slot of the hash and the number of slots; `None` where no Maglev table decides.
    pub slot: Option<(usize, usize)>,
    /// The flow's endpoint, then the fallbacks when it cannot be reached. Empty for a flow that is not admitted.
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
    /// Explains where a new flow would go whose SYN has this sequence number.
    ///
    /// # Errors
    /// When no listener or cluster serves the destination, or the hash includes the sequence number and none was
    /// given.
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
        let listener =
            listener.ok_or_else(|| format!("no listener serves destination {destination}"))?;
        let (security_group, admitting_range) = admission(listener, flow.client.ip());
        let decision = match transport {
            Transport::Tcp => {
                let number = sequence.unwrap_or_default();
                let tcp = self.tcp(listener, destination);
                tcp.and_then(|tcp| choose_tcp(self, tcp, flow, number).ok())
            }
            Transport::Udp => self.udp(listener).and_then(|udp| choose_udp(self, udp, flow).ok()),
        };
        let decision =
            decision.ok_or_else(|| format!("listener {:?} has no cluster", &*listener.name))?;
        if decision.flow_key.takes_sequence(transport) && sequence.is_none() {
            return Err(format!(
                "listener {:?} hashes the sequence number of the SYN: pass it with --sequence",
                &*listener.name
            ));
        }
        let FlowDecision { target, hash, .. } = decision;
        let slot = target.table().and_then(|table| Some((table.slot(hash)?, table.size())));
        let choices: [_; OTHER_ENDPOINTS + 1] =
            std::array::from_fn(|attempt| decision.endpoint(attempt));
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
}

/// The security group's decision about a client, and the range that decided.
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
