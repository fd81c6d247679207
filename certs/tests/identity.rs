//! Loading of certificates, chains and keys.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test panics on an unexpected result"
)]

#[expect(dead_code, reason = "each test file uses a part of it")]
mod pki;

use pki::{Leaf, WEB, World, leaf_params, unix};
use rcgen::SanType;
use weft_certs::tls::{LoadedIdentity, TlsError};
use weft_certs::{TrustError, TrustStore, VerifiedPeer};

const OTHER: &str = "spiffe://mesh.test/ns/a/sa/other";

fn peer(leaf: &Leaf) -> VerifiedPeer {
    let identity = LoadedIdentity::load(leaf.chain.as_bytes(), leaf.key.as_bytes()).unwrap();
    VerifiedPeer::assertion(identity.leaf().unwrap()).unwrap()
}

#[test]
fn store_without_readable_root_is_rejected() {
    let load = |roots: &[u8]| TrustStore::load(roots, None, Vec::new(), None, unix(0));
    assert_eq!(load(b"").unwrap_err(), TrustError::NoRoots);
    assert_eq!(load(b"# empty\n").unwrap_err(), TrustError::NoRoots);
    let broken = pki::root("root").pem().replace("MII", "AAA");
    assert!(matches!(load(broken.as_bytes()), Err(TrustError::Roots(_))));
    let cut = pki::root("root").pem().replace("-----END", "");
    assert!(matches!(load(cut.as_bytes()), Err(TrustError::Roots(_))));
}

#[test]
fn private_key_that_does_not_match_the_chain_is_rejected() {
    let world = World::new();
    let other = pki::leaf(&leaf_params(OTHER, 1), &world.below, &[]);
    let load =
        |chain: &str, key: &str| LoadedIdentity::load(chain.as_bytes(), key.as_bytes()).map(drop);
    let good = &world.good;
    assert_eq!(load(&good.chain, &good.key), Ok(()));
    assert_eq!(load(&good.chain, &other.key), Err(TlsError::Mismatch));
    // The key matches the first certificate only.
    assert_eq!(load(&(other.chain + &good.chain), &good.key), Err(TlsError::Mismatch));
    assert!(matches!(load("", &good.key), Err(TlsError::Chain(_))));
    assert!(matches!(load(&good.key, &good.key), Err(TlsError::Chain(_))));
    assert!(matches!(load(&good.chain, ""), Err(TlsError::Key(_))));
    assert!(matches!(load(&good.chain, &good.chain), Err(TlsError::Key(_))));
}

#[test]
fn spiffe_id_requires_exactly_one_uri() {
    let root = pki::root("root");
    let leaf = |uris: &[&str]| {
        let mut params = leaf_params(WEB, 1);
        params.subject_alt_names = vec![SanType::DnsName("server.test".try_into().unwrap())];
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        params.subject_alt_names.extend(uris);
        pki::leaf(&params, &root, &[])
    };
    let id = |uris: &[&str]| peer(&leaf(uris)).identity().map(|id| id.as_str().to_owned());
    assert_eq!(id(&[WEB]).as_deref(), Some(WEB));
    assert_eq!(id(&[]), None);
    assert_eq!(id(&["https://example.test/"]), None);
    // A certificate with an invalid SPIFFE ID is rejected, and not treated as one without an ID.
    for uris in [
        &[WEB, OTHER][..],
        &[WEB, "https://example.test/"],
        &["https://example.test/", WEB],
        &["SPIFFE://mesh.test/ns/a/sa/web"],
        &["spiffe://mesh.test/ns/../sa/web"],
    ] {
        let leaf = leaf(uris);
        let identity = LoadedIdentity::load(leaf.chain.as_bytes(), leaf.key.as_bytes()).unwrap();
        assert!(VerifiedPeer::assertion(identity.leaf().unwrap()).is_none(), "{uris:?}");
    }
}

#[test]
fn serial_number_is_formatted_without_sign_byte() {
    let root = pki::root("root");
    for (serial, expected) in
        [(0xfef2_5737_2d5c_14d4, "FEF257372D5C14D4"), (0x03_a5b1, "03A5B1"), (0, "00")]
    {
        let leaf = pki::leaf(&leaf_params(WEB, serial), &root, &[]);
        assert_eq!(peer(&leaf).serial_hex(), expected);
    }
}
