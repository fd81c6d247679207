//! CRLs of intermediates that only peers present, and intermediates in the trust bundle.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use std::sync::Arc;

use pki::{
    Ca, Critical, HOUR, Leaf, List, WEB, World, ca_params, crl_pem, extension, leaf_params, unix,
};
use rcgen::{KeyPair, KeyUsagePurpose};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_certs::{TrustParts, TrustStore, fault, tls};
use weft_model::{RevocationMode, RevocationPolicy};

fn policy(mode: RevocationMode) -> RevocationPolicy {
    RevocationPolicy { mode, ..RevocationPolicy::default() }
}

const STRICT: RevocationMode = RevocationMode::Strict;
const SOFT: RevocationMode = RevocationMode::Soft;

/// A store with this trust bundle and these CRLs.
fn store(
    bundle: &[&Ca],
    lists: &[Vec<u8>],
    mode: RevocationMode,
    previous: Option<&TrustStore>,
) -> Arc<TrustStore> {
    let roots: String = bundle.iter().map(|ca| ca.pem()).collect();
    let lists: String = lists.iter().map(|list| crl_pem(list)).collect();
    let parts = TrustParts {
        roots: roots.as_bytes(),
        revocations: Some(lists.as_bytes()),
        names: Vec::new(),
        policy: policy(mode),
    };
    Arc::new(TrustStore::build(parts, previous, unix(0)).unwrap())
}

fn chain(leaf: &Leaf) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(leaf.chain.as_bytes()).map(Result::unwrap).collect()
}

/// The result of a client; if rejected, the fault and its detail.
fn admits(store: &Arc<TrustStore>, leaf: &Leaf) -> Result<(), String> {
    tls::check_client(store.clone(), &chain(leaf), unix(0)).map_err(|error| {
        let fault::PeerRefusal { fault, detail, .. } = fault::take(&error);
        format!("{fault}: {detail}")
    })
}

const GOOD: Result<(), String> = Ok(());

fn revoked() -> Result<(), String> {
    Err("ClientCertCrlHit: certificate is revoked".into())
}

fn uncovered() -> Result<(), String> {
    Err("ClientCertCrlProcessingError: no CRL covers the certificate".into())
}

fn member(issuer: &Ca, serial: u64, above: &[&Ca]) -> Leaf {
    pki::leaf(&leaf_params(WEB, serial), issuer, above)
}

fn named(name: &str, serial: u64, issuer: &Ca) -> Ca {
    let mut params = ca_params(name);
    params.serial_number = Some(serial.into());
    pki::intermediate(params, issuer)
}

#[test]
fn pending_crl_is_used_once_a_verified_chain_contains_its_issuer() {
    let World { root, below, good } = World::new();
    let bad = member(&below, 7, &[&below]);
    let lists = [List::new(1, &[7]).signed_by(&below), List::new(1, &[]).signed_by(&root)];
    for mode in [STRICT, SOFT] {
        for first in [&good, &bad] {
            let store = store(&[&root], &lists, mode, None);
            assert!(store.warnings(unix(0))[0].contains("\"below\" is not in the trust bundle"));
            drop(admits(&store, first));
            assert_eq!(
                (admits(&store, &good), admits(&store, &bad)),
                (GOOD, revoked()),
                "{mode:?}"
            );
            assert_eq!(store.warnings(unix(0)), Vec::<String>::new(), "no CRL is pending");
            assert_eq!(store.revocations().unwrap().crl_infos().len(), 2);
        }
    }
}

#[test]
fn unverified_chain_activates_no_pending_crl() {
    let World { root, below, good } = World::new();
    // A CA of the same name, below an untrusted root of the same name, that signs its own CRL.
    let false_root = pki::root("root");
    let false_below = named("below", 50, &false_root);
    let attacker = member(&false_below, 1, &[&false_below]);
    let lists = [
        List::new(9, &[]).signed_by(&false_below),
        List::new(1, &[7]).signed_by(&below),
        List::new(1, &[]).signed_by(&root),
    ];
    let store = store(&[&root], &lists, STRICT, None);
    assert!(admits(&store, &attacker).is_err());
    assert_eq!(store.warnings(unix(0)).len(), 2, "both CRLs are pending");
    // The trusted intermediate in addition to its own certificate changes nothing.
    let mixed = Leaf { chain: attacker.chain + &below.pem(), key: String::new() };
    assert!(admits(&store, &mixed).is_err());
    assert_eq!(store.warnings(unix(0)).len(), 2);
    assert_eq!(admits(&store, &good), GOOD);
    assert_eq!(admits(&store, &member(&below, 7, &[&below])), revoked());
    assert_eq!(store.warnings(unix(0)).len(), 1, "the untrusted CRL stays pending");
}

