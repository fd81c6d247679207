//! CRLs: accepted contents, accepted signers, and precedence.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use std::time::Duration;

use pki::{Ca, Critical, HOUR, List, NOW, at, ca_params, crl_pem, der, extension, unix};
use rcgen::{CustomExtension, IsCa, KeyUsagePurpose};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_certs::{
    Authority, CertificateRole, CrlIndex, CrlSigners, RevocationQuery, RevocationStatus,
    RevokedCertificate,
};
use weft_model::{RevocationMode, RevocationPolicy};

const DELTA_INDICATOR: &[u8] = &[0x55, 0x1d, 0x1b];
const DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 0x1c];
const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 0x14];
const CERTIFICATE_ISSUER: &[u8] = &[0x55, 0x1d, 0x1d];
const UNHEARD_OF: &[u8] = &[0x55, 0x1d, 0x7f];

fn signers<'a>(roots: &'a [CertificateDer<'static>]) -> CrlSigners<'a> {
    CrlSigners { roots, intermediates: &[], seen: &[] }
}

fn load(bytes: &[u8], roots: &[&Ca], previous: Option<&CrlIndex>) -> Result<CrlIndex, String> {
    let roots: Vec<_> = roots.iter().map(|root| root.der().clone()).collect();
    CrlIndex::load(bytes, &signers(&roots), previous, &RevocationPolicy::default(), unix(0))
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

/// The status in `index` of the leaf with this serial number that `ca` signed.
fn status(index: &CrlIndex, ca: &Ca, serial: u64) -> RevocationStatus {
    status_of(index, ca, &pki::integer(serial), CertificateRole::Leaf, unix(0))
}

fn status_of(
    index: &CrlIndex,
    ca: &Ca,
    serial: &[u8],
    role: CertificateRole,
    now: UnixTime,
) -> RevocationStatus {
    let anchor = webpki::anchor_from_trusted_cert(ca.der()).unwrap();
    index.status(
        &RevocationQuery {
            issuer: &anchor.subject,
            issuer_key: None,
            serial,
            role,
            certificate: &[],
        },
        now,
    )
}

fn set(lists: &[Vec<u8>]) -> String {
    lists.iter().map(|list| crl_pem(list)).collect()
}

/// Asserts that `bytes` are rejected with a message that contains `reason`.
fn refused(bytes: &[u8], roots: &[&Ca], reason: &str) {
    match load(bytes, roots, None) {
        Ok(index) => panic!("{index:?} was accepted; expected {reason:?}"),
        Err(error) => assert!(error.contains(reason), "{error:?} does not contain {reason:?}"),
    }
}

#[test]
fn crls_of_a_weft_ca_cover_its_root_and_intermediate() {
    let files = Authority::create("mesh.test", pki::now()).unwrap();
    let root = CertificateDer::from_pem_slice(files.root_certificate.as_bytes()).unwrap();
    let below = CertificateDer::from_pem_slice(files.intermediate_certificate.as_bytes()).unwrap();
    let authority = Authority::load(files, "mesh.test").unwrap();
    let revoked = [RevokedCertificate { serial: "0a0b".into(), at: pki::now() }];
    let pem = authority.crls(&revoked, 1, pki::now(), Duration::from_secs(60)).unwrap();

    let index = CrlIndex::load(
        pem.as_bytes(),
        &signers(std::slice::from_ref(&root)),
        None,
        &RevocationPolicy::default(),
        unix(0),
    );
    let index = index.unwrap();
    assert_eq!((index.len(), index.warnings()), (1, vec![]));
    let name = |certificate| webpki::anchor_from_trusted_cert(certificate).unwrap().subject;
    let root = name(&root);
    let below = name(&below);
    let check = |issuer, serial: &[u8], role, expected| {
        assert_eq!(
            index.status(
                &RevocationQuery { issuer, issuer_key: None, serial, role, certificate: &[] },
                unix(0)
            ),
            expected
        );
    };
    check(&below, &[0x0a, 0x0b], CertificateRole::Leaf, RevocationStatus::Revoked);
    check(&below, &[0x0a, 0x0c], CertificateRole::Leaf, RevocationStatus::Good);
    check(&root, &[0x0a, 0x0b], CertificateRole::Authority, RevocationStatus::Good);
    check(b"other issuer", &[0x0a, 0x0b], CertificateRole::Leaf, RevocationStatus::Unknown);
}

#[test]
fn newest_crl_of_a_file_is_used_in_any_order() {
    let ca = pki::root("root");
    let older = List::new(1, &[7]).signed_by(&ca);
    let newer = List::new(2, &[8]).signed_by(&ca);
    for order in [[older.clone(), newer.clone()], [newer, older]] {
        let index = load(set(&order).as_bytes(), &[&ca], None).unwrap();
        assert_eq!(status(&index, &ca, 7), RevocationStatus::Good);
        assert_eq!(status(&index, &ca, 8), RevocationStatus::Revoked);
        assert!(index.warnings()[0].contains("the newer one is used"), "{:?}", index.warnings());
    }
}

#[test]
fn crl_number_takes_precedence_over_date() {
    let ca = pki::root("root");
    let list = |number, this_update, serial| {
        List { this_update, ..List::new(number, &[serial]) }.signed_by(&ca)
    };
    let check = |lists: &[Vec<u8>], revoked| {
        let index = load(set(lists).as_bytes(), &[&ca], None).unwrap();
        assert_eq!(status(&index, &ca, revoked), RevocationStatus::Revoked);
        assert_eq!(index.len(), 1);
    };
    check(&[list(255, -60, 1), list(256, -600, 2)], 2);
    check(&[list(255, -60, 1), list(255, -600, 2)], 1);
    check(&[list(255, -600, 1), list(255, -60, 2)], 2);
}

#[test]
fn older_crl_does_not_replace_the_one_in_force_and_is_reported() {
    let one = pki::root("one");
    let two = pki::root("two");
    let roots = [&one, &two];
    let push = |number_one, number_two, previous: Option<&CrlIndex>| {
        let lists = [
            List::new(number_one, &[number_one]).signed_by(&one),
            List::new(number_two, &[number_two]).signed_by(&two),
        ];
        load(set(&lists).as_bytes(), &roots, previous).unwrap()
    };
    let first = push(5, 5, None);
    let second = push(4, 6, Some(&first));
    assert_eq!(status(&second, &one, 5), RevocationStatus::Revoked, "the CRL in force stays");
    assert_eq!(status(&second, &one, 4), RevocationStatus::Good, "the older CRL is not used");
    assert_eq!(status(&second, &two, 6), RevocationStatus::Revoked, "the newer one replaces it");
    assert_eq!(status(&second, &two, 5), RevocationStatus::Good);
    assert_eq!(second.warnings().len(), 1);
    assert!(second.warnings()[0].contains("one\" is older than the one in force, which stays"));

    let third = push(5, 6, Some(&second));
    assert_eq!(third.warnings(), &[] as &[String], "loading the same CRLs again causes no warning");
}

#[test]
fn removed_crl_is_dropped() {
    let one = pki::root("one");
    let two = pki::root("two");
    let lists = [List::new(1, &[7]).signed_by(&one), List::new(1, &[7]).signed_by(&two)];
    let first = load(set(&lists).as_bytes(), &[&one, &two], None).unwrap();
    let second = load(set(&lists[..1]).as_bytes(), &[&one, &two], Some(&first)).unwrap();
    assert_eq!(status(&second, &one, 7), RevocationStatus::Revoked);
    assert_eq!(status(&second, &two, 7), RevocationStatus::Unknown);
}

#[test]
fn crls_of_two_cas_with_one_name_are_kept_apart() {
    let old = pki::root("root");
    let new = pki::root("root");
    let held = List::new(90, &[7]).signed_by(&old);
    let fresh = List::new(1, &[8]).signed_by(&new);

    let first = load(&held, &[&old], None).unwrap();
    let second = load(&fresh, &[&new], Some(&first)).unwrap();
    assert_eq!(status(&second, &new, 8), RevocationStatus::Revoked);
    assert_eq!(status(&second, &new, 7), RevocationStatus::Good);

    let both = load(set(&[held, fresh]).as_bytes(), &[&old, &new], None).unwrap();
    assert_eq!(status(&both, &new, 7), RevocationStatus::Revoked);
    assert_eq!(status(&both, &new, 8), RevocationStatus::Revoked);
}

#[test]
fn crl_without_a_trusted_signer_is_not_used_and_is_reported() {
    let ca = pki::root("root");
    let same_name = pki::root("root");
    let stranger = pki::root("stranger");
    let list = List::new(1, &[7]);
    waits(&list.signed_by(&same_name), &[&ca], "CRL is not signed by \"root\"");
    waits(&list.signed_as(ca.der(), &stranger), &[&ca], "CRL is not signed by \"root\"");
    waits(&list.signed_by(&stranger), &[&ca], "issuer \"stranger\" is not in the trust bundle");
    waits(&list.signed_by(&ca), &[], "issuer \"root\" is not in the trust bundle");
}

/// Asserts that a CRL is loaded, is reported with `reason`, and is not used yet.
#[track_caller]
fn waits(bytes: &[u8], roots: &[&Ca], reason: &str) {
    let index = load(bytes, roots, None).unwrap();
    assert_eq!(index.crl_infos(), vec![], "{reason}");
    let [warning] = &index.warnings()[..] else { panic!("{:?}", index.warnings()) };
    assert!(warning.contains(reason), "{warning:?} does not contain {reason:?}");
}

#[test]
fn unsupported_crl_of_unknown_issuer_is_ignored_only_in_strict_mode() {
    let ca = pki::root("root");
    let stranger = pki::root("stranger");
    let own = List::new(1, &[7]).signed_by(&ca);
    let odd = List { number: None, ..List::new(1, &[]) }.signed_by(&stranger);
    let both = set(&[odd.clone(), own.clone()]);
    let index = load(both.as_bytes(), &[&ca], None).unwrap();
    assert_eq!(status(&index, &ca, 7), RevocationStatus::Revoked);
    assert_eq!(status(&index, &ca, 8), RevocationStatus::Good);
    let warnings = index.warnings().join("; ");
    assert!(warnings.contains("CRL 0") && warnings.contains("malformed"), "{warnings}");
    // In soft mode, an unsupported CRL may revoke a certificate, so it is an error.
    let soft = RevocationPolicy { mode: RevocationMode::Soft, ..RevocationPolicy::default() };
    assert!(load_within(both.as_bytes(), &ca, &soft).unwrap_err().contains("CRL 0"));
    refused(&odd, &[&ca], "malformed");
    let odd = List { number: None, ..List::new(1, &[]) }.signed_by(&ca);
    refused(set(&[odd, own]).as_bytes(), &[&ca], "CRL 0");
}

#[test]
fn crl_of_unknown_issuer_leaves_others_in_force_and_is_reported_by_index() {
    let ca = pki::root("root");
    let stranger = pki::root("stranger");
    let good = List::new(1, &[7]).signed_by(&ca);
    let bad = List::new(1, &[7]).signed_by(&stranger);
    let index = load(set(&[good.clone(), bad]).as_bytes(), &[&ca], None).unwrap();
    assert_eq!(status(&index, &ca, 7), RevocationStatus::Revoked);
    assert_eq!(status(&index, &ca, 8), RevocationStatus::Good);
    assert!(index.warnings()[0].starts_with("CRL 1: issuer"));
    let broken = set(&[good]).replace("-----END", "-----BEND");
    refused(broken.as_bytes(), &[&ca], "CRL 0: neither DER nor PEM");
}

#[test]
fn crl_of_an_intermediate_requires_a_valid_certificate_below_a_root() {
    let root = pki::root("root");
    let check = |tweak: &dyn Fn(&mut rcgen::CertificateParams), reason: Option<&str>| {
        let mut params = ca_params("below");
        tweak(&mut params);
        let below = pki::intermediate(params, &root);
        let set = set(&[List::new(1, &[7]).signed_by(&below)]) + &below.pem();
        match reason {
            Some(reason) => refused(set.as_bytes(), &[&root], reason),
            None => {
                let index = load(set.as_bytes(), &[&root], None).unwrap();
                assert_eq!(status(&index, &below, 7), RevocationStatus::Revoked);
            }
        }
    };
    let not_in_force = Some("issuer certificate has expired or is not valid yet");
    let untrusted = "issuer \"below\" is not in the trust bundle";
    check(&|_| {}, None);
    check(&|params| params.key_usages.clear(), None);
    check(&|params| params.not_after = at(1), None);
    check(&|params| params.not_after = at(-1), not_in_force);
    check(&|params| params.not_before = at(1), not_in_force);
    check(&|params| params.is_ca = IsCa::ExplicitNoCa, Some("issuer is not a CA"));
    check(&|params| params.is_ca = IsCa::NoCa, Some("issuer is not a CA"));
    check(
        &|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign],
        Some("key usage of the issuer does not allow CRL signing"),
    );
    let mut params = ca_params("below");
    let mut odd = CustomExtension::from_oid_content(&[2, 5, 29, 127], vec![5, 0]);
    odd.set_criticality(true);
    params.custom_extensions.push(odd);
    let below = pki::intermediate(params, &root);
    let set = set(&[List::new(1, &[7]).signed_by(&below)]) + &below.pem();
    waits(set.as_bytes(), &[&root], untrusted);
}

#[test]
fn crl_of_an_untrusted_intermediate_is_not_used() {
    let root = pki::root("root");
    let same_name = pki::root("root");
    let below = pki::intermediate(ca_params("below"), &same_name);
    let deeper = pki::intermediate(ca_params("deeper"), &below);
    let list = |ca: &Ca| set(&[List::new(1, &[7]).signed_by(ca)]);
    let untrusted = "is not in the trust bundle";
    waits((list(&below) + &below.pem()).as_bytes(), &[&root], untrusted);
    waits((list(&same_name) + &same_name.pem()).as_bytes(), &[&root], "CRL is not signed by");
    waits(list(&below).as_bytes(), &[&same_name], untrusted);
    // Two levels below a root: the intermediate between is required, in any order.
    let alone = list(&deeper) + &deeper.pem();
    waits(alone.as_bytes(), &[&same_name], untrusted);
    for set in [alone.clone() + &below.pem(), below.pem() + &alone] {
        let index = load(set.as_bytes(), &[&same_name], None).unwrap();
        assert_eq!(status(&index, &deeper, 7), RevocationStatus::Revoked);
    }
    // The intermediate must be valid and may sign CAs.
    let check = |change: fn(&mut rcgen::CertificateParams)| {
        let mut params = ca_params("between");
        change(&mut params);
        let between = pki::intermediate(params, &same_name);
        let last = pki::intermediate(ca_params("last"), &between);
        let set = list(&last) + &last.pem() + &between.pem();
        waits(set.as_bytes(), &[&same_name], untrusted);
    };
    check(|params| params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0)));
    check(|params| params.is_ca = IsCa::ExplicitNoCa);
    check(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
    check(|params| (params.not_before, params.not_after) = (at(-2 * HOUR), at(-HOUR)));
    let mut short = ca_params("short");
    short.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    let short = Ca::self_signed(short, rcgen::KeyPair::generate().unwrap()).unwrap();
    let last = pki::intermediate(ca_params("last"), &short);
    waits((list(&last) + &last.pem()).as_bytes(), &[&short], untrusted);
}

