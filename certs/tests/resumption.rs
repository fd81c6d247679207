//! Resumed sessions are verified again.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

mod pki;

use std::sync::Arc;

use pki::{HOUR, Leaf, List, WEB, World, carry, unix};
use rustls::HandshakeKind::{Full, Resumed};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ClientConnection, Connection, Error, ServerConfig, ServerConnection};
use rustls_pki_types::UnixTime;
use weft_certs::TrustStore;
use weft_certs::fault::{PeerFault, take};
use weft_certs::tls::{ClientAuthentication, ClientTls, LoadedIdentity, ServerTls, SessionTickets};
use weft_model::{StringMatch, TlsParameters, TlsVersion};

/// The time of the tests.
#[derive(Debug)]
struct Now;

impl TimeProvider for Now {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(0))
    }
}

fn identity(leaf: &Leaf) -> LoadedIdentity {
    LoadedIdentity::load(leaf.chain.as_bytes(), leaf.key.as_bytes()).unwrap()
}

fn required(trust: TrustStore) -> ClientAuthentication {
    ClientAuthentication::Required(Arc::new(trust), Vec::new())
}

/// The certificates and the TLS version of a test.
#[derive(Clone, Copy)]
struct Setting<'a> {
    world: &'a World,
    version: TlsVersion,
}

fn only(version: TlsVersion) -> TlsParameters {
    TlsParameters { minimum: version, maximum: version, ..TlsParameters::default() }
}

fn by_each_version(test: impl Fn(TlsVersion)) {
    TlsVersion::WORDS.into_iter().for_each(|(_, version)| test(version));
}

fn server(
    Setting { world, version }: Setting<'_>,
    clients: ClientAuthentication,
    tickets: &SessionTickets,
) -> ServerTls {
    let alpn = ["h2".into()];
    ServerTls::new(&identity(&world.good), clients, &alpn, &only(version), tickets).unwrap()
}

fn client(
    Setting { world, version }: Setting<'_>,
    own: Option<&Leaf>,
) -> (ClientTls, Arc<ClientConfig>) {
    let own = own.map(identity);
    let names = vec![StringMatch::Exact(WEB.into())];
    let trust = Arc::new(world.trust());
    let client =
        ClientTls::new(own.as_ref(), trust, names, &["h2".into()], &only(version)).unwrap();
    let mut config = ClientConfig::clone(client.config());
    config.time_provider = Arc::new(Now);
    (client, Arc::new(config))
}

/// Runs a handshake, delivers the session tickets, and returns the client and the server.
fn meet(client: &Arc<ClientConfig>, server: &ServerTls, name: &str) -> (Connection, Connection) {
    let mut config = ServerConfig::clone(server.config());
    config.time_provider = Arc::new(Now);
    let name = name.to_owned().try_into().unwrap();
    let mut client: Connection = ClientConnection::new(client.clone(), name).unwrap().into();
    let mut server: Connection = ServerConnection::new(Arc::new(config)).unwrap().into();
    while client.wants_write() || server.wants_write() {
        carry(&mut client, &mut server).unwrap();
        carry(&mut server, &mut client).unwrap();
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    (client, server)
}

/// The result at server `then` of a client whose session began at server `first`, at a time in seconds from now.
fn returns(
    setting: Setting<'_>,
    first: &ServerTls,
    then: &ServerTls,
    seconds: i64,
) -> Result<bool, PeerFault> {
    let (_, config) = client(setting, Some(&setting.world.good));
    let (_, begun) = meet(&config, first, "server.test");
    assert_eq!(begun.handshake_kind(), Some(Full));
    let (_, resumed) = meet(&config, then, "server.test");
    assert_eq!(resumed.handshake_kind(), Some(Resumed));
    let told = then.client(&resumed, unix(seconds));
    told.map(|client| client.is_some()).map_err(|error| take(&error).fault)
}

#[test]
fn full_and_resumed_handshakes_have_the_same_proof_on_both_sides() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let server = server(setting, required(world.trust()), &SessionTickets::new().unwrap());
        let (client, config) = client(setting, Some(&world.good));
        let proofs = [Full, Resumed].map(|kind| {
            let (near, far) = meet(&config, &server, "server.test");
            assert_eq!(far.handshake_kind(), Some(kind));
            let shown = server.client(&far, unix(0)).unwrap().unwrap();
            let proved = server.proof(shown, unix(0)).unwrap();
            // Both present the same chain.
            let of_server = client.proof(near.peer_certificates().unwrap(), unix(0)).unwrap();
            assert_eq!(proved, of_server);
            proved
        });
        assert_eq!(proofs[0], proofs[1]);
        assert_eq!(proofs[0].expires_at(), unix(24 * HOUR));
    });
}

