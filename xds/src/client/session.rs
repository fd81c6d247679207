//! What to send after what arrived. A state machine without I/O.
//!
//! One session lives as long as the process; [`ClientSession::open`] begins a new stream in it. Per
//! type it knows what the server sent and we accepted (which outlives streams), and what this
//! stream was asked and acknowledged (which does not).
//!
//! Rules kept here (xDS protocol, envoyproxy/envoy `docs/root/api-docs/xds_protocol.rst`):
//! one ACK or NACK for each response; a NACK carries `error_detail`, and the good resources of its
//! response are used; nonces belong to a stream; what is absent from a state-of-the-world response
//! is deleted for clusters and listeners only; removal of endpoints, secrets and routes in use is
//! not obeyed, the last good ones stay (Envoy does the same); resources nobody asked for are
//! ignored; duplicates are refused; on reconnect only accepted versions are reported.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::rpc;
use prost::Message as _;
use weft_model::{Discovery, MissingReference, Name, Snapshot};

use super::batch::Batch;
use super::subscription::{REQUEST_BYTES, Subscription};
use crate::translate::{self, FieldError, Notes, Rejection, Resource, ResourceKind};

/// How many names of clusters are kept that the server has removed.
const ABSENT_LIMIT: usize = 10_000;

/// Which of the two protocol variants is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdsVariant {
    /// Only changes are sent.
    Delta,
    /// The whole state is sent.
    StateOfTheWorld,
}

/// Who we say we are. A claim: what a server trusts is the certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XdsNode {
    /// Names this process.
    pub id: String,
    /// Names the service it stands beside.
    pub cluster: String,
    /// What else a bootstrap file says of this process, as an encoded `core.v3.Node`: metadata and
    /// locality, by which a server decides what to send.
    pub described: Vec<u8>,
}

/// A message to send.
#[derive(Debug, Clone, PartialEq)]
pub enum XdsRequest {
    /// Of the delta variant.
    Delta(Box<DeltaDiscoveryRequest>),
    /// Of the state-of-the-world variant.
    StateOfTheWorld(Box<DiscoveryRequest>),
}

/// What a response led to.
#[derive(Debug, Default)]
pub struct ResponseOutcome {
    /// To be sent, in order.
    pub requests: Vec<XdsRequest>,
    /// Whether the accepted resources are others than before.
    pub changed: bool,
    /// What was refused.
    pub rejections: Vec<Rejection>,
    /// What an operator should know of each resource that was accepted: nothing of those that are gone.
    pub notes: Vec<(ResourceKind, Name, Notes)>,
}

/// The client's side of the protocol, for all types.
#[derive(Debug)]
pub struct ClientSession {
    variant: XdsVariant,
    node: XdsNode,
    /// Names of secrets that are made here and never asked for.
    local_secrets: BTreeSet<Name>,
    types: BTreeMap<ResourceKind, ClientTypeState>,
    /// The node goes with the first message of a stream only.
    node_sent: bool,
}

#[derive(Debug, Default)]
struct ClientTypeState {
    /// Outlives streams: the last good resources with their versions.
    accepted: BTreeMap<Name, (String, Resource)>,
    /// Resources whose last version was refused, until a good version comes or the server removes them.
    /// The empty name is for those without a readable name.
    refused: BTreeMap<Name, FieldError>,
    /// Names the server has said do not exist.
    absent: BTreeSet<Name>,
    /// Names that something refers to.
    wanted: BTreeSet<Name>,
    /// Outlives streams: whether the server ever answered.
    answered: bool,
    /// Of this stream: what the server knows we want.
    asked: BTreeSet<Name>,
    /// Of this stream: whether anything was sent.
    opened: bool,
    /// Of this stream: the nonce of the last response.
    nonce: String,
    /// State of the world: the version of the last response accepted whole.
    version: String,
}

impl ClientSession {
    /// A session that has not answered anything. `local_secrets` are never asked for.
    #[must_use]
    pub fn new(variant: XdsVariant, node: XdsNode, local_secrets: BTreeSet<Name>) -> Self {
        let types =
            ResourceKind::ALL.into_iter().map(|kind| (kind, ClientTypeState::default())).collect();
        Self { variant, node, local_secrets, types, node_sent: false }
    }

    /// Which variant is spoken.
    #[must_use]
    pub fn variant(&self) -> XdsVariant {
        self.variant
    }

    /// Begins a new stream: what to send first.
    pub fn open(&mut self) -> Vec<XdsRequest> {
        self.node_sent = false;
        for state in self.types.values_mut() {
            state.asked.clear();
            state.nonce.clear();
            state.opened = false;
        }
        self.update_references();
        self.subscribe()
    }

