//! Clusters whose endpoints are host names, and faults of DNS servers.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, route_to, with,
};
use weft_integration::curl::Curl;
use weft_integration::dns_server::{DnsReply, DnsServer};
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::wait::eventually;

const LOCALHOST: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
const EMPTY_HOSTS_FILE: &str = "";

/// A cluster with one host name, which is looked up every 100 ms, or every 200 ms at most after failures.
fn dns_cluster(cluster_name: &str, kind: &str, host: &str, port: u16) -> Value {
    let address = json!({"socket_address": {"address": host, "port_value": port}});
    let members = json!([{"lb_endpoints": [{"endpoint": {"address": address}}]}]);
    let cluster = cluster(cluster_name, &[], UpstreamHttp::Http1, None);
    let cluster = with(cluster, "type", json!(kind));
    let cluster = with(cluster, "dns_refresh_rate", json!("0.1s"));
    let rate = json!({"base_interval": "0.1s", "max_interval": "0.2s"});
    let cluster = with(cluster, "dns_failure_refresh_rate", rate);
    with(cluster, "load_assignment", json!({"cluster_name": cluster_name, "endpoints": members}))
}

fn service() -> u16 {
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
    ScriptedServer::replying_once(head).port
}

/// A sidecar with one listener per cluster.
struct DnsSidecar {
    sidecar: TestSidecar,
    ports: Vec<u16>,
    _folder: MeshPki,
}

impl DnsSidecar {
    fn start(clusters: &[Value]) -> Self {
        let folder = MeshPki::create();
        let admin = port::free();
        let ports: Vec<u16> = clusters.iter().map(|_| port::free()).collect();
        let listeners: Vec<Value> = clusters
            .iter()
            .zip(&ports)
            .map(|(cluster, port)| {
                let name = cluster["name"].as_str().expect("a cluster has a name");
                listener(name, *port, http(&route_to(name, 5), &[]), None)
            })
            .collect();
        let config = bootstrap(admin, &listeners, clusters);
        let first = *ports.first().expect("there is a cluster");
        let sidecar = TestSidecar::start("named", &folder, first, admin, &config);
        Self { sidecar, ports, _folder: folder }
    }

    fn status(&self, number: usize) -> u16 {
        Curl::get(*self.ports.get(number).expect("the cluster exists"), "/").run().status
    }

    #[track_caller]
    fn wait_for_status(&self, number: usize, status: u16) {
        eventually(format!("cluster {number} responds with {status}"), || {
            (self.status(number) == status).then_some(())
        });
    }

    /// The number of endpoints that a cluster has.
    fn endpoints(&self, cluster: &str) -> usize {
        let dump = Curl::get(self.sidecar.admin, "/config_dump").run().text();
        let dump: Value = serde_json::from_str(&dump).expect("the dump is JSON");
        let members = dump.pointer(&format!("/resolved/{cluster}/endpoints/0/lb_endpoints"));
        members.and_then(Value::as_array).map_or(0, Vec::len)
    }
}

#[track_caller]
fn wait_for_queries(server: &DnsServer, name: &str, times: usize) {
    let goal = server.query_count(name) + times;
    eventually(format!("{name} is looked up {times} more times"), || {
        (server.query_count(name) >= goal).then_some(())
    });
}

