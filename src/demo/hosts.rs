//! Machines in a network namespace each, joined by a router: the namespace we are in.

use std::fs::File;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// Makes hosts.
#[derive(Debug, Default)]
pub struct Network {
    count: u8,
}

/// A machine with one network card.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
}

impl Network {
    /// Turns the namespace we are in into a router.
    ///
    /// # Errors
    /// What the host does not allow.
    pub fn new() -> Result<Self, String> {
        ip("link set lo up")?;
        let forwarding = "/proc/sys/net/ipv4/ip_forward";
        std::fs::write(forwarding, "1").map_err(|error| format!("{forwarding}: {error}"))?;
        Ok(Self::default())
    }

    /// Makes a host, `10.90.N.2`, with the router as its way out.
    ///
    /// # Errors
    /// What the host does not allow.
    pub fn host(&mut self, name: &str) -> Result<Host, String> {
        self.count += 1;
        let n = self.count;
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add to-{n} type veth peer name eth0 netns {name}"))?;
        ip(&format!("addr add 10.90.{n}.1/24 dev to-{n}"))?;
        ip(&format!("link set to-{n} up"))?;
        ip(&format!("-n {name} addr add 10.90.{n}.2/24 dev eth0"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        ip(&format!("-n {name} route add default via 10.90.{n}.1"))?;
        Ok(Host { name: name.to_owned(), address: Ipv4Addr::new(10, 90, n, 2) })
    }
}

impl Host {
    /// The file of its network namespace.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `work` on a thread that is on this host. Processes that it starts are there too.
    ///
    /// # Errors
    /// When the host cannot be entered.
    pub fn on<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, String> {
        let path = self.namespace();
        let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|_| Err(format!("a thread on {} failed", self.name)))
        })
    }

    /// Runs asynchronous `work` on this host.
    ///
    /// # Errors
    /// When the host cannot be entered.
    pub fn run<T: Send>(&self, work: impl Future<Output = T> + Send) -> Result<T, String> {
        self.on(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map(|runtime| runtime.block_on(work)).map_err(|error| error.to_string())
        })?
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .map_err(|error| format!("the command ip is needed (apt-get install iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
