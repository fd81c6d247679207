//! The story: what a mesh does, a line a step, each checked.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use weft_agent::redirect::RedirectBackend;

use super::files::{Files, MeshFile};
use super::flows::{echo_flow, udp_flows};
use super::load::{Load, usage};
use super::roles::{now, pause};
use super::service::DIRECT_PORT;
use super::stage::{Stage, web_address};
use super::{line, mark};
use crate::client::{Caller, config_dump, get};

/// How long a change may take to arrive everywhere.
const CHANGE: Duration = Duration::from_secs(15);
/// How many requests the table is made of.
const MEASURED: usize = 300;

/// A role with its memory in KiB and its open files.
type Usage = (String, (u64, u64));

/// A step: what was found, or why it failed.
type Step = fn(&mut Stage) -> Result<String, String>;

/// Tells the story; the first step that fails ends it.
pub(super) fn tell(
    keep: bool,
    load: Option<Load>,
    backend: RedirectBackend,
    path: &str,
) -> Result<(), String> {
    line("weft demo: a mesh of a control plane, an agent, web and three replicas of orders");
    let mut stage = Stage::set(backend, path)?;
    mark(true, "control plane, agent and four sidecars are ready, each on a host of its own");
    line(&format!("         redirects installed by {backend}"));
    let steps: [(&str, Step); 13] = [
        ("traffic flows, and each service sees who called it", Stage::traffic_flows),
        ("a client without a certificate is refused", Stage::no_certificate),
        ("a token is asked for: none 401, forged 401, good 200", Stage::tokens),
        ("orders is reached through its three replicas evenly", Stage::evenly),
        ("weft tells where a flow goes and who moves it, and there it goes", Stage::explained),
        ("a flow stays on its endpoint while endpoints change", Stage::sticky_flow),
        ("UDP is balanced, and each flow keeps its endpoint", Stage::datagrams),
        ("IPv6 clients are served in the same way", Stage::ipv6),
        ("rules that somebody removes are back at once", Stage::repaired),
        ("a bad mesh.yaml is rejected with the reason, the old one serves", Stage::bad_mesh),
        (
            "a revoked certificate loses its live connection, and is refused from then on",
            Stage::revocation,
        ),
        ("control plane killed: traffic goes on", Stage::control_killed),
        ("how long requests take", Stage::measure),
    ];
    for (text, step) in steps {
        match step(&mut stage) {
            Ok(found) => {
                mark(true, text);
                found.lines().for_each(|detail| line(&format!("         {detail}")));
            }
            Err(reason) => {
                mark(false, text);
                stage.show_logs();
                return Err(reason);
            }
        }
    }
    line("every step as promised");
    if let Some(load) = load {
        let what = format!("{} requests a second for {} seconds", load.rate, load.seconds);
        match stage.carry_load(&load) {
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
        stage.stay();
    }
    Ok(())
}

impl Stage {
    fn traffic_flows(&mut self) -> Result<String, String> {
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || format!("status {}: {}", answer.status, answer.body))?;
        let said: serde_json::Value =
            serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
        let peer = |said: &serde_json::Value| {
            said.get("peer").and_then(|p| p.as_str()).unwrap_or("nobody").to_owned()
        };
        let (caller, web) = (peer(&said), said.get("orders").map(peer).unwrap_or_default());
        expect(caller.ends_with("/sa/client"), || format!("web saw {caller}"))?;
        expect(web.ends_with("/sa/web"), || format!("orders saw {web}"))?;
        Ok(format!("web was called by {caller}\norders was called by {web}"))
    }

    fn no_certificate(&mut self) -> Result<String, String> {
        let tls = self.files.tls(None)?;
        match self.client_host.run(get(web_address(), Some(tls), "/orders", None))? {
            Err(reason) => Ok(format!("the handshake ended: {reason}")),
            Ok(answer) => Err(format!("it was answered with {}", answer.status)),
        }
    }

    fn tokens(&mut self) -> Result<String, String> {
        let forged = Files::forged_token()?;
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
            return Ok("this host has no IPv6: not tried".into());
        }
        let token = self.files.token()?;
        let web = SocketAddr::from((Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1), 80));
        // Enough that both of web's addresses, one of either family, are chosen.
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
        self.files.write_mesh(&MeshFile { caller: "wbe", ..self.mesh() })?;
        let mut reason = String::new();
        wait("the control plane rejects it", || {
            let dump = self.control_host.run(config_dump())??;
            let rejected = dump.pointer("/rejected/0").and_then(|r| r.as_str()).unwrap_or_default();
            rejected.clone_into(&mut reason);
            Ok(!reason.is_empty())
        })?;
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || format!("meanwhile traffic got {}", answer.status))?;
        self.files.write_mesh(&self.mesh())?;
        wait("the control plane takes the good one again", || {
            let dump = self.control_host.run(config_dump())??;
            Ok(dump.pointer("/rejected/0").is_none())
        })?;
        Ok(reason)
    }

    fn revocation(&mut self) -> Result<String, String> {
        let (files, tls) = (&self.files, self.files.tls(Some(&self.leaver))?);
        let revoking = MeshFile { revocations: vec![self.leaver.serial.clone()], ..self.mesh() };
        let (cut, refused) = self.client_host.run(async {
            let mut live = Caller::connect(web_address(), Some(tls.clone())).await?;
            let status = live.get("/", None).await?.status;
            expect(status == 200, || format!("before it was revoked it got {status}"))?;
            files.write_mesh(&revoking)?;
            let since = now();
            live.ended().await?;
            let cut = since.elapsed();
            Ok::<_, String>((cut, get(web_address(), Some(tls), "/", None).await))
        })??;
        let Err(reason) = refused else {
            return Err("the revoked certificate was taken once more".into());
        };
        let other = self.ask(Some(&self.files.token()?))?;
        expect(other.status == 200, || format!("the other certificate got {}", other.status))?;
        Ok(format!(
            "its connection was cut {} ms after mesh.yaml named it; the next handshake ended: {reason}",
            cut.as_millis()
        ))
    }

    fn control_killed(&mut self) -> Result<String, String> {
        self.control.kill()?;
        let token = self.files.token()?;
        for _ in 0..20 {
            let answer = self.ask(Some(&token))?;
            expect(answer.status == 200, || format!("a request got {}", answer.status))?;
        }
        Ok("20 requests, each with a handshake of its own, were served".into())
    }

    fn measure(&mut self) -> Result<String, String> {
        let replica = self.orders.first().ok_or("no replica")?;
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

    /// Sends a steady load, and looks at memory and open files before and after.
    fn carry_load(&self, load: &Load) -> Result<String, String> {
        let look = || -> Result<Vec<Usage>, String> {
            let mut all = vec![("agent".to_owned(), on_router(usage())??)];
            for host in [&self.web].into_iter().chain(&self.orders) {
                all.push((host.name.clone(), host.run(usage())??));
            }
            Ok(all)
        };
        let (tls, token) = (self.tls()?, self.files.token()?);
        let short = Load { seconds: 2, ..*load };
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

pub(super) fn expect(good: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(otherwise()) }
}

/// Looks until it is so, not longer than a change may take.
pub(super) fn wait(
    what: &str,
    mut is_so: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let deadline = now() + CHANGE;
    while !is_so()? {
        expect(now() < deadline, || {
            format!("within {CHANGE:?} it did not come to pass that {what}")
        })?;
        pause(Duration::from_millis(50));
    }
    Ok(())
}

pub(super) fn on_router<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map(|runtime| runtime.block_on(work)).map_err(|error| error.to_string())
}

/// How long each of some requests took, over one connection.
async fn timed(
    target: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    token: Option<String>,
) -> Result<Vec<Duration>, String> {
    let mut caller = Caller::connect(target, tls).await?;
    let mut times = Vec::new();
    for _ in 0..MEASURED {
        let started = now();
        let answer = caller.get("/orders", token.as_deref()).await?;
        expect(answer.status == 200, || format!("a measured request got {}", answer.status))?;
        times.push(now() - started);
    }
    Ok(times)
}
