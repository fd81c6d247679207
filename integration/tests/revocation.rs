//! Revocation: a revoked peer loses its connections at once, and other peers are not affected.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::{bootstrap, cluster, http, listener, route_to, tcp_tls_listener};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::{run, weft};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{SidecarLaunch, TestSidecar};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_client::{TlsClient, client_config, client_config_trusting};
use weft_integration::tls_contexts::{TestTls, verify_mode};
use weft_integration::wait::{eventually, pause};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// The maximum time from the publication of a CRL to the end of the last connection.
const REVOCATION_DEADLINE: Duration = Duration::from_secs(1);

/// A sidecar in front of a service, which accepts clients that the signer has not revoked.
fn start(signer: &TestAuthority, origin: &OriginServer) -> SingleSidecar {
    start_as(signer, origin, &signer.sign("server", DAY))
}

fn start_as(signer: &TestAuthority, origin: &OriginServer, server: &PemIdentity) -> SingleSidecar {
    let mut wanted =
        SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).with_one_worker(&[]);
    let server = signer.write_files("server", server);
    wanted.tls = Some(verify_mode(&server, &signer.root(), &signer.crl_file()));
    wanted.start()
}

fn connect(signer: &TestAuthority, identity: &PemIdentity, sidecar: &SingleSidecar) -> TlsClient {
    TlsClient::connect(sidecar.port, &client_config(signer, identity, "server", "http/1.1"))
}

#[test]
fn new_crl_closes_exactly_the_connections_of_revoked_clients_at_once() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    let sidecar = start(&signer, &origin);
    let holders: Vec<PemIdentity> =
        (0..1000).map(|n| signer.sign(&format!("web-{n}"), DAY)).collect();
    let mut callers: Vec<TlsClient> =
        holders.iter().map(|identity| connect(&signer, identity, &sidecar)).collect();
    callers.iter_mut().for_each(|caller| assert_eq!(caller.ask("/"), Some(200)));

    let is_revoked = |n: usize| n % 100 == 37;
    let revoked = || holders.iter().enumerate().filter(|(n, _)| is_revoked(*n));
    let serials: Vec<&str> = revoked().map(|(_, identity)| identity.serial.as_str()).collect();
    assert_eq!(serials.len(), 10);
    signer.revoke(&serials);
    let since = now();
    for (n, caller) in callers.iter_mut().enumerate().filter(|(n, _)| is_revoked(*n)) {
        assert!(caller.ends_within(REVOCATION_DEADLINE), "client {n} is still connected");
    }
    assert!(
        since.elapsed() < REVOCATION_DEADLINE,
        "the last connection ended after {:?}",
        since.elapsed()
    );
    for (n, caller) in callers.iter_mut().enumerate() {
        let expected = if is_revoked(n) { None } else { Some(200) };
        assert_eq!(caller.ask("/"), expected, "{n}");
    }
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}"),
        10
    );
    let (n, identity) = revoked().next().unwrap();
    assert_eq!(connect(&signer, identity, &sidecar).ask("/"), None, "client {n} is served again");
    // No connection is ended twice, and no other connection by a repeated CRL.
    signer.revoke(&serials);
    assert!(!callers[0].ends_within(REVOCATION_DEADLINE));
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}"),
        10
    );
}

