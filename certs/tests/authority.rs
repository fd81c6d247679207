//! Certificates of the CA: they contain the SPIFFE ID of the request, and no other field of it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use std::collections::BTreeSet;
use std::time::Duration;

use pki::WEB;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use weft_certs::request::{self, CheckedRequest, RequestError};
use weft_certs::tls::{self, ClientAuthentication, LoadedIdentity};
use weft_certs::{Authority, AuthorityError, RootSigner};
use weft_model::SpiffeId;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> Authority {
    let files = Authority::create("mesh.test", pki::now()).unwrap();
    Authority::load(files, "mesh.test").unwrap()
}

fn uri(name: &str) -> SanType {
    SanType::URI(name.try_into().unwrap())
}

/// A request with these names, changed by `tweak`, PEM.
fn asking(names: Vec<SanType>, tweak: impl FnOnce(&mut CertificateParams)) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    tweak(&mut params);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

#[test]
fn request_must_have_exactly_one_spiffe_id() {
    let dns = || SanType::DnsName("web.test".try_into().unwrap());
    let check = |names: Vec<SanType>, good: bool| {
        let outcome = CheckedRequest::parse(&asking(names, |_| {}));
        match outcome {
            Ok(request) => assert!(good && request.identity().as_str() == WEB, "{request:?}"),
            Err(error) => assert!(!good && matches!(error, RequestError::Identity(_)), "{error}"),
        }
    };
    check(vec![uri(WEB)], true);
    check(vec![], false);
    check(vec![dns()], false);
    check(vec![uri(WEB), dns()], false);
    check(vec![uri(WEB), uri(WEB)], false);
    check(vec![uri(WEB), uri("spiffe://mesh.test/ns/a/sa/admin")], false);
    check(vec![uri("https://mesh.test/ns/a/sa/web")], false);
    check(vec![uri("spiffe://MESH.test/ns/a/sa/web")], false);
    check(vec![uri("spiffe://mesh.test/ns/a/../b")], false);
    check(vec![uri("spiffe://mesh.test/ns/a%2fsa")], false);
    check(vec![uri(&format!("spiffe://mesh.test/{}", "a".repeat(2048)))], false);
}

#[test]
fn modified_request_is_rejected() {
    let request = request::make(&SpiffeId::parse(WEB).unwrap()).unwrap();
    let block = pem::parse(&request.request_pem).unwrap();
    let parse = |der: &[u8]| {
        CheckedRequest::parse(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)))
    };
    let der = block.contents();
    assert_eq!(parse(der).unwrap().identity().as_str(), WEB);
    // The signed part is the first element inside: two headers of 3 bytes, and its length.
    assert_eq!([&der[..2], &der[3..5]].concat(), [0x30, 0x81, 0x30, 0x81]);
    let signed = 6 + usize::from(der[5]);
    let signature = der.len() - 64;
    for place in 0..der.len() {
        let mut changed = der.to_vec();
        changed[place] ^= 1;
        if let Ok(request) = parse(&changed) {
            // Lenient parsing of the algorithm identifier is accepted, because it is not signed data.
            assert!(
                (signed..signature).contains(&place),
                "accepted although byte {place} was changed"
            );
            assert_eq!(request.identity().as_str(), WEB);
        }
        assert!(parse(&der[..place]).is_err(), "accepted when cut at byte {place}");
    }
}

#[test]
fn malformed_or_oversized_request_is_rejected() {
    let good = asking(vec![uri(WEB)], |_| {});
    let padded = |bytes: usize| format!("{good}{}", "\n".repeat(bytes - good.len()));
    let check = |text: &str, reason: &str| match CheckedRequest::parse(text) {
        Err(RequestError::Malformed(said)) => assert!(said.contains(reason), "{said}"),
        other => panic!("{other:?}"),
    };
    CheckedRequest::parse(&padded(64 * 1024)).unwrap();
    check(&padded(64 * 1024 + 1), "larger than 64 KiB");
    check("", "");
    check("-----BEGIN CERTIFICATE REQUEST-----", "");
    check(&pki::root("root").pem(), "");
    check(&KeyPair::generate().unwrap().serialize_pem(), "");
}

#[test]
fn request_for_another_trust_domain_is_not_signed() {
    let authority = authority();
    for foreign in
        ["spiffe://other.test/ns/a/sa/web", "spiffe://mesh.test.other/web", "spiffe://mesh.tes/web"]
    {
        let request = CheckedRequest::parse(&asking(vec![uri(foreign)], |_| {})).unwrap();
        let outcome = authority.issue(&request, HOUR, pki::now());
        let id = SpiffeId::parse(foreign).unwrap();
        let trust_domain = "mesh.test".to_owned();
        assert_eq!(outcome, Err(AuthorityError::WrongTrustDomain { id, trust_domain }));
    }
}

