//! A mesh CA with certificates, trust bundles and CRLs, for tests of plans.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_certs::request::{self, CheckedRequest};
use weft_certs::{Authority, Proof, RevokedCertificate, TrustStore, VerifiedPeer, tls};
use weft_model::{DataSource, RevocationPolicy, SpiffeId, TlsIdentity, Validation};

const NOW: u64 = 1_800_000_000;

/// The time this many seconds after the CA was created.
pub(crate) fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(NOW + seconds))
}

/// A mesh CA.
pub(crate) struct TestPki {
    authority: Authority,
    now: SystemTime,
}

/// A certificate of a mesh CA.
pub(crate) struct TestCertificate {
    chain: String,
    key: String,
    pub(crate) serial: String,
}

impl TestCertificate {
    pub(crate) fn identity(&self) -> TlsIdentity {
        let key = DataSource::inline(self.key.as_str());
        TlsIdentity { chain: DataSource::inline(self.chain.as_str()), key }
    }

    /// A peer that has proved its identity with this certificate.
    pub(crate) fn peer(&self) -> VerifiedPeer {
        let leaf = CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap();
        VerifiedPeer::assertion(&leaf).unwrap()
    }

    /// The proof of a client with this certificate, if `store` accepts it.
    pub(crate) fn proof(&self, store: &Arc<TrustStore>) -> Option<Proof> {
        let chain: Vec<CertificateDer<'_>> =
            CertificateDer::pem_slice_iter(self.chain.as_bytes()).map(Result::unwrap).collect();
        tls::prove_client(store.clone(), &chain, at(0))
    }
}

impl TestPki {
    pub(crate) fn new() -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
        let files = Authority::create("mesh.test", now).unwrap();
        Self { authority: Authority::load(files, "mesh.test").unwrap(), now }
    }

    /// A validation with a CRL that revokes `serials` and is valid after this many seconds.
    pub(crate) fn validation(&self, number: u64, serials: &[&str], from: u64) -> Validation {
        let entry =
            |serial: &&str| RevokedCertificate { serial: (*serial).to_owned(), at: self.now };
        let revoked: Vec<_> = serials.iter().map(entry).collect();
        // The authority backdates its CRLs by five minutes.
        let issued = self.now + Duration::from_secs(from + 300);
        let life = Duration::from_secs(3600);
        let lists = self.authority.crls(&revoked, number, issued, life).unwrap();
        let inline = |text: &str| DataSource::inline(text);
        Validation {
            roots: inline(self.authority.trust_bundle()),
            revocations: Some(inline(&lists)),
            points: Vec::new(),
            policy: RevocationPolicy::default(),
            names: Vec::new(),
        }
    }

    /// A certificate of `spiffe://mesh.test/ns/a/sa/web`.
    pub(crate) fn certificate(&self) -> TestCertificate {
        let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").unwrap();
        let pending = request::make(&id).unwrap();
        let asked = CheckedRequest::parse(&pending.request_pem).unwrap();
        let issued = self.authority.issue(&asked, Duration::from_secs(3600), self.now).unwrap();
        let key = pending.key_pem.to_string();
        TestCertificate { chain: issued.chain.concat(), key, serial: issued.serial }
    }
}