#[test]
fn pending_crl_waits_for_the_issuer_that_signed_it() {
    let root = pki::root("root");
    let issuers = [named("below", 51, &root), named("below", 52, &root), named("below", 53, &root)];
    let [one, two, three] = &issuers;
    let lists = [
        List::new(1, &[]).signed_by(&root),
        List::new(1, &[11]).signed_by(one),
        List::new(1, &[12]).signed_by(two),
    ];
    for mode in [STRICT, SOFT] {
        let store = store(&[&root], &lists, mode, None);
        let uncovered = if mode == STRICT { uncovered() } else { GOOD };
        for _ in 0..2 {
            assert_eq!(admits(&store, &member(three, 30, &[three])), uncovered, "{mode:?}");
            assert_eq!(admits(&store, &member(two, 22, &[two])), GOOD);
            assert_eq!(admits(&store, &member(two, 12, &[two])), revoked());
            assert_eq!(admits(&store, &member(one, 11, &[one])), revoked());
            assert_eq!(admits(&store, &member(one, 21, &[one])), GOOD);
        }
    }
}

#[test]
fn intermediate_in_the_bundle_with_its_root_is_not_an_anchor() {
    let World { root, below, good } = World::new();
    let bad = member(&below, 7, &[&below]);
    // A client may omit an intermediate that the trust bundle has.
    let bare = member(&below, 9, &[]);
    let below_list = List::new(1, &[7]).signed_by(&below);
    let with_root = |serials: &[u64]| [below_list.clone(), List::new(1, serials).signed_by(&root)];
    for bundle in [[&root, &below], [&below, &root]] {
        let clean = store(&bundle, &with_root(&[]), STRICT, None);
        assert_eq!(clean.warnings(unix(0)), Vec::<String>::new());
        for _ in 0..2 {
            assert_eq!((admits(&clean, &good), admits(&clean, &bad)), (GOOD, revoked()));
            assert_eq!(admits(&clean, &bare), GOOD);
        }
        let hit = store(&bundle, &with_root(&[50]), STRICT, Some(&clean));
        assert_eq!((admits(&hit, &good), admits(&hit, &bare)), (revoked(), revoked()));
        // The connection of a client that omitted the intermediate is closed as well.
        let proof = tls::prove_client(clean.clone(), &chain(&bare), unix(0)).unwrap();
        assert!(hit.delta_since(&clean).invalidates(&proof));
        // Without a CRL of the root, the status of the intermediate is unknown.
        let partial = store(&bundle, std::slice::from_ref(&below_list), STRICT, None);
        assert_eq!(admits(&partial, &good), uncovered());
        let partial = store(&bundle, std::slice::from_ref(&below_list), SOFT, None);
        assert_eq!((admits(&partial, &good), admits(&partial, &bad)), (GOOD, revoked()));
    }
    // Alone in the bundle, the intermediate is an anchor.
    let alone = store(&[&below], &[below_list], STRICT, None);
    assert_eq!((admits(&alone, &good), admits(&alone, &bad)), (GOOD, revoked()));
}

#[test]
fn self_issued_certificate_is_an_anchor_when_it_signed_itself() {
    let old = pki::root("root");
    // One certificate with another key, and one with the same key.
    let rolled = named("root", 70, &old);
    let mut params = ca_params("root");
    params.serial_number = Some(71.into());
    let renewed = Ca::self_signed(params, KeyPair::from_pem(&old.key().serialize_pem()).unwrap());
    let renewed = renewed.unwrap();
    let lists = |revoked: &[u64]| {
        [List::new(1, revoked).signed_by(&old), List::new(1, &[]).signed_by(&rolled)]
    };
    for bundle in [[&old, &renewed, &rolled], [&rolled, &renewed, &old]] {
        let check = |revoked: &[u64], by_old, by_rolled| {
            let store = store(&bundle, &lists(revoked), STRICT, None);
            let leaves = [member(&old, 9, &[]), member(&rolled, 9, &[])];
            assert_eq!(leaves.map(|leaf| admits(&store, &leaf)), [by_old, by_rolled]);
        };
        check(&[], GOOD, GOOD);
        check(&[70, 71], GOOD, revoked());
    }
}

#[test]
fn bundle_certificates_that_sign_one_another_are_anchors() {
    let one = pki::root("one");
    let two = named("two", 1, &one);
    let crossed = ca_params("one").signed_by(one.key(), &two).unwrap();
    let bundle = crossed.pem() + &two.pem();
    let store = TrustStore::load(bundle.as_bytes(), None, Vec::new(), None, unix(0)).unwrap();
    let store = Arc::new(store);
    for issuer in [&one, &two] {
        assert_eq!(admits(&store, &member(issuer, 9, &[])), GOOD);
    }
}

