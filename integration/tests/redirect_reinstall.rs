//! Redirect rules that are reinstalled while connections are made, and installers that are killed.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use weft::demo::hosts::{Host, Network};
use weft_integration::bootstrap::{address, bootstrap, static_cluster, tcp_listener, with};
use weft_integration::port;
use weft_integration::process::{nft, run, weft};
use weft_integration::wait::eventually;

/// The capture port, on which the test itself listens.
const CAPTURE: u16 = 15001;
/// Addresses of services: their traffic must reach only the capture port.
const SERVICES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 7)),
    IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 7)),
];

fn redirect(command: &str, host: &Host, more: &[&str]) -> Command {
    let mut weft = weft();
    weft.args(["redirect", command, "--outbound", "15001", "--services", "10.96.0.0/16,fd96::/64"]);
    weft.arg("--netns").arg(host.namespace()).args(more);
    weft
}

/// Counts, on the router, packets that left the host for a service.
fn watch(host: &Host) {
    let [_, _, number, _] = host.address.octets();
    let device = format!("to-{number}");
    nft("add table inet watch");
    nft("add chain inet watch arriving { type filter hook prerouting priority -300; }");
    for services in ["ip daddr 10.96.0.0/16", "ip6 daddr fd96::/64"] {
        let rule = format!("add rule inet watch arriving iifname {device} {services} counter");
        nft(&rule);
    }
}

/// The number of such packets.
fn escaped() -> u64 {
    let listing = nft("list table inet watch");
    let counts = listing.split("counter packets ").skip(1);
    counts.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum()
}

/// Checks that the counter detects escaping packets of both address families while nothing is
/// redirected; returns the count.
fn assert_escapes_are_counted(host: &Host) -> u64 {
    let mut before = 0;
    for service in SERVICES {
        let service = SocketAddr::new(service, 80);
        drop(host.on(|| TcpStream::connect_timeout(&service, Duration::from_millis(100))));
        assert!(escaped() > before, "a packet to {service} was counted");
        before = escaped();
    }
    before
}

/// Makes connections to services until stopped, and counts those that were accepted.
fn make_connections(service: IpAddr, stop: &AtomicBool, taken: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        let socket = Socket::new(Domain::for_address((service, 80).into()), Type::STREAM, None);
        let socket = socket.expect("a socket");
        // The connections end with a reset: ports are free at once, which allows thousands of
        // connections per second.
        socket.set_linger(Some(Duration::ZERO)).expect("SO_LINGER can be set");
        let to = SockAddr::from(SocketAddr::new(service, 80));
        if socket.connect_timeout(&to, Duration::from_millis(200)).is_ok() {
            taken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Accepts connections at the capture port until stopped.
fn accept_connections(stop: &AtomicBool) {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
    socket.set_only_v6(false).expect("the socket can be dual-stack");
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), CAPTURE).into()).expect("free");
    socket.listen(4096).expect("the socket can listen");
    let listener = TcpListener::from(socket);
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        drop(stream.map(|mut stream: TcpStream| stream.read(&mut [0; 1])));
    }
}

#[test]
fn no_packet_escapes_while_rules_are_reinstalled() {
    let mut network = Network::new().expect("the test has a network namespace");
    let host = network.host("app").expect("hosts can be created");
    watch(&host);
    let before = assert_escapes_are_counted(&host);

    let wishes: [&[&str]; 2] = [&[], &["--exclude-outbound-ports", "25", "--strict"]];
    run(&mut redirect("apply", &host, wishes[0]));
    let stop = AtomicBool::new(false);
    let taken = [const { AtomicU64::new(0) }; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            host.on(|| accept_connections(&stop)).expect("the host's namespace can be entered")
        });
        for (service, taken) in SERVICES.into_iter().zip(&taken) {
            let host = &host;
            let stop = &stop;
            scope.spawn(move || {
                host.on(|| make_connections(service, stop, taken))
                    .expect("the host's namespace can be entered")
            });
        }
        for redirects in wishes.iter().cycle().take(500) {
            run(&mut redirect("apply", &host, redirects));
        }
        stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread.
        drop(host.on(|| TcpStream::connect((Ipv4Addr::LOCALHOST, CAPTURE))));
    });
    let taken = taken.map(AtomicU64::into_inner);
    assert!(taken.iter().all(|taken| *taken > 500), "only {taken:?} connections were accepted");
    assert_eq!(escaped(), before, "packets left for a service");
}

