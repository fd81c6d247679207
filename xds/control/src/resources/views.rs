//! The resource sets of all clients. Resources are encoded once per service and shared by all clients.
//!
//! All sidecars share the outbound configuration of all services. The inbound configuration of a service is built when one
//! of its sidecars connects. When the mesh changes, only the changed services are encoded again, and only those are
//! compared for each client.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use weft_model::SpiffeId;
use weft_xds::client::XdsNode;
use weft_xds::server::{Fragment, ResourceProvider, ResourceSet};
use weft_xds::translate::{ResourceKind, WORKLOAD_IDENTITY};

use super::identities::agent_identity;
use super::scope::{self, CallerScope, InboundParts, InboundScope, PolicyIndex, Scopes};
use super::trust::{TRUST, Trust};
use super::{agent, sidecar};
use crate::mesh::{Mesh, Service, identity};

/// The most threads that encode at the same time.
const ENCODER_LIMIT: usize = 8;

/// The resource sets of all clients for one mesh.
#[derive(Debug, Default)]
pub struct Views {
    mesh: Option<IndexedMesh>,
    agent: Arc<ResourceSet>,
    /// The resources that all sidecars share.
    outbound: Arc<ResourceSet>,
    services: Services,
    /// How many services were encoded for this mesh. The others were reused from the previous views.
    encoded: usize,
    /// The sets of services whose sidecars have connected.
    sidecars: Mutex<BTreeMap<String, SidecarView>>,
}

/// A mesh, with indexes for lookups by service.
#[derive(Debug)]
struct IndexedMesh {
    mesh: Arc<Mesh>,
    /// The global settings of the mesh. The allocation is shared with previous views as long as they are equal.
    global: Arc<Mesh>,
    policies: PolicyIndex,
}

/// The services by name.
type Services = BTreeMap<String, Arc<EncodedService>>;

/// The encoded resources by which agents and sidecars reach a service.
#[derive(Debug)]
struct EncodedService {
    /// The scope that they were generated from.
    scope: CallerScope,
    agent: Fragment,
    sidecar: Fragment,
}

/// The inbound configuration of a service, and the resource set of its sidecars.
#[derive(Debug)]
struct SidecarView {
    /// The scope that the inbound configuration was generated from.
    scope: Arc<InboundScope>,
    inbound: Arc<Fragment>,
    /// None until a sidecar requests it after a change of the mesh.
    set: Option<Arc<ResourceSet>>,
    /// The set before the last change, if a sidecar had requested it.
    earlier: Option<Arc<ResourceSet>>,
}

impl Views {
    /// The views of a mesh. Agents hash flows with `flow_seed`. Unchanged parts of `earlier` are reused.
    ///
    /// # Errors
    /// Each resource that cannot be encoded or has a missing reference. That is a bug of the generator.
    pub fn new(
        mesh: Arc<Mesh>,
        trust: &Trust,
        flow_seed: u32,
        earlier: &Self,
    ) -> Result<Self, Vec<String>> {
        let global = scope::global(&mesh);
        let known = earlier.mesh.as_ref().map(|indexed| &indexed.global);
        let global = match known.filter(|known| ***known == global) {
            Some(known) => known.clone(),
            None => Arc::new(global),
        };
        let (services, encoded) = encode(&mesh, &global, &earlier.services)?;
        let common = Fragment::encode(agent::common(flow_seed))?;
        let parts = services.values().map(|encoded| &encoded.agent);
        let mut agent = ResourceSet::assemble(None, [&common].into_iter().chain(parts), &[])?;
        agent.compare(&earlier.agent);
        let common = Fragment::encode(sidecar::common(&global, trust))?;
        let parts = services.values().map(|encoded| &encoded.sidecar);
        let parts = [&common].into_iter().chain(parts);
        let mut outbound = ResourceSet::assemble(None, parts, &[WORKLOAD_IDENTITY])?;
        outbound.compare(&earlier.outbound);
        let sidecars = earlier.carried_over(&mesh);
        let policies = PolicyIndex::new(&mesh);
        Ok(Self {
            mesh: Some(IndexedMesh { mesh, global, policies }),
            agent: Arc::new(agent),
            outbound: Arc::new(outbound),
            services,
            encoded,
            sidecars: Mutex::new(sidecars),
        })
    }

    /// How many services were encoded, because they or their dependencies had changed.
    pub(crate) fn encoded(&self) -> usize {
        self.encoded
    }

    /// The number of services.
    pub(crate) fn services(&self) -> usize {
        self.services.len()
    }

    /// The sidecar views of services that are still meshed, to be reused by the next views.
    fn carried_over(&self, mesh: &Mesh) -> BTreeMap<String, SidecarView> {
        let sidecars = self.sidecars.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meshed = |name: &String| mesh.services.get(name).is_some_and(|known| known.meshed);
        let carried = sidecars.iter().filter(|(name, _)| is_meshed(name)).map(|(name, sidecar)| {
            let SidecarView { scope, inbound, set, .. } = sidecar;
            let earlier = set.clone();
            let inbound = inbound.clone();
            (name.clone(), SidecarView { scope: scope.clone(), inbound, set: None, earlier })
        });
        carried.collect()
    }

    fn meshed(&self, name: &str) -> Option<(&IndexedMesh, &Service)> {
        let indexed = self.mesh.as_ref()?;
        let service = indexed.mesh.services.get(name).filter(|service| service.meshed)?;
        Some((indexed, service))
    }

