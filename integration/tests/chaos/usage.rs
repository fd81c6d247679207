//! Resource usage of the mesh: memory, threads and descriptors of its processes; conntrack entries, rules and routes of
//! its hosts.

use std::fmt;
use std::path::PathBuf;

use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::process::{Process, run, tool};

/// Allowed growth of memory that the heap keeps, in addition to [`MEMORY_PERCENT`].
const MEMORY_SLACK_KIB: u64 = 8 * 1024;
const MEMORY_PERCENT: u64 = 20;
/// The number of threads for file access and name lookups varies.
const THREAD_SLACK: u64 = 6;
/// The number of connections between processes varies with the traffic.
const DESCRIPTOR_SLACK: u64 = 40;
const CONNTRACK_SLACK: u64 = 200;

/// Resource usage of one process.
#[derive(Debug)]
struct ProcessUsage {
    name: String,
    memory_kib: u64,
    threads: u64,
    /// Open descriptors: those of the process, and those of its workers, which have descriptor tables of their own.
    descriptors: u64,
}

/// Resource usage of one network namespace.
#[derive(Debug)]
struct HostUsage {
    name: String,
    conntrack: u64,
    nft_lines: u64,
    rules: u64,
    routes: u64,
}

/// Resource usage of the whole mesh at one moment.
#[derive(Debug)]
pub(crate) struct Usage {
    processes: Vec<ProcessUsage>,
    hosts: Vec<HostUsage>,
}

/// Shortens the timeouts of conntrack entries of closed connections, so that their number follows the current traffic.
pub(crate) fn shorten_conntrack(mesh: &TestMesh) {
    const TIMEOUTS: [&str; 7] = [
        "tcp_timeout_time_wait",
        "tcp_timeout_fin_wait",
        "tcp_timeout_close_wait",
        "tcp_timeout_last_ack",
        "tcp_timeout_close",
        "udp_timeout",
        "udp_timeout_stream",
    ];
    each_host(mesh, |_| {
        for timeout in TIMEOUTS {
            let file = format!("/proc/sys/net/netfilter/nf_conntrack_{timeout}");
            // A host without connection tracking has none of these files.
            drop(std::fs::write(file, "5"));
        }
    });
}

/// Does `work` on the router, whose name is `router`, and on each host.
fn each_host<T: Send>(mesh: &TestMesh, work: impl Fn(&str) -> T + Send + Sync) -> Vec<T> {
    let workloads = [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host);
    let hosts: Vec<&Host> = workloads.chain([&mesh.client, mesh.control_host()]).collect();
    let router = work("router");
    let on = |host: &&Host| host.on(|| work(&host.name)).expect("the host can be entered");
    [router].into_iter().chain(hosts.iter().map(on)).collect()
}

impl Usage {
    /// The current usage.
    pub(crate) fn of(mesh: &TestMesh) -> Self {
        let sidecars = [&mesh.web].into_iter().chain(&mesh.orders);
        let sidecars = sidecars.map(|one| (format!("sidecar of {}", one.host.name), &one.sidecar));
        let roles = [("control".to_owned(), &mesh.control), ("agent".to_owned(), &mesh.agent)];
        let roles = roles.into_iter().chain(sidecars);
        let processes = roles.map(|(name, role)| ProcessUsage::of(name, &role.process)).collect();
        Self { processes, hosts: each_host(mesh, HostUsage::of) }
    }

    /// The usage that has grown beyond its margin.
    pub(crate) fn growth_since(&self, before: &Self) -> Vec<String> {
        let processes = self.processes.iter().zip(&before.processes);
        let hosts = self.hosts.iter().zip(&before.hosts);
        let processes = processes.filter(|(now, before)| now.has_grown_since(before));
        let hosts = hosts.filter(|(now, before)| now.has_grown_since(before));
        let processes = processes.map(|(now, before)| format!("{now}, before: {before}"));
        processes.chain(hosts.map(|(now, before)| format!("{now}, before: {before}"))).collect()
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.processes.iter().try_for_each(|usage| writeln!(f, "  {usage}"))?;
        self.hosts.iter().try_for_each(|usage| writeln!(f, "  {usage}"))
    }
}

impl ProcessUsage {
    fn of(name: String, process: &Process) -> Self {
        let folder = PathBuf::from(format!("/proc/{}", process.id()));
        let status = std::fs::read_to_string(folder.join("status")).expect("the process runs");
        let number = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let tasks = std::fs::read_dir(folder.join("task")).expect("the process runs");
        let tasks = tasks.flatten().map(|task| task.path());
        let is_worker = |task: &PathBuf| {
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            name.starts_with("sidecar-") || name.starts_with("agent-")
        };
        let open = |task: PathBuf| Some(std::fs::read_dir(task.join("fd")).ok()?.count() as u64);
        let tables = tasks.filter(is_worker).chain([folder]);
        Self {
            name,
            memory_kib: number("VmRSS:").expect("a process has memory"),
            threads: number("Threads:").expect("a process has threads"),
            descriptors: tables.filter_map(open).sum(),
        }
    }

    fn has_grown_since(&self, before: &Self) -> bool {
        let memory_limit = before.memory_kib * (100 + MEMORY_PERCENT) / 100 + MEMORY_SLACK_KIB;
        self.memory_kib > memory_limit
            || self.threads > before.threads + THREAD_SLACK
            || self.descriptors > before.descriptors + DESCRIPTOR_SLACK
    }
}

impl fmt::Display for ProcessUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, memory_kib, threads, descriptors } = self;
        write!(f, "{name}: {memory_kib} KiB, {threads} threads, {descriptors} descriptors")
    }
}

impl HostUsage {
    /// The usage of the current thread's network namespace.
    fn of(name: &str) -> Self {
        let lines = |program: &str, words: &str| {
            run(tool(program).args(words.split(' '))).lines().count() as u64
        };
        let both = |object: &str| {
            lines("ip", &format!("-4 {object}")) + lines("ip", &format!("-6 {object}"))
        };
        let conntrack = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        Self {
            name: name.to_owned(),
            conntrack: conntrack.ok().and_then(|count| count.trim().parse().ok()).unwrap_or(0),
            // Without the elements of sets and maps, whose number depends on the endpoints.
            nft_lines: lines("nft", "--terse list ruleset"),
            rules: both("rule"),
            routes: both("route show table all"),
        }
    }

    /// Rules and routes depend on `mesh.yaml` only, which is the original file again.
    fn has_grown_since(&self, before: &Self) -> bool {
        let Self { nft_lines, rules, routes, .. } = self;
        self.conntrack > 2 * before.conntrack + CONNTRACK_SLACK
            || (nft_lines, rules, routes) != (&before.nft_lines, &before.rules, &before.routes)
    }
}

impl fmt::Display for HostUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, conntrack, nft_lines, rules, routes } = self;
        write!(f, "{name}: {conntrack} conntrack entries, {nft_lines} lines of nftables, ")?;
        write!(f, "{rules} routing rules, {routes} routes")
    }
}