#[test]
fn crl_of_an_expired_intermediate_is_ignored() {
    let root = pki::root("root");
    let mut over = ca_params("over");
    (over.not_before, over.not_after) = (at(-2 * HOUR), at(-HOUR));
    let over = pki::intermediate(over, &root);
    let lists = set(&[List::new(1, &[7]).signed_by(&root), List::new(1, &[8]).signed_by(&over)]);
    let index = load((lists + &over.pem()).as_bytes(), &[&root], None).unwrap();
    assert_eq!(status(&index, &root, 7), RevocationStatus::Revoked);
    assert_eq!(status(&index, &over, 8), RevocationStatus::Unknown);
    let [warning] = &index.warnings()[..] else { panic!("{:?}", index.warnings()) };
    assert!(warning.ends_with("is not valid yet; the CRL is ignored"), "{warning}");
}

#[test]
fn crl_of_a_root_without_crl_sign_usage_is_rejected() {
    let check = |usages: Vec<KeyUsagePurpose>, good: bool| {
        let mut params = ca_params("root");
        params.key_usages = usages;
        (params.not_before, params.not_after) = (at(-2 * HOUR), at(-HOUR));
        let root = Ca::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        let list = List::new(1, &[7]).signed_by(&root);
        match load(&list, &[&root], None) {
            Ok(index) => assert!(good && status(&index, &root, 7) == RevocationStatus::Revoked),
            Err(error) => assert!(!good && error.contains("does not allow CRL signing"), "{error}"),
        }
    };
    check(vec![KeyUsagePurpose::KeyCertSign], false);
    check(vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign], true);
    check(Vec::new(), true);
}