    /// The resource set of a service's sidecars.
    fn sidecar(
        &self,
        indexed: &IndexedMesh,
        service: &Service,
    ) -> Result<Arc<ResourceSet>, Vec<String>> {
        let mut sidecars = self.sidecars.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sidecars.get(&service.name);
        if let Some(set) = known.and_then(|sidecar| sidecar.set.as_ref()) {
            return Ok(set.clone());
        }
        let IndexedMesh { mesh, global, policies } = indexed;
        let parts = InboundParts::new(mesh, global, policies, service);
        let (scope, inbound) = match known.filter(|sidecar| parts.equal(&sidecar.scope)) {
            Some(sidecar) => (sidecar.scope.clone(), sidecar.inbound.clone()),
            None => {
                let scope = parts.scope();
                let inbound = Fragment::encode(sidecar::inbound_configuration(&scope.mesh()))?;
                (Arc::new(scope), Arc::new(inbound))
            }
        };
        let base = Some(self.outbound.clone());
        let mut set = ResourceSet::assemble(base, [&*inbound], &[WORKLOAD_IDENTITY])?;
        if let Some(earlier) = known.and_then(|sidecar| sidecar.earlier.as_ref()) {
            set.compare(earlier);
        }
        let set = Arc::new(set);
        let sidecar = SidecarView { scope, inbound, set: Some(set.clone()), earlier: None };
        sidecars.insert(service.name.clone(), sidecar);
        Ok(set)
    }

    /// Whether the client with this identity receives a trust bundle.
    pub(crate) fn receives_trust_bundle(&self, id: &str) -> bool {
        SpiffeId::parse(id).is_ok_and(|id| {
            self.meshed(id.workload())
                .is_some_and(|(indexed, _)| id.trust_domain() == indexed.mesh.trust_domain)
        })
    }

    /// The version of the trust bundle. None if no client receives one.
    pub(crate) fn trust_version(&self) -> Option<&str> {
        self.mesh.as_ref()?.mesh.services.values().find(|service| service.meshed)?;
        self.outbound.get(ResourceKind::Secret, TRUST).map(|published| &*published.version)
    }
}

impl ResourceProvider for Views {
    /// The set depends on the client's certificate only, not on the node ID that it sends.
    fn resources(
        &self,
        node: &XdsNode,
        peer: Option<&SpiffeId>,
    ) -> Result<Arc<ResourceSet>, String> {
        let Some(peer) = peer else {
            return Err("configuration requires a client certificate".into());
        };
        let trust_domain = self.mesh.as_ref().map_or("", |indexed| &indexed.mesh.trust_domain);
        if peer.trust_domain() != trust_domain {
            return Err(format!("invalid client {peer}: must be in trust domain {trust_domain:?}"));
        }
        if *peer.as_str() == *agent_identity(trust_domain) {
            return Ok(self.agent.clone());
        }
        let is_sidecar = identity(trust_domain, peer.workload()).is_ok_and(|id| id == *peer);
        let Some((indexed, service)) = self.meshed(peer.workload()).filter(|_| is_sidecar) else {
            return Err(format!(
                "invalid client {peer} (node {:?}): must be an agent or the sidecar of a meshed service",
                node.id
            ));
        };
        self.sidecar(indexed, service).map_err(|problems| {
            let problems = problems.join("; ");
            tracing::error!(
                service = service.name,
                problems,
                "failed to encode inbound configuration"
            );
            format!("the configuration of {:?} cannot be encoded: {problems}", service.name)
        })
    }
}

/// Encodes the services whose scope has changed, on all processors. Returns all services, and how many were encoded.
fn encode(
    mesh: &Mesh,
    global: &Arc<Mesh>,
    earlier: &Services,
) -> Result<(Services, usize), Vec<String>> {
    let scopes = Scopes::new(mesh, global.clone());
    let mut services = BTreeMap::new();
    let mut changed = Vec::new();
    for service in mesh.services.values() {
        let known = earlier.get(&service.name);
        match known.filter(|encoded| scopes.has(&encoded.scope, service)) {
            Some(encoded) => drop(services.insert(service.name.clone(), encoded.clone())),
            None => changed.push(scopes.callers(service)),
        }
    }
    let count = changed.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(ENCODER_LIMIT);
    let share = changed.len().div_ceil(threads).max(1);
    let mut shares = Vec::new();
    while !changed.is_empty() {
        shares.push(changed.split_off(changed.len().saturating_sub(share)));
    }
    let encoded = std::thread::scope(|threads| {
        let spawned: Vec<_> =
            shares.into_iter().map(|share| threads.spawn(move || encode_all(share))).collect();
        let joined = spawned.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(vec!["an encoder thread panicked".into()]))
        });
        joined.collect::<Result<Vec<_>, _>>()
    })?;
    services.extend(encoded.into_iter().flatten());
    Ok((services, count))
}

fn encode_all(share: Vec<CallerScope>) -> Result<Vec<(String, Arc<EncodedService>)>, Vec<String>> {
    let encode = |scope: CallerScope| {
        let mesh = scope.mesh();
        let agent = Fragment::encode(agent::all_services(&mesh))?;
        let sidecar = Fragment::encode(sidecar::outbound_configuration(&mesh))?;
        Ok((scope.service.name.clone(), Arc::new(EncodedService { scope, agent, sidecar })))
    };
    share.into_iter().map(encode).collect()
}
