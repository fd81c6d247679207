//! The links of a proof, and the trust changes that invalidate it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use std::sync::Arc;

use pki::{
    Ca, HOUR, List, WEB, World, at, ca_params, crl_pem, intermediate, leaf, leaf_params, root, unix,
};
use rcgen::{GeneralSubtree, KeyPair, NameConstraints};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_certs::{Proof, TrustStore, tls};

fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

fn prove(pem: &str, trust: &Arc<TrustStore>) -> Option<Proof> {
    tls::prove_client(trust.clone(), &chain(pem), unix(0))
}

fn store(bundle: &[&Ca], previous: Option<&Arc<TrustStore>>) -> Arc<TrustStore> {
    let bundle: String = bundle.iter().map(|ca| ca.pem()).collect();
    let previous = previous.map(Arc::as_ref);
    Arc::new(TrustStore::load(bundle.as_bytes(), None, Vec::new(), previous, unix(0)).unwrap())
}

/// A store with the strict revocation policy.
fn listed(
    bundle: &[&Ca],
    lists: &[Vec<u8>],
    previous: Option<&Arc<TrustStore>>,
) -> Arc<TrustStore> {
    let bundle: String = bundle.iter().map(|ca| ca.pem()).collect();
    let lists: String = lists.iter().map(|list| crl_pem(list)).collect();
    let bundle = bundle.as_bytes();
    let lists = Some(lists.as_bytes());
    let previous = previous.map(Arc::as_ref);
    Arc::new(TrustStore::load(bundle, lists, Vec::new(), previous, unix(0)).unwrap())
}

/// An intermediate "below" with this serial number, which expires after `ends` seconds.
fn below(serial: u64, ends: i64, issuer: &Ca) -> Ca {
    let mut params = ca_params("below");
    params.serial_number = Some(serial.into());
    (params.not_before, params.not_after) = (at(-2 * HOUR), at(ends));
    intermediate(params, issuer)
}

#[test]
fn proof_is_invalidated_only_by_revocations_on_its_path() {
    let world = World::new();
    let beside = intermediate(ca_params("beside"), &world.root);
    let shown = [world.good.chain.as_str(), &beside.pem(), &world.root.pem()].concat();
    let nothing = |number| List::new(number, &[]);
    let before = Arc::new(world.listed(Some(&nothing(1)), Some(&nothing(1))));
    let proof = prove(&shown, &before).unwrap();
    let check = |below: &[u64], root: &[u64], expected: bool| {
        let lists = [List::new(2, below), List::new(2, root)];
        let now = world.listed(Some(&lists[0]), Some(&lists[1]));
        let withdrawn = now.delta_since(&before);
        assert_eq!(withdrawn.invalidates(&proof), expected, "{below:?}, {root:?}");
        // Earlier revocations are not part of the delta.
        let later = world.listed(Some(&List::new(3, below)), Some(&List::new(3, root)));
        assert!(later.delta_since(&now).is_empty(), "{below:?}, {root:?}");
    };
    check(&[1000], &[], true);
    check(&[], &[50], true);
    check(&[1001, 999], &[51], false);
    // Serial numbers of other certificates: those of the root, and those of the intermediate below.
    check(&[50], &[1000], false);
}

#[test]
fn certificates_outside_the_path_are_not_part_of_the_proof() {
    let top = root("root");
    let mut params = ca_params("beside");
    params.serial_number = Some(7.into());
    params.not_after = at(HOUR / 2);
    let beside = intermediate(params, &top);
    let middle = intermediate(ca_params("middle"), &top);
    let below = intermediate(ca_params("below"), &middle);
    let trust = store(&[&top], None);
    let good = leaf(&leaf_params(WEB, 1), &below, &[]);
    let proof = |above: &[&Ca]| {
        let above: String = above.iter().map(|ca| ca.pem()).collect();
        prove(&format!("{}{above}", good.chain), &trust).unwrap()
    };
    let plain = proof(&[&below, &middle]);
    assert_eq!(plain.links().len(), 6, "three certificates and three authorities");
    assert_eq!(proof(&[&middle, &beside, &top, &below]), plain);
    assert_eq!(plain.expires_at(), unix(24 * HOUR));
}

