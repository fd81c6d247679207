//! Security groups: whose flows are let in, by the kernel, before anything else sees them.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::{Family, Mesh};
use weft_integration::wait::eventually;

/// How long a flow that is dropped waits in vain.
const IN_VAIN: Duration = Duration::from_millis(700);

/// Says whose flows to the echo service are let in.
fn let_in(mesh: &mut Mesh, ranges: &[String]) {
    mesh.change(|mesh| {
        let echo = mesh.pointer_mut("/services/2").and_then(Value::as_object_mut);
        echo.expect("it is there").insert("allow_from".into(), json!(ranges));
    });
}

fn blocked(mesh: &Mesh) -> u64 {
    let page = mesh.agent.admin("/metrics").text();
    let name = "weft_agent_blocked_packets_total ";
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    line.expect("it is told").parse().expect("a number")
}

fn connect(mesh: &Mesh, host: &Host) -> Result<TcpStream, ErrorKind> {
    let echo = mesh.echo();
    let stream = mesh.on(Some(host), || TcpStream::connect_timeout(&echo, IN_VAIN));
    stream.map_err(|error| error.kind())
}

/// Whether a connection from a host is accepted.
fn connects(mesh: &Mesh, host: &Host) -> bool {
    connect(mesh, host).is_ok()
}

/// Whether a connection from a host is dropped: a group's no is silence, and not a refusal.
fn is_dropped(mesh: &Mesh, host: &Host) -> bool {
    connect(mesh, host).is_err_and(|kind| kind == ErrorKind::TimedOut)
}

/// Whether a datagram from a host is answered.
fn is_answered(mesh: &Mesh, host: &Host) -> bool {
    let echo = SocketAddr::new(mesh.echo().ip(), mesh.echo().port() + 1);
    let any: SocketAddr = if echo.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = mesh.on(Some(host), || UdpSocket::bind(any)).expect("a port is free");
    socket.set_read_timeout(Some(IN_VAIN)).expect("it is above zero");
    socket.send_to(b"?", echo).expect("it is sent");
    socket.recv_from(&mut [0; 64]).is_ok()
}

fn range_of(mesh: &Mesh, host: &Host) -> String {
    let address: IpAddr = match mesh.echo() {
        SocketAddr::V4(_) => host.address.into(),
        SocketAddr::V6(_) => host.address6.expect("the kernel has IPv6").into(),
    };
    address.to_string()
}

fn assert_groups_hold(family: Family, path: &str) {
    let mut mesh = Mesh::start_with(family, &["--path", path]);
    let (client, stranger) = (mesh.client.clone(), mesh.host("stranger"));
    assert!(connects(&mesh, &stranger), "without a group anybody is let in");
    let (mut flow, replica) = mesh.open_flow().expect("the echo service greets");

    let range = range_of(&mesh, &stranger);
    let_in(&mut mesh, &[range]);
    eventually("the client is not let in any more", || (!connects(&mesh, &client)).then_some(()));
    assert!(!is_answered(&mesh, &client));
    assert!(connects(&mesh, &stranger) && is_answered(&mesh, &stranger));
    assert_eq!(flow.say("still there?"), Some(replica), "what was let in goes on");
    // The proxy path may have refused the first ones: the kernel learns of a change a moment later.
    eventually("what was dropped is counted", || {
        assert!(!is_answered(&mesh, &client));
        (blocked(&mesh) > 1).then_some(())
    });

    let range = range_of(&mesh, &client);
    let_in(&mut mesh, &[range]);
    eventually("the client is let in again", || connects(&mesh, &client).then_some(()));
    assert!(is_answered(&mesh, &client));
    eventually("the stranger is not let in any more", || {
        is_dropped(&mesh, &stranger).then_some(())
    });
    assert!(!is_answered(&mesh, &stranger));

    let_in(&mut mesh, &[]);
    eventually("nobody is let in", || is_dropped(&mesh, &client).then_some(()));
}

#[test]
fn a_group_lets_in_its_ranges_and_drops_all_others_before_the_kernel_path() {
    assert_groups_hold(Family::V4, "auto");
}

#[test]
fn a_group_lets_in_its_ranges_and_drops_all_others_before_the_proxy_path() {
    assert_groups_hold(Family::V4, "proxy");
}

#[test]
fn a_group_of_ipv6_lets_in_its_ranges_and_drops_all_others() {
    assert_groups_hold(Family::V6, "auto");
}
