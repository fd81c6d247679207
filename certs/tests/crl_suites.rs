//! CRLs of external test suites have the expected status.
//!
//! The data is read if present, in `../shared/suites` beside the workspace or in the folder `WEFT_SUITES`: the corner
//! cases of rustls-webpki (ISC) and the CRLs of C2SP/x509-limbo (Apache-2.0). `revocation.rs` covers the same kinds
//! of CRLs with generated ones.

#![expect(clippy::print_stderr, reason = "a test prints what it skips")]

use std::path::PathBuf;
use std::time::Duration;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_certs::{CertificateRole, CrlIndex, CrlSigners, RevocationQuery, RevocationStatus};
use weft_model::RevocationPolicy;

/// 2027-01-15, 08:00 UTC.
fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000))
}

/// The folder of a suite; none if it does not exist, which the test prints.
fn suite(name: &str) -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/suites");
    let folder = std::env::var_os("WEFT_SUITES").map_or(beside, PathBuf::from).join(name);
    if !folder.exists() {
        eprintln!("skipped: {} not found", folder.display());
        return None;
    }
    Some(folder)
}

fn status(index: &CrlIndex, leaf: &webpki::EndEntityCert<'_>) -> RevocationStatus {
    let issuer = leaf.issuer();
    let serial = leaf.serial();
    let certificate = leaf.der();
    index.status(
        &RevocationQuery {
            issuer,
            issuer_key: None,
            serial,
            role: CertificateRole::Leaf,
            certificate: &certificate,
        },
        now(),
    )
}

fn signers<'a>(roots: &'a [CertificateDer<'static>]) -> CrlSigners<'a> {
    CrlSigners { roots, intermediates: &[], seen: &[] }
}

/// Source: rustls-webpki, `tests/crls`. No CA of this test signed these CRLs, so the valid ones fail at their issuer
/// and the others before.
#[test]
fn malformed_crls_of_the_webpki_suite_are_rejected() {
    let Some(folder) = suite("webpki-crls/tests/crls") else { return };
    let stranger = "is not in the trust bundle";
    let cases = [
        ("valid", stranger),
        ("negative.serial", stranger),
        ("topbit.serial", stranger),
        ("no.entry.exts", stranger),
        ("entry.invalidity.date", stranger),
        ("idp.valid", stranger),
        ("delta", stranger),
        ("idp.indirect_crl", "indirect CRLs are not supported"),
        ("idp.only_some_reasons", "CRLs for some reasons only"),
        ("idp.no_distribution_point_name", stranger),
        ("idp.name_relative_to_issuer", "no full name"),
        ("idp.only_attribute_certs", "malformed"),
        ("idp.invalid.bool", "malformed"),
        ("idp.invalid.name", "malformed"),
        ("idp.unknown.tag", "malformed"),
        ("unknown.crit.ext", "unsupported critical extension"),
        ("wrong.version", "only version 2 CRLs"),
        ("missing.exts", "malformed"),
        ("missing.next.update", "malformed"),
        ("invalid.this.update.time", "malformed"),
        ("mismatched.sigalg", "malformed"),
        ("negative.crl.number", "malformed"),
        ("too.long.crl.number", "malformed"),
    ];
    for (name, reason) in cases {
        let list = std::fs::read(folder.join(format!("crl.{name}.der"))).unwrap();
        let policy = RevocationPolicy::default();
        let error = match CrlIndex::load(&list, &signers(&[]), None, &policy, now()) {
            Ok(waiting) => waiting.warnings()[0].clone(),
            Err(errors) => errors[0].to_string(),
        };
        assert!(error.contains(reason), "{name}: {error:?} does not contain {reason:?}");
    }
}

/// Source: rustls-webpki, `tests/client_auth_revocation`: CRLs with unusual distribution points.
#[test]
fn distribution_points_of_the_webpki_suite_leave_the_status_unknown() {
    let Some(folder) = suite("webpki-crls/tests/client_auth_revocation") else { return };
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    for (list, chain) in [
        ("ee_dp_invalid", "invalid_dp_chain"),
        ("ee_indirect_dp_unknown_status", "indirect_dp_chain"),
        ("ee_nofullname_dp_unknown_status", "nofullname_dp_chain"),
        ("ee_reasons_dp_unknown_status", "reasons_dp_chain"),
    ] {
        let issuer = CertificateDer::from(read(&format!("{chain}.int.a.ca.der")));
        let leaf = CertificateDer::from(read(&format!("{chain}.ee.der")));
        let leaf = webpki::EndEntityCert::try_from(&leaf).unwrap();
        let list = read(&format!("{list}.crl.der"));
        let index =
            CrlIndex::load(&list, &signers(&[issuer]), None, &RevocationPolicy::default(), now())
                .unwrap();
        let status = status(&index, &leaf);
        assert_eq!(status, RevocationStatus::Unknown, "{chain}");
    }
}

/// Source: C2SP/x509-limbo, the cases `crl::*`; all have the expected result.
#[test]
fn limbo_crl_cases_have_the_expected_result() {
    let Some(file) = suite("x509-limbo.json") else { return };
    let suite: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut seen = 0;
    for case in suite["testcases"].as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        if !id.starts_with("crl::") {
            continue;
        }
        seen += 1;
        let certificate = |pem: &serde_json::Value| {
            CertificateDer::from_pem_slice(pem.as_str().unwrap().as_bytes()).unwrap()
        };
        let roots: Vec<_> =
            case["trusted_certs"].as_array().unwrap().iter().map(certificate).collect();
        let lists: String =
            case["crls"].as_array().unwrap().iter().map(|list| list.as_str().unwrap()).collect();
        let leaf = certificate(&case["peer_certificate"]);
        let leaf = webpki::EndEntityCert::try_from(&leaf).unwrap();
        let outcome = CrlIndex::load(
            lists.as_bytes(),
            &signers(&roots),
            None,
            &RevocationPolicy::default(),
            now(),
        )
        .map(|index| status(&index, &leaf));
        let good = outcome == Ok(RevocationStatus::Good);
        assert_eq!(good, case["expected_result"] == "SUCCESS", "{id}: {outcome:?}");
    }
    assert_eq!(seen, 8);
}