#[test]
fn cross_signed_intermediate_is_accepted_on_the_path_without_revocation() {
    let [old, new] = ["old", "new"].map(pki::root);
    let below = named("below", 60, &old);
    let mut params = ca_params("below");
    params.serial_number = Some(61.into());
    let crossed = params.signed_by(below.key(), &new).unwrap();
    let good = member(&below, 21, &[&below]);
    let both = Leaf { chain: good.chain.clone() + &crossed.pem(), key: String::new() };
    let other = Leaf { chain: member(&below, 21, &[]).chain + &crossed.pem(), key: String::new() };
    let lists = |revoked_by_old: &[u64], revoked_by_new: &[u64]| {
        [
            List::new(1, &[7]).signed_by(&below),
            List::new(1, revoked_by_old).signed_by(&old),
            List::new(1, revoked_by_new).signed_by(&new),
        ]
    };
    let check = |lists: &[Vec<u8>], expected: [Result<(), String>; 3]| {
        let store = store(&[&old, &new], lists, STRICT, None);
        for _ in 0..2 {
            let found = [&good, &other, &both].map(|leaf| admits(&store, leaf));
            assert_eq!(found, expected);
        }
    };
    check(&lists(&[], &[]), [GOOD, GOOD, GOOD]);
    check(&lists(&[60], &[]), [revoked(), GOOD, GOOD]);
    check(&lists(&[], &[61]), [GOOD, revoked(), GOOD]);
    check(&lists(&[60], &[61]), [revoked(), revoked(), revoked()]);
}

#[test]
fn next_crls_of_a_learned_intermediate_are_verified_on_load() {
    let World { root, below, good } = World::new();
    let clean = List::new(1, &[]).signed_by(&root);
    let lists =
        |number, serials: &[u64]| [List::new(number, serials).signed_by(&below), clean.clone()];
    let first = store(&[&root], &lists(5, &[]), STRICT, None);
    assert_eq!(admits(&first, &good), GOOD);
    let proof = tls::prove_client(first.clone(), &chain(&good), unix(0)).unwrap();

    let next = store(&[&root], &lists(6, &[1000]), STRICT, Some(&first));
    assert_eq!(next.warnings(unix(0)), Vec::<String>::new(), "no CRL is pending");
    assert!(next.delta_since(&first).invalidates(&proof), "its connections are closed");
    assert_eq!(admits(&next, &good), revoked());

    // The CRL in force stays if the new one is older, missing or damaged.
    let mut damaged = lists(7, &[]);
    *damaged[0].last_mut().unwrap() ^= 1;
    for lists in [lists(4, &[]).to_vec(), damaged.to_vec()] {
        let later = store(&[&root], &lists, STRICT, Some(&next));
        assert_eq!(admits(&later, &good), revoked());
        assert!(!later.warnings(unix(0)).is_empty());
    }
    // The same applies to a CRL that was never checked while its connection was set up.
    let unlisted = store(&[&root], std::slice::from_ref(&clean), SOFT, None);
    assert_eq!(admits(&unlisted, &good), GOOD);
    let listed = store(&[&root], &lists(1, &[1000]), SOFT, Some(&unlisted));
    assert!(listed.delta_since(&unlisted).invalidates(&proof));
}

#[test]
fn intermediate_that_may_not_sign_crls_yet_activates_none() {
    let root = pki::root("root");
    let clean = List::new(1, &[]).signed_by(&root);
    let mut params = ca_params("below");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let below = pki::intermediate(params, &root);
    let lists = [List::new(1, &[]).signed_by(&below), clean.clone()];
    let unfit = store(&[&root], &lists, STRICT, None);
    assert_eq!(admits(&unfit, &member(&below, 1, &[&below])), uncovered());

    let below = named("below", 50, &root);
    let early = List { this_update: HOUR, ..List::new(1, &[7]) };
    let store = store(&[&root], &[early.signed_by(&below), clean], STRICT, None);
    let [good, bad] = [8, 7].map(|serial| member(&below, serial, &[&below]));
    assert_eq!(admits(&store, &good), uncovered());
    let later = |leaf| tls::check_client(store.clone(), &chain(leaf), unix(HOUR)).is_ok();
    assert!(!later(&bad));
    // At that time, the other certificate fails because the root's CRL, which is valid for an hour, has expired.
    assert_eq!(store.warnings(unix(0)), Vec::<String>::new(), "the early CRL is in force by then");
}

