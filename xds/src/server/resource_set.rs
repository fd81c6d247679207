//! What one kind of client sees at one moment.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::Arc;

use weft_model::{Discovery, EndpointSet, Missing, Name, RouteTable, Snapshot};

use crate::descriptor;
use crate::translate::{self, Kind, Resource};

/// A resource, encoded once for all streams.
#[derive(Debug, Clone, Eq)]
pub struct Published {
    /// A hash of the content: the same after a restart and on every replica.
    pub version: Arc<str>,
    /// The message. Its maps stand in any order, so equal resources may differ here.
    pub bytes: Arc<[u8]>,
    /// For a cluster: the name its endpoints are served under.
    pub endpoints: Option<Name>,
}

impl PartialEq for Published {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version && self.endpoints == other.endpoints
    }
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
        let json = resource.json();
        let version = hash(json.to_string().as_bytes());
        let bytes = descriptor::from_json(resource.kind().message(), json)?;
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
        let published = Published { version: version.into(), bytes: bytes.into(), endpoints };
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

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::{
        ChainMatch, Filter, FilterChain, HttpFilter, HttpService, Listener, Permission, Principal,
        Rbac, RbacAction, RbacFilter, RbacPolicy, RouteSource, SourceAddress, Transport,
    };

    /// A listener whose policies are a map on the wire, which has no order there.
    fn guarded() -> Snapshot {
        let policy =
            RbacPolicy { permissions: vec![Permission::Any], principals: vec![Principal::Any] };
        let rbac = Rbac {
            action: RbacAction::Allow,
            policies: (0..20).map(|n| (n.to_string().into(), policy.clone())).collect(),
        };
        let http = HttpService {
            filters: vec![HttpFilter::Rbac(RbacFilter { rules: Some(rbac), shadow: None }.into())],
            ..HttpService::new(RouteSource::Named("r".into()))
        };
        let chain = FilterChain {
            name: "".into(),
            matches: ChainMatch::default(),
            tls: None,
            rules: Vec::new(),
            filter: Filter::Http(http.into()),
        };
        let listener = Listener {
            name: "l".into(),
            address: ([0, 0, 0, 0], 80).into(),
            transport: Transport::Tcp,
            bind: true,
            use_original_destination: false,
            transparent: false,
            chains: vec![chain],
            default_chain: None,
            udp: None,
            allow_from: None,
            idle_end: None,
            flow_seed: None,
            source_address: SourceAddress::Agent,
        };
        let mut snapshot = Snapshot::default();
        snapshot.listeners.insert("l".into(), listener.into());
        snapshot
    }

    #[test]
    fn the_same_configuration_has_the_same_versions_wherever_it_is_published() {
        let set = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        let replica = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        let version = |set: &ResourceSet| set.get(Kind::Listener, "l").map(|p| p.version.clone());
        assert_eq!(version(&set), version(&replica));
        assert_eq!(set, replica);
    }

    #[test]
    fn a_name_that_leads_nowhere_is_published_empty_or_refused() {
        let set = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        assert!(set.get(Kind::Routes, "r").is_some());

        let mut snapshot = guarded();
        let listener = snapshot.listeners.get_mut("l").map(Arc::make_mut).expect("it is there");
        listener.udp = Some(weft_model::UdpProxy {
            cluster: "nowhere".into(),
            idle_timeout: std::time::Duration::ZERO,
            flow_key: weft_model::FlowKey::FiveTuple,
            access_log: false,
        });
        listener.transport = Transport::Udp;
        listener.chains.clear();
        let problems = ResourceSet::new(snapshot, &[]).expect_err("refused");
        assert_eq!(problems, ["cluster \"nowhere\" is referred to and not there"]);
    }
}
