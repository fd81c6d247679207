//! The steps of the demo. Each step exercises one feature of the mesh, checks the result and prints a line.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use weft_agent::redirect::RedirectBackend;
use weft_runtime::clock::now;

use super::demo_mesh::{DemoMesh, web_address};
use super::files::{DemoFiles, DemoMeshFile};
use super::flows::{echo_flow, udp_flows};
use super::load::{LoadTest, usage};
use super::output::{line, mark};
use super::service::DIRECT_PORT;
use super::wait::{expect, wait};
use crate::client::{HttpClient, config_dump, get};

/// The number of requests per row of the latency table.
const MEASURED: usize = 300;

/// A process name with its memory in KiB and its number of open files.
type ProcessUsage = (String, (u64, u64));

/// A step: returns the details to print, or the reason of the failure.
type DemoStep = fn(&mut DemoMesh) -> Result<String, String>;

/// Runs all steps; stops at the first that fails.
pub(super) fn run(
    keep: bool,
    load: Option<LoadTest>,
    backend: RedirectBackend,
    path: &str,
) -> Result<(), String> {
    line(
        "weft demo: control plane, agent, service web with one endpoint, service orders with three endpoints",
    );
    let mut mesh = DemoMesh::start(backend, path)?;
    mark(
        true,
        "control plane, agent and four sidecars are ready, each in its own network namespace",
    );
    line(&format!("         redirects installed with {backend}"));
    let steps: [(&str, DemoStep); 13] = [
        (
            "requests succeed, and each service receives the SPIFFE ID of its caller",
            DemoMesh::traffic_flows,
        ),
        ("client without a certificate is rejected", DemoMesh::no_certificate),
        ("JWT is required: no token 401, forged token 401, valid token 200", DemoMesh::tokens),
        ("requests are balanced evenly over the three endpoints of orders", DemoMesh::evenly),
        ("weft flow explain predicts the endpoint and the path of a flow", DemoMesh::explained),
        ("flow stays on its endpoint while endpoints change", DemoMesh::sticky_flow),
        ("UDP flows are balanced, and each keeps its endpoint", DemoMesh::datagrams),
        ("IPv6 clients are served", DemoMesh::ipv6),
        ("removed redirect rules are restored", DemoMesh::repaired),
        (
            "invalid mesh.yaml is rejected with a reason; the last good configuration stays in force",
            DemoMesh::bad_mesh,
        ),
        (
            "revoked certificate: its connection is closed, new handshakes are rejected",
            DemoMesh::revocation,
        ),
        ("control plane killed: requests still succeed", DemoMesh::control_killed),
        ("request latency", DemoMesh::measure),
    ];
    for (text, step) in steps {
        match step(&mut mesh) {
            Ok(found) => {
                mark(true, text);
                found.lines().for_each(|detail| line(&format!("         {detail}")));
            }
            Err(reason) => {
                mark(false, text);
                mesh.show_logs();
                return Err(reason);
            }
        }
    }
    line("all steps succeeded");
    if let Some(load) = load {
        let what =
            format!("load test: {} requests per second for {} seconds", load.rate, load.seconds);
        match mesh.carry_load(&load) {
            Ok(found) => {
                mark(true, &what);
                found.lines().for_each(|detail| line(&format!("         {detail}")));
            }
            Err(reason) => {
                mark(false, &what);
                return Err(reason);
            }
        }
    }
    if keep {
        mesh.stay();
    }
    Ok(())
}