#[test]
fn crls_of_a_learned_intermediate_load_again() {
    const DELTA_INDICATOR: &[u8] = &[0x55, 0x1d, 0x1b];
    let root = pki::root("root");
    let mut params = ca_params("below");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let unfit = pki::intermediate(params, &root);
    let below = named("below", 50, &root);
    let plain = || List::new(1, &[]);
    let changes = extension(DELTA_INDICATOR, Critical::Yes, &[0x02, 1, 5]);
    let unreadable = List { serials: vec![vec![1; 22]], ..plain() };
    let check = |case: &str, issuer: &Ca, list: &List, beside: &[Vec<u8>], mode| {
        let lists = [&[list.signed_by(issuer)], beside].concat();
        let mut held = store(&[&root], &lists, mode, None);
        for _ in 0..2 {
            drop(admits(&held, &member(issuer, 1, &[issuer])));
            held = store(&[&root], &lists, mode, Some(&held));
            assert_eq!(held.warnings(unix(0)).len(), 1, "{case}, {mode:?}");
        }
    };
    let clean = [plain().signed_by(&root)];
    for mode in [STRICT, SOFT] {
        for beside in [&clean[..], &[]] {
            check("issuer may not sign CRLs", &unfit, &plain(), beside, mode);
            check("from the future", &below, &List { this_update: 60, ..plain() }, beside, mode);
            let lone = List { extensions: changes.clone(), ..plain() };
            check("delta CRL without base CRL", &below, &lone, beside, mode);
        }
    }
    check("unreadable", &below, &unreadable, &clean, STRICT);
}

#[test]
fn pending_crls_are_limited_in_number_bytes_and_entries() {
    let World { root, below, good } = World::new();
    let stranger = pki::root("stranger");
    let foreign = List::new(1, &[1, 2, 3]).signed_by(&stranger);
    let mut lists: Vec<_> = (0..300).map(|_| foreign.clone()).collect();
    lists.push(List::new(1, &[]).signed_by(&below));
    lists.push(List::new(1, &[]).signed_by(&root));
    let full = store(&[&root], &lists, STRICT, None);
    assert_eq!(full.warnings(unix(0)).len(), 301);
    assert_eq!(admits(&full, &good), uncovered(), "its CRL exceeds the limit");

    // Pending CRLs do not use up the limits of CRLs from known issuers.
    let tight = RevocationPolicy { entries_limit: 2, ..RevocationPolicy::default() };
    let lists = [foreign, List::new(1, &[7, 8]).signed_by(&root)];
    let lists: String = lists.iter().map(|list| crl_pem(list)).collect();
    let roots = root.pem();
    let parts = TrustParts {
        roots: roots.as_bytes(),
        revocations: Some(lists.as_bytes()),
        names: Vec::new(),
        policy: tight,
    };
    let store = Arc::new(TrustStore::build(parts, None, unix(0)).unwrap());
    assert!(store.warnings(unix(0))[0].contains("more than 0 entries"));
    assert_eq!(admits(&store, &member(&root, 7, &[])), revoked());
    assert_eq!(admits(&store, &member(&root, 9, &[])), GOOD);
}

#[test]
fn keys_tried_on_pending_crls_are_limited() {
    let root = pki::root("root");
    let [one, last] = [named("below", 51, &root), named("below", 52, &root)];
    let early = List { this_update: HOUR, ..List::new(2, &[]) }.signed_by(&last);
    let lists = [List::new(1, &[]).signed_by(&root), List::new(1, &[]).signed_by(&last), early];
    for lists in [&lists[..2], &lists] {
        let store = store(&[&root], lists, STRICT, None);
        assert_eq!(admits(&store, &member(&one, 1, &[&one])), uncovered());
        for serial in 100..356 {
            let other = named("below", serial, &root);
            drop(admits(&store, &member(&other, 1, &[&other])));
        }
        assert_eq!(admits(&store, &member(&last, 1, &[&last])), uncovered(), "fails closed");
    }
}

#[test]
fn early_crl_replaces_the_older_one_once_in_force() {
    let World { root, below, good } = World::new();
    let clean = List { next_update: 5 * HOUR, ..List::new(1, &[]) }.signed_by(&root);
    let older = List::new(1, &[1001]).signed_by(&below);
    let early = List { this_update: HOUR, next_update: 3 * HOUR, ..List::new(2, &[]) };
    let restored = member(&below, 1001, &[&below]);
    let lists = [clean, older, early.signed_by(&below)];
    let seen_before = store(&[&root], &lists[..1], SOFT, None);
    assert_eq!(admits(&seen_before, &good), GOOD);
    for previous in [None, Some(&*seen_before)] {
        let held = store(&[&root], &lists, STRICT, previous);
        assert_eq!((admits(&held, &good), admits(&held, &restored)), (GOOD, revoked()));
        let later = |leaf| tls::check_client(held.clone(), &chain(leaf), unix(2 * HOUR)).is_ok();
        assert!(later(&good), "the older CRL has expired and is not used");
        assert!(later(&restored));
        assert_eq!(held.revocations().unwrap().crl_infos().len(), 2, "one of each issuer");
    }
}