    /// Takes a delta response.
    pub fn on_delta(&mut self, response: DeltaDiscoveryResponse) -> ResponseOutcome {
        let Some(kind) = ResourceKind::from_type_url(&response.type_url) else {
            return self.refuse_type(&response.type_url, response.nonce, String::new());
        };
        let mut batch = Batch::new(kind);
        for resource in response.resources {
            // A resource without a body is a heartbeat: the version we have is still good.
            if let Some(any) = &resource.resource {
                batch.take(&resource.name, any, resource.version);
            }
        }
        self.state(kind).answered = true;
        let mut outcome = ResponseOutcome::default();
        let error = self.accept(batch, &mut outcome);
        for name in response.removed_resources {
            self.remove(kind, &Name::from(name), &mut outcome);
        }
        self.acknowledge_delta(kind, response.nonce, error, &mut outcome);
        outcome.notes.extend(self.update_references());
        outcome.requests.extend(self.subscribe());
        outcome
    }

    /// Takes a state-of-the-world response.
    pub fn on_state(&mut self, response: DiscoveryResponse) -> ResponseOutcome {
        let Some(kind) = ResourceKind::from_type_url(&response.type_url) else {
            return self.refuse_type(&response.type_url, response.nonce, response.version_info);
        };
        let mut batch = Batch::new(kind);
        for any in response.resources {
            batch.take("", &any, response.version_info.clone());
        }
        let present: BTreeSet<Name> = batch.names().collect();
        // One without a readable name may be any of those that seem to be gone.
        let nameless = present.contains("");
        self.state(kind).answered = true;
        let mut outcome = ResponseOutcome::default();
        let error = self.accept(batch, &mut outcome);
        if kind.is_wildcard() && !nameless {
            let state = self.state(kind);
            let known: BTreeSet<&Name> =
                state.accepted.keys().chain(state.refused.keys()).collect();
            let gone = known.into_iter().filter(|name| !present.contains(*name));
            for name in gone.cloned().collect::<Vec<_>>() {
                self.remove(kind, &name, &mut outcome);
            }
        }
        let state = self.state(kind);
        state.nonce = response.nonce;
        if error.is_none() {
            state.version = response.version_info;
        }
        outcome.notes.extend(self.update_references());
        // Names are the whole wish each time, so a change of wishes rides on the acknowledgement.
        outcome.requests.push(self.state_request(kind, error));
        outcome.requests.extend(self.subscribe());
        outcome
    }

