//! The server's side of one xDS stream, as a state machine without I/O.
//!
//! Rules (xDS protocol, and the observed behaviour of clients):
//!
//! - Clusters are sent before endpoints, secrets, listeners and routes; removals of clusters last.
//! - The endpoints of a changed cluster are sent again even if they did not change; otherwise Envoy waits 15 s.
//! - A rejected version (NACK) is not sent again until it changes.
//! - The first wildcard request is answered even when there are no resources; its ACK is never answered.
//! - At most one response of a type is unacknowledged; later changes are merged into the next response.
//! - Newly subscribed names are answered even if the client reported them.
//! - Removals are reported, also to a client that reconnects.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;

use weft_model::Name;

use super::ack_state::AckState;
use super::known_resources::KnownResources;
use super::{EncodedResource, ResourceSet};
use crate::client::XdsVariant;
use crate::translate::ResourceKind;

/// The most names that one stream may subscribe to, per type.
const NAME_LIMIT: usize = 100_000;
/// The most bytes of these names, including the names that must be sent.
const NAME_LIMIT_BYTES: usize = 32 * 1024 * 1024;
const TOO_MANY_NAMES: &str = "too many names of one resource type: at most 100000 are accepted";

/// A response to the client.
#[derive(Debug, Clone, PartialEq)]
pub enum XdsResponse {
    /// A response of the delta variant.
    Delta(Box<DeltaDiscoveryResponse>),
    /// A response of the state-of-the-world variant.
    StateOfTheWorld(Box<DiscoveryResponse>),
}

/// The server's side of one stream.
#[derive(Debug)]
pub struct ServerSession {
    variant: XdsVariant,
    types: BTreeMap<ResourceKind, ServerTypeState>,
    sent: u64,
}

#[derive(Debug, Default)]
struct ServerTypeState {
    /// Whether the client sent a request of this type.
    opened: bool,
    /// Whether the client subscribes to all resources.
    wildcard: bool,
    /// Whether the client has subscribed to names. After that, an empty list no longer means a wildcard.
    named: bool,
    /// The names that the client subscribes to.
    names: BTreeSet<Name>,
    /// The versions that the client has, as far as the server knows.
    known: KnownResources,
    /// Names to send even if the client has them.
    must_send: BTreeSet<Name>,
    /// The state of the last response.
    last: LastResponse,
    /// The version of this type at which `known` was compared with the set: only later changes need a comparison. None
    /// when all resources must be compared.
    compared_version: Option<String>,
}

/// The state of the last response of a type, with its nonce.
#[derive(Debug, Default)]
enum LastResponse {
    /// No response was sent.
    #[default]
    None,
    /// Not acknowledged yet.
    InFlight(String),
    /// Acknowledged (ACK).
    Accepted(String),
    /// Rejected (NACK).
    Refused(String),
}

impl LastResponse {
    /// The nonce; empty before the first response.
    fn nonce(&self) -> &str {
        match self {
            Self::None => "",
            Self::InFlight(nonce) | Self::Accepted(nonce) | Self::Refused(nonce) => nonce,
        }
    }
}

impl ServerTypeState {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// The client's version of a resource.
    fn version(&self, kind: ResourceKind, name: &str) -> Option<&Arc<str>> {
        self.known.version(kind, name, self.wants(name))
    }

    /// Whether the client subscribes to a resource and has another version of it, or none.
    fn lacks(&self, kind: ResourceKind, name: &str, published: &EncodedResource) -> bool {
        self.wants(name) && self.version(kind, name) != Some(&published.version)
    }

    /// Lists the versions that the client has, before its subscription grows.
    fn list_known(&mut self, kind: ResourceKind) {
        let Self { known, names, wildcard, .. } = self;
        known.list(kind, |name| *wildcard || names.contains(name));
    }

    fn want_all(&mut self, kind: ResourceKind) {
        if !self.wildcard {
            self.list_known(kind);
            self.wildcard = true;
        }
    }

    /// Ends the wildcard subscription; only names remain.
    fn want_names_only(&mut self) {
        self.wildcard = false;
        let names = &self.names;
        self.known.retain(|name| names.contains(name));
        self.must_send.retain(|name| names.contains(name));
    }

    /// Removes a name from the subscription.
    fn unsubscribe(&mut self, kind: ResourceKind, name: &str, set: &ResourceSet) {
        let was_named = self.names.remove(name);
        self.must_send.remove(name);
        if !self.wildcard {
            self.known.forget(name);
        } else if was_named || self.version(kind, name).is_some() || set.get(kind, name).is_some() {
            self.must_send.insert(set.shared_name(kind, name));
        }
    }

