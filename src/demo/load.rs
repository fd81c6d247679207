//! A steady load: requests at even distances, whether or not the last was answered.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

use super::roles::now;
use crate::client::{self, Caller};

/// How many connections carry it.
const CONNECTIONS: u32 = 32;

/// So many requests a second, for so long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) rate: u32,
    pub(super) seconds: u32,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// How long each took from when it was due, sorted.
    pub(super) times: Vec<Duration>,
    pub(super) errors: Vec<String>,
}

impl Sent {
    /// The time in milliseconds that so many percent of the requests kept.
    pub(super) fn at(&self, percent: usize) -> f64 {
        let index = self.times.len().saturating_sub(1) * percent / 100;
        self.times.get(index).copied().unwrap_or_default().as_secs_f64() * 1e3
    }
}

impl Load {
    /// Sends it. Each connection has its own due times, so a slow answer delays no other.
    pub(super) async fn send(
        self,
        target: SocketAddr,
        tls: Arc<ClientConfig>,
        token: &str,
    ) -> Result<Sent, String> {
        let mut tasks = Vec::new();
        for index in 0..CONNECTIONS.min(self.rate) {
            let caller = Caller::connect(target, Some(tls.clone())).await?;
            tasks.push(tokio::spawn(self.one(index, caller, token.to_owned())));
        }
        let mut all = Sent::default();
        for task in tasks {
            let sent = task.await.map_err(|error| error.to_string())?;
            all.times.extend(sent.times);
            all.errors.extend(sent.errors);
        }
        all.times.sort_unstable();
        Ok(all)
    }

    async fn one(self, index: u32, mut caller: Caller, token: String) -> Sent {
        let connections = CONNECTIONS.min(self.rate);
        let distance = Duration::from_secs(1) * connections / self.rate;
        let count = self.rate * self.seconds / connections;
        let start = now() + distance * index / connections;
        let mut sent = Sent::default();
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

/// Memory in KiB and open files of the role on this host, as its metrics tell.
pub(super) async fn usage() -> Result<(u64, u64), String> {
    let page = client::metrics().await?;
    let value = |name: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<u64>().ok())
            .ok_or_else(|| format!("there is no metric {name}"))
    };
    Ok((value("process_resident_memory_bytes")? / 1024, value("process_open_fds")?))
}