#[test]
fn proof_expires_with_its_first_certificate() {
    let top = root("root");
    let mut params = ca_params("below");
    params.not_after = at(HOUR);
    let below = intermediate(params, &top);
    let shown = leaf(&leaf_params(WEB, 1), &below, &[&below]).chain;
    let proof = prove(&shown, &store(&[&top], None)).unwrap();
    assert_eq!(proof.expires_at(), unix(HOUR));
}

#[test]
fn expired_intermediate_does_not_shorten_the_proof_of_its_renewal() {
    let top = root("root");
    let [expired, renewed] = [below(50, -HOUR, &top), below(51, HOUR, &top)];
    let good = leaf(&leaf_params(WEB, 1), &renewed, &[]).chain;
    let plain = prove(&(good.clone() + &renewed.pem()), &store(&[&top], None)).unwrap();
    assert_eq!(plain.expires_at(), unix(HOUR));
    for both in [[&expired, &renewed], [&renewed, &expired]] {
        let held = store(&[&top, both[0], both[1]], None);
        let shown = good.clone() + &both[0].pem() + &both[1].pem();
        assert_eq!(prove(&good, &held).as_ref(), Some(&plain), "both in the trust bundle");
        assert_eq!(prove(&shown, &store(&[&top], None)).as_ref(), Some(&plain), "both shown");
        assert_eq!(prove(&shown, &held).as_ref(), Some(&plain), "both in the bundle and shown");
    }
}

#[test]
fn revoked_intermediate_does_not_invalidate_another_of_the_same_name() {
    let top = root("root");
    let [old, new] = [below(50, HOUR, &top), below(51, HOUR, &top)];
    let lists = |number, revoked: &[u64]| {
        let nothing = List::new(number, &[]);
        [
            List::new(number, revoked).signed_by(&top),
            nothing.signed_by(&old),
            nothing.signed_by(&new),
        ]
    };
    for both in [[&old, &new], [&new, &old]] {
        let bundle = [&top, both[0], both[1]];
        let before = listed(&bundle, &lists(1, &[]), None);
        let after = listed(&bundle, &lists(2, &[50]), Some(&before));
        let withdrawn = after.delta_since(&before);
        for shown in [&[][..], &both] {
            let by_old = leaf(&leaf_params(WEB, 1), &old, shown).chain;
            let by_new = leaf(&leaf_params(WEB, 2), &new, shown).chain;
            let [by_old, by_new] = [by_old, by_new].map(|chain| prove(&chain, &before).unwrap());
            assert!(withdrawn.invalidates(&by_old) && !withdrawn.invalidates(&by_new));
        }
    }
}

#[test]
fn forged_certificate_does_not_extend_the_proof() {
    let [top, false_top] = [root("root"), root("root")];
    let [short, forged] = [below(50, HOUR / 2, &top), below(50, 20 * HOUR, &false_top)];
    let trust = store(&[&top], None);
    for above in [[&short, &forged], [&forged, &short]] {
        let shown = leaf(&leaf_params(WEB, 1), &short, &above).chain;
        assert_eq!(prove(&shown, &trust).unwrap().expires_at(), unix(HOUR / 2));
    }
    let forged = leaf(&leaf_params(WEB, 1), &forged, &[&forged, &short]).chain;
    assert_eq!(prove(&forged, &trust), None);
}

