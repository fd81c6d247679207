//! The part of a mesh that one piece of configuration depends on, as a mesh of its own.
//!
//! What is built from a scope can depend on nothing else, so it is reused as long as the scope is
//! equal: no list of dependencies is kept by hand.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::mesh::{Mesh, Policy, Route, Service};

/// Gives the scopes of one mesh.
#[derive(Debug)]
pub(super) struct Scopes<'m> {
    mesh: &'m Mesh,
    routes: HashMap<&'m str, Vec<&'m Route>>,
}

impl<'m> Scopes<'m> {
    pub(super) fn new(mesh: &'m Mesh) -> Self {
        let mut routes: HashMap<&str, Vec<&Route>> = HashMap::new();
        for route in &mesh.routes {
            let parents: BTreeSet<&str> =
                route.parents.iter().map(|parent| parent.service.as_str()).collect();
            for parent in parents {
                routes.entry(parent).or_default().push(route);
            }
        }
        Self { mesh, routes }
    }

    /// What holds for the whole mesh, without services, routes, policies and issuers.
    pub(super) fn global(&self) -> Mesh {
        Mesh {
            trust_domain: self.mesh.trust_domain.clone(),
            service_ranges: self.mesh.service_ranges.clone(),
            outbound: self.mesh.outbound,
            services: BTreeMap::new(),
            routes: Vec::new(),
            issuers: BTreeMap::new(),
            policies: Vec::new(),
            revocations: Vec::new(),
            revocation: self.mesh.revocation,
            groups: self.mesh.groups.clone(),
            warnings: Vec::new(),
        }
    }

    /// What callers of a service depend on: the service and its routes.
    pub(super) fn callers(&self, service: &Service) -> Mesh {
        let routes = self.routes.get(service.name.as_str()).into_iter().flatten();
        Mesh {
            services: [(service.name.clone(), service.clone())].into(),
            routes: routes.map(|route| Route::clone(route)).collect(),
            ..self.global()
        }
    }
}

/// What the inbound side of a service depends on: the service, its policies, and the issuers of the
/// tokens that they name.
pub(super) fn inbound(mesh: &Mesh, service: &Service) -> Mesh {
    let policies = mesh.policies.iter().filter(|policy| policy.service == service.name);
    let policies: Vec<Policy> = policies.cloned().collect();
    let clauses = policies.iter().flat_map(|policy| policy.allow.iter().chain(&policy.deny));
    let tokens: BTreeSet<&String> = clauses.filter_map(|clause| clause.token.as_ref()).collect();
    let issuers = mesh.issuers.iter().filter(|(name, _)| tokens.contains(name));
    Mesh {
        services: [(service.name.clone(), service.clone())].into(),
        issuers: issuers.map(|(name, issuer)| (name.clone(), issuer.clone())).collect(),
        policies,
        ..Scopes { mesh, routes: HashMap::new() }.global()
    }
}
