//! Hosts, each in its own network namespace, connected by a router: the current namespace. Each host has an IPv4 address
//! and, if the kernel supports it, an IPv6 address.

use std::fs::File;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// Creates hosts.
#[derive(Debug)]
pub struct Network {
    count: u8,
    has_ipv6: bool,
}

/// A host with one network interface.
#[derive(Debug, Clone)]
pub struct Host {
    /// The name of the host and of its network namespace.
    pub name: String,
    /// The IPv4 address.
    pub address: Ipv4Addr,
    /// The IPv6 address; none without IPv6.
    pub address6: Option<Ipv6Addr>,
}

impl Network {
    /// Turns the current network namespace into a router.
    ///
    /// # Errors
    /// A command or a sysctl fails, for example without permission.
    pub fn new() -> Result<Self, String> {
        ip("link set lo up")?;
        let switch_on =
            |file| std::fs::write(file, "1").map_err(|error| format!("{file}: {error}"));
        switch_on("/proc/sys/net/ipv4/ip_forward")?;
        let forwarding6 = "/proc/sys/net/ipv6/conf/all/forwarding";
        let has_ipv6 = Path::new(forwarding6).exists();
        if has_ipv6 {
            switch_on(forwarding6)?;
        }
        Ok(Self { count: 0, has_ipv6 })
    }

    /// Creates a host with the addresses `10.90.N.2` and `fd90:N::2`, and the router as its default gateway.
    ///
    /// # Errors
    /// A command or a sysctl fails, for example without permission.
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
        if self.has_ipv6 {
            // No other host has the address, so the kernel need not look for an address's second owner, and
            // the address can be used at once.
            ip(&format!("addr add fd90:{n:x}::1/64 dev to-{n} nodad"))?;
            ip(&format!("-n {name} addr add fd90:{n:x}::2/64 dev eth0 nodad"))?;
            ip(&format!("-n {name} route add default via fd90:{n:x}::1"))?;
        }
        Ok(Host {
            name: name.to_owned(),
            address: Ipv4Addr::new(10, 90, n, 2),
            address6: self.has_ipv6.then_some(Ipv6Addr::new(0xfd90, n.into(), 0, 0, 0, 0, 0, 2)),
        })
    }
}

impl Host {
    /// All addresses of the host.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V4(self.address)].into_iter().chain(self.address6.map(IpAddr::V6))
    }

    /// The path of the network namespace.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `work` on a thread in the network namespace of this host. Processes that it starts inherit the namespace.
    ///
    /// # Errors
    /// The network namespace cannot be entered.
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
    /// The network namespace cannot be entered.
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
        .map_err(|error| format!("cannot run ip (apt-get install iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
