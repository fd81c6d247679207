//! What a proof rests on, and what ends it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod pki;

use pki::{Ca, HOUR, List, WEB, World, at, ca_params, intermediate, leaf, leaf_params, root, unix};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_certs::{Proof, TrustStore};

fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

fn store(roots: &[&Ca], previous: Option<&TrustStore>) -> TrustStore {
    let roots: String = roots.iter().map(|root| root.pem()).collect();
    TrustStore::load(roots.as_bytes(), None, Vec::new(), previous, unix(0)).unwrap()
}

#[test]
fn a_proof_ends_with_what_is_revoked_of_its_way_and_with_nothing_else() {
    let world = World::new();
    let beside = intermediate(ca_params("beside"), &world.root);
    let shown = [world.good.chain.as_str(), &beside.pem(), &world.root.pem()].concat();
    let nothing = |number| List::new(number, &[]);
    let before = world.listed(Some(&nothing(1)), Some(&nothing(1)));
    let proof = Proof::of(&chain(&shown), &before).unwrap();
    let check = |below: &[u64], root: &[u64], expected: bool| {
        let lists = [List::new(2, below), List::new(2, root)];
        let now = world.listed(Some(&lists[0]), Some(&lists[1]));
        let withdrawn = now.withdrawn_since(&before);
        assert_eq!(withdrawn.ends(&proof), expected, "{below:?}, {root:?}");
        // What was revoked before is not withdrawn again.
        let later = world.listed(Some(&List::new(3, below)), Some(&List::new(3, root)));
        assert!(later.withdrawn_since(&now).is_empty(), "{below:?}, {root:?}");
    };
    check(&[1000], &[], true);
    check(&[], &[50], true);
    check(&[1001, 999], &[51], false);
    // The numbers of others: those that the root has given, and those of the one below it.
    check(&[50], &[1000], false);
}

#[test]
fn certificates_beside_the_way_do_not_count_in_whatever_order_they_are_shown() {
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
        Proof::of(&chain(&format!("{}{above}", good.chain)), &trust).unwrap()
    };
    let plain = proof(&[&below, &middle]);
    assert_eq!(plain.links().len(), 4, "three certificates and a root");
    assert_eq!(proof(&[&middle, &beside, &top, &below]), plain);
    assert_eq!(plain.ends(), unix(24 * HOUR).as_secs());
}

#[test]
fn a_proof_ends_with_the_first_of_its_certificates() {
    let top = root("root");
    let mut params = ca_params("below");
    params.not_after = at(HOUR);
    let below = intermediate(params, &top);
    let shown = leaf(&leaf_params(WEB, 1), &below, &[&below]).chain;
    let proof = Proof::of(&chain(&shown), &store(&[&top], None)).unwrap();
    assert_eq!(proof.ends(), unix(HOUR).as_secs());
}

#[test]
fn roots_of_one_name_are_told_apart() {
    let (old, new) = (root("root"), root("root"));
    let both = store(&[&old, &new], None);
    let proof =
        |ca: &Ca| Proof::of(&chain(&leaf(&leaf_params(WEB, 1), ca, &[]).chain), &both).unwrap();
    let later = store(&[&new], Some(&both));
    let withdrawn = later.withdrawn_since(&both);
    assert!(withdrawn.ends(&proof(&old)) && !withdrawn.ends(&proof(&new)));
    // The other way round nothing is taken back, and who replaces whom is known.
    assert!(both.withdrawn_since(&later).is_empty());
    let (before, after) = (both.standing(), later.standing());
    assert_eq!((before.line, before.generation + 1), (after.line, after.generation));
    assert_ne!(store(&[&new], None).standing().line, after.line);
}

#[test]
fn what_is_no_certificate_proves_nothing() {
    let top = root("root");
    let trust = store(&[&top], None);
    let good = chain(&leaf(&leaf_params(WEB, 1), &top, &[]).chain);
    assert_eq!(Proof::of(&[], &trust), None);
    let whole = good.first().unwrap();
    for length in 0..150 {
        let cut = CertificateDer::from(whole.as_ref().get(..length).unwrap().to_vec());
        assert_eq!(Proof::of(&[cut], &trust), None, "{length}");
    }
}