/// A service with endless responses: it sends bytes slowly, echoes upgraded connections, or stays
/// silent.
fn endless() -> ScriptedServer {
    ScriptedServer::start(|stream| {
        let mut reader = BufReader::new(stream);
        let Some(head) = read_head(&mut reader) else { return };
        let say = |reader: &mut BufReader<TcpStream>, text: &[u8]| {
            reader.get_mut().write_all(text).is_ok()
        };
        if head.contains("GET /drip") {
            say(&mut reader, b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n");
            while say(&mut reader, b".") {
                pause(Duration::from_millis(20));
            }
        } else if head.contains("GET /upgrade") {
            say(
                &mut reader,
                b"HTTP/1.1 101 On\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            );
            let mut byte = [0];
            while reader.read_exact(&mut byte).is_ok() && say(&mut reader, &byte) {}
        } else {
            drop(reader.read_to_end(&mut Vec::new()));
        }
    })
}

/// A sidecar in front of the same service in two ways: as HTTP and as TCP.
fn start_both_ways(signer: &TestAuthority, service: ScriptedServer) -> (TestSidecar, u16) {
    let port = port::free();
    let raw = port::free();
    let admin = port::free();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let tls = verify_mode(&server, &signer.root(), &signer.crl_file());
    let web = listener("http", port, http(&route_to("service", 0), &[]), Some(tls.clone()));
    let at = (Ipv4Addr::LOCALHOST, raw).into();
    let bytes = tcp_tls_listener("raw", at, json!({"cluster": "service"}), Some(tls));
    let clusters = [cluster("service", &[service.port], UpstreamHttp::Http1, None)];
    let config = bootstrap(admin, &[web, bytes], &clusters);
    (
        TestSidecar::launch(&SidecarLaunch::default(), &MeshPki::create(), [port, admin], &config),
        raw,
    )
}

/// The bytes of an HTTP/2 client that starts a request with an endless body.
fn open_stream() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    // POST, https and / from the static table, and a literal `:authority: a`.
    let head = [0x83, 0x87, 0x84, 0x01, 0x01, b'a'];
    bytes.extend_from_slice(&[0, 0, 6, 0x01, 0x04, 0, 0, 0, 1]);
    bytes.extend_from_slice(&head);
    bytes
}

/// The error code of the GOAWAY in the received bytes.
fn goaway_code(mut bytes: &[u8]) -> Option<u8> {
    while let [_, high, low, kind, _, _, _, _, _, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if *kind == 7 {
            return rest.get(7).copied();
        }
        bytes = rest.get(length..)?;
    }
    None
}

#[test]
fn every_kind_of_connection_of_a_revoked_client_is_closed() {
    const INADEQUATE_SECURITY: u8 = 0xc;
    let signer = TestAuthority::create();
    let (sidecar, raw) = start_both_ways(&signer, endless());
    let identity = signer.sign("web", DAY);
    let connect =
        |port, alpn| TlsClient::connect(port, &client_config(&signer, &identity, "server", alpn));
    let mut dripped = connect(sidecar.port, "http/1.1");
    dripped.send(b"GET /drip HTTP/1.1\r\nhost: a\r\n\r\n");
    let mut waiting = connect(sidecar.port, "http/1.1");
    waiting.send(b"GET /never HTTP/1.1\r\nhost: a\r\n\r\n");
    let mut sending = connect(sidecar.port, "http/1.1");
    sending.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nx");
    let mut upgraded = connect(sidecar.port, "http/1.1");
    upgraded.send(
        b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    );
    let mut streamed = connect(sidecar.port, "h2");
    streamed.send(&open_stream());
    let mut idle = connect(sidecar.port, "h2");
    idle.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    let mut opaque = connect(raw, "http/1.1");
    opaque.send(b"GET /upgrade HTTP/1.1\r\n\r\n");
    for caller in [&mut dripped, &mut upgraded, &mut opaque, &mut idle, &mut streamed] {
        assert!(!caller.receive(1024).is_empty(), "the client is served");
    }
    upgraded.send(b"x");
    assert_eq!(upgraded.receive(1), b"x");

    signer.revoke(&[&identity.serial]);
    let since = now();
    let left = |caller: &mut TlsClient| {
        let mut all = Vec::new();
        loop {
            let more = caller.receive(1024);
            if more.is_empty() {
                assert!(since.elapsed() < REVOCATION_DEADLINE, "after {:?}", since.elapsed());
                return all;
            }
            all.extend_from_slice(&more);
        }
    };
    for caller in [&mut dripped, &mut waiting, &mut sending, &mut upgraded, &mut opaque] {
        left(caller);
    }
    for caller in [&mut streamed, &mut idle] {
        assert_eq!(goaway_code(&left(caller)), Some(INADEQUATE_SECURITY));
    }
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}"),
        7
    );
    // All connections and requests are released.
    eventually("no connection or request is open", || {
        let open = |name| sidecar.metric(name) == 0;
        (open("weft_sidecar_connections_open") && open("weft_sidecar_requests_open")).then_some(())
    });
}

