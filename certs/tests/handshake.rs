//! Complete handshakes between weft's TLS configurations, in memory and at a fixed time.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

mod pki;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use pki::{HOUR, Leaf, List, WEB, World, at, ca_params, carry, crl_pem, leaf_params, unix};
use rcgen::{ExtendedKeyUsagePurpose, IsCa};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::time_provider::TimeProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Connection, Error, HandshakeKind,
    RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use weft_certs::fault::PeerFault;
use weft_certs::request::{self, CheckedRequest};
use weft_certs::tls::{
    self, ClientAuthentication, ClientTls, LoadedIdentity, ServerTls, SessionTickets,
};
use weft_certs::{Authority, RevokedCertificate, TrustError, TrustStore, VerifiedPeer};
use weft_model::{
    CipherSuite, ExpiredCrlAction, RevocationMode, RevocationPolicy, SpiffeId, StringMatch,
    TlsParameters, TlsVersion,
};

const OTHER: &str = "spiffe://mesh.test/ns/a/sa/other";

/// A clock that changes only when a test sets it, in seconds from the time of the tests.
#[derive(Debug, Default)]
struct Clock(AtomicI64);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.0.load(Ordering::Relaxed)))
    }
}

/// A handshake that one end rejected: its error, and the alert that the other end received.
#[derive(Debug)]
struct Refused {
    error: Error,
    fault: PeerFault,
    alert: AlertDescription,
}

impl Refused {
    fn is(&self, fault: PeerFault, alert: AlertDescription) {
        assert_eq!((self.fault, self.alert), (fault, alert), "{:?}", self.error);
    }
}

/// Delivers the data of `from` to `to`, and the alert back when `to` rejects it.
fn deliver(from: &mut Connection, to: &mut Connection) -> Result<(), Refused> {
    carry(from, to).map_err(|error| {
        let fault = weft_certs::fault::take(&error).fault;
        match carry(to, from) {
            Err(Error::AlertReceived(alert)) => Refused { error, fault, alert },
            other => panic!("{error:?} sent {other:?} to the peer"),
        }
    })
}