#[test]
fn crl_is_valid_from_this_update_to_next_update() {
    let ca = pki::root("root");
    let list = |this_update, next_update| {
        List { this_update, next_update, ..List::new(1, &[7]) }.signed_by(&ca)
    };
    refused(&list(1, HOUR), &[&ca], "thisUpdate is in the future");
    let index = load(&list(0, 60), &[&ca], None).unwrap();
    let check = |serial: u8, seconds, expected| {
        let status = status_of(&index, &ca, &[serial], CertificateRole::Leaf, unix(seconds));
        assert_eq!(status, expected, "{serial} after {seconds} s");
    };
    check(8, 59, RevocationStatus::Good);
    check(8, 60, RevocationStatus::Expired);
    check(7, 59, RevocationStatus::Revoked);
    check(7, 60, RevocationStatus::Revoked);
    // A CRL that has expired on load is kept, so the status is expired.
    let index = load(&list(-HOUR, -60), &[&ca], None).unwrap();
    assert_eq!(status(&index, &ca, 8), RevocationStatus::Expired);
    assert_eq!(status(&index, &ca, 7), RevocationStatus::Revoked);
}

/// The value of an `IssuingDistributionPoint` with these fields.
fn scoped(fields: &[Vec<u8>]) -> Vec<u8> {
    extension(DISTRIBUTION_POINT, Critical::Yes, &der(0x30, &fields.concat()))
}