#[test]
fn revoked_endpoint_gets_no_new_requests_and_its_connection_is_closed() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    let server = signer.sign("server", DAY);
    let service = start_as(&signer, &origin, &server);
    let ours = signer.write_files("client", &signer.sign("client", DAY));
    let wanted = |speaks| {
        let tls = TestTls::cluster(&ours, &signer.root(), "server").crls(&signer.crl_file());
        let mut wanted =
            SingleSidecarConfig::for_upstream(service.port, speaks).with_one_worker(&[]);
        wanted.clusters = vec![cluster("service", &[service.port], speaks, Some(tls.socket()))];
        wanted.start()
    };
    let callers = [wanted(UpstreamHttp::Http1), wanted(UpstreamHttp::Http2)];
    for caller in &callers {
        assert_eq!(Curl::get(caller.port, "/").run().status, 200);
    }
    // A CRL that revokes other certificates.
    signer.revoke(&["00ff"]);
    let mut other = TlsClient::connect(
        service.port,
        &client_config(&signer, &signer.sign("web", DAY), "server", "http/1.1"),
    );
    assert_eq!(other.ask("/"), Some(200));
    assert!(!other.ends_within(REVOCATION_DEADLINE), "an unrelated CRL does not end a connection");
    for caller in &callers {
        assert_eq!(Curl::get(caller.port, "/").run().status, 200);
        assert_eq!(
            caller.metric("weft_sidecar_upstream_connections_total"),
            1,
            "the connection is kept"
        );
    }
    signer.revoke(&["00ff", &server.serial]);
    for caller in &callers {
        eventually("the connection is closed", || {
            (caller.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}")
                == 1)
                .then_some(())
        });
        assert_eq!(
            Curl::get(caller.port, "/").run().status,
            503,
            "the endpoint is not connected to again"
        );
    }
}

#[test]
fn clients_of_a_removed_root_are_disconnected() {
    let signer = TestAuthority::create();
    let stranger = TestAuthority::create();
    let origin = OriginServer::start();
    let roots = signer.file("roots.pem");
    std::fs::write(&roots, format!("{}{}", signer.roots(), stranger.roots())).unwrap();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let mut wanted = SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::AsClient);
    wanted.tls = Some(TestTls::listener(&server, &roots).socket());
    let sidecar = wanted.start();
    let call = |identity: &PemIdentity, signed: &TestAuthority| {
        let config = client_config_trusting(signer.roots(), identity, "server", "http/1.1");
        let mut caller = TlsClient::connect(sidecar.port, &config);
        assert_eq!(caller.ask("/"), Some(200), "{}", signed.roots());
        caller
    };
    let mut ours = call(&signer.sign("web", DAY), &signer);
    let mut theirs = call(&stranger.sign("web", DAY), &stranger);
    std::fs::write(&roots, signer.roots()).unwrap();
    assert!(theirs.ends_within(REVOCATION_DEADLINE));
    assert_eq!(ours.ask("/"), Some(200));
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}"),
        1
    );
}

/// A sidecar in Verify Mode with a revocation policy, and CRLs from `lists`.
fn start_with_policy(
    signer: &TestAuthority,
    origin: &OriginServer,
    lists: &Path,
    settings: &Value,
) -> SingleSidecar {
    let mut wanted =
        SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).with_one_worker(&[]);
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let tls = TestTls::listener(&server, &signer.root()).crls(lists);
    wanted.tls = Some(tls.revocation_policy(settings).socket());
    wanted.start()
}