    /// Whether the server has ever answered for clusters and listeners. Before that, having none
    /// means nothing.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.types.iter().filter(|(kind, _)| kind.is_wildcard()).all(|(_, state)| state.answered)
    }

    /// Puts everything accepted into `snapshot`, over what is there.
    pub fn fill(&self, snapshot: &mut Snapshot) {
        for (_, resource) in self.types.values().flat_map(|state| state.accepted.values()) {
            translate::insert(snapshot, resource.clone());
        }
    }

    /// The resources whose last version was refused, by kind and name, with the reason.
    #[must_use]
    pub fn rejected(&self) -> BTreeMap<String, String> {
        let of_kind = |(kind, state): (&ResourceKind, &ClientTypeState)| {
            let entry =
                |(name, why): (&Name, &FieldError)| (format!("{kind} {name}"), why.to_string());
            state.refused.iter().map(entry).collect::<Vec<_>>()
        };
        self.types.iter().flat_map(of_kind).collect()
    }

    /// Whether the server has said that this does not exist.
    #[must_use]
    pub fn is_absent(&self, missing: &MissingReference) -> bool {
        let (kind, name) = match missing {
            MissingReference::Routes(name) => (ResourceKind::Routes, name),
            MissingReference::Cluster(name) => (ResourceKind::Cluster, name),
            MissingReference::Endpoints(name) => (ResourceKind::Endpoints, name),
            MissingReference::Secret(name) => (ResourceKind::Secret, name),
            // No server is asked for them.
            MissingReference::Addresses(_) => return false,
        };
        self.types.get(&kind).is_some_and(|state| state.absent.contains(name))
    }

    /// Uses the good resources and gives the text for those refused.
    fn accept(&mut self, batch: Batch, outcome: &mut ResponseOutcome) -> Option<String> {
        let kind = batch.kind;
        let local = self.local_secrets.clone();
        let state = self.state(kind);
        state.refused.remove("");
        for (name, (version, accepted)) in batch.good {
            let asked = kind.is_wildcard() || state.asked.contains(&name);
            if !asked || (kind == ResourceKind::Secret && local.contains(&name)) {
                continue;
            }
            outcome.notes.push((kind, name.clone(), accepted.notes));
            state.absent.remove(&name);
            state.refused.remove(&name);
            let entry = (version, accepted.resource);
            let same = state.accepted.get(&name).is_some_and(|(_, old)| *old == entry.1);
            outcome.changed |= !same;
            state.accepted.insert(name, entry);
        }
        for rejection in &batch.bad {
            state.refused.insert(rejection.name.as_str().into(), rejection.error.clone());
        }
        outcome.rejections.extend(batch.bad);
        if outcome.rejections.is_empty() {
            return None;
        }
        let texts: Vec<String> = outcome.rejections.iter().map(ToString::to_string).collect();
        Some(texts.join("; "))
    }

    /// Obeys a removal where it counts; see the module's head.
    fn remove(&mut self, kind: ResourceKind, name: &Name, outcome: &mut ResponseOutcome) {
        let state = self.state(kind);
        let in_use = state.wanted.contains(name);
        state.refused.remove(name);
        if in_use {
            state.absent.insert(name.clone());
        } else if kind == ResourceKind::Cluster {
            // Routes that come later may refer to it. No route has to: names that change would add up.
            state.absent.insert(name.clone());
            if state.absent.len() > ABSENT_LIMIT {
                state.absent.pop_first();
            }
        }
        if in_use && !kind.is_wildcard() && state.accepted.contains_key(name) {
            return;
        }
        let had = state.accepted.remove(name).is_some();
        if had {
            outcome.notes.push((kind, name.clone(), Notes::default()));
        }
        outcome.changed |= had || in_use;
    }

    /// Works out which names the accepted resources refer to, and forgets resources without a reference. Gives
    /// those, without notes.
    fn update_references(&mut self) -> Vec<(ResourceKind, Name, Notes)> {
        let mut forgotten = Vec::new();
        let mut wanted: BTreeMap<ResourceKind, BTreeSet<Name>> = BTreeMap::new();
        let resources: Vec<&Resource> = self
            .types
            .iter()
            .filter(|(kind, _)| kind.is_wildcard())
            .flat_map(|(_, state)| state.accepted.values().map(|(_, resource)| resource))
            .collect();
        for resource in resources {
            references(resource, &mut |kind, name| {
                wanted.entry(kind).or_default().insert(name.clone());
            });
        }
        for (kind, state) in &mut self.types {
            if kind.is_wildcard() {
                continue;
            }
            let mut names = wanted.remove(kind).unwrap_or_default();
            if *kind == ResourceKind::Secret {
                names.retain(|name| !self.local_secrets.contains(name));
            }
            state.accepted.retain(|name, _| {
                let is_kept = names.contains(name);
                if !is_kept {
                    forgotten.push((*kind, name.clone(), Notes::default()));
                }
                is_kept
            });
            state.refused.retain(|name, _| name.is_empty() || names.contains(name));
            state.absent.retain(|name| names.contains(name));
            state.wanted = names;
        }
        forgotten
    }

    /// Asks for what is wanted and was not asked on this stream.
    fn subscribe(&mut self) -> Vec<XdsRequest> {
        let kinds: Vec<ResourceKind> = self
            .types
            .iter()
            .filter(|(kind, state)| {
                !state.opened && kind.is_wildcard() || state.wanted != state.asked
            })
            .map(|(kind, _)| *kind)
            .collect();
        kinds
            .into_iter()
            .flat_map(|kind| match self.variant {
                XdsVariant::Delta => self.delta_subscription(kind),
                XdsVariant::StateOfTheWorld => vec![self.state_request(kind, None)],
            })
            .collect()
    }

    /// The requests that tell the server what is wanted now. Only the first request of a type on a stream may carry
    /// versions: names that follow in later requests are sent again by the server.
    fn delta_subscription(&mut self, kind: ResourceKind) -> Vec<XdsRequest> {
        let mut node = self.first_node();
        let state = self.state(kind);
        let is_first = !std::mem::replace(&mut state.opened, true);
        let mut requests = Vec::new();
        let mut request = Subscription::new(kind);
        if is_first && kind.is_wildcard() {
            // In one request whatever its size: the server removes nothing that it does not know of.
            for (name, (version, _)) in &state.accepted {
                request.report(name, version);
            }
        }
        let mut may_report = is_first;
        for name in state.wanted.difference(&state.asked) {
            if request.bytes >= REQUEST_BYTES {
                requests.push(std::mem::replace(&mut request, Subscription::new(kind)).message);
                may_report = false;
            }
            request.subscribe(name);
            if let Some((version, _)) = state.accepted.get(name).filter(|_| may_report) {
                request.report(name, version);
            }
        }
        for name in state.asked.difference(&state.wanted) {
            if request.bytes >= REQUEST_BYTES {
                requests.push(std::mem::replace(&mut request, Subscription::new(kind)).message);
            }
            request.unsubscribe(name);
        }
        requests.push(request.message);
        state.asked = state.wanted.clone();
        let with_node = requests.into_iter().map(|message| {
            XdsRequest::Delta(Box::new(DeltaDiscoveryRequest { node: node.take(), ..message }))
        });
        with_node.collect()
    }

    fn acknowledge_delta(
        &mut self,
        kind: ResourceKind,
        nonce: String,
        error: Option<String>,
        outcome: &mut ResponseOutcome,
    ) {
        let node = self.first_node();
        outcome.requests.push(XdsRequest::Delta(Box::new(DeltaDiscoveryRequest {
            node,
            type_url: kind.type_url(),
            response_nonce: nonce,
            error_detail: error.map(invalid),
            ..DeltaDiscoveryRequest::default()
        })));
    }

    fn state_request(&mut self, kind: ResourceKind, error: Option<String>) -> XdsRequest {
        let node = self.first_node();
        let state = self.state(kind);
        state.asked = state.wanted.clone();
        state.opened = true;
        XdsRequest::StateOfTheWorld(Box::new(DiscoveryRequest {
            version_info: state.version.clone(),
            node,
            resource_names: state.wanted.iter().map(ToString::to_string).collect(),
            type_url: kind.type_url(),
            response_nonce: state.nonce.clone(),
            error_detail: error.map(invalid),
            ..DiscoveryRequest::default()
        }))
    }

    /// A type we never asked for: said once, and nothing else changes.
    fn refuse_type(
        &mut self,
        type_url: &str,
        nonce: String,
        version_info: String,
    ) -> ResponseOutcome {
        let error = Some(invalid(format!("the type {type_url:?} was not asked for")));
        let type_url = type_url.to_owned();
        let request = match self.variant {
            XdsVariant::Delta => XdsRequest::Delta(Box::new(DeltaDiscoveryRequest {
                type_url,
                response_nonce: nonce,
                error_detail: error,
                ..DeltaDiscoveryRequest::default()
            })),
            XdsVariant::StateOfTheWorld => {
                XdsRequest::StateOfTheWorld(Box::new(DiscoveryRequest {
                    version_info,
                    type_url,
                    response_nonce: nonce,
                    error_detail: error,
                    ..DiscoveryRequest::default()
                }))
            }
        };
        ResponseOutcome { requests: vec![request], ..ResponseOutcome::default() }
    }

    fn first_node(&mut self) -> Option<core::Node> {
        if std::mem::replace(&mut self.node_sent, true) {
            return None;
        }
        // The bytes are of our own encoding; were they not, the rest is still a valid node.
        let mut node = core::Node::decode(self.node.described.as_slice()).unwrap_or_default();
        node.id.clone_from(&self.node.id);
        node.cluster.clone_from(&self.node.cluster);
        node.user_agent_name = "weft".into();
        let version = env!("CARGO_PKG_VERSION").into();
        node.user_agent_version_type =
            Some(core::node::UserAgentVersionType::UserAgentVersion(version));
        node.client_features.push("envoy.lb.does_not_support_overprovisioning".into());
        Some(node)
    }

    fn state(&mut self, kind: ResourceKind) -> &mut ClientTypeState {
        self.types.entry(kind).or_default()
    }
}

/// Calls `refer` with every name that a resource refers to and a server is asked for by name.
fn references(resource: &Resource, refer: &mut dyn FnMut(ResourceKind, &Name)) {
    match resource {
        Resource::Cluster(cluster) => {
            if let Discovery::Endpoints(name) = &cluster.discovery {
                refer(ResourceKind::Endpoints, name);
            }
            cluster.secret_names().for_each(|name| refer(ResourceKind::Secret, name));
        }
        Resource::Listener(listener) => {
            listener.secret_names().for_each(|name| refer(ResourceKind::Secret, name));
            listener.table_names().for_each(|name| refer(ResourceKind::Routes, name));
        }
        Resource::Endpoints(..) | Resource::Secret(..) | Resource::Routes(_) => {}
    }
}

/// The `error_detail` of a NACK: INVALID_ARGUMENT with a text for people.
fn invalid(message: String) -> rpc::Status {
    const INVALID_ARGUMENT: i32 = 3;
    rpc::Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
}
