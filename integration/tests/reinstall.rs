//! Rules that are installed again and again while connections are made, and installers that die.

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

/// The capture port, behind which the test itself listens.
const CAPTURE: u16 = 15001;
/// What goes to a service, as nobody but the capture port may ever see it.
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

/// How many such packets there were.
fn escaped() -> u64 {
    let listing = nft("list table inet watch");
    let counts = listing.split("counter packets ").skip(1);
    counts.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum()
}

/// Holds that the watch sees what escapes, of either family, while nothing is redirected; gives how
/// much that was.
fn assert_it_sees(host: &Host) -> u64 {
    let mut before = 0;
    for service in SERVICES {
        let service = SocketAddr::new(service, 80);
        drop(host.on(|| TcpStream::connect_timeout(&service, Duration::from_millis(100))));
        assert!(escaped() > before, "the watch saw what went to {service}");
        before = escaped();
    }
    before
}

/// Makes connections to services until told to stop, and counts those that were taken.
fn make_connections(service: IpAddr, stop: &AtomicBool, taken: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        let socket = Socket::new(Domain::for_address((service, 80).into()), Type::STREAM, None);
        let socket = socket.expect("a socket");
        // Its end is a reset: ports are free at once, and thousands a second are possible.
        socket.set_linger(Some(Duration::ZERO)).expect("it can be set");
        let to = SockAddr::from(SocketAddr::new(service, 80));
        if socket.connect_timeout(&to, Duration::from_millis(200)).is_ok() {
            taken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Takes connections at the capture port until told to stop.
fn take_connections(stop: &AtomicBool) {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
    socket.set_only_v6(false).expect("one socket for both families");
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), CAPTURE).into()).expect("free");
    socket.listen(4096).expect("it can listen");
    let listener = TcpListener::from(socket);
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        drop(stream.map(|mut stream: TcpStream| stream.read(&mut [0; 1])));
    }
}

#[test]
fn nothing_escapes_while_rules_are_installed_again_and_again() {
    let mut network = Network::new().expect("a test has a network namespace of its own");
    let host = network.host("app").expect("hosts can be made");
    watch(&host);
    let before = assert_it_sees(&host);

    let wishes: [&[&str]; 2] = [&[], &["--exclude-outbound-ports", "25", "--strict"]];
    run(&mut redirect("apply", &host, wishes[0]));
    let (stop, taken) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
    std::thread::scope(|scope| {
        scope.spawn(|| host.on(|| take_connections(&stop)).expect("it takes"));
        for (service, taken) in SERVICES.into_iter().zip(&taken) {
            let (host, stop) = (&host, &stop);
            scope.spawn(move || {
                host.on(|| make_connections(service, stop, taken)).expect("it runs")
            });
        }
        for wish in wishes.iter().cycle().take(500) {
            run(&mut redirect("apply", &host, wish));
        }
        stop.store(true, Ordering::Relaxed);
        // Wakes who takes them.
        drop(host.on(|| TcpStream::connect((Ipv4Addr::LOCALHOST, CAPTURE))));
    });
    let taken = taken.map(AtomicU64::into_inner);
    assert!(
        taken.iter().all(|taken| *taken > 500),
        "{taken:?} connections were taken in all that time"
    );
    assert_eq!(escaped(), before, "packets left for a service");
}

/// A sidecar's outbound port, with one service.
fn sidecar_file(folder: &Path, endpoint: SocketAddr) -> PathBuf {
    let capture = address((Ipv4Addr::UNSPECIFIED, CAPTURE).into(), "TCP");
    let capture = json!({"name": "out", "address": capture, "use_original_dst": true});
    let [service, _] = SERVICES.map(|service| SocketAddr::new(service, 80));
    let service = tcp_listener("service", service, json!({"cluster": "c"}));
    let service = with(service, "bind_to_port", json!(false));
    let cluster = static_cluster("c", &[endpoint]);
    let file = bootstrap(port::free(), &[capture, service], &[cluster]);
    let path = folder.join("sidecar.json");
    std::fs::write(&path, file.to_string()).expect("the folder takes files");
    path
}

#[test]
fn nothing_escapes_while_the_proxy_starts_and_is_killed() {
    let mut network = Network::new().expect("a test has a network namespace of its own");
    let (host, server) = (network.host("app"), network.host("server"));
    let (host, server) = (host.expect("hosts can be made"), server.expect("hosts can be made"));
    watch(&host);
    let before = assert_it_sees(&host);
    // Rules come first; the program speaks before there is a proxy, and whenever there is none.
    run(&mut redirect("apply", &host, &["--strict"]));
    let listener = server.on(|| TcpListener::bind((server.address, 9000)).expect("it is free"));
    let listener = listener.expect("the host can be entered");
    let folder = TempDir::new().expect("a temporary folder can be made");
    let endpoint = listener.local_addr().expect("it is bound");
    let file = sidecar_file(folder.path(), endpoint);
    let served = Arc::new(AtomicU64::new(0));
    let counter = served.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counter.fetch_add(u64::from(stream.is_ok()), Ordering::Relaxed);
        }
    });
    let (stop, taken) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for service in SERVICES {
            let (host, stop, taken) = (&host, &stop, &taken);
            scope.spawn(move || {
                host.on(|| make_connections(service, stop, taken)).expect("it runs")
            });
        }
        for start in 0..50 {
            let sidecar = host.on(|| {
                let mut weft = weft();
                weft.args(["sidecar", "--workers", "1", "-c"]).arg(&file);
                weft.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
            });
            let mut sidecar = sidecar.expect("the host can be entered");
            if start % 5 == 0 {
                let before = served.load(Ordering::Relaxed);
                eventually("the program reaches the service through it", || {
                    (served.load(Ordering::Relaxed) > before).then_some(())
                });
            } else {
                (0..start * 60).for_each(|_| std::thread::yield_now());
            }
            sidecar.kill().expect("it was not waited for");
            sidecar.wait().expect("it was started");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(escaped(), before, "packets left for a service");
}

#[test]
fn an_installer_that_is_killed_leaves_the_old_rules_or_the_new_ones() {
    let mut network = Network::new().expect("a test has a network namespace of its own");
    let host = network.host("app").expect("hosts can be made");
    let wishes: [&[&str]; 2] =
        [&[], &["--exclude-outbound-ports", "25", "--udp", "15099", "--strict"]];
    run(&mut redirect("apply", &host, wishes[0]));
    let mut killed = 0;
    for (step, wish) in wishes.iter().cycle().take(80).enumerate() {
        let mut installer = redirect("apply", &host, wish);
        let mut installer =
            installer.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        // At every point of its short life, from its first instructions to its end.
        for _ in 0..step * 15 {
            std::thread::yield_now();
        }
        installer.kill().expect("it was not waited for");
        killed += u64::from(!installer.wait().expect("it was started").success());
        let as_wanted = |wish: &&&[&str]| {
            let verified = redirect("verify", &host, wish).output().expect("weft can be started");
            verified.status.success()
        };
        // Marked packets have a route besides the table, which does no harm alone.
        let there = wishes.iter().filter(as_wanted).count();
        assert_eq!(there, 1, "after step {step}");
    }
    assert!(killed > 0, "some were killed before they were done");
}
