//! Translates between protobuf resources and the model, in both directions.
//!
//! Each resource type has a file with its decoder and encoder. Every resource is decoded on its own: valid ones are
//! used, the others are rejected with name, field path and reason.

mod cluster;
mod endpoints;
mod filters;
mod listener;
mod mutation;
mod notes;
mod pb;
mod reader;
mod revocation;
mod route;
mod route_match;
mod secret;
mod security_fields;
mod struct_value;
mod tls_parameters;
mod values;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prost::Message as _;
use prost_reflect::DynamicMessage;
use weft_model::{Cluster, EndpointSet, Listener, Name, RouteTable, Secret, Snapshot};

pub use notes::Notes;
pub use reader::FieldError;
pub(crate) use reader::{MessageReader, TranslationFindings};
pub use secret::WORKLOAD_IDENTITY;
pub(crate) use values::socket;

use crate::{descriptor, map_order};

/// The resource types, in the order in which they are sent: referenced types come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKind {
    /// `envoy.config.cluster.v3.Cluster` (CDS).
    Cluster,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment` (EDS).
    Endpoints,
    /// `envoy.extensions.transport_sockets.tls.v3.Secret` (SDS).
    Secret,
    /// `envoy.config.listener.v3.Listener` (LDS).
    Listener,
    /// `envoy.config.route.v3.RouteConfiguration` (RDS).
    Routes,
}

impl ResourceKind {
    /// All kinds, in sending order.
    pub const ALL: [Self; 5] =
        [Self::Cluster, Self::Endpoints, Self::Secret, Self::Listener, Self::Routes];

    /// The full name of the message.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::Cluster => "envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Secret => "envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Listener => "envoy.config.listener.v3.Listener",
            Self::Routes => "envoy.config.route.v3.RouteConfiguration",
        }
    }

    /// The type URL.
    #[must_use]
    pub fn type_url(self) -> String {
        format!("{}{}", descriptor::TYPE_URL_PREFIX, self.message())
    }

    /// The kind with this type URL.
    #[must_use]
    pub fn from_type_url(type_url: &str) -> Option<Self> {
        let name = type_url.strip_prefix(descriptor::TYPE_URL_PREFIX)?;
        Self::ALL.into_iter().find(|kind| kind.message() == name)
    }

    /// Whether a state-of-the-world response contains all resources, so that missing ones are deleted; also whether a
    /// client may subscribe to all resources without names.
    #[must_use]
    pub fn is_wildcard(self) -> bool {
        match self {
            Self::Cluster | Self::Listener => true,
            Self::Endpoints | Self::Secret | Self::Routes => false,
        }
    }

    /// The field with the resource's name.
    fn name_field(self) -> &'static str {
        if self == Self::Endpoints { "cluster_name" } else { "name" }
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message().rsplit('.').next().unwrap_or_default())
    }
}

/// A resource as a model type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A cluster.
    Cluster(Arc<Cluster>),
    /// The endpoints of a cluster.
    Endpoints(Name, Arc<EndpointSet>),
    /// A secret.
    Secret(Name, Arc<Secret>),
    /// A listener.
    Listener(Arc<Listener>),
    /// A route table.
    Routes(Arc<RouteTable>),
}

impl Resource {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ResourceKind {
        match self {
            Self::Cluster(_) => ResourceKind::Cluster,
            Self::Endpoints(..) => ResourceKind::Endpoints,
            Self::Secret(..) => ResourceKind::Secret,
            Self::Listener(_) => ResourceKind::Listener,
            Self::Routes(_) => ResourceKind::Routes,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        match self {
            Self::Cluster(cluster) => &cluster.name,
            Self::Endpoints(name, _) | Self::Secret(name, _) => name,
            Self::Listener(listener) => &listener.name,
            Self::Routes(table) => &table.name,
        }
    }

    /// The encoded message; equal resources have equal bytes, in every process.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = match self {
            Self::Cluster(cluster) => cluster::encode(cluster).encode_to_vec(),
            Self::Endpoints(name, set) => endpoints::encode(name, set).encode_to_vec(),
            Self::Secret(name, secret) => secret::encode(name, secret).encode_to_vec(),
            Self::Listener(listener) => listener::encode(listener).encode_to_vec(),
            Self::Routes(table) => route::encode(table).encode_to_vec(),
        };
        map_order::sort_maps(self.kind().message(), &mut bytes);
        bytes
    }

    /// The message in JSON form, with the field names of the protobuf definition.
    fn json(&self) -> serde_json::Value {
        let form = descriptor::json(self.kind().message(), &self.encode());
        form.unwrap_or_else(|error| serde_json::json!({"error": error}))
    }
}

/// A decoded resource with notes for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodedResource {
    /// The resource.
    pub resource: Resource,
    /// Settings without effect and settings that weaken security.
    pub notes: Notes,
}

/// A rejected resource; its text is sent in a NACK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The kind.
    pub kind: ResourceKind,
    /// The name; empty when it could not be decoded.
    pub name: String,
    /// The field and the reason.
    pub error: FieldError,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}: {}", self.kind, self.name, self.error)
    }
}

/// Decodes a resource.
///
/// # Errors
/// When the bytes are not a valid message, or a field is invalid or unsupported.
pub fn decode(kind: ResourceKind, bytes: &[u8]) -> Result<DecodedResource, Rejection> {
    let unreadable = |reason| Rejection {
        kind,
        name: String::new(),
        error: FieldError { path: String::new(), reason },
    };
    let message = descriptor::decode(&kind.type_url(), bytes).map_err(unreadable)?;
    read(kind, message, String::new())
}

/// The name of a resource that is not decoded yet; empty when it has none.
pub(crate) fn name_of(kind: ResourceKind, message: &DynamicMessage) -> String {
    let name = message.get_field_by_name(kind.name_field());
    name.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Decodes a resource at `path` of a larger message.
pub(crate) fn read(
    kind: ResourceKind,
    message: DynamicMessage,
    path: String,
) -> Result<DecodedResource, Rejection> {
    let name = name_of(kind, &message);
    let findings = RefCell::new(TranslationFindings::default());
    let reader = MessageReader::new(message, path, &findings);
    let result = match kind {
        ResourceKind::Cluster => cluster::decode(reader).map(|c| Resource::Cluster(Arc::new(c))),
        ResourceKind::Endpoints => {
            endpoints::decode(reader).map(|(name, set)| Resource::Endpoints(name, Arc::new(set)))
        }
        ResourceKind::Secret => {
            secret::decode(reader).map(|(name, s)| Resource::Secret(name, Arc::new(s)))
        }
        ResourceKind::Listener => listener::decode(reader).map(|l| Resource::Listener(Arc::new(l))),
        ResourceKind::Routes => route::decode(reader).map(|t| Resource::Routes(Arc::new(t))),
    };
    let findings = findings.into_inner();
    match (result, findings.refused) {
        (Ok(resource), None) => Ok(DecodedResource { resource, notes: findings.notes }),
        (Err(refused), _) | (Ok(_), Some(refused)) => Err(Rejection { kind, name, error: refused }),
    }
}

/// Adds a resource to a snapshot; returns its name when it replaced another one.
pub(crate) fn insert(snapshot: &mut Snapshot, resource: Resource) -> Option<Name> {
    let name = resource.name().clone();
    let replaced = match resource {
        Resource::Cluster(cluster) => snapshot.clusters.insert(name.clone(), cluster).is_some(),
        Resource::Endpoints(_, set) => snapshot.endpoints.insert(name.clone(), set).is_some(),
        Resource::Secret(_, secret) => snapshot.secrets.insert(name.clone(), secret).is_some(),
        Resource::Listener(listener) => snapshot.listeners.insert(name.clone(), listener).is_some(),
        Resource::Routes(table) => snapshot.routes.insert(name.clone(), table).is_some(),
    };
    replaced.then_some(name)
}

/// The whole configuration in JSON form for `/config_dump`, without private keys.
#[must_use]
pub fn dump(snapshot: &Snapshot) -> serde_json::Value {
    let mut dump = serde_json::json!({
        "revision": snapshot.revision,
        "clusters": json_by_name(&snapshot.clusters, |_, cluster| Resource::Cluster(cluster)),
        "endpoints": json_by_name(&snapshot.endpoints, Resource::Endpoints),
        "resolved": json_by_name(&snapshot.resolved, Resource::Endpoints),
        "secrets": json_by_name(&snapshot.secrets, Resource::Secret),
        "listeners": json_by_name(&snapshot.listeners, |_, listener| Resource::Listener(listener)),
        "routes": json_by_name(&snapshot.routes, |_, table| Resource::Routes(table)),
    });
    redact(&mut dump);
    dump
}

/// Resources of one kind in JSON form, by name.
fn json_by_name<T>(
    resources: &BTreeMap<Name, Arc<T>>,
    resource: fn(Name, Arc<T>) -> Resource,
) -> serde_json::Value {
    let named = resources.iter();
    named.map(|(name, of)| (name.to_string(), resource(name.clone(), of.clone()).json())).collect()
}

/// Redacts private keys and the flow seed, with which clients could aim flows at an endpoint.
fn redact(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, field) in fields {
                if name == "private_key" || name == listener::FLOW_SEED {
                    *field = serde_json::json!("[redacted]");
                } else {
                    redact(field);
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

#[cfg(test)]
mod matcher_tests;
#[cfg(test)]
mod tests;
