//! What to send to one stream. A state machine without I/O.
//!
//! Rules kept here (xDS protocol; the numbers are what real clients were seen to need):
//! clusters go before endpoints, secrets, listeners and routes, and removals of clusters last; the
//! endpoints of a changed cluster are sent again, unasked and unchanged, or Envoy waits 15 s; what a
//! client refused is never sent again until it changes; a first request for everything is answered
//! even when there is nothing, its acknowledgement never; at most one response of a type is
//! unacknowledged, later changes merge into the next; names are answered even if the client had
//! them; what is gone is told, also to a client that was away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc;

use weft_model::Name;

use super::known_resources::KnownResources;
use super::{AckState, EncodedResource, ResourceSet};
use crate::client::XdsVariant;
use crate::translate::ResourceKind;

/// The most names one stream may ask for, of each type.
const NAME_LIMIT: usize = 100_000;
/// The most bytes that they may have, those of the names to answer included.
const NAME_LIMIT_BYTES: usize = 32 * 1024 * 1024;
const TOO_MANY_NAMES: &str = "more than 100000 names of one type";

/// A message to send.
#[derive(Debug, Clone, PartialEq)]
pub enum XdsResponse {
    /// Of the delta variant.
    Delta(Box<DeltaDiscoveryResponse>),
    /// Of the state-of-the-world variant.
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
    /// Whether the client asked for this type at all.
    opened: bool,
    /// Whether it wants everything.
    wildcard: bool,
    /// Whether it ever named something, after which no names mean nothing.
    named: bool,
    /// The names it wants.
    names: BTreeSet<Name>,
    /// What it has, as far as we know.
    known: KnownResources,
    /// Names to answer even if the client has them.
    must_send: BTreeSet<Name>,
    /// How the last response fares.
    last: LastResponse,
    /// The version of this type up to which `known` agrees with the set: only what has changed
    /// since then needs a look. None when everything has to be compared_version.
    compared_version: Option<String>,
}

/// What became of the last response of a type, with its nonce.
#[derive(Debug, Default)]
enum LastResponse {
    /// There was none yet.
    #[default]
    None,
    /// The client has not answered it.
    InFlight(String),
    /// The client accepted it.
    Accepted(String),
    /// The client refused it.
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

    /// The version that the client has of a name.
    fn version(&self, kind: ResourceKind, name: &str) -> Option<&Arc<str>> {
        self.known.version(kind, name, self.wants(name))
    }

    /// Whether the client wants a resource and does not have it in this version.
    fn lacks(&self, kind: ResourceKind, name: &str, published: &EncodedResource) -> bool {
        self.wants(name) && self.version(kind, name) != Some(&published.version)
    }

    /// Lists what the client has, before it wants more than that.
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

    /// Takes note that the client wants nothing but names.
    fn want_names_only(&mut self) {
        self.wildcard = false;
        let names = &self.names;
        self.known.retain(|name| names.contains(name));
        self.must_send.retain(|name| names.contains(name));
    }

    /// Takes note that the client does not want a name any longer.
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
    /// When the stream asks for more than the limit.
    fn check_limits(&self) -> Result<(), &'static str> {
        let bytes = |names: &BTreeSet<Name>| names.iter().map(|name| name.len()).sum::<usize>();
        if self.names.len() > NAME_LIMIT || self.must_send.len() > NAME_LIMIT {
            return Err(TOO_MANY_NAMES);
        }
        if bytes(&self.names).saturating_add(bytes(&self.must_send)) > NAME_LIMIT_BYTES {
            return Err("more than 32 MiB of names of one type");
        }
        Ok(())
    }

    /// Whether the last response is not yet answered.
    fn in_flight(&self) -> bool {
        matches!(self.last, LastResponse::InFlight(_))
    }

    /// Notes an answer to the last response. A refusal changes nothing: the version counts as
    /// known, so that it is not sent again.
    fn acknowledged(&mut self, nonce: &str, refused: bool) {
        if self.in_flight() && nonce == self.last.nonce() {
            let nonce = nonce.to_owned();
            self.last =
                if refused { LastResponse::Refused(nonce) } else { LastResponse::Accepted(nonce) };
        }
    }
}

impl ServerSession {
    /// A stream that has said nothing.
    #[must_use]
    pub fn new(variant: XdsVariant) -> Self {
        Self { variant, types: BTreeMap::new(), sent: 0 }
    }

    /// Takes a delta request; what to send now.
    ///
    /// # Errors
    /// When the stream asks for more than the limit and has to end.
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
            // A client that comes back lists what it has: that is asked for, and it need not be sent again.
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

    /// Takes a state-of-the-world request; what to send now.
    ///
    /// # Errors
    /// When the stream asks for more than the limit and has to end.
    pub fn on_state(
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
            // Stale: the client will answer the newer response too. By then it may name again what
            // it left out here, and it has forgotten that.
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
        // The same names under the same nonce once more: a request to send them again. Envoy does
        // so for the endpoints of a cluster that changed.
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

    /// What the client has said of a resource.
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

    /// What to send now that `set` is in force.
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

    /// Whether listeners or routes are still to be sent or acknowledged: until then a cluster that
    /// is gone may still be in use.
    fn routes_are_unsettled(&self, set: &ResourceSet) -> bool {
        [ResourceKind::Listener, ResourceKind::Routes].into_iter().any(|kind| {
            self.types.get(&kind).is_some_and(|state| {
                let can_report = |name: &Name| self.can_report(kind, name, set);
                state.in_flight() || differences(state, kind, set).any(can_report)
            })
        })
    }

    /// Whether there is a way to tell the client how this name stands: the state of the world has
    /// no word for the absence of endpoints, secrets and routes.
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
            // A cluster that the client never had cannot be in use.
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
        // A first request for everything is answered even when there is nothing.
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
            // The whole state: what is absent is deleted.
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

    /// A type nobody here publishes: what is named does not exist.
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

/// The text of a refusal, when a request carries one.
pub(super) fn refusal(detail: Option<&rpc::Status>) -> Option<&str> {
    detail.map(|status| status.message.as_str())
}

/// Names the client wants or has whose state it does not know. A name may come twice.
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
