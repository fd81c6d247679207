//! Publishing with a valid and with an invalid `mesh.yaml`.

use std::path::PathBuf;

use weft_certs::Authority;
use weft_model::SpiffeId;

use super::*;

const DOMAIN: &str = "mesh.test";
const MESH: &str = r#"trust_domain: mesh.test
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, target: 8080, protocol: http}], endpoints: [{address: 10.90.1.1}]}
security:
  issuers: {login: {issuer: me, audiences: [web], jwks_file: keys.json}}
  policies: [{service: web, allow: [{from: [web], token: login}]}]
"#;

const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

/// A publisher with its file and store in a temporary folder.
struct TestPublisher {
    folder: tempfile::TempDir,
    publisher: Publisher,
}

impl TestPublisher {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("mesh.yaml"), MESH).expect("written");
        std::fs::write(folder.path().join("keys.json"), KEYS).expect("written");
        let files = Authority::create(DOMAIN, wall_clock()).expect("an authority");
        let state = folder.path().join("state");
        let store = Arc::new(Store::create(&state, DOMAIN, &files).expect("a store"));
        let authority_set = store.authority_set().expect("present");
        let authorities = Authorities::load(authority_set).expect("valid");
        let sources = PublisherSources {
            file: MeshFile::new(folder.path().join("mesh.yaml")),
            store,
            authorities: Arc::new(CurrentAuthorities::new(authorities)),
            clock: Arc::new(SteadyClock::start()),
        };
        let publisher = Publisher::new(sources, watch::Sender::default(), watch::Sender::default());
        let mut running = Self { folder, publisher };
        running.publisher.first().expect("a valid mesh");
        running
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Issues a certificate, and revokes it.
    fn revoke(&self, serial: &str) {
        let id = SpiffeId::parse("spiffe://mesh.test/ns/default/sa/web").expect("an id");
        let store = &self.publisher.store;
        let until = wall_clock() + Duration::from_secs(3600);
        store.record_issued(serial, &id, until, wall_clock()).expect("stored");
        store.revoke(&[serial.to_owned()], wall_clock()).expect("revoked");
    }

    fn status(&self) -> ControlStatus {
        self.publisher.status.borrow().clone()
    }

    fn is_published_as_revoked(&self, serial: &str) -> bool {
        self.publisher.revoked_serials.borrow().contains(serial)
    }
}

#[test]
fn invalid_mesh_file_delays_neither_a_revocation_nor_crl_renewal() {
    let mut running = TestPublisher::start();
    for (round, break_file) in [
        |running: &TestPublisher| {
            std::fs::write(running.file("mesh.yaml"), "trust_domain: [").unwrap()
        },
        |running: &TestPublisher| std::fs::remove_file(running.file("mesh.yaml")).unwrap(),
        |running: &TestPublisher| {
            let unknown = MESH.replace("from: [web]", "from: [wbe]");
            std::fs::write(running.file("mesh.yaml"), unknown).unwrap();
        },
    ]
    .into_iter()
    .enumerate()
    {
        break_file(&running);
        assert!(running.publisher.next().is_none(), "nothing new");
        let rejected = running.status().rejected;
        assert_eq!(rejected.len(), 1, "{rejected:?}");
        let number = running.status().crl_number;
        let serial = format!("0{round}");
        running.revoke(&serial);
        assert!(running.publisher.next().is_some(), "the revocation");
        let status = running.status();
        assert_eq!((status.crl_number, &status.rejected), (number + 1, &rejected));
        assert!(running.is_published_as_revoked(&serial));
        assert!(running.publisher.next().is_none(), "once");

        let last = running.publisher.last.as_mut().expect("a mesh is in force");
        last.crl_signed_at -= CRL_RENEWAL;
        assert!(running.publisher.next().is_some(), "the renewal");
        let status = running.status();
        assert_eq!((status.crl_number, status.rejected), (number + 2, rejected));
    }
    std::fs::write(running.file("mesh.yaml"), MESH).unwrap();
    drop(running.publisher.next());
    assert_eq!(running.status().rejected, Vec::<String>::new());
}

#[test]
fn missing_key_file_is_reported_and_does_not_delay_a_revocation() {
    let mut running = TestPublisher::start();
    std::fs::remove_file(running.file("keys.json")).unwrap();
    let number = running.status().crl_number;
    running.revoke("0a");
    assert!(running.publisher.next().is_some(), "the revocation");
    let status = running.status();
    assert_eq!(status.crl_number, number + 1);
    assert!(running.is_published_as_revoked("0a"));
    assert!(status.rejected.len() == 1 && status.rejected[0].contains("keys.json"), "{status:?}");
}

#[test]
fn changed_key_file_is_published_without_a_change_of_mesh_yaml() {
    let mut running = TestPublisher::start();
    assert!(running.publisher.next().is_none(), "nothing new");
    let changed = KEYS.replace("\"a\"", "\"b\"");
    std::fs::write(running.file("keys.json"), &changed).unwrap();
    assert!(running.publisher.next().is_some(), "the keys");
    let mesh = &running.publisher.last.as_ref().expect("a mesh is in force").mesh;
    let crate::mesh::TokenKeys::File(_, keys) = &mesh.issuers["login"].keys else {
        panic!("keys come from a file");
    };
    assert_eq!(keys, changed.as_bytes());
    assert!(running.publisher.next().is_none(), "once");
}

#[test]
fn mesh_that_cannot_be_encoded_is_rejected_and_the_last_one_stays() {
    let mut running = TestPublisher::start();
    let keys = "jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'";
    let numbers = 0..=100;
    let issuers = numbers.clone().map(|n| format!("i{n}: {{issuer: i, audiences: [a], {keys}}}"));
    let allow = numbers.map(|n| format!("{{from: [web], paths: [/{n}], token: i{n}}}"));
    let (services, _) = MESH.split_once("security:").expect("policies");
    let text = format!(
        "{services}security:\n  issuers: {{{}}}\n  policies: [{{service: web, allow: [{}]}}]\n",
        issuers.collect::<Vec<_>>().join(", "),
        allow.collect::<Vec<_>>().join(", ")
    );
    std::fs::write(running.file("mesh.yaml"), text).unwrap();
    assert!(running.publisher.next().is_none());
    let rejected = running.status().rejected;
    let expected = "services \"web\": inbound configuration cannot be encoded";
    assert!(rejected.len() == 1 && rejected[0].starts_with(expected), "{rejected:?}");
    running.revoke("0a");
    assert!(running.publisher.next().is_some(), "the revocation");
    assert_eq!(running.status().rejected, rejected);
}