/// The field that names one distribution point.
fn point(uri: &str) -> Vec<u8> {
    der(0xa0, &der(0xa0, &der(0x86, uri.as_bytes())))
}

#[test]
fn unsupported_kinds_of_crls_are_rejected_with_their_reason() {
    let ca = pki::root("root");
    let good = List::new(1, &[7]);
    let check = |list: List, reason| refused(&list.signed_by(&ca), &[&ca], reason);
    let with = |extensions| List { extensions, ..good.clone() };
    let entry = |entry_extensions| List { entry_extensions, ..good.clone() };
    let number = der(0x02, &[1]);
    let here = point("http://x/");

    check(with(extension(DELTA_INDICATOR, Critical::Yes, &number)), "without its base CRL");
    check(with(extension(DELTA_INDICATOR, Critical::No, &number)), "without its base CRL");
    check(with(extension(DELTA_INDICATOR, Critical::Yes, &[2, 1, 0x80])), "malformed");
    check(with(scoped(&[here.clone(), der(0x84, &[0xff])])), "indirect CRLs are not");
    check(with(scoped(&[here.clone(), der(0x83, &[6, 0x40])])), "CRLs for some reasons only");
    check(with(scoped(&[here.clone(), der(0x85, &[0xff])])), "malformed");
    check(with(scoped(&[der(0x81, &[0xff]), der(0x82, &[0xff])])), "covers no certificates");
    check(with(scoped(&[der(0x82, &[0xff]), der(0x81, &[0xff])])), "out of order");
    check(with(scoped(&[der(0x81, &[1])])), "malformed");
    check(with(scoped(&[der(0xa0, &der(0xa1, &[]))])), "distribution point has no full name");
    check(with(scoped(&[der(0xa0, &der(0xa0, &[]))])), "malformed");
    check(with(scoped(&[here.clone(), here])), "malformed");
    check(with(extension(UNHEARD_OF, Critical::Yes, &number)), "unsupported critical extension");
    check(entry(extension(UNHEARD_OF, Critical::Yes, &number)), "unsupported critical extension");
    let other_issuer = der(0x30, &der(0x82, b"other.test"));
    check(
        entry(extension(CERTIFICATE_ISSUER, Critical::Yes, &other_issuer)),
        "indirect CRLs are not",
    );
    check(List { number: None, ..good.clone() }, "malformed CRL");
    check(
        List { number: None, ..with(extension(UNHEARD_OF, Critical::No, &number)) },
        "CRL number is missing",
    );
    check(
        List { number: None, ..with(extension(CRL_NUMBER, Critical::Yes, &number)) },
        "CRL number is missing or critical",
    );
    check(List { version: 0, ..good.clone() }, "only version 2 CRLs");

    let odd_but_harmless = with(extension(UNHEARD_OF, Critical::No, &number)).signed_by(&ca);
    assert_eq!(
        status(&load(&odd_but_harmless, &[&ca], None).unwrap(), &ca, 7),
        RevocationStatus::Revoked
    );
}

