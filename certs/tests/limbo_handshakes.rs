//! Complete handshakes with the chains and keys of C2SP/x509-limbo.
//!
//! The peer is a rustls endpoint without verification, so it can present chains that weft would not load. The data
//! (Apache-2.0) is read if present; `limbo-exceptions.txt` lists the cases with another result, and the reasons.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test panics on an unexpected result and prints skipped parts"
)]

mod exceptions;
#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use exceptions::{Exceptions, Outcome, Verdict};
use pki::{World, carry};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, sign};
use rustls::server::NoClientAuth;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error, ServerConfig,
    ServerConnection, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde_json::Value;
use weft_certs::tls::{self, ClientAuthentication, LoadedIdentity};
use weft_certs::{TrustParts, TrustStore};
use weft_model::RevocationPolicy;

/// Most cases of the suite have no time: then the time is 2027-01-15, 08:00 UTC.
const NOW: u64 = pki::NOW;

#[derive(Debug)]
struct Clock(UnixTime);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.0)
    }
}

/// The role of the peer that a case verifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Client,
    Server,
}

/// A case of the suite.
struct Case {
    id: String,
    kind: Kind,
    wanted: Verdict,
    roots: String,
    lists: Option<String>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    now: UnixTime,
    /// The host name or address that the client connects to.
    name: ServerName<'static>,
}

fn texts(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap())
}

/// Seconds since 1970 of a time such as `2024-01-01T00:00:00+00:00`.
fn seconds(text: &str) -> u64 {
    use time::format_description::well_known::Rfc3339;
    let time = time::OffsetDateTime::parse(text, &Rfc3339).unwrap();
    time.unix_timestamp().try_into().unwrap()
}

impl Case {
    /// None if no peer could have the leaf's key in TLS 1.3: the suite has no key, or a DSA key.
    fn read(case: &Value) -> Option<Self> {
        let text = |field: &str| case[field].as_str().unwrap().to_owned();
        let key = case["peer_certificate_key"].as_str()?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).ok()?;
        let leaf = [text("peer_certificate")];
        let leaf = leaf.iter().map(String::as_str);
        let chain = leaf.chain(texts(&case["untrusted_intermediates"]));
        let lists: String = texts(&case["crls"]).collect();
        Some(Self {
            id: text("id"),
            kind: match case["validation_kind"].as_str() {
                Some("CLIENT") => Kind::Client,
                Some("SERVER") => Kind::Server,
                other => panic!("{}: {other:?}", case["id"]),
            },
            wanted: match case["expected_result"].as_str() {
                Some("SUCCESS") => Verdict::Accepted,
                Some("FAILURE") => Verdict::Refused,
                other => panic!("{}: {other:?}", case["id"]),
            },
            roots: texts(&case["trusted_certs"]).collect::<Vec<_>>().join("\n"),
            lists: (!lists.is_empty()).then_some(lists),
            chain: chain
                .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
                .collect(),
            key: sign::any_supported_type(&key).ok()?,
            now: UnixTime::since_unix_epoch(Duration::from_secs(
                case["validation_time"].as_str().map_or(NOW, seconds),
            )),
            name: name(&case["expected_peer_name"]["value"]),
        })
    }

    fn trust(&self) -> Result<Arc<TrustStore>, String> {
        let parts = TrustParts {
            roots: self.roots.as_bytes(),
            revocations: self.lists.as_ref().map(String::as_bytes),
            names: Vec::new(),
            policy: RevocationPolicy::default(),
        };
        TrustStore::build(parts, None, self.now).map(Arc::new).map_err(|error| error.to_string())
    }

    /// The certificate and key of the peer, without verification.
    fn shown(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(CertifiedKey::new(self.chain.clone(), self.key.clone())))
    }

    /// Runs the handshake of the case.
    fn run(&self, own: &LoadedIdentity) -> Result<(), String> {
        let trust = self.trust()?;
        match self.kind {
            Kind::Client => self.as_client(trust, own),
            Kind::Server => self.as_server(trust),
        }
        .map_err(|error| format!("{error:?}"))
    }

    fn as_client(&self, trust: Arc<TrustStore>, own: &LoadedIdentity) -> Result<(), Error> {
        let client = builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous))
            .with_client_cert_resolver(self.shown());
        let clients = ClientAuthentication::Required(trust.clone(), Vec::new());
        let server = tls::server(own, clients, &[]).unwrap();
        let mut server = Arc::unwrap_or_clone(server);
        server.time_provider = Arc::new(Clock(self.now));
        let result = meet(client, server, &self.name);
        // The same check without a handshake.
        let checked = tls::check_client(trust, &self.chain, self.now);
        assert_eq!(format!("{checked:?}"), format!("{result:?}"), "{}", self.id);
        result
    }

    fn as_server(&self, trust: Arc<TrustStore>) -> Result<(), Error> {
        let server = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(Arc::new(NoClientAuth))
            .with_cert_resolver(self.shown());
        let client = tls::client(None, trust, Vec::new(), &[]).unwrap();
        let mut client = Arc::unwrap_or_clone(client);
        client.time_provider = Arc::new(Clock(self.now));
        meet(client, server, &self.name)
    }
}

/// Cases without a peer name accept any name.
fn name(value: &Value) -> ServerName<'static> {
    let value = value.as_str().unwrap_or("example.com").to_owned();
    value.try_into().unwrap()
}

fn builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
}

/// Returns the error of the weft endpoint; the peer has no verification and so no errors.
fn meet(
    client: ClientConfig,
    server: ServerConfig,
    name: &ServerName<'static>,
) -> Result<(), Error> {
    let client = ClientConnection::new(Arc::new(client), name.clone()).unwrap();
    let (mut client, mut server): (Connection, Connection) =
        (client.into(), ServerConnection::new(Arc::new(server)).unwrap().into());
    while client.wants_write() || server.wants_write() {
        carry(&mut client, &mut server)?;
        carry(&mut server, &mut client)?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(())
}

/// A client that accepts every server.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        panic!("the weft configurations use only TLS 1.3");
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// All cases; none if the data is missing, which the test prints.
fn cases() -> Option<Vec<Case>> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/suites");
    let folder = std::env::var_os("WEFT_SUITES").map_or(beside, PathBuf::from);
    let file = folder.join("x509-limbo.json");
    if !file.exists() {
        eprintln!("skipped: {} not found", file.display());
        return None;
    }
    let suite: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    Some(suite["testcases"].as_array().unwrap().iter().filter_map(Case::read).collect())
}

fn outcomes(cases: &[Case]) -> Vec<Outcome> {
    let good = World::new().good;
    let own = LoadedIdentity::load(good.chain.as_bytes(), good.key.as_bytes()).unwrap();
    cases.iter().map(|case| Outcome::new(case.id.clone(), case.wanted, case.run(&own))).collect()
}

#[test]
fn limbo_peers_have_the_expected_result() {
    let Some(cases) = cases() else { return };
    assert!(cases.len() >= 80, "{} cases", cases.len());
    let exceptions = Exceptions::read(include_str!("limbo-exceptions.txt"));
    exceptions.hold(&outcomes(&cases));
}