/// A request with fields that the CA must ignore.
fn greedy(params: &mut CertificateParams) {
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.distinguished_name.push(DnType::OrganizationName, "masters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
}

#[test]
fn certificate_contains_only_fields_set_by_the_ca() {
    let authority = authority();
    let request = CheckedRequest::parse(&asking(vec![uri(WEB)], greedy)).unwrap();
    let issued = authority.issue(&request, HOUR, pki::now()).unwrap();
    assert_eq!(issued.chain.len(), 3);
    assert_eq!(issued.chain[2], authority.trust_bundle());

    let leaf = CertificateDer::from_pem_slice(issued.chain[0].as_bytes()).unwrap();
    let (_, leaf) = x509_parser::certificate::X509Certificate::from_der(&leaf).unwrap();
    assert_eq!(leaf.subject().to_string(), "CN=web");
    assert_eq!(leaf.issuer().to_string(), "CN=weft intermediate mesh.test");
    assert!(!leaf.is_ca());
    assert_eq!(leaf.validity().not_before.timestamp(), pki::at(-300).unix_timestamp());
    assert_eq!(leaf.validity().not_after.timestamp(), pki::at(3600).unix_timestamp());
    assert_eq!(issued.not_after, pki::now() + HOUR);

    let mut seen = Vec::new();
    for extension in leaf.extensions() {
        seen.push(match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => {
                assert_eq!(names.general_names, [GeneralName::URI(WEB)]);
                "names"
            }
            ParsedExtension::KeyUsage(usage) => {
                assert!(usage.digital_signature() && usage.flags.count_ones() == 1);
                "usage"
            }
            ParsedExtension::ExtendedKeyUsage(usage) => {
                assert!(usage.server_auth && usage.client_auth && !usage.any);
                assert!(!usage.code_signing && !usage.ocsp_signing && usage.other.is_empty());
                "purposes"
            }
            ParsedExtension::BasicConstraints(constraints) => {
                assert!(!constraints.ca);
                "constraints"
            }
            ParsedExtension::AuthorityKeyIdentifier(_) => "issuer's key",
            ParsedExtension::SubjectKeyIdentifier(_) => "own key",
            other => panic!("unexpected extension {other:?}"),
        });
    }
    seen.sort_unstable();
    assert_eq!(seen, ["constraints", "issuer's key", "names", "own key", "purposes", "usage"]);
}

#[test]
fn certificates_of_one_key_have_different_serial_numbers() {
    let authority = authority();
    let request = CheckedRequest::parse(&asking(vec![uri(WEB)], |_| {})).unwrap();
    let serials: BTreeSet<String> =
        (0..1000).map(|_| authority.issue(&request, HOUR, pki::now()).unwrap().serial).collect();
    assert_eq!(serials.len(), 1000);
    assert!(serials.iter().all(|serial| serial.len() == 32));
}

#[test]
fn ca_with_invalid_trust_domain_or_files_is_rejected() {
    assert!(Authority::create("Mesh.Test", pki::now()).is_err());
    let files = Authority::create("mesh.test", pki::now()).unwrap();
    let mut keyless = files.clone();
    keyless.intermediate_key = String::new().into();
    let error = Authority::load(keyless, "mesh.test").unwrap_err();
    assert!(matches!(error, AuthorityError::Unreadable { part: "intermediate", .. }), "{error}");
    let mut rootless = files;
    rootless.root_certificate.clear();
    let error = Authority::load(rootless, "mesh.test").unwrap_err();
    assert!(matches!(error, AuthorityError::Unreadable { part: "root", .. }), "{error}");
}

/// Asserts that `shown` contains no part of the key in any common encoding.
fn hides(shown: &str, key_pem: &str) {
    let key = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes()).unwrap();
    let der = key.secret_pkcs8_der();
    // The 32 bytes of the private key; the rest is the public key and common structure.
    let start = der.windows(2).position(|pair| pair == [0x04, 0x20]).unwrap() + 2;
    for piece in der[start..start + 32].chunks(4) {
        let forms = [
            piece.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            piece.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            piece.iter().map(|byte| format!("0x{byte:02x}")).collect::<Vec<_>>().join(", "),
        ];
        for form in forms {
            assert!(!shown.to_lowercase().contains(&form), "{form} is in {shown}");
        }
    }
    for line in key_pem.lines().filter(|line| !line.starts_with("-----")) {
        assert!(!shown.contains(line), "{line} is in {shown}");
    }
}

#[test]
fn debug_output_contains_no_private_key() {
    let files = Authority::create("mesh.test", pki::now()).unwrap();
    let RootSigner::Local { key: root_key } = files.root.clone() else {
        panic!("the root is local")
    };
    let intermediate_key = files.intermediate_key.clone();
    let shown_files = format!("{files:#?} {files:?}");
    let authority = Authority::load(files, "mesh.test").unwrap();
    let shown = format!("{shown_files} {authority:?} {authority:#?}");
    hides(&shown, &root_key);
    hides(&shown, &intermediate_key);

    let pending = request::make(&SpiffeId::parse(WEB).unwrap()).unwrap();
    let request = CheckedRequest::parse(&pending.request_pem).unwrap();
    let issued = authority.issue(&request, HOUR, pki::now()).unwrap();
    let chain = issued.chain.concat();
    let identity = LoadedIdentity::load(chain.as_bytes(), pending.key_pem.as_bytes()).unwrap();
    let server = tls::server(&identity, ClientAuthentication::None, &[]).unwrap();
    let shown = format!("{pending:?} {request:?} {issued:?} {identity:?} {identity:#?} {server:?}");
    hides(&shown, &pending.key_pem);
}
