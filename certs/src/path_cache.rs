//! A cache of verified certificate paths, one per trust store.
//!
//! The signatures and extensions of a path never change. When a peer presents the same certificates again, only the validity
//! and the CRLs are checked. A new trust store starts with an empty cache.

use std::collections::HashMap;
use std::sync::Mutex;

use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::profile::Purpose;
use crate::proof::Proof;

/// The maximum number of cached paths, in two generations of equal size.
const LIMIT: usize = 1024;

/// The SHA-256 of the presented certificates and the purpose.
pub(crate) type ChainDigest = [u8; 32];

/// A verified path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CachedPath {
    /// The certificates above the leaf, in the order of the path. Each number is an index into the presented
    /// certificates above the leaf, followed by the intermediates of the trust bundle.
    pub(crate) above: Box<[usize]>,
    /// The root's `SubjectPublicKeyInfo`.
    pub(crate) root_key: Box<[u8]>,
    /// When all certificates of the path are valid from.
    pub(crate) from: UnixTime,
    /// The proof, with the time at which the first certificate of the path expires.
    pub(crate) proof: Proof,
}

/// The cached paths of one trust store.
#[derive(Debug, Default)]
pub(crate) struct PathCache(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<ChainDigest, CachedPath>,
    old: HashMap<ChainDigest, CachedPath>,
}

/// Computes the cache key of the presented certificates.
pub(crate) fn chain_digest(
    purpose: Purpose,
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
) -> ChainDigest {
    let mut context = Context::new(&SHA256);
    context.update(&[purpose as u8]);
    for certificate in std::iter::once(leaf).chain(above) {
        context.update(&certificate.len().to_be_bytes());
        context.update(certificate);
    }
    let mut digest = ChainDigest::default();
    digest.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
    digest
}

impl PathCache {
    /// The cached path of a chain. None also while another thread holds the lock: the lookup never blocks.
    pub(crate) fn get(&self, digest: &ChainDigest) -> Option<CachedPath> {
        let mut paths = self.0.try_lock().ok()?;
        if let Some(path) = paths.young.get(digest) {
            return Some(path.clone());
        }
        let path = paths.old.remove(digest)?;
        paths.put(*digest, path.clone());
        Some(path)
    }

    /// Adds a path. Does nothing while another thread holds the lock.
    pub(crate) fn put(&self, digest: ChainDigest, path: CachedPath) {
        if let Ok(mut paths) = self.0.try_lock() {
            paths.put(digest, path);
        }
    }
}

impl Generations {
    fn put(&mut self, digest: ChainDigest, path: CachedPath) {
        if self.young.len() >= LIMIT / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(digest, path);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn path(from: u64) -> CachedPath {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let proof = Proof::new(Vec::new(), at(from + 1));
        CachedPath { above: Box::new([0]), root_key: Box::default(), from: at(from), proof }
    }

    #[test]
    fn path_cache_is_bounded_and_keeps_recently_used_paths() {
        let cache = PathCache::default();
        let digest_of = |number: u64| {
            let mut digest = ChainDigest::default();
            digest.iter_mut().zip(number.to_be_bytes()).for_each(|(to, from)| *to = from);
            digest
        };
        cache.put(digest_of(u64::MAX), path(7));
        for number in 0..10_000 {
            cache.put(digest_of(number), path(number));
            assert_eq!(cache.get(&digest_of(u64::MAX)), Some(path(7)), "{number}");
        }
        let paths = cache.0.lock().unwrap();
        assert!(paths.young.len() + paths.old.len() <= LIMIT);
        assert!(!paths.young.contains_key(&digest_of(5)) && !paths.old.contains_key(&digest_of(5)));
    }

    #[test]
    fn chain_digest_covers_purpose_and_certificate_boundaries() {
        let der = |bytes: &[u8]| CertificateDer::from(bytes.to_vec());
        let digest_of = |purpose, leaf: &[u8], above: &[CertificateDer<'_>]| {
            chain_digest(purpose, &der(leaf), above)
        };
        let one = digest_of(Purpose::Client, b"ab", &[der(b"c")]);
        assert_eq!(one, digest_of(Purpose::Client, b"ab", &[der(b"c")]));
        assert_ne!(one, digest_of(Purpose::Server, b"ab", &[der(b"c")]));
        assert_ne!(one, digest_of(Purpose::Client, b"a", &[der(b"bc")]));
        assert_ne!(one, digest_of(Purpose::Client, b"ab", &[]));
        assert_ne!(one, digest_of(Purpose::Client, b"ab", &[der(b"c"), der(b"")]));
    }
}
