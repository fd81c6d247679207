//! The client's side of the xDS protocol, as a state machine without I/O.
//!
//! One session lives as long as the process; [`ClientSession::open`] starts a new stream in it. Per resource type it
//! keeps the accepted resources (across streams), and what the current stream has subscribed to and acknowledged.
//!
//! Rules (xDS protocol, envoyproxy/envoy `docs/root/api-docs/xds_protocol.rst`):
//!
//! - Each response gets one ACK or NACK. A NACK carries `error_detail`; the valid resources of its response are used.
//! - Nonces belong to a stream.
//! - A resource missing from a state-of-the-world response is deleted for clusters and listeners only.
//! - Removal of endpoints, secrets and routes that are in use is ignored; the last good ones stay (as in Envoy).
//! - Resources without a subscription are ignored; duplicate names are rejected.
//! - After a reconnect, only accepted versions are reported.

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

/// The most names of removed clusters that are remembered.
const ABSENT_LIMIT: usize = 10_000;

/// The variant of the xDS transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdsVariant {
    /// Incremental xDS: responses contain changes.
    Delta,
    /// State of the world: responses contain all resources.
    StateOfTheWorld,
}

/// The node that a client identifies itself as (`core.v3.Node`). Not authenticated: servers must rely on the client's
/// certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XdsNode {
    /// The name of the process.
    pub id: String,
    /// The name of its service.
    pub cluster: String,
    /// The other fields of the bootstrap file's node, as an encoded `core.v3.Node`: metadata and locality, which a
    /// server may use to select resources.
    pub described: Vec<u8>,
}

/// A request to the server.
#[derive(Debug, Clone, PartialEq)]
pub enum XdsRequest {
    /// A request of the delta variant.
    Delta(Box<DeltaDiscoveryRequest>),
    /// A request of the state-of-the-world variant.
    StateOfTheWorld(Box<DiscoveryRequest>),
}

/// The result of a response.
#[derive(Debug, Default)]
pub struct ResponseOutcome {
    /// The requests to send, in order.
    pub requests: Vec<XdsRequest>,
    /// Whether the set of accepted resources changed.
    pub changed: bool,
    /// The rejected resources.
    pub rejections: Vec<Rejection>,
    /// The notes of each accepted resource; empty notes for a removed one.
    pub notes: Vec<(ResourceKind, Name, Notes)>,
}

/// The client's side of the protocol, for all types.
#[derive(Debug)]
pub struct ClientSession {
    variant: XdsVariant,
    node: XdsNode,
    /// Secrets that this process creates itself and does not request.
    local_secrets: BTreeSet<Name>,
    types: BTreeMap<ResourceKind, ClientTypeState>,
    /// Whether the node was sent on this stream: it is sent with the first request only.
    node_sent: bool,
}

#[derive(Debug, Default)]
struct ClientTypeState {
    /// Across streams: the last good resources with their versions.
    accepted: BTreeMap<Name, (String, Resource)>,
    /// Resources whose last version was rejected, until a valid version arrives or the server removes them. The empty
    /// name stands for resources whose name could not be decoded.
    refused: BTreeMap<Name, FieldError>,
    /// Names that the server has reported as nonexistent.
    absent: BTreeSet<Name>,
    /// Names that accepted resources refer to.
    wanted: BTreeSet<Name>,
    /// Across streams: whether the server has answered at least once.
    answered: bool,
    /// On this stream: the subscribed names.
    subscribed: BTreeSet<Name>,
    /// On this stream: whether a request was sent.
    opened: bool,
    /// On this stream: the nonce of the last response.
    nonce: String,
    /// State of the world: the version of the last response without rejections.
    version: String,
}

impl ClientSession {
    /// A new session. `local_secrets` are never requested.
    #[must_use]
    pub fn new(variant: XdsVariant, node: XdsNode, local_secrets: BTreeSet<Name>) -> Self {
        let types =
            ResourceKind::ALL.into_iter().map(|kind| (kind, ClientTypeState::default())).collect();
        Self { variant, node, local_secrets, types, node_sent: false }
    }

    /// The protocol variant.
    #[must_use]
    pub fn variant(&self) -> XdsVariant {
        self.variant
    }

