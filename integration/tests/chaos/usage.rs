//! What the mesh uses: memory, threads and descriptors of its processes; connections, rules and routes of its
//! hosts.

use std::fmt;
use std::path::PathBuf;

use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::process::{Process, run, tool};

/// What may be added by memory that a heap keeps, beside [`MEMORY_PERCENT`].
const MEMORY_SLACK_KIB: u64 = 8 * 1024;
const MEMORY_PERCENT: u64 = 20;
/// Threads for file access and name lookups come and go.
const THREAD_SLACK: u64 = 6;
/// Connections between processes come and go with the traffic.
const DESCRIPTOR_SLACK: u64 = 40;
const CONNTRACK_SLACK: u64 = 200;

/// What one process uses.
#[derive(Debug)]
struct ProcessUsage {
    name: String,
    memory_kib: u64,
    threads: u64,
    /// Open descriptors: those of the process, and those of its workers, which have tables of their own.
    descriptors: u64,
}

/// What one network namespace holds.
#[derive(Debug)]
struct HostUsage {
    name: String,
    conntrack: u64,
    nft_lines: u64,
    rules: u64,
    routes: u64,
}

/// What everything uses at one moment.
#[derive(Debug)]
pub(crate) struct Usage {
    processes: Vec<ProcessUsage>,
    hosts: Vec<HostUsage>,
}

/// Has the kernel forget connections that have ended soon, so that their number follows the traffic of now.
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
            // A host that tracks no connections has none of them.
            drop(std::fs::write(file, "5"));
        }
    });
}

/// Does something on the router, which has no name, and on each host.
fn each_host<T: Send>(mesh: &TestMesh, work: impl Fn(&str) -> T + Send + Sync) -> Vec<T> {
    let workloads = [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host);
    let hosts: Vec<&Host> = workloads.chain([&mesh.client, mesh.control_host()]).collect();
    let router = work("router");
    let on = |host: &&Host| host.on(|| work(&host.name)).expect("the host can be entered");
    [router].into_iter().chain(hosts.iter().map(on)).collect()
}

impl Usage {
    /// What is used now.
    pub(crate) fn of(mesh: &TestMesh) -> Self {
        let sidecars = [&mesh.web].into_iter().chain(&mesh.orders);
        let sidecars = sidecars.map(|one| (format!("sidecar of {}", one.host.name), &one.sidecar));
        let roles = [("control".to_owned(), &mesh.control), ("agent".to_owned(), &mesh.agent)];
        let roles = roles.into_iter().chain(sidecars);
        let processes = roles.map(|(name, role)| ProcessUsage::of(name, &role.process)).collect();
        Self { processes, hosts: each_host(mesh, HostUsage::of) }
    }

    /// What has grown since, beyond its margin.
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
        self.processes.iter().try_for_each(|one| writeln!(f, "  {one}"))?;
        self.hosts.iter().try_for_each(|one| writeln!(f, "  {one}"))
    }
}

impl ProcessUsage {
    fn of(name: String, process: &Process) -> Self {
        let account = PathBuf::from(format!("/proc/{}", process.id()));
        let status = std::fs::read_to_string(account.join("status")).expect("the process runs");
        let number = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let tasks = std::fs::read_dir(account.join("task")).expect("the process runs");
        let tasks = tasks.flatten().map(|task| task.path());
        let is_worker = |task: &PathBuf| {
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            name.starts_with("sidecar-") || name.starts_with("agent-")
        };
        let open = |task: PathBuf| Some(std::fs::read_dir(task.join("fd")).ok()?.count() as u64);
        let tables = tasks.filter(is_worker).chain([account]);
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
    /// What the namespace holds that this thread is in.
    fn of(name: &str) -> Self {
        let lines = |program: &str, words: &str| {
            run(tool(program).args(words.split(' '))).lines().count() as u64
        };
        let both =
            |what: &str| lines("ip", &format!("-4 {what}")) + lines("ip", &format!("-6 {what}"));
        let conntrack = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        Self {
            name: name.to_owned(),
            conntrack: conntrack.ok().and_then(|count| count.trim().parse().ok()).unwrap_or(0),
            // Without the elements of sets and maps, which are the endpoints' slots.
            nft_lines: lines("nft", "--terse list ruleset"),
            rules: both("rule"),
            routes: both("route show table all"),
        }
    }

    /// Rules and routes follow the file alone, and it is the same as before.
    fn has_grown_since(&self, before: &Self) -> bool {
        let Self { nft_lines, rules, routes, .. } = self;
        self.conntrack > 2 * before.conntrack + CONNTRACK_SLACK
            || (nft_lines, rules, routes) != (&before.nft_lines, &before.rules, &before.routes)
    }
}

impl fmt::Display for HostUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, conntrack, nft_lines, rules, routes } = self;
        write!(f, "{name}: {conntrack} tracked connections, {nft_lines} lines of nftables, ")?;
        write!(f, "{rules} routing rules, {routes} routes")
    }
}
