//! Scopes: the part of a mesh that the configuration of one service depends on, as a small mesh.
//!
//! Resources are generated from a scope only, so they cannot depend on anything else. They are reused as long as the scope
//! is equal. This replaces a list of dependencies, which would have to be maintained by hand.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::mesh::{Issuer, Mesh, MeshRoute, Policy, Service};

/// The scope of the outbound configuration of a service's callers.
#[derive(Debug)]
pub(super) struct CallerScope {
    pub(super) service: Service,
    routes: Vec<MeshRoute>,
    /// The global settings of the mesh. The allocation is shared as long as they are equal.
    global: Arc<Mesh>,
}

impl CallerScope {
    /// The scope as a mesh.
    pub(super) fn mesh(&self) -> Mesh {
        Mesh {
            services: [(self.service.name.clone(), self.service.clone())].into(),
            routes: self.routes.clone(),
            ..Mesh::clone(&self.global)
        }
    }
}

/// Makes the scopes of one mesh.
#[derive(Debug)]
pub(super) struct Scopes<'m> {
    global: Arc<Mesh>,
    routes: HashMap<&'m str, Vec<&'m MeshRoute>>,
}

impl<'m> Scopes<'m> {
    /// Prepares a mesh. `global` is the result of [`global`] for it.
    pub(super) fn new(mesh: &'m Mesh, global: Arc<Mesh>) -> Self {
        let mut routes: HashMap<&str, Vec<&MeshRoute>> = HashMap::new();
        for route in &mesh.routes {
            let parents: BTreeSet<&str> =
                route.parents.iter().map(|parent| parent.service.as_str()).collect();
            for parent in parents {
                routes.entry(parent).or_default().push(route);
            }
        }
        Self { global, routes }
    }

    /// The scope of the callers of a service: the service and its routes.
    pub(super) fn callers(&self, service: &Service) -> CallerScope {
        CallerScope {
            service: service.clone(),
            routes: self.routes_of(service).cloned().collect(),
            global: self.global.clone(),
        }
    }

    /// Whether a scope equals the result of [`Self::callers`], without building that.
    pub(super) fn has(&self, scope: &CallerScope, service: &Service) -> bool {
        scope.service == *service
            && scope.routes.iter().eq(self.routes_of(service))
            && Arc::ptr_eq(&scope.global, &self.global)
    }

    fn routes_of(&self, service: &Service) -> impl Iterator<Item = &'m MeshRoute> {
        self.routes.get(service.name.as_str()).into_iter().flatten().copied()
    }
}

/// The global settings of a mesh, without services, routes, policies and issuers.
pub(super) fn global(mesh: &Mesh) -> Mesh {
    Mesh {
        trust_domain: mesh.trust_domain.clone(),
        service_ranges: mesh.service_ranges.clone(),
        outbound: mesh.outbound,
        services: BTreeMap::new(),
        routes: Vec::new(),
        issuers: BTreeMap::new(),
        policies: Vec::new(),
        revocations: Vec::new(),
        revocation: mesh.revocation,
        groups: mesh.groups.clone(),
        warnings: Vec::new(),
    }
}

/// The indexes of a mesh's policies, ordered by service.
#[derive(Debug, Default)]
pub(super) struct PolicyIndex(Vec<usize>);

impl PolicyIndex {
    pub(super) fn new(mesh: &Mesh) -> Self {
        let service = |place: &usize| mesh.policies.get(*place).map(|policy| &policy.service);
        let mut places: Vec<usize> = (0..mesh.policies.len()).collect();
        // A stable sort: policies of one service keep the order of the file.
        places.sort_by(|a, b| service(a).cmp(&service(b)));
        Self(places)
    }

    /// The policies of a service, in the order of the file.
    fn of<'m>(&self, mesh: &'m Mesh, service: &str) -> impl Iterator<Item = &'m Policy> {
        let at = |place: &usize| mesh.policies.get(*place).map_or("", |policy| &policy.service);
        let first = self.0.partition_point(|place| at(place) < service);
        let places = self.0.iter().skip(first).filter_map(|place| mesh.policies.get(*place));
        places.take_while(move |policy| policy.service == service)
    }
}

/// The scope of the inbound configuration of a service: the service, its policies, and the issuers that they refer to.
#[derive(Debug)]
pub(super) struct InboundScope {
    service: Service,
    policies: Vec<Policy>,
    issuers: BTreeMap<String, Issuer>,
    /// The global settings of the mesh. The allocation is shared as long as they are equal.
    global: Arc<Mesh>,
}

impl InboundScope {
    /// The scope as a mesh.
    pub(super) fn mesh(&self) -> Mesh {
        Mesh {
            services: [(self.service.name.clone(), self.service.clone())].into(),
            issuers: self.issuers.clone(),
            policies: self.policies.clone(),
            ..Mesh::clone(&self.global)
        }
    }
}

/// Borrowed parts of a mesh that make an [`InboundScope`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InboundParts<'m> {
    pub(super) service: &'m Service,
    policies: Vec<&'m Policy>,
    issuers: Vec<(&'m String, &'m Issuer)>,
    global: &'m Arc<Mesh>,
}

impl<'m> InboundParts<'m> {
    /// The parts for a service. `global` is the result of [`global`] for the mesh.
    pub(super) fn new(
        mesh: &'m Mesh,
        global: &'m Arc<Mesh>,
        index: &PolicyIndex,
        service: &'m Service,
    ) -> Self {
        let policies: Vec<&Policy> = index.of(mesh, &service.name).collect();
        let clauses = policies.iter().flat_map(|policy| policy.allow.iter().chain(&policy.deny));
        let tokens: BTreeSet<&String> =
            clauses.filter_map(|clause| clause.token.as_ref()).collect();
        let issuers = tokens.into_iter().filter_map(|token| mesh.issuers.get_key_value(token));
        let issuers = issuers.collect();
        Self { service, policies, issuers, global }
    }

    /// The scope.
    pub(super) fn scope(&self) -> InboundScope {
        let issuers = self.issuers.iter();
        let issuers = issuers.map(|(name, issuer)| ((*name).clone(), (*issuer).clone()));
        InboundScope {
            service: self.service.clone(),
            policies: self.policies.iter().copied().cloned().collect(),
            issuers: issuers.collect(),
            global: self.global.clone(),
        }
    }

    /// Whether a scope equals the result of [`Self::scope`], without building that.
    pub(super) fn equal(&self, scope: &InboundScope) -> bool {
        scope.service == *self.service
            && scope.policies.iter().eq(self.policies.iter().copied())
            && scope.issuers.iter().eq(self.issuers.iter().copied())
            && Arc::ptr_eq(&scope.global, self.global)
    }
}