#[test]
fn partial_crl_revokes_its_entries_and_leaves_others_unknown() {
    const USERS: u8 = 0x81;
    const AUTHORITIES: u8 = 0x82;
    let ca = pki::root("root");
    let list = |number, serial, fields: &[Vec<u8>]| {
        List { extensions: scoped(fields), ..List::new(number, &[serial]) }.signed_by(&ca)
    };
    let here = point("http://x/1");
    let lists = [
        list(9, 1, std::slice::from_ref(&here)),
        list(8, 2, &[point("http://x/2")]),
        list(7, 3, &[here.clone(), der(USERS, &[0xff])]),
        list(6, 4, &[here.clone(), der(AUTHORITIES, &[0xff])]),
    ];
    let check = |index: &CrlIndex, serial, expected| {
        for role in [CertificateRole::Leaf, CertificateRole::Authority] {
            assert_eq!(status_of(index, &ca, &[serial], role, unix(0)), expected, "{serial}");
        }
    };
    for (one, serial) in lists.iter().zip(1..) {
        let index = load(one, &[&ca], None).unwrap();
        check(&index, serial, RevocationStatus::Revoked);
        check(&index, 9, RevocationStatus::Unknown);
    }
    // CRLs of different parts are independent: a newer CRL of one part does not replace that of another.
    let parts = load(set(&lists).as_bytes(), &[&ca], None).unwrap();
    assert_eq!((parts.len(), parts.warnings()), (4, vec![]));
    (1..=4).for_each(|serial| check(&parts, serial, RevocationStatus::Revoked));
    check(&parts, 9, RevocationStatus::Unknown);
    // A CRL for all certificates proves the rest good, even if it is older.
    let whole = set(&lists) + &set(&[List::new(1, &[5]).signed_by(&ca)]);
    let whole = load(whole.as_bytes(), &[&ca], Some(&parts)).unwrap();
    (1..=5).for_each(|serial| check(&whole, serial, RevocationStatus::Revoked));
    check(&whole, 9, RevocationStatus::Good);
}

