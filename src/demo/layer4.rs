//! Demo steps of the L4 agent: flow explanation, flow affinity and restored redirects.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::Value;
use weft_runtime::clock::now;

use super::demo_mesh::{DemoMesh, await_redirect};
use super::files::DemoMeshFile;
use super::flows::{echo_flow, echo_flow_from, udp_flows};
use super::hosts::Host;
use super::service::ECHO_PORT;
use super::steps::on_router;
use super::wait::{expect, wait};
use crate::client::{config_dump, explain_flow};
use crate::redirects;

/// The virtual IP of the echo service.
const ECHO: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 3));

impl DemoMesh {
    pub(super) fn explained(&mut self) -> Result<String, String> {
        let mut found = String::new();
        // Unused source ports: on the proxy path the kernel rewrites the source port of a client when the port was used for
        // another service within two minutes, and the agent would see the rewritten port.
        for port in 20_001..=20_003 {
            let host = self.client_host.clone();
            let (flow, replica) = host.on(|| echo_flow_from(ECHO, port))??;
            let client = flow.client()?;
            let explanation =
                on_router(explain_flow("tcp", client, SocketAddr::new(ECHO, ECHO_PORT)))??;
            let text =
                |field: &str| explanation.get(field).and_then(Value::as_str).unwrap_or("none");
            let endpoint =
                explanation.pointer("/endpoints/0").and_then(Value::as_str).unwrap_or("none");
            let path = text("path");
            let why = text("why");
            let named =
                self.orders.iter().find(|host| endpoint.starts_with(&format!("{}:", host.address)));
            let named = named.map_or("no endpoint", |host| &host.name);
            expect(named == replica, || {
                format!("weft flow explain predicted {named} for {client}, but {replica} answered")
            })?;
            found = format!("{client} goes to {replica} by the {path} path: {why}");
        }
        Ok(found)
    }

    pub(super) fn repaired(&mut self) -> Result<String, String> {
        let mut longest = std::time::Duration::ZERO;
        for wish in &self.redirects {
            redirects::remove_all(&wish.namespace).map_err(|error| error.to_string())?;
            let removed = now();
            await_redirect(wish)?;
            longest = longest.max(now() - removed);
        }
        // A datagram in flight at that moment may be lost.
        let mut replicas = BTreeSet::new();
        wait("UDP flows are redirected again", || {
            let flows = self.client_host.run(udp_flows(ECHO, 10))?;
            Ok(flows.map(|reached| replicas = reached).is_ok())
        })?;
        Ok(format!(
            "removed on {} hosts, restored within {} ms; UDP flows reach {replicas:?}",
            self.redirects.len(),
            longest.as_millis()
        ))
    }

    pub(super) fn sticky_flow(&mut self) -> Result<String, String> {
        let host = self.client_host.clone();
        let (mut flow, first) = host.on(|| echo_flow(ECHO))??;
        let leaving =
            self.orders.iter().find(|replica| replica.name != first).ok_or("no other endpoint")?;
        let staying: Vec<&Host> =
            self.orders.iter().filter(|replica| replica.name != leaving.name).collect();
        self.files.write_mesh(&DemoMeshFile { echo: staying, ..self.mesh() })?;
        wait("the agent has two endpoints", || {
            let dump = on_router(config_dump())??;
            let endpoints = dump.pointer("/endpoints/echo|7000/endpoints/0/lb_endpoints");
            Ok(endpoints.and_then(|list| list.as_array()).is_some_and(|list| list.len() == 2))
        })?;
        let same = flow.say("still there?")?;
        expect(same == first, || format!("the flow moved from {first} to {same}"))?;
        // What the agent has heard of reaches its workers a moment later.
        wait("12 consecutive new flows reach another endpoint", || {
            for _ in 0..12 {
                let (_, replica) = host.on(|| echo_flow(ECHO))??;
                if replica == leaving.name {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        let detail = format!(
            "the flow stayed on {first}; {} was removed and receives no new flows",
            leaving.name
        );
        self.files.write_mesh(&self.mesh())?;
        Ok(detail)
    }

    pub(super) fn datagrams(&mut self) -> Result<String, String> {
        wait("the agent has three endpoints", || {
            let dump = on_router(config_dump())??;
            let endpoints = dump.pointer("/endpoints/echo|7001~1udp/endpoints/0/lb_endpoints");
            Ok(endpoints.and_then(|list| list.as_array()).is_some_and(|list| list.len() == 3))
        })?;
        let mut replicas = BTreeSet::new();
        wait("40 flows reach all three endpoints", || {
            replicas = self.client_host.run(udp_flows(ECHO, 40))??;
            Ok(replicas.len() == 3)
        })?;
        Ok(format!("40 flows over {replicas:?}"))
    }
}
