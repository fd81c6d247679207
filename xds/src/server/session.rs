//! What to send to one stream. A state machine without I/O.
//!
//! Rules kept here (xDS protocol; the numbers are what real clients were seen to need):
//! clusters go before endpoints, secrets, listeners and routes, and removals of clusters last; the
//! endpoints of a changed cluster are sent again, unasked and unchanged, or Envoy waits 15 s; what a
//! client refused is never sent again until it changes; a first request for everything is answered
//! even when there is nothing, its acknowledgement never; at most one response of a type is
//! unacknowledged, later changes merge into the next; names are answered even if the client had
//! them; what is gone is told, also to a client that was away.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc;

use weft_model::Name;

use super::{Published, ResourceSet, Taken};
use crate::client::Variant;
use crate::translate::Kind;

/// The most names one stream may ask for, of each type.
const NAME_LIMIT: usize = 100_000;

/// A message to send.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// Of the delta variant.
    Delta(Box<DeltaDiscoveryResponse>),
    /// Of the state-of-the-world variant.
    StateOfTheWorld(Box<DiscoveryResponse>),
}

/// The server's side of one stream.
#[derive(Debug)]
pub struct ServerSession {
    variant: Variant,
    types: BTreeMap<Kind, TypeState>,
    sent: u64,
}

#[derive(Debug, Default)]
struct TypeState {
    /// Whether the client asked for this type at all.
    opened: bool,
    /// Whether it wants everything.
    wildcard: bool,
    /// Whether it ever named something, after which no names mean nothing.
    named: bool,
    /// The names it wants.
    names: BTreeSet<String>,
    /// What it has, as far as we know: name and version.
    known: BTreeMap<String, String>,
    /// Names to answer even if the client has them.
    owed: BTreeSet<String>,
    /// How the last response fares.
    last: Last,
    /// The version of this type up to which `known` agrees with the set: only what has changed
    /// since then needs a look. None when everything has to be compared.
    compared: Option<String>,
}

/// What became of the last response of a type, with its nonce.
#[derive(Debug, Default)]
enum Last {
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

impl Last {
    /// The nonce; empty before the first response.
    fn nonce(&self) -> &str {
        match self {
            Self::None => "",
            Self::InFlight(nonce) | Self::Accepted(nonce) | Self::Refused(nonce) => nonce,
        }
    }
}

impl TypeState {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// Whether the last response is not yet answered.
    fn in_flight(&self) -> bool {
        matches!(self.last, Last::InFlight(_))
    }

    /// Notes an answer to the last response. A refusal changes nothing: the version counts as
    /// known, so that it is not sent again.
    fn acknowledged(&mut self, nonce: &str, refused: bool) {
        if self.in_flight() && nonce == self.last.nonce() {
            let nonce = nonce.to_owned();
            self.last = if refused { Last::Refused(nonce) } else { Last::Accepted(nonce) };
        }
    }
}

impl ServerSession {
    /// A stream that has said nothing.
    #[must_use]
    pub fn new(variant: Variant) -> Self {
        Self { variant, types: BTreeMap::new(), sent: 0 }
    }