    /// Starts a new stream; returns its first requests.
    pub fn open(&mut self) -> Vec<XdsRequest> {
        self.node_sent = false;
        for state in self.types.values_mut() {
            state.subscribed.clear();
            state.nonce.clear();
            state.opened = false;
        }
        self.update_references();
        self.subscribe()
    }

    /// Handles a delta response.
    pub fn on_delta(&mut self, response: DeltaDiscoveryResponse) -> ResponseOutcome {
        let Some(kind) = ResourceKind::from_type_url(&response.type_url) else {
            return self.refuse_type(&response.type_url, response.nonce, String::new());
        };
        let mut batch = Batch::new(kind);
        for resource in response.resources {
            // A resource without a body is a heartbeat: the current version stays valid.
            if let Some(any) = &resource.resource {
                batch.take(&resource.name, any, resource.version);
            }
        }
        self.type_state(kind).answered = true;
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

    /// Handles a state-of-the-world response.
    pub fn on_state_of_the_world(&mut self, response: DiscoveryResponse) -> ResponseOutcome {
        let Some(kind) = ResourceKind::from_type_url(&response.type_url) else {
            return self.refuse_type(&response.type_url, response.nonce, response.version_info);
        };
        let mut batch = Batch::new(kind);
        for any in response.resources {
            batch.take("", &any, response.version_info.clone());
        }
        let present: BTreeSet<Name> = batch.names().collect();
        // A resource whose name could not be decoded may be any of the missing ones.
        let nameless = present.contains("");
        self.type_state(kind).answered = true;
        let mut outcome = ResponseOutcome::default();
        let error = self.accept(batch, &mut outcome);
        if kind.is_wildcard() && !nameless {
            let state = self.type_state(kind);
            let known: BTreeSet<&Name> =
                state.accepted.keys().chain(state.refused.keys()).collect();
            let gone = known.into_iter().filter(|name| !present.contains(*name));
            for name in gone.cloned().collect::<Vec<_>>() {
                self.remove(kind, &name, &mut outcome);
            }
        }
        let state = self.type_state(kind);
        state.nonce = response.nonce;
        if error.is_none() {
            state.version = response.version_info;
        }
        outcome.notes.extend(self.update_references());
        // Each request lists all names, so the ACK also carries a changed subscription.
        outcome.requests.push(self.state_of_the_world_request(kind, error));
        outcome.requests.extend(self.subscribe());
        outcome
    }

    /// Whether the server has answered for clusters and listeners at least once. Before that, an empty set does not
    /// mean that there are none.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.types.iter().filter(|(kind, _)| kind.is_wildcard()).all(|(_, state)| state.answered)
    }

    /// Adds all accepted resources to `snapshot`; they replace those of the same name.
    pub fn fill(&self, snapshot: &mut Snapshot) {
        for (_, resource) in self.types.values().flat_map(|state| state.accepted.values()) {
            translate::insert(snapshot, resource.clone());
        }
    }

    /// The resources whose last version was rejected, by kind and name, with the reason.
    #[must_use]
    pub fn rejected(&self) -> BTreeMap<String, String> {
        let of_kind = |(kind, state): (&ResourceKind, &ClientTypeState)| {
            let entry =
                |(name, why): (&Name, &FieldError)| (format!("{kind} {name}"), why.to_string());
            state.refused.iter().map(entry).collect::<Vec<_>>()
        };
        self.types.iter().flat_map(of_kind).collect()
    }

    /// Whether the server has reported that this resource does not exist.
    #[must_use]
    pub fn is_absent(&self, missing: &MissingReference) -> bool {
        let (kind, name) = match missing {
            MissingReference::Routes(name) => (ResourceKind::Routes, name),
            MissingReference::Cluster(name) => (ResourceKind::Cluster, name),
            MissingReference::Endpoints(name) => (ResourceKind::Endpoints, name),
            MissingReference::Secret(name) => (ResourceKind::Secret, name),
            // DNS addresses do not come from the server.
            MissingReference::Addresses(_) => return false,
        };
        self.types.get(&kind).is_some_and(|state| state.absent.contains(name))
    }