#[test]
fn serial_numbers_are_compared_as_integers() {
    let ca = pki::root("root");
    let check = |listed: &[u8], revoked: &[&[u8]], good: &[&[u8]]| {
        let list = List { serials: vec![listed.to_vec()], ..List::new(1, &[]) };
        let index = load(&list.signed_by(&ca), &[&ca], None).unwrap();
        let status =
            |serial: &&[u8]| status_of(&index, &ca, serial, CertificateRole::Leaf, unix(0));
        assert!(
            revoked.iter().all(|serial| status(serial) == RevocationStatus::Revoked),
            "{listed:x?}"
        );
        assert!(good.iter().all(|serial| status(serial) == RevocationStatus::Good), "{listed:x?}");
    };
    let top = [&[0x00], [0xff; 20].as_slice()].concat();
    check(&[0x01], &[&[0x01], &[0x00, 0x01]], &[&[0x02], &[0x01, 0x00], &[0xff]]);
    check(&[0x00, 0xff], &[&[0x00, 0xff]], &[&[0xff], &[0x7f]]);
    check(&[0xff], &[&[0xff], &[0xff, 0xff]], &[&[0x00, 0xff], &[0x01]]);
    check(&[0x00], &[&[0x00]], &[&[0x01]]);
    check(&[0x7f; 20], &[&[0x7f; 20]], &[&[0x7f; 19]]);
    check(&top, &[&top], &[&[0xff; 20]]);
    let long = List { serials: vec![vec![0x01; 22]], ..List::new(1, &[]) };
    refused(&long.signed_by(&ca), &[&ca], "serial number is longer than 20 bytes");
}

#[test]
fn pem_and_der_crls_are_equivalent_and_empty_input_has_none() {
    let ca = pki::root("root");
    let list = List::new(1, &[7]).signed_by(&ca);
    let pem = format!("# CRLs of today\n\n{}\ntrailing words\n", crl_pem(&list));
    for bytes in [list.as_slice(), pem.as_bytes(), pem.replace('\n', "\r\n").as_bytes()] {
        let index = load(bytes, &[&ca], None).unwrap();
        assert_eq!(status(&index, &ca, 7), RevocationStatus::Revoked);
        assert_eq!(status(&index, &ca, 8), RevocationStatus::Good);
    }
    for bytes in ["", "nothing here", &ca.pem()] {
        let index = load(bytes.as_bytes(), &[&ca], None).unwrap();
        assert!(index.is_empty(), "{bytes:?}");
        assert_eq!(status(&index, &ca, 8), RevocationStatus::Unknown);
    }
    let both = [list.as_slice(), &List::new(2, &[9]).signed_by(&ca)].concat();
    assert_eq!(status(&load(&both, &[&ca], None).unwrap(), &ca, 9), RevocationStatus::Revoked);
    refused(&[list.as_slice(), &list[..20]].concat(), &[&ca], "malformed");
    refused(&[list.as_slice(), b"\n"].concat(), &[&ca], "malformed");
    refused(&[0x30], &[&ca], "malformed");
}

#[test]
fn damaged_crl_is_never_accepted() {
    let ca = pki::root("root");
    let list = List::new(1, &[7, 0x1234_5678]).signed_by(&ca);
    for end in 0..list.len() {
        if let Ok(index) = load(&list[..end], &[&ca], None) {
            assert!(index.is_empty(), "accepted when cut at byte {end}");
        }
    }
    for bit in 0..list.len() * 8 {
        let mut damaged = list.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // With an invalid signature the CRL waits for another signer.
        if let Ok(index) = load(&damaged, &[&ca], None) {
            assert_eq!(index.crl_infos(), vec![], "accepted with bit {bit} turned");
        }
    }
}

