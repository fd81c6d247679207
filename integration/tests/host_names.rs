//! Clusters whose hosts are names, and everything that a DNS server may do wrong.

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

const HERE: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
const NO_HOSTS: &str = "";

/// A cluster of one host name, looked up again quickly.
fn named(cluster_name: &str, kind: &str, host: &str, port: u16) -> Value {
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

/// A sidecar with a listener for each cluster.
struct Named {
    sidecar: TestSidecar,
    ports: Vec<u16>,
    _folder: MeshPki,
}

impl Named {
    fn start(clusters: &[Value]) -> Self {
        let (folder, admin) = (MeshPki::create(), port::free());
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
        Curl::get(*self.ports.get(number).expect("a cluster"), "/").run().status
    }

    #[track_caller]
    fn until_status(&self, number: usize, status: u16) {
        eventually(format!("cluster {number} gives {status}"), || {
            (self.status(number) == status).then_some(())
        });
    }

    /// How many endpoints a cluster has.
    fn endpoints(&self, cluster: &str) -> usize {
        let dump = Curl::get(self.sidecar.admin, "/config_dump").run().text();
        let dump: Value = serde_json::from_str(&dump).expect("the dump is JSON");
        let members = dump.pointer(&format!("/resolved/{cluster}/endpoints/0/lb_endpoints"));
        members.and_then(Value::as_array).map_or(0, Vec::len)
    }
}

#[track_caller]
fn until_asked(server: &DnsServer, name: &str, times: usize) {
    let goal = server.query_count(name) + times;
    eventually(format!("{name} is asked for {times} times"), || {
        (server.query_count(name) >= goal).then_some(())
    });
}

#[test]
fn addresses_stay_in_use_through_server_failures_and_silence() {
    let server = DnsServer::start("options timeout:1 attempts:1", NO_HOSTS);
    let port = service();
    server.set("service.test", DnsReply::Addresses(HERE.to_vec(), 1));
    let named = Named::start(&[named("service", "STRICT_DNS", "service.test", port)]);
    named.until_status(0, 200);
    for fault in [DnsReply::ServerFailure, DnsReply::Silence] {
        server.set("service.test", fault.clone());
        for _ in 0..6 {
            until_asked(&server, "service.test", 1);
            assert_eq!(named.status(0), 200, "{fault:?}");
        }
        eventually("the failure is shown", || {
            (named.sidecar.metric("weft_dns_failing_hosts") == 1).then_some(())
        });
        server.set("service.test", DnsReply::Addresses(HERE.to_vec(), 1));
        eventually("the failure is over", || {
            (named.sidecar.metric("weft_dns_failing_hosts") == 0).then_some(())
        });
        assert_eq!(named.status(0), 200, "after {fault:?}");
    }
}

#[test]
fn absent_name_drops_its_addresses_under_strict_dns_and_keeps_them_under_logical_dns() {
    let server = DnsServer::start("", NO_HOSTS);
    let port = service();
    for name in ["strict.test", "logical.test"] {
        server.set(name, DnsReply::Addresses(HERE.to_vec(), 1));
    }
    let named = Named::start(&[
        named("strict", "STRICT_DNS", "strict.test", port),
        named("logical", "LOGICAL_DNS", "logical.test", port),
    ]);
    named.until_status(0, 200);
    named.until_status(1, 200);
    server.set("strict.test", DnsReply::NoSuchName);
    server.set("logical.test", DnsReply::Addresses(Vec::new(), 0));
    named.until_status(0, 503);
    until_asked(&server, "logical.test", 4);
    assert_eq!(named.status(1), 200);
    server.set("strict.test", DnsReply::Addresses(HERE.to_vec(), 1));
    named.until_status(0, 200);
}

#[test]
fn silent_names_delay_no_other_cluster() {
    let server = DnsServer::start("", NO_HOSTS);
    let port = service();
    server.set("service.test", DnsReply::Addresses(HERE.to_vec(), 60));
    let silent = |number| {
        let host = format!("silent-{number}.test");
        server.set(&host, DnsReply::Silence);
        named(&format!("silent{number}"), "STRICT_DNS", &host, port)
    };
    let mut clusters = vec![named("service", "STRICT_DNS", "service.test", port)];
    clusters.extend((0..40).map(silent));
    #[allow(clippy::disallowed_methods, reason = "the time that it takes is what is tested")]
    let start = Instant::now();
    let named = Named::start(&clusters);
    assert_eq!(named.status(0), 200);
    assert_eq!(named.status(1), 503, "no addresses are known");
    // One silent name took 10 s before; the first wait of a cluster is 1 s.
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[test]
fn truncated_answer_is_asked_for_again_over_tcp() {
    let server = DnsServer::start("", NO_HOSTS);
    let many: Vec<IpAddr> = (1..=100).map(|last| Ipv4Addr::new(10, 0, 0, last).into()).collect();
    server.set("many.test", DnsReply::Truncated(many));
    let named = Named::start(&[named("many", "STRICT_DNS", "many.test", 80)]);
    eventually("all addresses are known", || (named.endpoints("many") == 100).then_some(()));
}

#[test]
fn ttl_replaces_the_refresh_rate_where_it_is_respected() {
    let server = DnsServer::start("", NO_HOSTS);
    let port = service();
    for name in ["ttl.test", "rate.test"] {
        server.set(name, DnsReply::Addresses(HERE.to_vec(), 1));
    }
    let slow = |cluster: Value, respected: bool| {
        let cluster = with(cluster, "dns_refresh_rate", json!("300s"));
        with(cluster, "respect_dns_ttl", json!(respected))
    };
    let named = Named::start(&[
        slow(named("ttl", "STRICT_DNS", "ttl.test", port), true),
        slow(named("rate", "STRICT_DNS", "rate.test", port), false),
    ]);
    named.until_status(0, 200);
    named.until_status(1, 200);
    let asked = server.query_count("rate.test");
    until_asked(&server, "ttl.test", 4);
    assert_eq!(server.query_count("rate.test"), asked);
}

#[test]
fn edited_hosts_file_is_followed_at_the_refresh_rate_where_ttls_are_respected() {
    let server = DnsServer::start("", "127.0.0.1 edited\n");
    let port = service();
    let cluster =
        with(named("edited", "STRICT_DNS", "edited", port), "respect_dns_ttl", json!(true));
    let named = Named::start(&[cluster]);
    named.until_status(0, 200);
    server.set_hosts("127.0.0.99 edited\n127.0.0.98 edited\n");
    eventually("the addresses of the edited file are in use", || {
        (named.endpoints("edited") == 2).then_some(())
    });
}

#[test]
fn hosts_file_and_search_list_of_this_host_are_used() {
    let server = DnsServer::start("search a.test b.test", "127.0.0.1 in_hosts\n");
    let port = service();
    server.set("short.b.test", DnsReply::Addresses(HERE.to_vec(), 1));
    server.set("broken.b.test", DnsReply::Addresses(HERE.to_vec(), 1));
    let named = Named::start(&[
        named("hosts", "STRICT_DNS", "in_hosts", port),
        named("search", "STRICT_DNS", "short", port),
        named("later", "STRICT_DNS", "later", port),
        named("broken", "STRICT_DNS", "broken", port),
    ]);
    for number in [0, 1, 3] {
        named.until_status(number, 200);
    }
    assert_eq!(server.query_count("in_hosts"), 0);
    assert_eq!(named.status(2), 503);
    server.set_hosts("127.0.0.1 in_hosts later\n");
    named.until_status(2, 200);
    // The name is gone from one search domain, while the server of another fails: no proof of absence.
    server.set("broken.a.test", DnsReply::ServerFailure);
    server.set("broken.b.test", DnsReply::NoSuchName);
    until_asked(&server, "broken.b.test", 4);
    assert_eq!(named.status(3), 200);
}