#[test]
fn intermediate_that_becomes_an_anchor_or_was_one_keeps_its_connections() {
    let [top, other] = [root("root"), root("other")];
    let [int, beside] = [below(50, HOUR, &top), below(51, HOUR, &top)];
    let [through, past] = [&int, &beside].map(|ca| leaf(&leaf_params(WEB, 1), ca, &[ca]).chain);
    let alone = store(&[&int], None);
    let both = store(&[&int, &top], Some(&alone));
    let by_anchor = prove(&through, &alone).unwrap();
    let by_root = prove(&through, &both).unwrap();
    let by_another = prove(&past, &both).unwrap();
    assert!(!both.delta_since(&alone).invalidates(&by_anchor));
    let withdrawn = alone.delta_since(&both);
    assert!(!withdrawn.invalidates(&by_root) && withdrawn.invalidates(&by_another));
    // The current stores decide, whatever the trust bundle was when the connection was opened.
    let root_alone = store(&[&top], Some(&both));
    let withdrawn = root_alone.delta_since(&both);
    assert!(withdrawn.invalidates(&by_anchor), "a client may not have shown the intermediate");
    assert!(!withdrawn.invalidates(&by_root) && !withdrawn.invalidates(&by_another));
    let others = store(&[&other], Some(&alone)).delta_since(&alone);
    assert!(others.invalidates(&by_anchor) && others.invalidates(&by_root));
}

#[test]
fn former_anchor_that_is_invalid_below_its_root_loses_its_connections() {
    let top = root("root");
    let mut params = ca_params("root");
    let permitted_subtrees = vec![GeneralSubtree::DnsName("server.test".into())];
    params.name_constraints =
        Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
    let constrained = Ca::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let check = |root: &Ca, ends, expected| {
        let int = below(50, ends, root);
        let before = store(&[&int], None);
        let proof = prove(&leaf(&leaf_params(WEB, 1), &int, &[]).chain, &before).unwrap();
        let withdrawn = store(&[root, &int], Some(&before)).delta_since(&before);
        assert_eq!(withdrawn.invalidates(&proof), expected);
    };
    check(&top, HOUR, false);
    check(&top, -HOUR, true);
    check(&constrained, HOUR, true);
}

#[test]
fn former_anchor_revoked_by_its_root_loses_its_connections() {
    let World { root, below, good } = World::new();
    let own = List::new(1, &[]).signed_by(&below);
    let lists =
        |number, revoked: &[u64]| [own.clone(), List::new(number, revoked).signed_by(&root)];
    let alone = listed(&[&below], std::slice::from_ref(&own), None);
    let proof = prove(&good.chain, &alone).unwrap();
    let both = [&root, &below];
    let ends = |new: &TrustStore, old: &TrustStore| new.delta_since(old).invalidates(&proof);
    assert!(ends(&listed(&both, &lists(1, &[50]), Some(&alone)), &alone), "at once");
    assert!(ends(&listed(&both, std::slice::from_ref(&own), Some(&alone)), &alone), "no CRL");
    let clean = listed(&both, &lists(1, &[]), Some(&alone));
    assert!(!ends(&clean, &alone));
    assert!(ends(&listed(&both, &lists(2, &[50]), Some(&clean)), &clean), "later");
}

#[test]
fn roots_with_one_name_are_distinguished() {
    let old = root("root");
    let new = root("root");
    let both = store(&[&old, &new], None);
    let proof = |ca: &Ca| prove(&leaf(&leaf_params(WEB, 1), ca, &[]).chain, &both).unwrap();
    let later = store(&[&new], Some(&both));
    let withdrawn = later.delta_since(&both);
    assert!(withdrawn.invalidates(&proof(&old)) && !withdrawn.invalidates(&proof(&new)));
    // In the other direction nothing is revoked, and the versions are ordered.
    assert!(both.delta_since(&later).is_empty());
    let before = both.version();
    let after = later.version();
    assert_eq!((before.lineage, before.generation + 1), (after.lineage, after.generation));
    assert_ne!(store(&[&new], None).version().lineage, after.lineage);
}

#[test]
fn truncated_certificate_yields_no_proof() {
    let top = root("root");
    let trust = store(&[&top], None);
    let good = chain(&leaf(&leaf_params(WEB, 1), &top, &[]).chain);
    let prove = |chain: &[_]| tls::prove_client(trust.clone(), chain, unix(0));
    assert!(prove(&good).is_some());
    assert_eq!(prove(&[]), None);
    let whole = good.first().unwrap();
    for length in 0..150 {
        let cut = CertificateDer::from(whole.as_ref().get(..length).unwrap().to_vec());
        assert_eq!(prove(&[cut]), None, "{length}");
    }
}