#[test]
fn revocation_policy_decides_on_certificates_without_a_crl() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    let good = signer.sign("good", DAY);
    let bad = signer.sign("bad", DAY);
    signer.revoke(&[&bad.serial]);
    let whole = std::fs::read_to_string(signer.crl_file()).unwrap();
    // The CRL of the intermediate only: no CRL covers the intermediate itself.
    let intermediate_only = signer.file("intermediate-only.pem");
    let (_, rest) = whole.split_once("-----END X509 CRL-----\n").unwrap();
    let (_, beside) = rest.split_once("-----END X509 CRL-----\n").unwrap();
    let first = &whole[..whole.len() - rest.len()];
    std::fs::write(&intermediate_only, format!("{first}{beside}")).unwrap();
    let check = |lists: &Path, settings: Value, expected: [Option<u16>; 2]| {
        let sidecar = start_with_policy(&signer, &origin, lists, &settings);
        let got = [&good, &bad].map(|identity| connect(&signer, identity, &sidecar).ask("/"));
        assert_eq!(got, expected, "{settings}");
    };
    let lists = signer.crl_file();
    let served = Some(200);
    check(&lists, json!({}), [served, None]);
    check(&lists, json!({"mode": "off"}), [served, served]);
    check(&intermediate_only, json!({}), [None, None]);
    check(&intermediate_only, json!({"mode": "soft"}), [served, None]);
    check(&intermediate_only, json!({"depth": "leaf"}), [served, None]);
}

#[test]
fn drain_seconds_lets_a_revoked_client_finish_open_requests() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    let settings = json!({"drain_seconds": 3});
    let sidecar = start_with_policy(&signer, &origin, &signer.crl_file(), &settings);
    let identity = signer.sign("web", DAY);
    let mut idle = connect(&signer, &identity, &sidecar);
    let mut busy = connect(&signer, &identity, &sidecar);
    assert_eq!(idle.ask("/"), Some(200));
    busy.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");
    let mut stuck = connect(&signer, &identity, &sidecar);
    stuck.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");
    eventually("the requests have started", || (origin.seen().len() == 3 + 1).then_some(()));
    signer.revoke(&[&identity.serial]);
    assert!(idle.ends_within(REVOCATION_DEADLINE), "an idle connection is closed at once");
    busy.send(b"lo");
    let since = now();
    let mut answer = busy.receive(1024);
    assert!(answer.starts_with(b"HTTP/1.1 200"), "an open request is finished");
    while !answer.is_empty() {
        answer = busy.receive(1024);
    }
    assert!(since.elapsed() < REVOCATION_DEADLINE, "the connection is closed after its request");
    // Times are whole seconds, and checked twice per second.
    assert!(stuck.ends_within(5 * REVOCATION_DEADLINE), "the drain timeout has passed");
}

#[test]
fn crl_folder_and_symbolic_link_are_watched() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    let folder = |name: &str, revoked: &[&str]| {
        signer.revoke(revoked);
        let folder = signer.file(name);
        std::fs::create_dir(&folder).unwrap();
        let text = std::fs::read_to_string(signer.crl_file()).unwrap();
        let (first, rest) = text.split_once("-----END X509 CRL-----\n").unwrap();
        std::fs::write(folder.join("1"), format!("{first}-----END X509 CRL-----\n")).unwrap();
        std::fs::write(folder.join("2"), rest).unwrap();
        folder
    };
    let identity = signer.sign("web", DAY);
    let before = folder("before", &[]);
    let after = folder("after", &[&identity.serial]);
    let link = signer.file("lists");
    std::os::unix::fs::symlink(&before, &link).unwrap();
    let sidecar = start_with_policy(&signer, &origin, &link, &json!({}));
    let mut client = connect(&signer, &identity, &sidecar);
    assert_eq!(client.ask("/"), Some(200));
    std::os::unix::fs::symlink(&after, signer.file("new")).unwrap();
    std::fs::rename(signer.file("new"), &link).unwrap();
    assert!(client.ends_within(REVOCATION_DEADLINE));
    // An invalid CRL is logged, and the last good ones stay in force.
    std::fs::write(after.join("3"), "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
        .unwrap();
    eventually("the invalid CRL is logged", || {
        let printed = Curl::get(sidecar.sidecar.admin, "/config_dump").run().text();
        printed.contains("the last good one stays in force").then_some(())
    });
    assert_eq!(connect(&signer, &identity, &sidecar).ask("/"), None);
}