#[test]
fn damaged_crl_file_never_makes_a_revoked_certificate_good() {
    let root = pki::root("root");
    let below = pki::intermediate(ca_params("below"), &root);
    let lists = [List::new(1, &[7]).signed_by(&below), List::new(1, &[8]).signed_by(&root)];
    let text = set(&lists) + &below.pem();
    let check = |bytes: &[u8], what: &str| {
        if let Ok(index) = load(bytes, &[&root], None) {
            assert_ne!(status(&index, &below, 7), RevocationStatus::Good, "{what}");
            assert_ne!(status(&index, &root, 8), RevocationStatus::Good, "{what}");
        }
    };
    for end in 0..text.len() {
        check(&text.as_bytes()[..end], &format!("cut at byte {end}"));
    }
    let mut random = fastrand::Rng::with_seed(NOW);
    for _ in 0..2000 {
        let mut damaged = text.clone().into_bytes();
        let place = random.usize(..damaged.len());
        let byte = random.u8(..);
        damaged[place] = byte;
        check(&damaged, &format!("byte {place} is {byte:#x}"));
    }
}

fn load_within(bytes: &[u8], ca: &Ca, policy: &RevocationPolicy) -> Result<CrlIndex, String> {
    CrlIndex::load(bytes, &signers(std::slice::from_ref(ca.der())), None, policy, unix(0))
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

#[test]
fn crls_are_limited_by_the_policy() {
    let ca = pki::root("root");
    let [whole, other] = [&[1, 2, 3][..], &[4, 5]].map(|serials| List::new(1, serials));
    let part = List { extensions: scoped(&[der(0x81, &[0xff])]), ..other };
    let lists = [whole.signed_by(&ca), part.signed_by(&ca)].concat();
    let check = |entries_limit, bytes_limit, expected: Result<usize, &str>| {
        let policy = RevocationPolicy { entries_limit, bytes_limit, ..Default::default() };
        let got = load_within(&lists, &ca, &policy).map(|index| index.len());
        match expected {
            Ok(entries) => assert_eq!(got, Ok(entries)),
            Err(reason) => assert!(got.as_ref().unwrap_err().contains(reason), "{got:?}"),
        }
    };
    check(5, lists.len(), Ok(5));
    check(6, lists.len() + 1, Ok(5));
    check(4, lists.len(), Err("CRL 1: CRL has more than 1 entries"));
    check(2, lists.len(), Err("CRL 0: CRL has more than 2 entries"));
    check(5, lists.len() - 1, Err("bytes; must be"));
    let policy = RevocationPolicy::default();
    assert_eq!((policy.entries_limit, policy.bytes_limit), (500_000, 50 * 1024 * 1024));
}

/// A delta CRL for the CRL with that number.
fn delta(list: List, base: u64) -> List {
    let base = extension(DELTA_INDICATOR, Critical::Yes, &der(0x02, &pki::integer(base)));
    List { extensions: [base, list.extensions].concat(), ..list }
}

#[test]
fn delta_crl_is_applied_only_with_its_base_crl() {
    const REASON: &[u8] = &[0x55, 0x1d, 0x15];
    let ca = pki::root("root");
    let base = List::new(5, &[1, 2]).signed_by(&ca);
    let restoring = extension(REASON, Critical::No, &[0x0a, 1, 8]);
    let check = |lists: &[&List], expected: &[(u64, RevocationStatus)]| {
        let lists: Vec<Vec<u8>> = lists.iter().map(|list| list.signed_by(&ca)).collect();
        let index = load(&[lists.concat(), base.clone()].concat(), &[&ca], None).unwrap();
        for (serial, expected) in expected {
            assert_eq!(status(&index, &ca, *serial), *expected, "{serial}");
        }
    };
    let good = RevocationStatus::Good;
    let revoked = RevocationStatus::Revoked;
    let adding = delta(List::new(6, &[3]), 5);
    check(&[&adding], &[(1, revoked), (2, revoked), (3, revoked), (4, good)]);
    let back = delta(List { entry_extensions: restoring.clone(), ..List::new(7, &[2, 3]) }, 5);
    check(&[&back], &[(1, revoked), (2, good), (3, good)]);
    // Delta CRLs are applied in the order of their numbers, whatever their order in the file.
    check(&[&back, &adding], &[(1, revoked), (2, good), (3, good)]);
    // A delta CRL older than the base CRL changes nothing.
    check(&[&delta(List::new(4, &[4]), 3)], &[(1, revoked), (4, good)]);
    // Both CRLs must be in force.
    let over = delta(List { this_update: -HOUR, next_update: -60, ..List::new(6, &[3]) }, 5);
    check(&[&over], &[(3, revoked), (4, RevocationStatus::Expired)]);
    // `removeFromCRL` has no effect in a full CRL.
    let whole = List { entry_extensions: restoring, ..List::new(6, &[2]) };
    check(&[&whole], &[(2, revoked), (1, good)]);

    let lone = |list: &List| [list.signed_by(&ca), base.clone()].concat();
    refused(&lone(&delta(List::new(9, &[3]), 6)), &[&ca], "number 6 of \"root\"");
    refused(
        &delta(List::new(6, &[3]), 5).signed_by(&ca),
        &[&ca],
        "CRL 0: delta CRL without its base CRL: number 5",
    );
    let elsewhere =
        delta(List { extensions: scoped(&[point("http://x/")]), ..List::new(6, &[3]) }, 5);
    refused(&lone(&elsewhere), &[&ca], "without its base CRL");
}

/// A leaf of `ca` with number 9 that names these distribution points, each DER.
fn at_points(ca: &Ca, points: &[Vec<u8>]) -> CertificateDer<'static> {
    let mut params = pki::leaf_params(pki::WEB, 9);
    let points = der(0x30, &points.concat());
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 31], points)];
    let key = rcgen::KeyPair::generate().unwrap();
    params.signed_by(&key, ca).unwrap().der().clone()
}