    /// # Errors
    /// When the stream subscribes to more names than the limit.
    fn check_limits(&self) -> Result<(), &'static str> {
        let bytes = |names: &BTreeSet<Name>| names.iter().map(|name| name.len()).sum::<usize>();
        if self.names.len() > NAME_LIMIT || self.must_send.len() > NAME_LIMIT {
            return Err(TOO_MANY_NAMES);
        }
        if bytes(&self.names).saturating_add(bytes(&self.must_send)) > NAME_LIMIT_BYTES {
            return Err("names of one resource type too long: at most 32 MiB are accepted");
        }
        Ok(())
    }

    /// Whether the last response is not acknowledged yet.
    fn in_flight(&self) -> bool {
        matches!(self.last, LastResponse::InFlight(_))
    }

    /// Records an ACK or NACK of the last response. After a NACK the version counts as known, so that it is not sent
    /// again.
    fn acknowledged(&mut self, nonce: &str, refused: bool) {
        if self.in_flight() && nonce == self.last.nonce() {
            let nonce = nonce.to_owned();
            self.last =
                if refused { LastResponse::Refused(nonce) } else { LastResponse::Accepted(nonce) };
        }
    }
}

impl ServerSession {
    /// A new stream.
    #[must_use]
    pub fn new(variant: XdsVariant) -> Self {
        Self { variant, types: BTreeMap::new(), sent: 0 }
    }

