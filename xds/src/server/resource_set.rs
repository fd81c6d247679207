//! What one kind of client sees at one moment.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::Arc;

use weft_model::{Discovery, EndpointSet, Missing, Name, RouteTable, Snapshot};

use crate::translate::{self, Kind, Resource};

/// A resource, encoded once for all streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// A hash of the bytes: the same after a restart and on every replica.
    pub version: Arc<str>,
    /// The message.
    pub bytes: Arc<[u8]>,
    /// For a cluster: the name its endpoints are served under.
    pub endpoints: Option<Name>,
}

/// Resources by kind and name: closed, so that no name in it leads nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceSet {
    kinds: BTreeMap<Kind, BTreeMap<Name, Published>>,
    /// Per kind, a hash over all versions.
    versions: BTreeMap<Kind, String>,
}

impl ResourceSet {
    /// Encodes a configuration. Routes and endpoints that are referred to and not there are
    /// published empty, since a client that waits for them would not become ready. `local_secrets`
    /// are those that clients make themselves.
    ///
    /// # Errors
    /// Each name that leads nowhere, and each value that has no form in xDS.
    pub fn new(mut snapshot: Snapshot, local_secrets: &[&str]) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        for missing in snapshot.missing() {
            match missing {
                Missing::Routes(name) => {
                    let empty = RouteTable { name: name.clone(), hosts: Vec::new() };
                    snapshot.routes.insert(name, Arc::new(empty));
                }
                Missing::Endpoints(name) => {
                    snapshot.endpoints.insert(name, Arc::new(EndpointSet::default()));
                }
                Missing::Secret(name) if local_secrets.contains(&&*name) => {}
                Missing::Cluster(_) | Missing::Secret(_) => {
                    problems.push(format!("{missing} is referred to and not there"));
                }
            }
        }
        let mut set = Self::default();
        for resource in resources(&snapshot) {
            match set.publish(&resource) {
                Ok(()) => {}
                Err(problem) => problems.push(problem),
            }
        }
        for kind in Kind::ALL {
            let versions =
                set.of(kind).map(|(name, p)| format!("{name}={}\n", p.version)).collect::<String>();
            set.versions.insert(kind, hash(versions.as_bytes()));
        }
        if problems.is_empty() { Ok(set) } else { Err(problems) }
    }

    fn publish(&mut self, resource: &Resource) -> Result<(), String> {
        let bytes = resource.encode()?;
        // What our own data planes would refuse must never leave.
        translate::decode(resource.kind(), &bytes).map_err(|rejection| rejection.to_string())?;
        let endpoints = match resource {
            Resource::Cluster(cluster) => match &cluster.discovery {
                Discovery::Endpoints(name) => Some(name.clone()),
                Discovery::Static(_) | Discovery::Dns(_) | Discovery::OriginalDestination => None,
            },
            Resource::Endpoints(..)
            | Resource::Secret(..)
            | Resource::Listener(_)
            | Resource::Routes(_) => None,
        };
        let published = Published { version: hash(&bytes).into(), bytes: bytes.into(), endpoints };
        self.kinds.entry(resource.kind()).or_default().insert(resource.name().clone(), published);
        Ok(())
    }

    /// The resources of a kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = (&Name, &Published)> {
        self.kinds.get(&kind).into_iter().flatten()
    }

    /// A resource by name.
    #[must_use]
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Published> {
        self.kinds.get(&kind)?.get(name)
    }

    /// The version of a whole kind.
    #[must_use]
    pub fn version(&self, kind: Kind) -> &str {
        self.versions.get(&kind).map_or("", String::as_str)
    }
}

fn resources(snapshot: &Snapshot) -> Vec<Resource> {
    let mut all = Vec::new();
    all.extend(snapshot.clusters.values().cloned().map(Resource::Cluster));
    all.extend(
        snapshot.endpoints.iter().map(|(name, set)| Resource::Endpoints(name.clone(), set.clone())),
    );
    all.extend(
        snapshot
            .secrets
            .iter()
            .map(|(name, secret)| Resource::Secret(name.clone(), secret.clone())),
    );
    all.extend(snapshot.listeners.values().cloned().map(Resource::Listener));
    all.extend(snapshot.routes.values().cloned().map(Resource::Routes));
    all
}

fn hash(bytes: &[u8]) -> String {
    let mut hasher = siphasher::sip::SipHasher13::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}