    /// Accepts the valid resources, and returns the NACK text when some are rejected.
    fn accept(&mut self, batch: Batch, outcome: &mut ResponseOutcome) -> Option<String> {
        let kind = batch.kind;
        let local = self.local_secrets.clone();
        let state = self.type_state(kind);
        state.refused.remove("");
        for (name, (version, accepted)) in batch.good {
            let is_subscribed = kind.is_wildcard() || state.subscribed.contains(&name);
            if !is_subscribed || (kind == ResourceKind::Secret && local.contains(&name)) {
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

    /// Handles a removal by the server; see the rules of the module.
    fn remove(&mut self, kind: ResourceKind, name: &Name, outcome: &mut ResponseOutcome) {
        let state = self.type_state(kind);
        let in_use = state.wanted.contains(name);
        state.refused.remove(name);
        if in_use {
            state.absent.insert(name.clone());
        } else if kind == ResourceKind::Cluster {
            // Routes that arrive later may refer to it. The number of names is limited, because names may change often.
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

    /// Computes which names the accepted resources refer to, and removes resources without a reference. Returns the
    /// removed ones with empty notes.
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

    /// The requests that bring the stream's subscriptions up to date.
    fn subscribe(&mut self) -> Vec<XdsRequest> {
        let kinds: Vec<ResourceKind> = self
            .types
            .iter()
            .filter(|(kind, state)| {
                !state.opened && kind.is_wildcard() || state.wanted != state.subscribed
            })
            .map(|(kind, _)| *kind)
            .collect();
        kinds
            .into_iter()
            .flat_map(|kind| match self.variant {
                XdsVariant::Delta => self.delta_subscription(kind),
                XdsVariant::StateOfTheWorld => vec![self.state_of_the_world_request(kind, None)],
            })
            .collect()
    }

    /// The requests that subscribe to and unsubscribe from names. Only the first request of a type on a stream may
    /// report versions: the server sends the resources of later requests again.
    fn delta_subscription(&mut self, kind: ResourceKind) -> Vec<XdsRequest> {
        let mut node = self.first_node();
        let state = self.type_state(kind);
        let is_first = !std::mem::replace(&mut state.opened, true);
        let mut requests = Vec::new();
        let mut request = Subscription::new(kind);
        if is_first && kind.is_wildcard() {
            // In one request of any size: the server only reports removals of names that this request lists.
            for (name, (version, _)) in &state.accepted {
                request.report(name, version);
            }
        }
        let mut may_report = is_first;
        for name in state.wanted.difference(&state.subscribed) {
            if request.bytes >= REQUEST_BYTES {
                requests.push(std::mem::replace(&mut request, Subscription::new(kind)).message);
                may_report = false;
            }
            request.subscribe(name);
            if let Some((version, _)) = state.accepted.get(name).filter(|_| may_report) {
                request.report(name, version);
            }
        }
        for name in state.subscribed.difference(&state.wanted) {
            if request.bytes >= REQUEST_BYTES {
                requests.push(std::mem::replace(&mut request, Subscription::new(kind)).message);
            }
            request.unsubscribe(name);
        }
        requests.push(request.message);
        state.subscribed = state.wanted.clone();
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

    fn state_of_the_world_request(
        &mut self,
        kind: ResourceKind,
        error: Option<String>,
    ) -> XdsRequest {
        let node = self.first_node();
        let state = self.type_state(kind);
        state.subscribed = state.wanted.clone();
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

    /// Sends a NACK for a response of an unknown type; nothing else changes.
    fn refuse_type(
        &mut self,
        type_url: &str,
        nonce: String,
        version_info: String,
    ) -> ResponseOutcome {
        let error = Some(invalid(format!("unknown resource type {type_url:?}: not subscribed")));
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
        // This process encoded the bytes. If decoding failed, the remaining fields would still be a valid node.
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

    fn type_state(&mut self, kind: ResourceKind) -> &mut ClientTypeState {
        self.types.entry(kind).or_default()
    }
}

/// Calls `refer` with every name that a resource refers to and that is requested by name.
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

/// The `error_detail` of a NACK: INVALID_ARGUMENT with a message.
fn invalid(message: String) -> rpc::Status {
    const INVALID_ARGUMENT: i32 = 3;
    rpc::Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
}
