//! The stream of changes of `mesh.yaml`. None of them concerns a request that is made: with each, at least two
//! replicas serve, and what the clients do is allowed.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::wait::{eventually, pause};

use crate::stage::REPLICAS;

/// How many services and policies come and go.
const COMING_AND_GOING: u64 = 10;
/// How many flows would show an endpoint that the kernel still uses: it has a third of them, more or less.
const FLOWS: usize = 20;
/// One of so many changes is a file that must be rejected.
const MISTAKES: u64 = 20;

/// A small generator of random numbers (SplitMix64), so that a run can be repeated.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number below `limit`, which is above zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// `mesh.yaml`, and what is wanted of it now.
#[derive(Debug)]
pub(crate) struct MeshFile {
    path: PathBuf,
    original: Value,
    replicas: Vec<Host>,
    wanted: Mutex<Wanted>,
    /// Held while the file has a mistake, and while the control plane must be able to start.
    good: Mutex<()>,
}

#[derive(Debug)]
struct Wanted {
    random: Random,
    changes: u64,
    /// The replica that is out of the mesh for a while.
    out: Option<usize>,
    /// The replica that must stay out, since its program is about to end.
    held_out: Option<usize>,
    weights: [u64; REPLICAS],
    services: BTreeSet<u64>,
    policies: BTreeSet<u64>,
    request_timeout: Option<u64>,
    idle_timeout: Option<u64>,
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MeshFile {
    /// The file of a mesh, as it is now.
    pub(crate) fn of(mesh: &TestMesh, seed: u64) -> Self {
        let path = mesh.file("mesh.yaml");
        let text = std::fs::read(&path).expect("the mesh has a file");
        let wanted = Wanted {
            random: Random(seed),
            changes: 0,
            out: None,
            held_out: None,
            weights: [1; REPLICAS],
            services: BTreeSet::new(),
            policies: BTreeSet::new(),
            request_timeout: None,
            idle_timeout: None,
        };
        Self {
            path,
            original: serde_json::from_slice(&text).expect("the mesh is written as JSON"),
            replicas: mesh.orders.iter().map(|replica| replica.host.clone()).collect(),
            wanted: Mutex::new(wanted),
            good: Mutex::new(()),
        }
    }

    /// Makes a random change.
    pub(crate) fn change(&self) {
        let mut wanted = held(&self.wanted);
        if wanted.random.below(MISTAKES) == 0
            && let Ok(_good) = self.good.try_lock()
        {
            wanted.changes += 1;
            self.write("trust_domain: mesh.local\nservices: [{name: Not A Name, ports: []}]\n");
            // Long enough that the control plane reads it.
            pause(Duration::from_millis(200));
            self.write(&self.text(&wanted));
            return;
        }
        wanted.change();
        self.write(&self.text(&wanted));
    }

    /// How many changes there were.
    pub(crate) fn changes(&self) -> u64 {
        held(&self.wanted).changes
    }

    /// Does something while the file has no mistake.
    pub(crate) fn while_good<T>(&self, work: impl FnOnce() -> T) -> T {
        let _good = held(&self.good);
        work()
    }

    /// Takes a replica out of the mesh until [`MeshFile::bring_back`], and waits until callers know.
    pub(crate) fn take_out(&self, replica: usize, mesh: &TestMesh) {
        let mut wanted = held(&self.wanted);
        wanted.out = None;
        wanted.held_out = Some(replica);
        wanted.changes += 1;
        self.write(&self.text(&wanted));
        drop(wanted);
        let host = self.replicas.get(replica).expect("there is such a replica");
        eventually(format!("callers know that {} is out", host.name), || {
            let mut roles = [&mesh.agent, &mesh.web.sidecar].into_iter();
            roles.all(|role| !knows(&role.admin("/config_dump").body, host)).then_some(())
        });
        eventually(format!("the kernel sends no flow to {}", host.name), || {
            let mut flows = (0..FLOWS)
                .flat_map(|_| [mesh.open_flow().map(|(_, name)| name), Some(mesh.send_datagram())]);
            flows.all(|replica| replica.is_some_and(|name| name != host.name)).then_some(())
        });
    }

    /// Lets the replica back in that was taken out.
    pub(crate) fn bring_back(&self) {
        let mut wanted = held(&self.wanted);
        wanted.held_out = None;
        wanted.changes += 1;
        self.write(&self.text(&wanted));
    }

    /// Writes the file as it was first, and waits until callers know.
    pub(crate) fn restore(&self, mesh: &TestMesh) {
        let mut wanted = held(&self.wanted);
        // A change that both can see, so that they have seen all before it.
        wanted.services = BTreeSet::from([COMING_AND_GOING]);
        wanted.out = None;
        self.write(&self.text(&wanted));
        let last = service_name(COMING_AND_GOING);
        let knows_last = |is_known: bool| {
            eventually("the last change is known", || {
                let dump = mesh.agent.admin("/config_dump").text();
                (dump.contains(&last) == is_known).then_some(())
            });
        };
        knows_last(true);
        self.write(&format!("{:#}", self.original));
        knows_last(false);
        eventually("callers know all replicas", || {
            let mut roles = [&mesh.agent, &mesh.web.sidecar].into_iter();
            let all = |dump: &[u8]| self.replicas.iter().all(|host| knows(dump, host));
            roles.all(|role| all(&role.admin("/config_dump").body)).then_some(())
        });
    }

    fn write(&self, text: &str) {
        let part = self.path.with_extension("next");
        std::fs::write(&part, text).expect("the folder takes files");
        std::fs::rename(part, &self.path).expect("a file can be renamed");
    }

    fn text(&self, wanted: &Wanted) -> String {
        let mut file = self.original.clone();
        let services = file.pointer_mut("/services").and_then(Value::as_array_mut);
        let services = services.expect("the file has services");
        for service in services.iter_mut() {
            wanted.shape(service, &self.replicas);
        }
        services.extend(wanted.services.iter().map(|number| self.service(*number)));
        let policies = file.pointer_mut("/security/policies").and_then(Value::as_array_mut);
        policies.expect("the file has policies").extend(wanted.policies.iter().map(policy));
        if let Some(seconds) = wanted.request_timeout {
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
        let nth = usize::try_from(number).unwrap_or(0) % self.replicas.len();
        let host = self.replicas.get(nth).expect("there is such a replica");
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

/// A policy that concerns no request that is made.
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

/// Whether a configuration that is in force has endpoints on that host.
fn knows(dump: &[u8], host: &Host) -> bool {
    let dump: Value = serde_json::from_slice(dump).unwrap_or_default();
    let endpoints = dump.get("endpoints").and_then(Value::as_object);
    let ours = ["orders|", "echo|", "proxied|"];
    let of_replicas = |name: &str| ours.iter().any(|service| name.starts_with(service));
    let addresses: Vec<String> = host.addresses().map(|address| format!("\"{address}\"")).collect();
    let clusters = endpoints.into_iter().flatten();
    let mut clusters = clusters.filter(|(name, _)| of_replicas(name)).map(|(_, at)| at.to_string());
    clusters.any(|cluster| addresses.iter().any(|address| cluster.contains(address)))
}

impl Wanted {
    fn change(&mut self) {
        self.changes += 1;
        match self.random.below(8) {
            0 | 1 => self.out = self.next_out(),
            2 => self.weights = std::array::from_fn(|_| 2 + self.random.below(3)),
            3 => {
                let number = self.random.below(COMING_AND_GOING);
                toggle(&mut self.services, number);
            }
            4 => {
                let number = self.random.below(COMING_AND_GOING);
                toggle(&mut self.policies, number);
            }
            5 => self.request_timeout = Some(10 + self.random.below(20)),
            6 => self.request_timeout = None,
            _ => self.idle_timeout = Some(60 + self.random.below(200)),
        }
    }

    fn next_out(&mut self) -> Option<usize> {
        if self.out.is_some() || self.held_out.is_some() {
            return None;
        }
        usize::try_from(self.random.below(REPLICAS as u64)).ok()
    }

    /// Puts the wanted endpoints and timeouts into a service with several replicas.
    fn shape(&self, service: &mut Value, replicas: &[Host]) {
        let name = service.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !["orders", "echo", "proxied"].contains(&name.as_str()) {
            return;
        }
        let out = [self.out, self.held_out];
        let stays = replicas.iter().enumerate().filter(|(number, _)| !out.contains(&Some(*number)));
        let endpoints = stays.zip(&self.weights).map(|((_, host), weight)| match name.as_str() {
            "proxied" => json!({"address": host.address6, "weight": weight}),
            _ => json!({"address": host.address, "weight": weight}),
        });
        let endpoints: Vec<Value> = endpoints.collect();
        let fields = service.as_object_mut().expect("a service is an object");
        fields.insert("endpoints".to_owned(), endpoints.into());
        // Flows that the agent forwards are open descriptors until they have been idle for so long.
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