#[test]
fn status_shows_the_crls_in_force_and_the_issuers_without_one() {
    let signer = TestAuthority::create();
    let origin = OriginServer::start();
    signer.revoke(&["0a0b", "0c0d"]);
    let sidecar = start(&signer, &origin);
    assert_eq!(sidecar.metric("weft_sidecar_crl_revoked_certificates"), 2);
    assert_eq!(sidecar.metric("weft_sidecar_crls"), 2);
    let admin = sidecar.sidecar.admin.to_string();
    let status = run(weft().args(["status", "--admin", &format!("127.0.0.1:{admin}")]));
    assert!(status.contains("\"weft intermediate mesh.local\" (all), 2 revoked, valid until 20"));
    let coverage = |lists: &Path| {
        let mut command = weft();
        command.args(["ca", "coverage", "--roots"]).arg(signer.root());
        let output = command.arg("--lists").arg(lists).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, printed) = coverage(&signer.crl_file());
    assert_eq!(code, Some(0), "{printed}");
    for issuer in ["root", "intermediate"] {
        let line = format!("covered  \"weft {issuer} mesh.local\": leaf and CA certificates");
        assert!(printed.contains(&line), "{printed}");
    }
    let text = std::fs::read_to_string(signer.crl_file()).unwrap();
    let (_, rest) = text.split_once("-----END X509 CRL-----\n").unwrap();
    std::fs::write(signer.file("part.pem"), rest).unwrap();
    let (code, printed) = coverage(&signer.file("part.pem"));
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("missing  \"weft intermediate mesh.local\": no CRL"), "{printed}");
}

#[test]
fn connections_of_an_expired_client_are_drained() {
    let signer = TestAuthority::create();
    let (sidecar, raw) = start_both_ways(&signer, endless());
    let brief = signer.sign("web", Duration::from_secs(4));
    let long = signer.sign("web", DAY);
    let connect = |identity: &PemIdentity, port, alpn| {
        TlsClient::connect(port, &client_config(&signer, identity, "server", alpn))
    };
    let mut idle = connect(&brief, sidecar.port, "http/1.1");
    let mut kept = connect(&long, sidecar.port, "http/1.1");
    let mut busy = connect(&brief, sidecar.port, "http/1.1");
    busy.send(b"GET /drip HTTP/1.1\r\nhost: a\r\n\r\n");
    let mut opaque = connect(&brief, raw, "http/1.1");
    opaque.send(b"GET /upgrade HTTP/1.1\r\n\r\n");
    let mut streamed = connect(&brief, sidecar.port, "h2");
    streamed.send(&open_stream());
    assert!(!busy.receive(1024).is_empty() && !opaque.receive(1024).is_empty());

    assert!(idle.send(b""), "the handshake is complete");
    assert!(
        idle.ends_within(Duration::from_secs(7)),
        "an idle connection of an expired client is closed"
    );
    assert!(
        !kept.ends_within(REVOCATION_DEADLINE),
        "a client with a valid certificate stays connected"
    );
    // Open requests continue.
    assert!(opaque.send(b"x"));
    assert_eq!(opaque.receive(1), b"x");
    for _ in 0..50 {
        assert!(!busy.receive(1024).is_empty());
    }
    assert!(!streamed.receive(1024).is_empty());
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_expired\"}"),
        4
    );
    assert_eq!(
        sidecar.metric("weft_sidecar_connections_closed_total{reason=\"certificate_revoked\"}"),
        0
    );
}

#[expect(clippy::disallowed_methods, reason = "the test measures elapsed time")]
fn now() -> Instant {
    Instant::now()
}
