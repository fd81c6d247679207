//! The `mesh.yaml` of a test mesh, and its changes. Services and policies are selected by the name of the service, not by
//! their position.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};
use weft::demo::hosts::Host;

use crate::mesh_pki::{MeshPki, TRUST_DOMAIN, spiffe_id};

/// The port of the programs of `web` and `orders`.
pub(crate) const PROGRAM_PORT: u16 = 8080;
/// The TCP echo port of the programs; the next port echoes UDP. Traffic to them bypasses the
/// sidecars.
pub(crate) const ECHO_PORT: u16 = 7000;
/// The numbers of the services in their virtual IPs.
pub(crate) const WEB: u8 = 1;
pub(crate) const ORDERS: u8 = 2;
pub(crate) const ECHO: u8 = 3;
pub(crate) const SINK: u8 = 4;
/// The TCP port at which tests listen themselves on the hosts of `orders`; the next port is for
/// UDP.
pub(crate) const SINK_PORT: u16 = 7100;

/// The address family of a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeshIpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl MeshIpFamily {
    /// The range of the virtual IPs.
    #[must_use]
    pub fn service_range(self) -> &'static str {
        match self {
            Self::V4 => "10.96.0.0/16",
            Self::V6 => "fd96::/64",
        }
    }

    /// The virtual IP of the service with this number.
    pub(crate) fn service(self, number: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
            Self::V6 => Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number.into()).into(),
        }
    }

    pub(crate) fn of(self, host: &Host) -> IpAddr {
        match self {
            Self::V4 => host.address.into(),
            Self::V6 => host.address6.expect("the host has IPv6").into(),
        }
    }

    pub(crate) fn any(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// The content of `mesh.yaml`: services `web`, `orders`, `echo` and `sink`, and policies of the first two.
#[derive(Debug, Clone)]
pub struct TestMeshFile {
    file: Value,
}

impl TestMeshFile {
    pub(crate) fn new(family: MeshIpFamily, web: IpAddr, orders: &[IpAddr]) -> Self {
        let endpoint = |address: &IpAddr| json!({"address": address});
        let orders: Vec<Value> = orders.iter().map(endpoint).collect();
        let http = json!([{"port": 80, "target": PROGRAM_PORT, "protocol": "http"}]);
        let file = json!({
            "trust_domain": TRUST_DOMAIN,
            "service_ranges": [family.service_range()],
            "services": [
                {"name": "web", "addresses": [family.service(WEB)], "ports": http,
                 "endpoints": [endpoint(&web)]},
                {"name": "orders", "addresses": [family.service(ORDERS)], "ports": http,
                 "endpoints": orders},
                {"name": "echo", "addresses": [family.service(ECHO)], "meshed": false,
                 "ports": [{"port": ECHO_PORT, "protocol": "tcp"},
                           {"port": ECHO_PORT + 1, "protocol": "udp"}],
                 "endpoints": orders},
                {"name": "sink", "addresses": [family.service(SINK)], "meshed": false,
                 "ports": [{"port": SINK_PORT, "protocol": "tcp"},
                           {"port": SINK_PORT + 1, "protocol": "udp"}],
                 "endpoints": orders},
            ],
            "security": {"revocations": [], "policies": [
                {"service": "web", "allow": [{"from": [spiffe_id("client")], "methods": ["GET"]}]},
                {"service": "orders", "allow": [{"from": ["web"], "methods": ["GET"]}]},
            ]},
        });
        Self { file }
    }

    /// Replaces the file in the folder of the mesh, atomically.
    pub(crate) fn write(&self, pki: &MeshPki) {
        let part = pki.path("mesh.part");
        std::fs::write(&part, format!("{:#}", self.file)).expect("the folder is writable");
        std::fs::rename(part, pki.path("mesh.yaml")).expect("a file can be renamed");
    }

    /// Sets a field of the file.
    ///
    /// # Panics
    /// Never: the file is a JSON object.
    pub fn set(&mut self, field: &str, value: Value) {
        set(&mut self.file, field, value);
    }

    /// Sets a field of the section `security`.
    ///
    /// # Panics
    /// If the file has no such section.
    pub fn set_security(&mut self, field: &str, value: Value) {
        set(self.file.get_mut("security").expect("the file has the section"), field, value);
    }

    /// Adds a service.
    ///
    /// # Panics
    /// If the file has no services.
    pub fn add_service(&mut self, service: Value) {
        self.services().push(service);
    }

    /// Adds a policy.
    ///
    /// # Panics
    /// If the file has no policies.
    pub fn add_policy(&mut self, policy: Value) {
        self.policies().push(policy);
    }

    /// The service of that name.
    ///
    /// # Panics
    /// If the file has no such service.
    pub fn service(&mut self, name: &str) -> TestMeshService<'_> {
        let mut services = self.services().iter_mut();
        let service = services.find(|service| service.get("name") == Some(&json!(name)));
        TestMeshService { service: service.expect("the file has the service") }
    }

    /// The first policy of a service.
    ///
    /// # Panics
    /// If the file has no such policy.
    pub fn policy(&mut self, service: &str) -> TestMeshPolicy<'_> {
        let mut policies = self.policies().iter_mut();
        let policy = policies.find(|policy| policy.get("service") == Some(&json!(service)));
        TestMeshPolicy { policy: policy.expect("the service has a policy") }
    }

    fn services(&mut self) -> &mut Vec<Value> {
        list(&mut self.file, "services")
    }

    fn policies(&mut self) -> &mut Vec<Value> {
        list(self.file.get_mut("security").expect("the file has the section"), "policies")
    }
}