    /// Takes a delta request; what to send now.
    ///
    /// # Errors
    /// When the stream asks for more than the limit and has to end.
    pub fn on_delta(
        &mut self,
        request: DeltaDiscoveryRequest,
        set: &ResourceSet,
    ) -> Result<Vec<Response>, &'static str> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            return Ok(self.unknown_delta(request));
        };
        let state = self.types.entry(kind).or_default();
        state.acknowledged(&request.response_nonce, request.error_detail.is_some());
        let first = !std::mem::replace(&mut state.opened, true);
        let mut reported = BTreeMap::new();
        if first {
            reported.extend(request.initial_resource_versions);
            state.known.extend(reported.clone());
            let silent = request.resource_names_subscribe.is_empty()
                && request.resource_names_unsubscribe.is_empty();
            state.wildcard = silent && kind.is_wildcard();
        }
        if first
            || !request.resource_names_subscribe.is_empty()
            || !request.resource_names_unsubscribe.is_empty()
        {
            state.compared = None;
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                state.wildcard = true;
                continue;
            }
            // A client that comes back lists what it has: that is asked for, and it need not be sent again.
            if !reported.contains_key(&name) {
                state.owed.insert(name.clone());
            }
            state.names.insert(name);
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                state.wildcard = false;
                let names = state.names.clone();
                state.known.retain(|name, _| names.contains(name));
                state.owed.retain(|name| names.contains(name));
                continue;
            }
            state.names.remove(&name);
            state.owed.remove(&name);
            if state.wildcard {
                state.owed.insert(name);
            } else {
                state.known.remove(&name);
            }
        }
        if state.names.len() > NAME_LIMIT {
            return Err("more than 100000 names of one type");
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
        set: &ResourceSet,
    ) -> Result<Vec<Response>, &'static str> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            return Ok(Vec::new());
        };
        if request.resource_names.len() > NAME_LIMIT {
            return Err("more than 100000 names of one type");
        }
        let state = self.types.entry(kind).or_default();
        if !request.response_nonce.is_empty() && request.response_nonce != state.last.nonce() {
            // Stale: the client will answer the newer response too. By then it may name again what
            // it left out here, and it has forgotten that.
            let names: BTreeSet<String> = request.resource_names.into_iter().collect();
            let wildcard = state.wildcard;
            state.compared = None;
            state.known.retain(|name, _| wildcard || names.contains(name));
            return Ok(Vec::new());
        }
        let was_acknowledged = matches!(state.last, Last::Accepted(_) | Last::Refused(_));
        state.acknowledged(&request.response_nonce, request.error_detail.is_some());
        let first = !std::mem::replace(&mut state.opened, true);
        let mut names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let star = names.remove("*");
        let wildcard = kind.is_wildcard() && (star || (names.is_empty() && !state.named));
        if first || wildcard != state.wildcard || names != state.names {
            state.compared = None;
        }
        state.wildcard = wildcard;
        state.named |= star || !names.is_empty();
        // The same names under the same nonce once more: a request to send them again. Envoy does
        // so for the endpoints of a cluster that changed.
        let again =
            was_acknowledged && !first && names == state.names && request.error_detail.is_none();
        for name in &names {
            if again || !state.names.contains(name) {
                state.owed.insert(name.clone());
            }
        }
        state.known.retain(|name, _| wildcard || names.contains(name));
        state.owed.retain(|name| names.contains(name));
        state.names = names;
        Ok(self.flush(set))
    }

    /// What the client has said of a resource.
    #[must_use]
    pub fn taken(&self, kind: Kind, name: &str) -> Taken {
        match self.types.get(&kind).filter(|state| state.opened && state.wants(name)) {
            None => Taken::NotAsked,
            Some(TypeState { last: Last::InFlight(_) | Last::Refused(_), .. }) => Taken::NotYet,
            Some(state) => state.known.get(name).cloned().map_or(Taken::NotYet, Taken::Version),
        }
    }

    /// What to send now that `set` is in force.
    pub fn flush(&mut self, set: &ResourceSet) -> Vec<Response> {
        let mut responses = Vec::new();
        for kind in Kind::ALL {
            let hold_removals = kind == Kind::Cluster && self.routes_are_unsettled(set);
            let changed_endpoints = changed_clusters(self.types.get(&kind), kind, set);
            let response = match self.variant {
                Variant::Delta => self.delta_response(kind, set, hold_removals),
                Variant::StateOfTheWorld => self.state_response(kind, set, hold_removals),
            };
            let Some(response) = response else {
                continue;
            };
            responses.push(response);
            if let Some(endpoints) = self.types.get_mut(&Kind::Endpoints) {
                let wanted =
                    changed_endpoints.into_iter().filter(|name| endpoints.names.contains(name));
                let wanted: Vec<String> = wanted.collect();
                endpoints.owed.extend(wanted);
            }
        }
        responses
    }

    /// Whether listeners or routes are still to be sent or acknowledged: until then a cluster that
    /// is gone may still be in use.
    fn routes_are_unsettled(&self, set: &ResourceSet) -> bool {
        [Kind::Listener, Kind::Routes].into_iter().any(|kind| {
            self.types.get(&kind).is_some_and(|state| {
                let changed =
                    || differences(state, kind, set).iter().any(|n| self.can_tell(kind, n, set));
                state.in_flight() || changed()
            })
        })
    }

    /// Whether there is a way to tell the client how this name stands: the state of the world has
    /// no word for the absence of endpoints, secrets and routes.
    fn can_tell(&self, kind: Kind, name: &str, set: &ResourceSet) -> bool {
        match self.variant {
            Variant::Delta => true,
            Variant::StateOfTheWorld => kind.is_wildcard() || set.get(kind, name).is_some(),
        }
    }

    fn delta_response(
        &mut self,
        kind: Kind,
        set: &ResourceSet,
        hold_removals: bool,
    ) -> Option<Response> {
        let state = self.types.get_mut(&kind).filter(|state| state.opened && !state.in_flight())?;
        let names = differences(state, kind, set);
        let mut resources = Vec::new();
        let mut removed = Vec::new();
        state.compared = Some(set.version(kind).to_owned());
        for name in names {
            match set.get(kind, &name) {
                Some(published) => {
                    state.known.insert(name.clone(), published.version.to_string());
                    resources.push(Resource {
                        name,
                        version: published.version.to_string(),
                        resource: Some(any(kind, &published.bytes)),
                        ..Resource::default()
                    });
                }
                // A cluster that the client never had cannot be in use.
                None if hold_removals && state.known.contains_key(&name) => state.compared = None,
                None => {
                    state.known.remove(&name);
                    removed.push(name);
                }
            }
        }
        state.owed.clear();
        let empty = resources.is_empty() && removed.is_empty();
        // A first request for everything is answered even when there is nothing.
        let first = state.wildcard && matches!(state.last, Last::None);
        if empty && !first {
            return None;
        }
        self.sent += 1;
        let nonce = self.sent.to_string();
        state.last = Last::InFlight(nonce.clone());
        Some(Response::Delta(Box::new(DeltaDiscoveryResponse {
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
        kind: Kind,
        set: &ResourceSet,
        hold_removals: bool,
    ) -> Option<Response> {
        let state = self.types.get_mut(&kind).filter(|state| state.opened && !state.in_flight())?;
        let mut names = differences(state, kind, set);
        names
            .retain(|name| set.get(kind, name).is_some() || (kind.is_wildcard() && !hold_removals));
        let first = state.wildcard && matches!(state.last, Last::None);
        state.compared = Some(set.version(kind).to_owned()).filter(|_| !hold_removals);
        if names.is_empty() && !first {
            return None;
        }
        if kind.is_wildcard() {
            // The whole state: what is absent is deleted.
            names = set
                .of(kind)
                .map(|(name, _)| name.to_string())
                .filter(|name| state.wants(name))
                .collect();
            if hold_removals {
                // Clusters that are gone cannot be kept in a whole state without their bytes.
                state.known.retain(|name, _| names.contains(name));
            } else {
                state.known.clear();
            }
        }
        let mut resources = Vec::new();
        for name in names {
            if let Some(published) = set.get(kind, &name) {
                resources.push(any(kind, &published.bytes));
                state.known.insert(name, published.version.to_string());
            }
        }
        state.owed.clear();
        self.sent += 1;
        let nonce = self.sent.to_string();
        state.last = Last::InFlight(nonce.clone());
        Some(Response::StateOfTheWorld(Box::new(DiscoveryResponse {
            version_info: set.version(kind).to_owned(),
            resources,
            type_url: kind.type_url(),
            nonce,
            ..DiscoveryResponse::default()
        })))
    }

    /// A type nobody here publishes: what is named does not exist.
    fn unknown_delta(&mut self, request: DeltaDiscoveryRequest) -> Vec<Response> {
        if !request.response_nonce.is_empty() {
            return Vec::new();
        }
        self.sent += 1;
        vec![Response::Delta(Box::new(DeltaDiscoveryResponse {
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

/// Names the client wants or has whose state it does not know.
fn differences(state: &TypeState, kind: Kind, set: &ResourceSet) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = state.owed.clone();
    let is_new = |name: &str, published: &Published| {
        state.wants(name) && state.known.get(name).map(String::as_str) != Some(&*published.version)
    };
    let changed = state.compared.as_deref().and_then(|version| set.changed_since(kind, version));
    if let Some(changed) = changed {
        let is_different = |name: &&Name| match set.get(kind, name) {
            Some(published) => is_new(name, published),
            None => state.known.contains_key(&***name),
        };
        names.extend(changed.iter().filter(is_different).map(ToString::to_string));
        return names;
    }
    let new = set.of(kind).filter(|(name, published)| is_new(name, published));
    names.extend(new.map(|(name, _)| name.to_string()));
    names.extend(state.known.keys().filter(|name| set.get(kind, name).is_none()).cloned());
    names
}

/// The endpoint names of the clusters that are about to be sent.
fn changed_clusters(state: Option<&TypeState>, kind: Kind, set: &ResourceSet) -> Vec<String> {
    let Some(state) =
        state.filter(|state| kind == Kind::Cluster && state.opened && !state.in_flight())
    else {
        return Vec::new();
    };
    let names = differences(state, kind, set);
    names
        .iter()
        .filter_map(|name| set.get(kind, name)?.endpoints.as_ref().map(ToString::to_string))
        .collect()
}

fn any(kind: Kind, bytes: &[u8]) -> Any {
    Any { type_url: kind.type_url(), value: bytes.to_vec() }
}
