//! The changes of `mesh.yaml`. None of them may fail a request: each leaves at least two endpoints in service, and the
//! policies allow what the clients do.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::wait::{eventually, pause};

use crate::testbed::ENDPOINTS;

/// Number of services and policies that are added and removed.
const CHURN: u64 = 10;
/// Number of flows that would show that the kernel still uses an endpoint: each endpoint gets about a third of them.
const FLOWS: usize = 20;
/// One of this many changes is a file that must be rejected.
const CHANGES_PER_INVALID_FILE: u64 = 20;

/// A SplitMix64 random number generator, so that a run can be repeated from its seed.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number below `limit`, which must not be 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// `mesh.yaml` and the state that it should describe.
#[derive(Debug)]
pub(crate) struct MeshFile {
    path: PathBuf,
    original: Value,
    endpoints: Vec<Host>,
    state: Mutex<MeshState>,
    /// Locked while the file is invalid, and while the control plane starts, which needs a valid file.
    valid: Mutex<()>,
}

#[derive(Debug)]
struct MeshState {
    random: Random,
    changes: u64,
    /// The endpoint that a random change has removed, until the next such change.
    removed: Option<usize>,
    /// The endpoint that stays removed, because its program is about to be killed.
    removed_for_kill: Option<usize>,
    weights: [u64; ENDPOINTS],
    services: BTreeSet<u64>,
    policies: BTreeSet<u64>,
    request_timeout: Option<u64>,
    idle_timeout: Option<u64>,
}

fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MeshFile {
    /// The file of a mesh, in its current state.
    pub(crate) fn of(mesh: &TestMesh, seed: u64) -> Self {
        let path = mesh.file("mesh.yaml");
        let text = std::fs::read(&path).expect("the mesh has a file");
        let state = MeshState {
            random: Random(seed),
            changes: 0,
            removed: None,
            removed_for_kill: None,
            weights: [1; ENDPOINTS],
            services: BTreeSet::new(),
            policies: BTreeSet::new(),
            request_timeout: None,
            idle_timeout: None,
        };
        Self {
            path,
            original: serde_json::from_slice(&text).expect("the mesh is written as JSON"),
            endpoints: mesh.orders.iter().map(|endpoint| endpoint.host.clone()).collect(),
            state: Mutex::new(state),
            valid: Mutex::new(()),
        }
    }

    /// Makes a random change.
    pub(crate) fn change(&self) {
        let mut state = locked(&self.state);
        if state.random.below(CHANGES_PER_INVALID_FILE) == 0
            && let Ok(_valid) = self.valid.try_lock()
        {
            state.changes += 1;
            self.write("trust_domain: mesh.local\nservices: [{name: Not A Name, ports: []}]\n");
            // Long enough that the control plane reads it.
            pause(Duration::from_millis(200));
            self.write(&self.text(&state));
            return;
        }
        state.change();
        self.write(&self.text(&state));
    }

    /// The number of changes so far.
    pub(crate) fn changes(&self) -> u64 {
        locked(&self.state).changes
    }

    /// Does `work` while the file is valid.
    pub(crate) fn while_valid<T>(&self, work: impl FnOnce() -> T) -> T {
        let _valid = locked(&self.valid);
        work()
    }

    /// Removes an endpoint until [`MeshFile::add_endpoint`], and waits until callers and the kernel no longer use it.
    pub(crate) fn remove_endpoint(&self, endpoint: usize, mesh: &TestMesh) {
        let mut state = locked(&self.state);
        state.removed = None;
        state.removed_for_kill = Some(endpoint);
        state.changes += 1;
        self.write(&self.text(&state));
        drop(state);
        let host = self.endpoints.get(endpoint).expect("the endpoint exists");
        eventually(format!("no caller has the endpoint {}", host.name), || {
            let mut roles = [&mesh.agent, &mesh.web.sidecar].into_iter();
            roles.all(|role| !has_endpoint_on(&role.admin("/config_dump").body, host)).then_some(())
        });
        eventually(format!("the kernel sends no flow to {}", host.name), || {
            let mut flows = (0..FLOWS)
                .flat_map(|_| [mesh.open_flow().map(|(_, name)| name), Some(mesh.send_datagram())]);
            flows.all(|endpoint| endpoint.is_some_and(|name| name != host.name)).then_some(())
        });
    }

    /// Adds the endpoint again that [`MeshFile::remove_endpoint`] removed.
    pub(crate) fn add_endpoint(&self) {
        let mut state = locked(&self.state);
        state.removed_for_kill = None;
        state.changes += 1;
        self.write(&self.text(&state));
    }

    /// Writes the original file, and waits until callers have it.
    pub(crate) fn restore(&self, mesh: &TestMesh) {
        let mut state = locked(&self.state);
        // A change that shows in the dumps: with it, all earlier changes have arrived too.
        state.services = BTreeSet::from([CHURN]);
        state.removed = None;
        self.write(&self.text(&state));
        let last = service_name(CHURN);
        let wait_for_last = |is_present: bool| {
            eventually("the agent has the last change", || {
                let dump = mesh.agent.admin("/config_dump").text();
                (dump.contains(&last) == is_present).then_some(())
            });
        };
        wait_for_last(true);
        self.write(&format!("{:#}", self.original));
        wait_for_last(false);
        eventually("callers have all endpoints", || {
            let mut roles = [&mesh.agent, &mesh.web.sidecar].into_iter();
            let all = |dump: &[u8]| self.endpoints.iter().all(|host| has_endpoint_on(dump, host));
            roles.all(|role| all(&role.admin("/config_dump").body)).then_some(())
        });
    }

    fn write(&self, text: &str) {
        let part = self.path.with_extension("next");
        std::fs::write(&part, text).expect("the folder is writable");
        std::fs::rename(part, &self.path).expect("a file can be renamed");
    }

    fn text(&self, state: &MeshState) -> String {
        let mut file = self.original.clone();
        let services = file.pointer_mut("/services").and_then(Value::as_array_mut);
        let services = services.expect("the file has services");
        for service in services.iter_mut() {
            state.apply_to(service, &self.endpoints);
        }
        services.extend(state.services.iter().map(|number| self.service(*number)));
        let policies = file.pointer_mut("/security/policies").and_then(Value::as_array_mut);
        policies.expect("the file has policies").extend(state.policies.iter().map(policy));
        if let Some(seconds) = state.request_timeout {
            let rule = json!({
                "backendRefs": [{"name": "orders", "port": 80}],
                "timeouts": {"request": format!("{seconds}s")},
            });
            let route = json!({
                "name": "orders", "parentRefs": [{"name": "orders", "port": 80}], "rules": [rule],
            });
            if let Some(file) = file.as_object_mut() {
                file.insert("routes".to_owned(), json!([route]));
            }
        }
        format!("{file:#}")
    }

    /// A service that no client uses.
    fn service(&self, number: u64) -> Value {
        let nth = usize::try_from(number).unwrap_or(0) % self.endpoints.len();
        let host = self.endpoints.get(nth).expect("the endpoint exists");
        let is_meshed = number.is_multiple_of(2);
        let ports = if is_meshed {
            json!([{"port": 80, "target": 8080, "protocol": "http"}, {"port": 90, "target": 7002, "protocol": "tcp"}])
        } else {
            json!([{"port": 7000, "protocol": "tcp"}, {"port": 7001, "protocol": "udp"}])
        };
        json!({
            "name": service_name(number), "addresses": [format!("10.96.1.{number}")], "meshed": is_meshed,
            "ports": ports, "endpoints": [{"address": host.address}],
        })
    }
}