#[test]
fn addresses_stay_in_use_through_server_failures_and_silence() {
    let server = DnsServer::start("options timeout:1 attempts:1", EMPTY_HOSTS_FILE);
    let port = service();
    server.set("service.test", DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    let sidecar = DnsSidecar::start(&[dns_cluster("service", "STRICT_DNS", "service.test", port)]);
    sidecar.wait_for_status(0, 200);
    for fault in [DnsReply::ServerFailure, DnsReply::Silence] {
        server.set("service.test", fault.clone());
        for _ in 0..6 {
            wait_for_queries(&server, "service.test", 1);
            assert_eq!(sidecar.status(0), 200, "{fault:?}");
        }
        eventually("the failure is counted", || {
            (sidecar.sidecar.metric("weft_dns_failing_hosts") == 1).then_some(())
        });
        server.set("service.test", DnsReply::Addresses(LOCALHOST.to_vec(), 1));
        eventually("the failure count returns to 0", || {
            (sidecar.sidecar.metric("weft_dns_failing_hosts") == 0).then_some(())
        });
        assert_eq!(sidecar.status(0), 200, "after {fault:?}");
    }
}

#[test]
fn absent_name_loses_its_addresses_with_strict_dns_and_keeps_them_with_logical_dns() {
    let server = DnsServer::start("", EMPTY_HOSTS_FILE);
    let port = service();
    for name in ["strict.test", "logical.test"] {
        server.set(name, DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    }
    let sidecar = DnsSidecar::start(&[
        dns_cluster("strict", "STRICT_DNS", "strict.test", port),
        dns_cluster("logical", "LOGICAL_DNS", "logical.test", port),
    ]);
    sidecar.wait_for_status(0, 200);
    sidecar.wait_for_status(1, 200);
    server.set("strict.test", DnsReply::NoSuchName);
    server.set("logical.test", DnsReply::Addresses(Vec::new(), 0));
    sidecar.wait_for_status(0, 503);
    wait_for_queries(&server, "logical.test", 4);
    assert_eq!(sidecar.status(1), 200);
    server.set("strict.test", DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    sidecar.wait_for_status(0, 200);
}

#[test]
fn unanswered_lookups_do_not_delay_other_clusters() {
    let server = DnsServer::start("", EMPTY_HOSTS_FILE);
    let port = service();
    server.set("service.test", DnsReply::Addresses(LOCALHOST.to_vec(), 60));
    let unanswered = |number| {
        let host = format!("unanswered-{number}.test");
        server.set(&host, DnsReply::Silence);
        dns_cluster(&format!("unanswered{number}"), "STRICT_DNS", &host, port)
    };
    let mut clusters = vec![dns_cluster("service", "STRICT_DNS", "service.test", port)];
    clusters.extend((0..40).map(unanswered));
    #[expect(clippy::disallowed_methods, reason = "the test measures the elapsed time")]
    let start = Instant::now();
    let sidecar = DnsSidecar::start(&clusters);
    assert_eq!(sidecar.status(0), 200);
    assert_eq!(sidecar.status(1), 503, "an unanswered lookup yields no addresses");
    // A cluster waits 1 s at most for its first addresses. One unanswered lookup takes 10 s to time out.
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[test]
fn truncated_response_is_retried_over_tcp() {
    let server = DnsServer::start("", EMPTY_HOSTS_FILE);
    let many: Vec<IpAddr> = (1..=100).map(|last| Ipv4Addr::new(10, 0, 0, last).into()).collect();
    server.set("many.test", DnsReply::Truncated(many));
    let sidecar = DnsSidecar::start(&[dns_cluster("many", "STRICT_DNS", "many.test", 80)]);
    eventually("the cluster has all addresses", || {
        (sidecar.endpoints("many") == 100).then_some(())
    });
}

#[test]
fn ttl_replaces_the_refresh_rate_with_respect_dns_ttl() {
    let server = DnsServer::start("", EMPTY_HOSTS_FILE);
    let port = service();
    for name in ["ttl.test", "rate.test"] {
        server.set(name, DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    }
    let slow = |cluster: Value, respected: bool| {
        let cluster = with(cluster, "dns_refresh_rate", json!("300s"));
        with(cluster, "respect_dns_ttl", json!(respected))
    };
    let sidecar = DnsSidecar::start(&[
        slow(dns_cluster("ttl", "STRICT_DNS", "ttl.test", port), true),
        slow(dns_cluster("rate", "STRICT_DNS", "rate.test", port), false),
    ]);
    sidecar.wait_for_status(0, 200);
    sidecar.wait_for_status(1, 200);
    let lookups = server.query_count("rate.test");
    wait_for_queries(&server, "ttl.test", 4);
    assert_eq!(server.query_count("rate.test"), lookups);
}

#[test]
fn edited_hosts_file_applies_at_the_refresh_rate_with_respect_dns_ttl() {
    let server = DnsServer::start("", "127.0.0.1 edited\n");
    let port = service();
    let cluster =
        with(dns_cluster("edited", "STRICT_DNS", "edited", port), "respect_dns_ttl", json!(true));
    let sidecar = DnsSidecar::start(&[cluster]);
    sidecar.wait_for_status(0, 200);
    server.set_hosts("127.0.0.99 edited\n127.0.0.98 edited\n");
    eventually("the addresses of the edited file are in use", || {
        (sidecar.endpoints("edited") == 2).then_some(())
    });
}

#[test]
fn hosts_file_and_search_list_of_this_host_are_used() {
    let server = DnsServer::start("search a.test b.test", "127.0.0.1 in_hosts\n");
    let port = service();
    server.set("short.b.test", DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    server.set("broken.b.test", DnsReply::Addresses(LOCALHOST.to_vec(), 1));
    let sidecar = DnsSidecar::start(&[
        dns_cluster("hosts", "STRICT_DNS", "in_hosts", port),
        dns_cluster("search", "STRICT_DNS", "short", port),
        dns_cluster("later", "STRICT_DNS", "later", port),
        dns_cluster("broken", "STRICT_DNS", "broken", port),
    ]);
    for number in [0, 1, 3] {
        sidecar.wait_for_status(number, 200);
    }
    assert_eq!(server.query_count("in_hosts"), 0);
    assert_eq!(sidecar.status(2), 503);
    server.set_hosts("127.0.0.1 in_hosts later\n");
    sidecar.wait_for_status(2, 200);
    // One search domain has no such name, but the server of another fails, so the name may still exist.
    server.set("broken.a.test", DnsReply::ServerFailure);
    server.set("broken.b.test", DnsReply::NoSuchName);
    wait_for_queries(&server, "broken.b.test", 4);
    assert_eq!(sidecar.status(3), 200);
}