/// Runs a handshake and returns the client and the server.
fn meet(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> Result<(Connection, Connection), Refused> {
    let name = "server.test".try_into().unwrap();
    let mut client: Connection = ClientConnection::new(client.clone(), name).unwrap().into();
    let mut server: Connection = ServerConnection::new(server.clone()).unwrap().into();
    while client.wants_write() || server.wants_write() {
        deliver(&mut client, &mut server)?;
        deliver(&mut server, &mut client)?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

fn identity(leaf: &Leaf) -> LoadedIdentity {
    LoadedIdentity::load(leaf.chain.as_bytes(), leaf.key.as_bytes()).unwrap()
}

fn server(leaf: &Leaf, clients: ClientAuthentication, clock: &Arc<Clock>) -> Arc<ServerConfig> {
    let config = tls::server(&identity(leaf), clients, &["h2".into()]).unwrap();
    let mut config = Arc::unwrap_or_clone(config);
    config.time_provider = clock.clone();
    Arc::new(config)
}

fn client(leaf: Option<&Leaf>, trust: TrustStore, names: Vec<StringMatch>) -> Arc<ClientConfig> {
    let identity = leaf.map(identity);
    let alpn = ["h2".into(), "http/1.1".into()];
    let config = tls::client(identity.as_ref(), Arc::new(trust), names, &alpn).unwrap();
    let mut config = Arc::unwrap_or_clone(config);
    config.time_provider = Arc::new(Clock::default());
    Arc::new(config)
}

impl World {
    /// A client presents `leaf` to a valid server that verifies with `trust`.
    fn client_shows(&self, leaf: &Leaf, trust: TrustStore) -> Result<(), Refused> {
        let trust = Arc::new(trust);
        self.meet_by_each_version(|version| {
            let required = ClientAuthentication::Required(trust.clone(), Vec::new());
            let client = client_by(version, Some(leaf), self.trust(), Vec::new());
            meet(&client, &server_by(version, &self.good, required)).map(drop)
        })
    }

    /// A server presents `leaf` to a client that verifies with `trust`.
    fn server_shows(&self, leaf: &Leaf, trust: TrustStore) -> Result<(), Refused> {
        let trust = Arc::new(trust);
        self.meet_by_each_version(|version| {
            let server = server_by(version, leaf, ClientAuthentication::None);
            meet(&client_by(version, None, trust.clone(), Vec::new()), &server).map(drop)
        })
    }

    /// The result of a handshake, which must be the same in TLS 1.2 and TLS 1.3.
    fn meet_by_each_version(
        &self,
        meet: impl Fn(TlsVersion) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let older = meet(TlsVersion::V1_2);
        let newer = meet(TlsVersion::V1_3);
        let seen = |met: &Result<(), Refused>| {
            met.as_ref().err().map(|refused| (refused.fault, refused.alert))
        };
        assert_eq!(seen(&older), seen(&newer), "{older:?} {newer:?}");
        newer
    }
}

fn only(version: TlsVersion) -> TlsParameters {
    TlsParameters { minimum: version, maximum: version, ..TlsParameters::default() }
}

/// A server that allows only this version.
fn server_by(version: TlsVersion, leaf: &Leaf, clients: ClientAuthentication) -> Arc<ServerConfig> {
    let tickets = SessionTickets::new().unwrap();
    let server = ServerTls::new(&identity(leaf), clients, &["h2".into()], &only(version), &tickets);
    let mut config = ServerConfig::clone(server.unwrap().config());
    config.time_provider = Arc::new(Clock::default());
    Arc::new(config)
}

/// A client that allows only this version.
fn client_by(
    version: TlsVersion,
    leaf: Option<&Leaf>,
    trust: impl Into<Arc<TrustStore>>,
    names: Vec<StringMatch>,
) -> Arc<ClientConfig> {
    let identity = leaf.map(identity);
    let alpn = ["h2".into()];
    let client = ClientTls::new(identity.as_ref(), trust.into(), names, &alpn, &only(version));
    let mut config = ClientConfig::clone(client.unwrap().config());
    config.time_provider = Arc::new(Clock::default());
    Arc::new(config)
}

fn peer(connection: &Connection) -> VerifiedPeer {
    VerifiedPeer::assertion(&connection.peer_certificates().unwrap()[0]).unwrap()
}

#[test]
fn valid_peers_complete_the_handshake_with_their_spiffe_ids() {
    let files = Authority::create("mesh.test", pki::now()).unwrap();
    let authority = Authority::load(files, "mesh.test").unwrap();
    let issue = |id: &str| {
        let pending = request::make(&SpiffeId::parse(id).unwrap()).unwrap();
        let request = CheckedRequest::parse(&pending.request_pem).unwrap();
        let issued = authority.issue(&request, Duration::from_secs(3600), pki::now()).unwrap();
        (Leaf { chain: issued.chain.concat(), key: pending.key_pem.to_string() }, issued.serial)
    };
    let (web, web_serial) = issue(WEB);
    let (other, other_serial) = issue(OTHER);
    let revoked = [RevokedCertificate { serial: "77".into(), at: pki::now() }];
    let lists = authority.crls(&revoked, 1, pki::now(), Duration::from_secs(60)).unwrap();
    let roots = authority.trust_bundle().as_bytes();
    let trust =
        || TrustStore::load(roots, Some(lists.as_bytes()), Vec::new(), None, unix(0)).unwrap();

    let clients = ClientAuthentication::Required(Arc::new(trust()), Vec::new());
    let server = server(&web, clients, &Arc::default());
    let client = client(Some(&other), trust(), vec![StringMatch::Exact(WEB.into())]);
    let (client, server) = meet(&client, &server).unwrap();

    let seen_client = peer(&server);
    let seen_server = peer(&client);
    assert_eq!(seen_client.identity().map(SpiffeId::as_str), Some(OTHER));
    assert_eq!(seen_server.identity().map(SpiffeId::as_str), Some(WEB));
    assert_eq!(seen_client.serial_hex(), other_serial.to_uppercase());
    assert_eq!(seen_server.serial_hex(), web_serial.to_uppercase());
    assert_eq!(
        (client.alpn_protocol(), server.alpn_protocol()),
        (Some(&b"h2"[..]), Some(&b"h2"[..]))
    );
}

#[test]
fn client_without_certificate_is_rejected_only_if_one_is_required() {
    let world = World::new();
    let trust = || Arc::new(world.trust());
    let meet = |leaf, clients| {
        let server = server(&world.good, clients, &Arc::default());
        meet(&client(leaf, world.trust(), Vec::new()), &server).map(|(_, server)| server)
    };
    meet(None, ClientAuthentication::Required(trust(), Vec::new()))
        .unwrap_err()
        .is(PeerFault::Unmapped, AlertDescription::CertificateRequired);
    let optional = || ClientAuthentication::Optional(trust(), Vec::new());
    assert!(meet(None, optional()).unwrap().peer_certificates().is_none());
    let shown = meet(Some(&world.good), optional()).unwrap();
    assert_eq!(peer(&shown).identity().map(SpiffeId::as_str), Some(WEB));
    let unasked = meet(Some(&world.good), ClientAuthentication::None).unwrap();
    assert!(unasked.peer_certificates().is_none());

    let unchecked = |required| ClientAuthentication::Unchecked { required };
    assert!(meet(None, unchecked(false)).is_ok());
    meet(None, unchecked(true))
        .unwrap_err()
        .is(PeerFault::Unmapped, AlertDescription::CertificateRequired);

    let foreign = pki::leaf(&leaf_params(WEB, 1), &pki::root("foreign"), &[]);
    assert!(meet(Some(&foreign), unchecked(true)).is_ok());
    let long = "x".repeat(40_000);
    let large = pki::leaf(&leaf_params(&format!("{WEB}{long}"), 1), &pki::root("foreign"), &[]);
    meet(Some(&large), unchecked(true))
        .unwrap_err()
        .is(PeerFault::MaxSizeExceeded, AlertDescription::BadCertificate);
    meet(Some(&foreign), optional())
        .unwrap_err()
        .is(PeerFault::Untrusted, AlertDescription::CertificateUnknown);
}

#[test]
fn invalid_certificate_is_rejected_by_client_and_server_with_the_matching_alert() {
    let world = World::new();
    let root = &world.root;
    let below = &world.below;
    let check = |leaf: &Leaf, fault, alert| {
        world.client_shows(leaf, world.trust()).unwrap_err().is(fault, alert);
        world.server_shows(leaf, world.trust()).unwrap_err().is(fault, alert);
    };
    let leaf = |tweak: &dyn Fn(&mut rcgen::CertificateParams)| {
        let mut params = leaf_params(WEB, 1);
        tweak(&mut params);
        pki::leaf(&params, below, &[below])
    };
    let good = leaf_params(WEB, 1);
    let expired = leaf(&|params| params.not_after = at(-1));
    check(&expired, PeerFault::Expired, AlertDescription::CertificateExpired);
    let early = leaf(&|params| params.not_before = at(1));
    check(&early, PeerFault::NotYetValid, AlertDescription::CertificateExpired);
    let purpose =
        leaf(&|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]);
    check(&purpose, PeerFault::PurposeInvalid, AlertDescription::UnsupportedCertificate);
    let authority = leaf(&|params| params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    check(&authority, PeerFault::Invalid, AlertDescription::BadCertificate);

    let foreign = pki::root("foreign");
    let foreign = pki::leaf(&good, &foreign, &[&foreign]);
    check(&foreign, PeerFault::Untrusted, AlertDescription::CertificateUnknown);
    let impostor = pki::leaf(&good, &pki::root("root"), &[]);
    check(&impostor, PeerFault::Untrusted, AlertDescription::CertificateUnknown);
    let alone = pki::leaf(&good, below, &[]);
    check(&alone, PeerFault::Untrusted, AlertDescription::CertificateUnknown);
    let key = rcgen::KeyPair::generate().unwrap();
    let own = good.self_signed(&key).unwrap().pem();
    let own = Leaf { chain: own, key: key.serialize_pem() };
    check(&own, PeerFault::Untrusted, AlertDescription::CertificateUnknown);

    // A leaf certificate that signed another leaf.
    let false_authority = pki::intermediate(leaf_params(OTHER, 2), below);
    let under_leaf = pki::leaf(&good, &false_authority, &[&false_authority, below]);
    check(&under_leaf, PeerFault::Invalid, AlertDescription::BadCertificate);
    let mut params = ca_params("over");
    params.not_after = at(-1);
    let over = pki::intermediate(params, root);
    let under_expired = pki::leaf(&good, &over, &[&over]);
    check(&under_expired, PeerFault::Expired, AlertDescription::CertificateExpired);
}

#[test]
fn certificate_for_one_role_is_rejected_in_the_other() {
    let world = World::new();
    let with = |usage| {
        let mut params = leaf_params(WEB, 1);
        params.extended_key_usages = vec![usage];
        pki::leaf(&params, &world.below, &[&world.below])
    };
    let for_server = with(ExtendedKeyUsagePurpose::ServerAuth);
    let for_client = with(ExtendedKeyUsagePurpose::ClientAuth);
    let refusal = (PeerFault::PurposeInvalid, AlertDescription::UnsupportedCertificate);
    world.client_shows(&for_server, world.trust()).unwrap_err().is(refusal.0, refusal.1);
    world.server_shows(&for_client, world.trust()).unwrap_err().is(refusal.0, refusal.1);
    world.client_shows(&for_client, world.trust()).unwrap();
    world.server_shows(&for_server, world.trust()).unwrap();
}

#[test]
fn peer_needs_one_name_of_each_list_of_accepted_names() {
    let world = World::new();
    let exact = |name: &str| vec![StringMatch::Exact(name.into())];
    let under = || vec![StringMatch::Prefix("spiffe://mesh.test/ns/a/".into())];
    let check = |of_store: Vec<StringMatch>, of_listener: Vec<StringMatch>, good: bool| {
        let trust = || world.named(of_store.clone());
        let required = ClientAuthentication::Required(Arc::new(trust()), of_listener.clone());
        let strict = server(&world.good, required, &Arc::default());
        let shown = meet(&client(Some(&world.good), world.trust(), Vec::new()), &strict);
        let open = server(&world.good, ClientAuthentication::None, &Arc::default());
        let seen = meet(&client(None, trust(), of_listener), &open);
        if good {
            shown.unwrap();
            seen.unwrap();
        } else {
            shown.unwrap_err().is(PeerFault::Rejected, AlertDescription::AccessDenied);
            seen.unwrap_err().is(PeerFault::Rejected, AlertDescription::BadCertificate);
        }
    };
    check(Vec::new(), Vec::new(), true);
    check(exact(WEB), Vec::new(), true);
    check(Vec::new(), exact(WEB), true);
    check(under(), exact(WEB), true);
    check(exact("server.test"), under(), true);
    check(exact(OTHER), Vec::new(), false);
    check(Vec::new(), exact(OTHER), false);
    check(exact(WEB), exact(OTHER), false);
    check(exact(OTHER), exact(WEB), false);
    check(exact("leaf"), Vec::new(), false);
}

#[test]
fn server_without_accepted_names_must_have_the_host_name() {
    let world = World::new();
    let mut params = leaf_params(WEB, 1);
    params.subject_alt_names.pop();
    let nameless = pki::leaf(&params, &world.below, &[&world.below]);
    world
        .server_shows(&nameless, world.trust())
        .unwrap_err()
        .is(PeerFault::Rejected, AlertDescription::BadCertificate);
    world.server_shows(&nameless, world.named(vec![StringMatch::Exact(WEB.into())])).unwrap();
}

#[test]
fn revoked_leaf_and_leaf_below_revoked_intermediate_are_rejected() {
    let world = World::new();
    let list = |serials: &[u64]| List::new(1, serials);
    let check = |below: &[u64], root: &[u64], good: bool| {
        let trust = || world.listed(Some(&list(below)), Some(&list(root)));
        for outcome in
            [world.client_shows(&world.good, trust()), world.server_shows(&world.good, trust())]
        {
            match outcome {
                Ok(()) => assert!(good, "{below:?} {root:?}"),
                Err(refused) => {
                    assert!(!good, "{below:?} {root:?}: {refused:?}");
                    refused.is(PeerFault::CrlHit, AlertDescription::CertificateRevoked);
                }
            }
        }
    };
    check(&[], &[], true);
    check(&[999, 1001, 50], &[1000, 51], true);
    check(&[1000], &[], false);
    check(&[], &[50], false);
}

/// The results of a valid leaf with these CRLs for each policy: strict, unknown allowed, expired allowed, both
/// allowed. Empty: the handshake succeeds.
fn by_policy(world: &World, below: Option<&List>, root: Option<&List>) -> [String; 4] {
    let strict = RevocationPolicy::default();
    let unknown = RevocationPolicy { mode: RevocationMode::Soft, ..strict };
    let expired = RevocationPolicy { on_expired: ExpiredCrlAction::Warn, ..strict };
    let both = RevocationPolicy { on_expired: ExpiredCrlAction::Ignore, ..unknown };
    [strict, unknown, expired, both].map(|policy| {
        let trust = || world.listed_under(policy, below, root);
        let outcome = |end: Result<(), Refused>| match end {
            Ok(()) => String::new(),
            Err(refused) => format!("{} {:?}", refused.fault, refused.alert),
        };
        let shown = outcome(world.client_shows(&world.good, trust()));
        let seen = outcome(world.server_shows(&world.good, trust()));
        assert_eq!(shown, seen, "{policy:?}");
        shown
    })
}

#[test]
fn unknown_or_expired_revocation_status_is_rejected_unless_the_policy_allows_it() {
    const UNKNOWN: &str = "ClientCertCrlProcessingError CertificateUnknown";
    const EXPIRED: &str = UNKNOWN;
    const REVOKED: &str = "ClientCertCrlHit CertificateRevoked";
    let world = World::new();
    let fresh = List::new(1, &[]);
    let naming = |serial| List::new(1, &[serial]);
    let over = |list: List| List { this_update: -HOUR, next_update: -60, ..list };
    let expired = over(fresh.clone());
    let check = |below: Option<&List>, root: Option<&List>, expected: [&str; 4]| {
        assert_eq!(by_policy(&world, below, root), expected);
    };
    check(Some(&fresh), Some(&fresh), ["", "", "", ""]);
    check(None, Some(&fresh), [UNKNOWN, "", UNKNOWN, ""]);
    check(Some(&fresh), None, [UNKNOWN, "", UNKNOWN, ""]);
    check(Some(&expired), Some(&fresh), [EXPIRED, EXPIRED, "", ""]);
    check(Some(&fresh), Some(&expired), [EXPIRED, EXPIRED, "", ""]);
    check(Some(&expired), None, [EXPIRED, EXPIRED, UNKNOWN, ""]);
    check(None, Some(&expired), [UNKNOWN, EXPIRED, UNKNOWN, ""]);
    // Every policy rejects a revoked certificate.
    check(Some(&naming(1000)), None, [REVOKED; 4]);
    check(Some(&over(naming(1000))), None, [REVOKED; 4]);
    check(Some(&over(naming(1000))), Some(&fresh), [REVOKED; 4]);
    check(Some(&fresh), Some(&over(naming(50))), [REVOKED; 4]);
    check(None, Some(&naming(50)), [UNKNOWN, REVOKED, UNKNOWN, REVOKED]);
}

#[test]
fn crl_file_without_a_crl_is_rejected() {
    let world = World::new();
    let roots = world.root.pem();
    for nothing in ["", "# none today\n", &world.below.pem()] {
        let built =
            TrustStore::load(roots.as_bytes(), Some(nothing.as_bytes()), Vec::new(), None, unix(0));
        assert_eq!(built.map(drop), Err(TrustError::NoCrls), "{nothing:?}");
    }
}

#[test]
fn updated_store_keeps_newer_crls_of_the_previous_store() {
    let world = World::new();
    let lists = |number, serials: &[u64]| {
        let below = List::new(number, serials).signed_by(&world.below);
        crl_pem(&below)
            + &crl_pem(&List::new(number, &[]).signed_by(&world.root))
            + &world.below.pem()
    };
    let load = |lists: &str, previous: Option<&TrustStore>| {
        let roots = world.root.pem();
        let lists = Some(lists.as_bytes());
        TrustStore::load(roots.as_bytes(), lists, Vec::new(), previous, unix(0)).unwrap()
    };
    let first = load(&lists(2, &[1000]), None);
    let second = load(&lists(1, &[]), Some(&first));
    assert_eq!(second.revocations().unwrap().warnings().len(), 2);
    world
        .client_shows(&world.good, second)
        .unwrap_err()
        .is(PeerFault::CrlHit, AlertDescription::CertificateRevoked);
    world.client_shows(&world.good, load(&lists(3, &[]), Some(&first))).unwrap();
}

/// The path is cached; dates and CRLs are checked in each handshake.
#[test]
fn cached_path_is_checked_for_dates_and_crls() {
    let world = World::new();
    let short = |seconds| {
        let mut params = leaf_params(WEB, 1001);
        params.not_after = at(seconds);
        pki::leaf(&params, &world.below, &[&world.below])
    };
    let below = List { next_update: 3 * HOUR, ..List::new(1, &[]) };
    let trust = world.listed(Some(&below), Some(&List { next_update: 2 * HOUR, ..below.clone() }));
    let clock = Arc::new(Clock::default());
    let required = ClientAuthentication::Required(Arc::new(trust), Vec::new());
    let server = server(&world.good, required, &clock);
    let meets = |leaf: &Leaf, seconds| {
        clock.0.store(seconds, Ordering::Relaxed);
        meet(&client(Some(leaf), world.trust(), Vec::new()), &server).map(drop)
    };
    let hour = short(HOUR);
    let day = short(24 * HOUR);
    for _ in 0..3 {
        meets(&hour, 0).unwrap();
        meets(&day, 0).unwrap();
    }
    meets(&hour, HOUR).unwrap();
    meets(&hour, HOUR + 1)
        .unwrap_err()
        .is(PeerFault::Expired, AlertDescription::CertificateExpired);
    meets(&day, HOUR + 1).unwrap();
    // The clock is set back.
    meets(&day, -2 * HOUR)
        .unwrap_err()
        .is(PeerFault::NotYetValid, AlertDescription::CertificateExpired);
    // The CRL of the root, which covers the intermediate, has expired.
    let unknown = (PeerFault::CrlProcessingError, AlertDescription::CertificateUnknown);
    meets(&day, 2 * HOUR + 1).unwrap_err().is(unknown.0, unknown.1);
    meets(&day, HOUR).unwrap();
    // The same leaf without its intermediate is another cache entry.
    let alone = Leaf {
        chain: day.chain.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap().into(),
        key: day.key.clone(),
    };
    assert_ne!(alone.chain, day.chain);
    meets(&alone, 0).unwrap_err().is(PeerFault::Untrusted, AlertDescription::CertificateUnknown);
}

/// A rustls client with session resumption and without weft code.
fn eager_client(
    world: &World,
    leaf: &Leaf,
    version: &'static SupportedProtocolVersion,
    clock: &Arc<Clock>,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(world.root.der().clone()).unwrap();
    let chain = CertificateDer::pem_slice_iter(leaf.chain.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.time_provider = clock.clone();
    Arc::new(config)
}

/// A rustls server with session resumption and without weft code.
fn eager_server(world: &World, clock: &Arc<Clock>) -> Arc<ServerConfig> {
    let chain = CertificateDer::pem_slice_iter(world.good.chain.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(world.good.key.as_bytes()).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.map(Result::unwrap).collect(), key)
        .unwrap();
    config.time_provider = clock.clone();
    Arc::new(config)
}

#[test]
fn plain_server_config_resumes_no_sessions() {
    let world = World::new();
    let clock = Arc::new(Clock::default());
    let mut params = leaf_params(WEB, 1);
    params.not_after = at(60);
    let brief = pki::leaf(&params, &world.below, &[&world.below]);
    let required = ClientAuthentication::Required(Arc::new(world.trust()), Vec::new());
    let ours = server(&world.good, required, &clock);
    let theirs = eager_server(&world, &clock);
    clock.0.store(0, Ordering::Relaxed);
    let client = eager_client(&world, &brief, &TLS13, &clock);
    let kind = |server| meet(&client, server).unwrap().1.handshake_kind();
    assert_eq!(kind(&ours), Some(HandshakeKind::Full));
    assert_eq!(kind(&ours), Some(HandshakeKind::Full));
    clock.0.store(120, Ordering::Relaxed);
    meet(&client, &ours).unwrap_err().is(PeerFault::Expired, AlertDescription::CertificateExpired);
    // The same client resumes sessions with another server.
    assert_eq!(kind(&theirs), Some(HandshakeKind::Full));
    assert_eq!(kind(&theirs), Some(HandshakeKind::Resumed));
}

#[test]
fn plain_client_config_resumes_no_sessions() {
    let world = World::new();
    let theirs = eager_server(&world, &Arc::default());
    let ours = client(Some(&world.good), world.trust(), Vec::new());
    for _ in 0..3 {
        let (client, _) = meet(&ours, &theirs).unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn older_tls_version_is_rejected() {
    let world = World::new();
    let clock = Arc::new(Clock::default());
    let required = ClientAuthentication::Required(Arc::new(world.trust()), Vec::new());
    let server = server(&world.good, required, &clock);
    let client = eager_client(&world, &world.good, &TLS12, &clock);
    meet(&client, &server).unwrap_err().is(PeerFault::Unmapped, AlertDescription::ProtocolVersion);
}

#[test]
fn peer_without_the_private_key_is_rejected_in_each_tls_version() {
    let world = World::new();
    let foreign = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let resolver = || {
        let chain = CertificateDer::pem_slice_iter(world.good.chain.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(foreign.as_bytes()).unwrap();
        let key = default_provider().key_provider.load_private_key(key).unwrap();
        let certified = rustls::sign::CertifiedKey::new(chain.map(Result::unwrap).collect(), key);
        Arc::new(rustls::sign::SingleCertAndKey::from(certified))
    };
    let seen = |met: Result<(Connection, Connection), Refused>| {
        let refused = met.map(drop).unwrap_err();
        let bad_signature = rustls::CertificateError::BadSignature;
        assert_eq!(refused.error, Error::InvalidCertificate(bad_signature));
        refused.is(PeerFault::Untrusted, AlertDescription::DecryptError);
    };
    for (_, version) in TlsVersion::WORDS {
        let required = ClientAuthentication::Required(Arc::new(world.trust()), Vec::new());
        let server = server_by(version, &world.good, required);
        // A client with a session would resume it, and the private key would not be used.
        let client = || client_by(version, Some(&world.good), world.trust(), Vec::new());
        meet(&client(), &server).unwrap();
        let mut impostor = ClientConfig::clone(&client());
        impostor.client_auth_cert_resolver = resolver();
        seen(meet(&Arc::new(impostor), &server));
        let mut impostor = ServerConfig::clone(&server);
        impostor.cert_resolver = resolver();
        seen(meet(&client(), &Arc::new(impostor)));
        let unverified = ClientTls::unverified(None, &[], &only(version)).unwrap();
        let mut impostor =
            ServerConfig::clone(&server_by(version, &world.good, ClientAuthentication::None));
        impostor.cert_resolver = resolver();
        seen(meet(unverified.config(), &Arc::new(impostor)));
    }
}

#[test]
fn tls_versions_and_suites_match_the_parameters() {
    let world = World::new();
    let agreed = |parameters: TlsParameters, theirs: &'static SupportedProtocolVersion| {
        let tickets = SessionTickets::new().unwrap();
        let none = ClientAuthentication::None;
        let server = ServerTls::new(&identity(&world.good), none, &[], &parameters, &tickets);
        let client = eager_client(&world, &world.good, theirs, &Arc::default());
        let met = meet(&client, server.unwrap().config());
        met.map(|(client, _)| client.negotiated_cipher_suite().unwrap().suite())
            .map_err(|refused| refused.alert)
    };
    let bounds = |minimum, maximum| TlsParameters { minimum, maximum, ..TlsParameters::default() };
    let v1_2 = TlsVersion::V1_2;
    let v1_3 = TlsVersion::V1_3;
    let refused = Err(AlertDescription::ProtocolVersion);
    let aes = rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256;
    assert_eq!(agreed(bounds(v1_2, v1_3), &TLS12), Ok(aes));
    assert_eq!(agreed(bounds(v1_2, v1_2), &TLS12), Ok(aes));
    assert_eq!(agreed(bounds(v1_2, v1_2), &TLS13), refused);
    assert_eq!(agreed(bounds(v1_3, v1_3), &TLS12), refused);
    assert_eq!(agreed(TlsParameters::meshed(Vec::new()), &TLS12), refused);
    let suites = |cipher_suites: &[CipherSuite]| TlsParameters {
        cipher_suites: cipher_suites.to_vec(),
        ..bounds(v1_2, v1_3)
    };
    let two = suites(&[CipherSuite::EcdsaChaCha20, CipherSuite::EcdsaAes128Gcm]);
    let chacha = rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256;
    assert_eq!(agreed(two.clone(), &TLS12), Ok(chacha), "the server chooses by its order");
    let newer = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    assert_eq!(agreed(two, &TLS13), Ok(newer), "suites of TLS 1.3 are not configurable");
    let rsa = suites(&[CipherSuite::RsaAes128Gcm]);
    assert_eq!(agreed(rsa, &TLS12), Err(AlertDescription::HandshakeFailure), "the key is ECDSA");
}