impl DemoMesh {
    fn traffic_flows(&mut self) -> Result<String, String> {
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || format!("status {}: {}", answer.status, answer.body))?;
        let said: serde_json::Value =
            serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
        let peer = |said: &serde_json::Value| {
            said.get("peer").and_then(|p| p.as_str()).unwrap_or("no peer").to_owned()
        };
        let caller = peer(&said);
        let web = said.get("orders").map(peer).unwrap_or_default();
        expect(caller.ends_with("/sa/client"), || format!("web received the caller {caller}"))?;
        expect(web.ends_with("/sa/web"), || format!("orders received the caller {web}"))?;
        Ok(format!("caller of web: {caller}\ncaller of orders: {web}"))
    }

    fn no_certificate(&mut self) -> Result<String, String> {
        let tls = self.files.tls(None)?;
        match self.client_host.run(get(web_address(), Some(tls), "/orders", None))? {
            Err(reason) => Ok(format!("handshake failed: {reason}")),
            Ok(answer) => Err(format!("the request got status {}", answer.status)),
        }
    }

    fn tokens(&mut self) -> Result<String, String> {
        let forged = DemoFiles::forged_token()?;
        let good = self.files.token()?;
        for (token, expected) in
            [(None, 401), (Some(forged.as_str()), 401), (Some(good.as_str()), 200)]
        {
            let answer = self.ask(token)?;
            expect(answer.status == expected, || {
                format!("{} instead of {expected}: {}", answer.status, answer.body)
            })?;
        }
        Ok(String::new())
    }

    fn evenly(&mut self) -> Result<String, String> {
        let token = self.files.token()?;
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..30 {
            let answer = self.ask(Some(&token))?;
            let said: serde_json::Value =
                serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
            let replica = said
                .pointer("/orders/replica")
                .and_then(|r| r.as_str())
                .unwrap_or("none")
                .to_owned();
            *seen.entry(replica).or_default() += 1;
        }
        expect(seen.len() == 3 && seen.values().all(|count| *count == 10), || format!("{seen:?}"))?;
        Ok(format!("{seen:?}"))
    }

    fn ipv6(&mut self) -> Result<String, String> {
        if self.client_host.address6.is_none() {
            return Ok("skipped: IPv6 not available".into());
        }
        let token = self.files.token()?;
        let web = SocketAddr::from((Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1), 80));
        // Enough requests that both addresses of web (IPv4 and IPv6) are chosen.
        for _ in 0..12 {
            let asking = get(web, Some(self.tls()?), "/orders", Some(&token));
            let answer = self.client_host.run(asking)??;
            expect(answer.status == 200, || format!("status {}: {}", answer.status, answer.body))?;
        }
        let echo = IpAddr::from(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 3));
        let (mut flow, first) = self.client_host.on(|| echo_flow(echo))??;
        let same = flow.say("still there?")?;
        expect(same == first, || format!("the flow moved from {first} to {same}"))?;
        let replicas = self.client_host.run(udp_flows(echo, 20))??;
        Ok(format!("12 requests, a TCP flow to {first}, 20 UDP flows over {replicas:?}"))
    }

    fn bad_mesh(&mut self) -> Result<String, String> {
        self.files.write_mesh(&DemoMeshFile { caller: "wbe", ..self.mesh() })?;
        let mut reason = String::new();
        wait("the control plane rejects mesh.yaml", || {
            let dump = self.control_host.run(config_dump())??;
            let rejected = dump.pointer("/rejected/0").and_then(|r| r.as_str()).unwrap_or_default();
            rejected.clone_into(&mut reason);
            Ok(!reason.is_empty())
        })?;
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || {
            format!("a request got status {} meanwhile", answer.status)
        })?;
        self.files.write_mesh(&self.mesh())?;
        wait("the control plane applies the valid mesh.yaml", || {
            let dump = self.control_host.run(config_dump())??;
            Ok(dump.pointer("/rejected/0").is_none())
        })?;
        Ok(reason)
    }

    fn revocation(&mut self) -> Result<String, String> {
        let files = &self.files;
        let tls = self.files.tls(Some(&self.revoked_client))?;
        let revoking =
            DemoMeshFile { revocations: vec![self.revoked_client.serial.clone()], ..self.mesh() };
        let (cut, refused) = self.client_host.run(async {
            let mut live = HttpClient::connect(web_address(), Some(tls.clone())).await?;
            let status = live.get("/", None).await?.status;
            expect(status == 200, || format!("status {status} before the revocation"))?;
            files.write_mesh(&revoking)?;
            let since = now();
            live.ended().await?;
            let cut = since.elapsed();
            Ok::<_, String>((cut, get(web_address(), Some(tls), "/", None).await))
        })??;
        let Err(reason) = refused else {
            return Err("the revoked certificate was accepted".into());
        };
        let other = self.ask(Some(&self.files.token()?))?;
        expect(other.status == 200, || {
            format!("the certificate that is not revoked got status {}", other.status)
        })?;
        Ok(format!(
            "connection closed {} ms after the revocation in mesh.yaml; next handshake failed: {reason}",
            cut.as_millis()
        ))
    }

    fn control_killed(&mut self) -> Result<String, String> {
        self.control.kill()?;
        let token = self.files.token()?;
        for _ in 0..20 {
            let answer = self.ask(Some(&token))?;
            expect(answer.status == 200, || format!("a request got status {}", answer.status))?;
        }
        Ok("20 of 20 requests succeeded, each over a new TLS connection".into())
    }

    fn measure(&mut self) -> Result<String, String> {
        let replica = self.orders.first().ok_or("no endpoint")?;
        let direct: SocketAddr = (replica.address, DIRECT_PORT).into();
        let token = self.files.token()?;
        let tls = self.tls()?;
        let direct = self.client_host.run(timed(direct, None, None))??;
        let through = self.client_host.run(timed(web_address(), Some(tls), Some(token)))??;
        let row = |name: &str, mut times: Vec<Duration>| {
            times.sort_unstable();
            let at = |part: usize| {
                times.get(times.len() * part / 100).copied().unwrap_or_default().as_secs_f64() * 1e3
            };
            format!("{name:32} {:>8} {:>8.2}ms {:>8.2}ms", times.len(), at(50), at(99))
        };
        Ok(format!(
            "{:32} {:>8} {:>10} {:>10}\n{}\n{}",
            "",
            "requests",
            "p50",
            "p99",
            row("direct: client -> orders", direct),
            row("mesh: client -> web -> orders", through)
        ))
    }

    /// Sends requests at a constant rate, and compares memory and open files before and after.
    fn carry_load(&self, load: &LoadTest) -> Result<String, String> {
        let look = || -> Result<Vec<ProcessUsage>, String> {
            let mut all = vec![("agent".to_owned(), on_router(usage())??)];
            for host in [&self.web].into_iter().chain(&self.orders) {
                all.push((host.name.clone(), host.run(usage())??));
            }
            Ok(all)
        };
        let tls = self.tls()?;
        let token = self.files.token()?;
        let short = LoadTest { seconds: 2, ..*load };
        self.client_host.run(short.send(web_address(), tls.clone(), &token))??;
        let before = look()?;
        let sent = self.client_host.run(load.send(web_address(), tls, &token))??;
        let after = look()?;
        expect(sent.errors.is_empty(), || {
            format!("{} errors, such as {:?}", sent.errors.len(), sent.errors.first())
        })?;
        let mut found = format!(
            "{} requests, 0 errors, p50 {:.2}ms, p99 {:.2}ms",
            sent.times.len(),
            sent.at(50),
            sent.at(99)
        );
        for ((name, old), (_, new)) in before.iter().zip(&after) {
            found += &format!(
                "\n{name:9} {} -> {} KiB, {} -> {} open files",
                old.0, new.0, old.1, new.1
            );
        }
        Ok(found)
    }
}

pub(super) fn on_router<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map(|runtime| runtime.block_on(work)).map_err(|error| error.to_string())
}

/// The duration of each of [`MEASURED`] requests over one connection.
async fn timed(
    target: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    token: Option<String>,
) -> Result<Vec<Duration>, String> {
    let mut caller = HttpClient::connect(target, tls).await?;
    let mut times = Vec::new();
    for _ in 0..MEASURED {
        let started = now();
        let answer = caller.get("/orders", token.as_deref()).await?;
        expect(answer.status == 200, || {
            format!("a measured request got status {}", answer.status)
        })?;
        times.push(now() - started);
    }
    Ok(times)
}