fn service_name(number: u64) -> String {
    format!("unused-{number}")
}

/// A policy that applies to no request of the clients.
fn policy(number: &u64) -> Value {
    let other = format!("spiffe://mesh.local/ns/other/sa/caller-{number}");
    let path = format!("/unused-{number}");
    match number % 3 {
        0 => {
            json!({"service": "orders", "deny": [{"from": ["web"], "ports": [80], "paths": [path]}]})
        }
        1 => json!({"service": "orders", "allow": [{"from": [other]}]}),
        _ => json!({"service": "web", "deny": [{"from": [other]}]}),
    }
}

/// Whether the configuration in a dump has an endpoint on that host.
fn has_endpoint_on(dump: &[u8], host: &Host) -> bool {
    let dump: Value = serde_json::from_slice(dump).unwrap_or_default();
    let endpoints = dump.get("endpoints").and_then(Value::as_object);
    let balanced = ["orders|", "echo|", "proxied|"];
    let is_balanced = |name: &str| balanced.iter().any(|service| name.starts_with(service));
    let addresses: Vec<String> = host.addresses().map(|address| format!("\"{address}\"")).collect();
    let clusters = endpoints.into_iter().flatten();
    let mut clusters = clusters.filter(|(name, _)| is_balanced(name)).map(|(_, at)| at.to_string());
    clusters.any(|cluster| addresses.iter().any(|address| cluster.contains(address)))
}

impl MeshState {
    fn change(&mut self) {
        self.changes += 1;
        match self.random.below(8) {
            0 | 1 => self.removed = self.next_removed(),
            2 => self.weights = std::array::from_fn(|_| 2 + self.random.below(3)),
            3 => {
                let number = self.random.below(CHURN);
                toggle(&mut self.services, number);
            }
            4 => {
                let number = self.random.below(CHURN);
                toggle(&mut self.policies, number);
            }
            5 => self.request_timeout = Some(10 + self.random.below(20)),
            6 => self.request_timeout = None,
            _ => self.idle_timeout = Some(60 + self.random.below(200)),
        }
    }

    fn next_removed(&mut self) -> Option<usize> {
        if self.removed.is_some() || self.removed_for_kill.is_some() {
            return None;
        }
        usize::try_from(self.random.below(ENDPOINTS as u64)).ok()
    }

    /// Sets the endpoints and timeouts of a service that has several endpoints.
    fn apply_to(&self, service: &mut Value, endpoints: &[Host]) {
        let name = service.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !["orders", "echo", "proxied"].contains(&name.as_str()) {
            return;
        }
        let removed = [self.removed, self.removed_for_kill];
        let remaining =
            endpoints.iter().enumerate().filter(|(number, _)| !removed.contains(&Some(*number)));
        let endpoints =
            remaining.zip(&self.weights).map(|((_, host), weight)| match name.as_str() {
                "proxied" => json!({"address": host.address6, "weight": weight}),
                _ => json!({"address": host.address, "weight": weight}),
            });
        let endpoints: Vec<Value> = endpoints.collect();
        let fields = service.as_object_mut().expect("a service is an object");
        fields.insert("endpoints".to_owned(), endpoints.into());
        // Each flow that the agent proxies keeps file descriptors open until it has been idle for this long.
        let share = if name == "proxied" { 10 } else { 1 };
        let Some(seconds) = self.idle_timeout.filter(|_| name != "orders") else { return };
        let seconds = seconds / share;
        let ports = fields.get_mut("ports").and_then(Value::as_array_mut);
        for port in ports.into_iter().flatten().filter_map(Value::as_object_mut) {
            port.insert("idle_timeout".to_owned(), json!(format!("{seconds}s")));
        }
    }
}

fn toggle(set: &mut BTreeSet<u64>, number: u64) {
    if !set.remove(&number) {
        set.insert(number);
    }
}