/// A bootstrap file of a sidecar with an outbound listener and one service.
fn sidecar_file(folder: &Path, endpoint: SocketAddr) -> PathBuf {
    let capture = address((Ipv4Addr::UNSPECIFIED, CAPTURE).into(), "TCP");
    let capture = json!({"name": "out", "address": capture, "use_original_dst": true});
    let [service, _] = SERVICES.map(|service| SocketAddr::new(service, 80));
    let service = tcp_listener("service", service, json!({"cluster": "c"}));
    let service = with(service, "bind_to_port", json!(false));
    let cluster = static_cluster("c", &[endpoint]);
    let file = bootstrap(port::free(), &[capture, service], &[cluster]);
    let path = folder.join("sidecar.json");
    std::fs::write(&path, file.to_string()).expect("the folder is writable");
    path
}

#[test]
fn no_packet_escapes_while_the_proxy_starts_and_is_killed() {
    let mut network = Network::new().expect("the test has a network namespace");
    let host = network.host("app");
    let server = network.host("server");
    let host = host.expect("hosts can be created");
    let server = server.expect("hosts can be created");
    watch(&host);
    let before = assert_escapes_are_counted(&host);
    // The rules are installed first; the program connects before the proxy starts and while it is
    // down.
    run(&mut redirect("apply", &host, &["--strict"]));
    let listener =
        server.on(|| TcpListener::bind((server.address, 9000)).expect("the port is free"));
    let listener = listener.expect("the host's namespace can be entered");
    let folder = TempDir::new().expect("a temporary folder can be created");
    let endpoint = listener.local_addr().expect("the socket is bound");
    let file = sidecar_file(folder.path(), endpoint);
    let served = Arc::new(AtomicU64::new(0));
    let counter = served.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counter.fetch_add(u64::from(stream.is_ok()), Ordering::Relaxed);
        }
    });
    let stop = AtomicBool::new(false);
    let taken = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for service in SERVICES {
            let host = &host;
            let stop = &stop;
            let taken = &taken;
            scope.spawn(move || {
                host.on(|| make_connections(service, stop, taken))
                    .expect("the host's namespace can be entered")
            });
        }
        for start in 0..50 {
            let sidecar = host.on(|| {
                let mut weft = weft();
                weft.args(["sidecar", "--workers", "1", "-c"]).arg(&file);
                weft.stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("the process can be started")
            });
            let mut sidecar = sidecar.expect("the host's namespace can be entered");
            if start % 5 == 0 {
                let before = served.load(Ordering::Relaxed);
                eventually("the program reaches the service through the proxy", || {
                    (served.load(Ordering::Relaxed) > before).then_some(())
                });
            } else {
                (0..start * 60).for_each(|_| std::thread::yield_now());
            }
            sidecar.kill().expect("the process can be killed");
            sidecar.wait().expect("the process can be waited for");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(escaped(), before, "packets left for a service");
}

#[test]
fn killed_installer_leaves_either_the_old_or_the_new_rules() {
    let mut network = Network::new().expect("the test has a network namespace");
    let host = network.host("app").expect("hosts can be created");
    let wishes: [&[&str]; 2] =
        [&[], &["--exclude-outbound-ports", "25", "--udp", "15099", "--strict"]];
    run(&mut redirect("apply", &host, wishes[0]));
    let mut killed = 0;
    for (step, redirects) in wishes.iter().cycle().take(80).enumerate() {
        let mut installer = redirect("apply", &host, redirects);
        let mut installer = installer
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the process can be started");
        // The installer is killed at increasing delays, from its start to its end.
        for _ in 0..step * 15 {
            std::thread::yield_now();
        }
        installer.kill().expect("the process can be killed");
        killed += u64::from(!installer.wait().expect("the process can be waited for").success());
        let as_wanted = |redirects: &&&[&str]| {
            let verified =
                redirect("verify", &host, redirects).output().expect("weft can be started");
            verified.status.success()
        };
        // The policy route of marked packets is separate from the table; it has no effect without
        // it.
        let routes = wishes.iter().filter(as_wanted).count();
        assert_eq!(routes, 1, "after step {step}");
    }
    assert!(killed > 0, "some installers were killed before they finished");
}