    /// Handles a delta request; returns the responses to send.
    ///
    /// # Errors
    /// When the stream subscribes to more names than the limit; the stream must be closed.
    pub fn on_delta(
        &mut self,
        request: DeltaDiscoveryRequest,
        set: &Arc<ResourceSet>,
    ) -> Result<Vec<XdsResponse>, &'static str> {
        let Some(kind) = ResourceKind::from_type_url(&request.type_url) else {
            return Ok(self.unknown_delta(request));
        };
        let state = self.types.entry(kind).or_default();
        state.acknowledged(&request.response_nonce, request.error_detail.is_some());
        let first = !std::mem::replace(&mut state.opened, true);
        let silent = request.resource_names_subscribe.is_empty()
            && request.resource_names_unsubscribe.is_empty();
        let mut reported = HashMap::new();
        if first {
            reported = request.initial_resource_versions;
            if reported.len() > NAME_LIMIT {
                return Err(TOO_MANY_NAMES);
            }
            for (name, version) in &reported {
                let shared = set.get(kind, name).map(|published| published.version.clone());
                let shared = shared.filter(|known| **known == **version);
                let version = shared.unwrap_or_else(|| version.as_str().into());
                state.known.report(set.shared_name(kind, name), version);
            }
            state.wildcard = silent && kind.is_wildcard();
        }
        if first || !silent {
            state.compared_version = None;
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                state.want_all(kind);
                continue;
            }
            let shared = set.shared_name(kind, &name);
            // A client that reconnects reports the versions it has; those need not be sent again.
            if !reported.contains_key(&name) {
                state.must_send.insert(shared.clone());
            }
            state.names.insert(shared);
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                state.want_names_only();
            } else {
                state.unsubscribe(kind, &name, set);
            }
        }
        if !silent {
            state.check_limits()?;
        }
        Ok(self.flush(set))
    }

    /// Handles a state-of-the-world request; returns the responses to send.
    ///
    /// # Errors
    /// When the stream subscribes to more names than the limit; the stream must be closed.
    pub fn on_state_of_the_world(
        &mut self,
        request: DiscoveryRequest,
        set: &Arc<ResourceSet>,
    ) -> Result<Vec<XdsResponse>, &'static str> {
        let Some(kind) = ResourceKind::from_type_url(&request.type_url) else {
            return Ok(Vec::new());
        };
        if request.resource_names.len() > NAME_LIMIT {
            return Err(TOO_MANY_NAMES);
        }
        let state = self.types.entry(kind).or_default();
        let mut names: BTreeSet<Name> =
            request.resource_names.into_iter().map(|name| set.shared_name(kind, &name)).collect();
        if !request.response_nonce.is_empty() && request.response_nonce != state.last.nonce() {
            // Stale nonce: the client will also acknowledge the newer response. By then it may list names again that
            // are missing here; it has dropped their resources in between.
            let wildcard = state.wildcard;
            state.compared_version = None;
            state.list_known(kind);
            state.known.retain(|name| wildcard || names.contains(name));
            return Ok(Vec::new());
        }
        let was_acknowledged =
            matches!(state.last, LastResponse::Accepted(_) | LastResponse::Refused(_));
        state.acknowledged(&request.response_nonce, request.error_detail.is_some());
        let first = !std::mem::replace(&mut state.opened, true);
        let star = names.remove("*");
        let wildcard = kind.is_wildcard() && (star || (names.is_empty() && !state.named));
        if first || wildcard != state.wildcard || names != state.names {
            state.compared_version = None;
        }
        if wildcard {
            state.want_all(kind);
        }
        state.wildcard = wildcard;
        state.named |= star || !names.is_empty();
        // The same names with the same nonce again: a request to resend them. Envoy sends it for the endpoints of a
        // changed cluster.
        let again =
            was_acknowledged && !first && names == state.names && request.error_detail.is_none();
        for name in &names {
            if again || !state.names.contains(name) {
                state.must_send.insert(name.clone());
            }
        }
        state.known.retain(|name| wildcard || names.contains(name));
        state.must_send.retain(|name| names.contains(name));
        state.names = names;
        state.check_limits()?;
        Ok(self.flush(set))
    }

    /// How far the client is with a resource.
    #[must_use]
    pub fn ack_state(&self, kind: ResourceKind, name: &str) -> AckState {
        match self.types.get(&kind).filter(|state| state.opened && state.wants(name)) {
            None => AckState::NotSubscribed,
            Some(ServerTypeState {
                last: LastResponse::InFlight(_) | LastResponse::Refused(_),
                ..
            }) => AckState::Pending,
            Some(state) if state.must_send.contains(name) => AckState::Pending,
            Some(state) => {
                let version = state.version(kind, name).map(ToString::to_string);
                version.map_or(AckState::Pending, AckState::Acked)
            }
        }
    }

    /// The responses that bring the client up to date with `set`.
    pub fn flush(&mut self, set: &Arc<ResourceSet>) -> Vec<XdsResponse> {
        let mut responses = Vec::new();
        for kind in ResourceKind::ALL {
            let Some(state) =
                self.types.get(&kind).filter(|state| state.opened && !state.in_flight())
            else {
                continue;
            };
            let names: BTreeSet<Name> = differences(state, kind, set).cloned().collect();
            let hold_removals = kind == ResourceKind::Cluster && self.routes_are_unsettled(set);
            let endpoints_of = |name: &Name| set.get(kind, name)?.endpoints.clone();
            let changed_endpoints: Vec<Name> = names.iter().filter_map(endpoints_of).collect();
            let response = match self.variant {
                XdsVariant::Delta => self.delta_response(kind, set, names, hold_removals),
                XdsVariant::StateOfTheWorld => self.state_response(kind, set, names, hold_removals),
            };
            let Some(response) = response else {
                continue;
            };
            responses.push(response);
            if let Some(endpoints) = self.types.get_mut(&ResourceKind::Endpoints) {
                let wanted = |name: &Name| endpoints.names.contains(name);
                let wanted: Vec<Name> = changed_endpoints.into_iter().filter(wanted).collect();
                endpoints.must_send.extend(wanted);
            }
        }
        responses
    }

    /// Whether listeners or routes are not sent or not acknowledged yet: until then the client may still use a removed
    /// cluster.
    fn routes_are_unsettled(&self, set: &ResourceSet) -> bool {
        [ResourceKind::Listener, ResourceKind::Routes].into_iter().any(|kind| {
            self.types.get(&kind).is_some_and(|state| {
                let can_report = |name: &Name| self.can_report(kind, name, set);
                state.in_flight() || differences(state, kind, set).any(can_report)
            })
        })
    }

    /// Whether the protocol can report this name's state: state of the world cannot report the removal of endpoints,
    /// secrets and routes.
    fn can_report(&self, kind: ResourceKind, name: &str, set: &ResourceSet) -> bool {
        match self.variant {
            XdsVariant::Delta => true,
            XdsVariant::StateOfTheWorld => kind.is_wildcard() || set.get(kind, name).is_some(),
        }
    }

    fn delta_response(
        &mut self,
        kind: ResourceKind,
        set: &Arc<ResourceSet>,
        names: BTreeSet<Name>,
        hold_removals: bool,
    ) -> Option<XdsResponse> {
        let state = self.types.get_mut(&kind)?;
        let mut resources = Vec::new();
        let mut removed = Vec::new();
        let mut held = Vec::new();
        for name in names {
            if let Some(published) = set.get(kind, &name) {
                resources.push(Resource {
                    name: name.to_string(),
                    version: published.version.to_string(),
                    resource: Some(any(kind, &published.bytes)),
                    ..Resource::default()
                });
                continue;
            }
            // The client cannot use a cluster that it never had.
            match state.version(kind, &name).filter(|_| hold_removals).cloned() {
                Some(version) => held.push((name, version)),
                None => removed.push(name.to_string()),
            }
        }
        state.compared_version = Some(set.version(kind).to_owned()).filter(|_| held.is_empty());
        state.known.take_set(set.clone());
        held.into_iter().for_each(|(name, version)| state.known.report(name, version));
        state.must_send.clear();
        let empty = resources.is_empty() && removed.is_empty();
        // The first wildcard request is answered even when there are no resources.
        let first = state.wildcard && matches!(state.last, LastResponse::None);
        if empty && !first {
            return None;
        }
        self.sent += 1;
        let nonce = self.sent.to_string();
        state.last = LastResponse::InFlight(nonce.clone());
        Some(XdsResponse::Delta(Box::new(DeltaDiscoveryResponse {
            system_version_info: set.version(kind).to_owned(),
            resources,
            type_url: kind.type_url(),
            removed_resources: removed,
            nonce,
            ..DeltaDiscoveryResponse::default()
        })))
    }

    fn state_response(
        &mut self,
        kind: ResourceKind,
        set: &Arc<ResourceSet>,
        mut names: BTreeSet<Name>,
        hold_removals: bool,
    ) -> Option<XdsResponse> {
        let state = self.types.get_mut(&kind)?;
        let version = |name: &Name| Some((name.clone(), state.version(kind, name)?.clone()));
        let gone = names.iter().filter(|name| set.get(kind, name).is_none());
        let gone: Vec<(Name, Arc<str>)> = gone.filter_map(version).collect();
        names
            .retain(|name| set.get(kind, name).is_some() || (kind.is_wildcard() && !hold_removals));
        let first = state.wildcard && matches!(state.last, LastResponse::None);
        state.compared_version = Some(set.version(kind).to_owned()).filter(|_| !hold_removals);
        if names.is_empty() && !first {
            if !hold_removals {
                state.known.take_set_beside(kind, set.clone(), gone);
            }
            return None;
        }
        if kind.is_wildcard() {
            // The response contains all resources: the client deletes missing ones.
            let all = set.of(kind).map(|(name, _)| name).filter(|name| state.wants(name));
            names = all.cloned().collect();
            state.known.take_set(set.clone());
        } else {
            state.known.take_set_beside(kind, set.clone(), gone);
        }
        let published = names.iter().filter_map(|name| set.get(kind, name));
        let resources = published.map(|published| any(kind, &published.bytes)).collect();
        state.must_send.clear();
        self.sent += 1;
        let nonce = self.sent.to_string();
        state.last = LastResponse::InFlight(nonce.clone());
        Some(XdsResponse::StateOfTheWorld(Box::new(DiscoveryResponse {
            version_info: set.version(kind).to_owned(),
            resources,
            type_url: kind.type_url(),
            nonce,
            ..DiscoveryResponse::default()
        })))
    }

    /// Answers a request of an unknown type: the names do not exist.
    fn unknown_delta(&mut self, request: DeltaDiscoveryRequest) -> Vec<XdsResponse> {
        if !request.response_nonce.is_empty() {
            return Vec::new();
        }
        self.sent += 1;
        vec![XdsResponse::Delta(Box::new(DeltaDiscoveryResponse {
            type_url: request.type_url,
            removed_resources: request.resource_names_subscribe,
            nonce: self.sent.to_string(),
            ..DeltaDiscoveryResponse::default()
        }))]
    }
}

/// Names whose current version or removal the client does not know. A name may occur twice.
fn differences<'s>(
    state: &'s ServerTypeState,
    kind: ResourceKind,
    set: &'s ResourceSet,
) -> Box<dyn Iterator<Item = &'s Name> + 's> {
    let must_send = state.must_send.iter();
    let changed =
        state.compared_version.as_deref().and_then(|version| set.changed_since(kind, version));
    if let Some(changed) = changed {
        let is_different = move |name: &&Name| match set.get(kind, name) {
            Some(published) => state.lacks(kind, name, published),
            None => state.version(kind, name).is_some(),
        };
        return Box::new(must_send.chain(changed.iter().filter(is_different)));
    }
    let lacks =
        move |(name, published): &(&Name, &EncodedResource)| state.lacks(kind, name, published);
    let new = set.of(kind).filter(lacks).map(|(name, _)| name);
    let gone = state.known.gone(kind, set, |name| state.wants(name));
    Box::new(must_send.chain(new).chain(gone))
}

fn any(kind: ResourceKind, bytes: &[u8]) -> Any {
    Any { type_url: kind.type_url(), value: bytes.to_vec() }
}