#[test]
fn resumed_client_is_verified_again() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let check = |name: &str, clients, seconds, expected: Result<bool, PeerFault>| {
            let tickets = SessionTickets::new().unwrap();
            let first = server(setting, required(world.trust()), &tickets);
            let then = server(setting, clients, &tickets);
            let resumed = returns(setting, &first, &then, seconds);
            assert_eq!(resumed, expected, "{name}");
        };
        let lists = |below: &[u64], root: &[u64]| {
            required(world.listed(Some(&List::new(1, below)), Some(&List::new(1, root))))
        };
        check("nothing changed", required(world.trust()), 0, Ok(true));
        check("others were revoked", lists(&[999], &[49]), 0, Ok(true));
        check("the leaf was revoked", lists(&[1000], &[]), 0, Err(PeerFault::CrlHit));
        check("its authority was revoked", lists(&[], &[50]), 0, Err(PeerFault::CrlHit));
        check("a CRL has expired", lists(&[], &[]), 2 * HOUR, Err(PeerFault::CrlProcessingError));
        check("the leaf has expired", required(world.trust()), 25 * HOUR, Err(PeerFault::Expired));
        let other = World::new();
        check("the root was changed", required(other.trust()), 0, Err(PeerFault::Untrusted));
        let named = |name: &str| {
            let names = vec![StringMatch::Exact(name.into())];
            ClientAuthentication::Required(Arc::new(world.trust()), names)
        };
        check("its name is asked for", named(WEB), 0, Ok(true));
        let refused = Err(PeerFault::Rejected);
        check("another name is asked for", named("spiffe://mesh.test/ns/a/sa/other"), 0, refused);
        check("no client is asked", ClientAuthentication::None, 0, Ok(false));
    });
}

#[test]
fn client_rejected_on_resumption_can_present_a_new_certificate() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let tickets = SessionTickets::new().unwrap();
        let own = server(setting, required(world.trust()), &tickets);
        let (_, config) = client(setting, Some(&world.good));
        let meet = || meet(&config, &own, "server.test").1;
        assert_eq!(meet().handshake_kind(), Some(Full));
        let late = meet();
        assert_eq!(late.handshake_kind(), Some(Resumed));
        own.client(&late, unix(25 * HOUR)).unwrap_err();
        for _ in 0..64 {
            assert_eq!(meet().handshake_kind(), Some(Full));
        }
        assert_eq!(meet().handshake_kind(), Some(Resumed));
    });
}

#[test]
fn resumed_session_without_certificate_is_rejected_if_one_is_required() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let tickets = SessionTickets::new().unwrap();
        let (_, config) = client(setting, None);
        meet(&config, &server(setting, ClientAuthentication::None, &tickets), "server.test");
        let strict = server(setting, required(world.trust()), &tickets);
        let (_, resumed) = meet(&config, &strict, "server.test");
        assert_eq!(resumed.handshake_kind(), Some(Resumed));
        assert_eq!(strict.client(&resumed, unix(0)), Err(Error::NoCertificatesPresented));
        let optional = ClientAuthentication::Optional(Arc::new(world.trust()), Vec::new());
        meet(&config, &server(setting, ClientAuthentication::None, &tickets), "server.test");
        let (_, resumed) = meet(&config, &strict, "server.test");
        let resumed = server(setting, optional, &tickets)
            .client(&resumed, unix(0))
            .map(|client| client.is_some());
        assert_eq!(resumed, Ok(false));
    });
}

#[test]
fn session_is_resumed_only_for_the_same_listener_and_name() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let (_, config) = client(setting, Some(&world.good));
        let own = server(setting, required(world.trust()), &SessionTickets::new().unwrap());
        let other = server(setting, required(world.trust()), &SessionTickets::new().unwrap());
        let kind = |server: &ServerTls, name: &str| meet(&config, server, name).1.handshake_kind();
        assert_eq!(kind(&own, "server.test"), Some(Full));
        assert_eq!(kind(&own, "server.test"), Some(Resumed));
        assert_eq!(kind(&own, "other.test"), Some(Full), "another name");
        assert_eq!(kind(&other, "server.test"), Some(Full), "another listener");
        // Each client configuration has an identity and a session cache of its own.
        let (_, elsewhere) = client(setting, Some(&world.good));
        assert_eq!(meet(&elsewhere, &own, "server.test").1.handshake_kind(), Some(Full));
    });
}

#[test]
fn resumed_server_is_verified_again() {
    by_each_version(|version| {
        let world = World::new();
        let setting = Setting { world: &world, version };
        let tickets = SessionTickets::new().unwrap();
        let own = server(setting, required(world.trust()), &tickets);
        let (client, config) = client(setting, Some(&world.good));
        let name = "server.test".try_into().unwrap();
        let (first, _) = meet(&config, &own, "server.test");
        assert_eq!(first.handshake_kind(), Some(Full));
        assert_eq!(
            client.check_server(&first, &name, unix(25 * HOUR)),
            Ok(()),
            "it was just verified"
        );
        let (again, _) = meet(&config, &own, "server.test");
        assert_eq!(again.handshake_kind(), Some(Resumed));
        assert_eq!(client.check_server(&again, &name, unix(0)), Ok(()));
        let late = client.check_server(&again, &name, unix(25 * HOUR)).unwrap_err();
        assert_eq!(format!("{late:?}"), "InvalidCertificate(Expired)");
    });
}

#[test]
fn session_of_one_tls_version_is_not_resumed_in_another() {
    let world = World::new();
    let tickets = SessionTickets::new().unwrap();
    let both =
        |version| server(Setting { world: &world, version }, required(world.trust()), &tickets);
    let parameters = TlsParameters::default();
    let own = ClientTls::new(
        Some(&identity(&world.good)),
        Arc::new(world.trust()),
        vec![StringMatch::Exact(WEB.into())],
        &["h2".into()],
        &parameters,
    )
    .unwrap();
    let mut config = ClientConfig::clone(own.config());
    config.time_provider = Arc::new(Now);
    let config = Arc::new(config);
    let kind = |server: &ServerTls| meet(&config, server, "server.test").1.handshake_kind();
    assert_eq!(kind(&both(TlsVersion::V1_3)), Some(Full));
    assert_eq!(kind(&both(TlsVersion::V1_2)), Some(Full));
    assert_eq!(kind(&both(TlsVersion::V1_3)), Some(Full));
}