/// A service of the file.
#[derive(Debug)]
pub struct TestMeshService<'f> {
    service: &'f mut Value,
}

impl TestMeshService<'_> {
    /// The value of a field.
    ///
    /// # Panics
    /// If the service has no such field.
    #[must_use]
    pub fn field(&self, field: &str) -> Value {
        self.service.get(field).expect("the service has the field").clone()
    }

    /// Sets a field.
    ///
    /// # Panics
    /// Never: a service is a JSON object.
    pub fn set(&mut self, field: &str, value: Value) {
        set(self.service, field, value);
    }

    /// Adds a port.
    ///
    /// # Panics
    /// If the service has no ports.
    pub fn add_port(&mut self, port: Value) {
        list(self.service, "ports").push(port);
    }

    /// Replaces the first port.
    ///
    /// # Panics
    /// If the service has no ports.
    pub fn set_first_port(&mut self, port: Value) {
        *list(self.service, "ports").first_mut().expect("the service has a port") = port;
    }

    /// Replaces the endpoints.
    ///
    /// # Panics
    /// Never: a service is a JSON object.
    pub fn set_endpoints(&mut self, addresses: &[IpAddr]) {
        let endpoints = addresses.iter().map(|address| json!({"address": address})).collect();
        self.set("endpoints", endpoints);
    }

    /// Removes all endpoints after the first `count`.
    ///
    /// # Panics
    /// If the service has no endpoints.
    pub fn keep_endpoints(&mut self, count: usize) {
        list(self.service, "endpoints").truncate(count);
    }
}

/// A policy of the file.
#[derive(Debug)]
pub struct TestMeshPolicy<'f> {
    policy: &'f mut Value,
}

impl TestMeshPolicy<'_> {
    /// Replaces the whole policy.
    pub fn replace(&mut self, policy: Value) {
        *self.policy = policy;
    }

    /// Replaces the allow rules.
    ///
    /// # Panics
    /// Never: a policy is a JSON object.
    pub fn set_allow(&mut self, rules: Value) {
        set(self.policy, "allow", rules);
    }

    /// Sets the callers of the first allow rule.
    ///
    /// # Panics
    /// If the policy has no allow rule.
    pub fn allow_from(&mut self, callers: &[&str]) {
        set(self.first_allow(), "from", json!(callers));
    }

    /// Sets the methods of the first allow rule.
    ///
    /// # Panics
    /// If the policy has no allow rule.
    pub fn allow_methods(&mut self, methods: &[&str]) {
        set(self.first_allow(), "methods", json!(methods));
    }

    fn first_allow(&mut self) -> &mut Value {
        list(self.policy, "allow").first_mut().expect("the policy has an allow rule")
    }
}

fn set(object: &mut Value, field: &str, value: Value) {
    object.as_object_mut().expect("the value is a JSON object").insert(field.to_owned(), value);
}

fn list<'v>(object: &'v mut Value, field: &str) -> &'v mut Vec<Value> {
    let list = object.get_mut(field).and_then(Value::as_array_mut);
    list.expect("the field is a list")
}
