//! Open-loop load test: requests at a constant rate, independent of response times.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use weft_runtime::clock::now;

use crate::client::{self, HttpClient};

/// The number of connections.
const CONNECTIONS: u32 = 32;

/// The rate in requests per second and the duration of a load test.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadTest {
    pub(super) rate: u32,
    pub(super) seconds: u32,
}

/// The result of a load test.
#[derive(Debug, Default)]
pub(super) struct LoadResult {
    /// The latency of each request from its scheduled time, sorted.
    pub(super) times: Vec<Duration>,
    pub(super) errors: Vec<String>,
}

impl LoadResult {
    /// A percentile of the latency, in milliseconds.
    pub(super) fn at(&self, percent: usize) -> f64 {
        let index = self.times.len().saturating_sub(1) * percent / 100;
        self.times.get(index).copied().unwrap_or_default().as_secs_f64() * 1e3
    }
}

impl LoadTest {
    /// Runs the load test. Each connection has its own schedule, so that a slow response delays no other connection.
    pub(super) async fn send(
        self,
        target: SocketAddr,
        tls: Arc<ClientConfig>,
        token: &str,
    ) -> Result<LoadResult, String> {
        let mut tasks = Vec::new();
        for index in 0..CONNECTIONS.min(self.rate) {
            let caller = HttpClient::connect(target, Some(tls.clone())).await?;
            tasks.push(tokio::spawn(self.one(index, caller, token.to_owned())));
        }
        let mut all = LoadResult::default();
        for task in tasks {
            let sent = task.await.map_err(|error| error.to_string())?;
            all.times.extend(sent.times);
            all.errors.extend(sent.errors);
        }
        all.times.sort_unstable();
        Ok(all)
    }

    async fn one(self, index: u32, mut caller: HttpClient, token: String) -> LoadResult {
        let connections = CONNECTIONS.min(self.rate);
        let distance = Duration::from_secs(1) * connections / self.rate;
        let count = self.rate * self.seconds / connections;
        let start = now() + distance * index / connections;
        let mut sent = LoadResult::default();
        for number in 0..count {
            let due = start + distance * number;
            tokio::time::sleep_until(due.into()).await;
            match caller.get("/orders", Some(&token)).await {
                Ok(answer) if answer.status == 200 => sent.times.push(now() - due),
                Ok(answer) => sent.errors.push(format!("status {}", answer.status)),
                Err(error) => {
                    sent.errors.push(error);
                    return sent;
                }
            }
        }
        sent
    }
}

/// Memory in KiB and open files of the process on this host, from its metrics.
pub(super) async fn usage() -> Result<(u64, u64), String> {
    let page = client::metrics().await?;
    let value = |name: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<u64>().ok())
            .ok_or_else(|| format!("missing metric {name}"))
    };
    Ok((value("process_resident_memory_bytes")? / 1024, value("process_open_fds")?))
}