#[test]
fn distribution_point_crl_covers_only_certificates_that_name_the_point() {
    let ca = pki::root("root");
    let list = List { extensions: scoped(&[point("http://x/2")]), ..List::new(1, &[7]) };
    let index = load(&list.signed_by(&ca), &[&ca], None).unwrap();
    let issuer = webpki::anchor_from_trusted_cert(ca.der()).unwrap().subject;
    let check = |points: &[Vec<u8>], expected| {
        let leaf = at_points(&ca, points);
        let serial = [9];
        let asked = RevocationQuery {
            issuer: &issuer,
            issuer_key: None,
            serial: &serial,
            role: CertificateRole::Leaf,
            certificate: &leaf,
        };
        assert_eq!(index.status(&asked, unix(0)), expected, "{points:x?}");
    };
    let named = |uris: &[&str]| {
        let names: Vec<u8> = uris.iter().flat_map(|uri| der(0x86, uri.as_bytes())).collect();
        der(0x30, &der(0xa0, &der(0xa0, &names)))
    };
    let good = RevocationStatus::Good;
    let unknown = RevocationStatus::Unknown;
    check(&[named(&["http://x/2"])], good);
    check(&[named(&["http://x/1", "http://x/2"])], good);
    check(&[named(&["http://x/1"]), named(&["http://x/2"])], good);
    check(&[named(&["http://x/1"])], unknown);
    check(&[named(&["http://x/22"])], unknown);
    check(&[], unknown);
    // Points for some reasons only, or with another CRL issuer.
    let with = |more: Vec<u8>| {
        let name = der(0xa0, &der(0xa0, &der(0x86, b"http://x/2")));
        der(0x30, &[name, more].concat())
    };
    check(&[with(der(0x81, &[6, 0x40]))], unknown);
    check(&[with(der(0xa2, &der(0x86, b"http://other/")))], unknown);
}

#[test]
fn crl_for_leaves_or_cas_covers_only_these() {
    let ca = pki::root("root");
    let list = |tag| List { extensions: scoped(&[der(tag, &[0xff])]), ..List::new(1, &[7]) };
    let leaves = list(0x81).signed_by(&ca);
    let authorities = list(0x82).signed_by(&ca);
    let check = |lists: &[u8], expected: [RevocationStatus; 2]| {
        let index = load(lists, &[&ca], None).unwrap();
        let got = [CertificateRole::Leaf, CertificateRole::Authority]
            .map(|role| status_of(&index, &ca, &[9], role, unix(0)));
        assert_eq!(got, expected);
    };
    check(&leaves, [RevocationStatus::Good, RevocationStatus::Unknown]);
    check(&authorities, [RevocationStatus::Unknown, RevocationStatus::Good]);
    check(&[leaves, authorities].concat(), [RevocationStatus::Good; 2]);
}

#[test]
fn million_entry_crl_is_loaded_and_searched() {
    const ENTRIES: u64 = 1_000_000;
    let ca = pki::root("root");
    let serials: Vec<u64> = (0..ENTRIES).rev().map(|number| number * 3).collect();
    let list = List::new(1, &serials).signed_by(&ca);
    let policy = RevocationPolicy { entries_limit: 1_000_000, ..Default::default() };
    let index = load_within(&list, &ca, &policy).unwrap();
    assert_eq!(index.len() as u64, ENTRIES);
    assert!(index.bytes() <= 20 * index.len(), "{} bytes", index.bytes());
    for number in (0..ENTRIES).step_by(997).chain([ENTRIES - 1]) {
        assert_eq!(status(&index, &ca, number * 3), RevocationStatus::Revoked, "{number}");
        assert_eq!(status(&index, &ca, number * 3 + 1), RevocationStatus::Good, "{number}");
    }
}
