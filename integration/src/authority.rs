//! A certificate authority in the test's own process, for tests that need many certificates.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use weft_certs::request::{self, CheckedRequest};
use weft_certs::{Authority, AuthorityFiles, RevokedCertificate};
use weft_model::SpiffeId;

use crate::mesh_pki::{IdentityFiles, TRUST_DOMAIN, spiffe_id};

/// An authority that issues certificates and publishes its CRLs in a file.
#[derive(Debug)]
pub struct TestAuthority {
    folder: TempDir,
    authority: Authority,
    number: AtomicU64,
}

/// A certificate chain with its key, PEM.
#[derive(Debug, Clone)]
pub struct PemIdentity {
    /// The certificate chain.
    pub chain: String,
    /// The private key.
    pub key: String,
    /// The serial number of the certificate, hex.
    pub serial: String,
}

impl TestAuthority {
    /// Creates an authority that has revoked nothing.
    ///
    /// # Panics
    /// If the authority cannot be created.
    #[must_use]
    pub fn create() -> Self {
        Self::of(Authority::create(TRUST_DOMAIN, now()).expect("an authority can be made"))
    }

    /// Signs with the keys of an existing authority; that authority keeps no record of these
    /// certificates.
    ///
    /// # Panics
    /// If the files cannot be read.
    #[must_use]
    pub fn of(files: AuthorityFiles) -> Self {
        let authority = Authority::load(files, TRUST_DOMAIN).expect("the files hold an authority");
        let folder = TempDir::new().expect("a temporary folder can be created");
        let root = folder.path().join("root.pem");
        std::fs::write(root, authority.trust_bundle()).expect("the folder is writable");
        let signer = Self { folder, authority, number: AtomicU64::new(1) };
        signer.revoke(&[]);
        signer
    }

    /// Issues a certificate for a service, valid for `life`.
    ///
    /// # Panics
    /// If the certificate cannot be issued.
    #[must_use]
    pub fn sign(&self, service: &str, life: Duration) -> PemIdentity {
        let id = SpiffeId::parse(&spiffe_id(service)).expect("the SPIFFE ID is valid");
        let pending = request::make(&id).expect("the request can be made");
        let checked = CheckedRequest::parse(&pending.request_pem).expect("the request is valid");
        let issued = self
            .authority
            .issue(&checked, life, now())
            .expect("the authority signs the certificate");
        PemIdentity {
            chain: issued.chain.concat(),
            key: pending.key_pem.to_string(),
            serial: issued.serial,
        }
    }

    /// Writes the certificate chain and key to files.
    ///
    /// # Panics
    /// If the files cannot be written.
    #[must_use]
    pub fn write_files(&self, service: &str, identity: &PemIdentity) -> IdentityFiles {
        let file = |extension| self.folder.path().join(service).with_extension(extension);
        let certificate = file("pem");
        let key = file("key");
        std::fs::write(&certificate, &identity.chain).expect("the folder is writable");
        std::fs::write(&key, &identity.key).expect("the folder is writable");
        let owner_only = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&key, owner_only).expect("the key file belongs to the test");
        IdentityFiles { certificate, key, serial: identity.serial.clone() }
    }

    /// The path of a file in the authority's folder.
    #[must_use]
    pub fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// The path of the root certificate.
    #[must_use]
    pub fn root(&self) -> std::path::PathBuf {
        self.file("root.pem")
    }

    /// The path of the CRL file.
    #[must_use]
    pub fn crl_file(&self) -> std::path::PathBuf {
        self.file("revoked.pem")
    }

    /// The root certificate, PEM.
    #[must_use]
    pub fn roots(&self) -> &str {
        self.authority.trust_bundle()
    }

    /// Publishes CRLs that revoke exactly these serial numbers. The file is replaced atomically.
    ///
    /// # Panics
    /// If the CRLs cannot be signed or written.
    pub fn revoke(&self, serials: &[&str]) {
        let entry = |serial: &&str| RevokedCertificate { serial: (*serial).to_owned(), at: now() };
        let revoked: Vec<RevokedCertificate> = serials.iter().map(entry).collect();
        let number = self.number.fetch_add(1, Relaxed);
        let life = Duration::from_secs(3600);
        let lists = self.authority.crls(&revoked, number, now(), life);
        let mut lists = lists.expect("the authority signs CRLs");
        writeln!(lists, "# number {number}").expect("a String is writable");
        let new = self.file("revoked.new");
        let file = self.crl_file();
        std::fs::write(&new, lists).expect("the folder is writable");
        std::fs::rename(new, file).expect("the file can be replaced");
    }
}

#[expect(clippy::disallowed_methods, reason = "tests issue certificates for the current time")]
fn now() -> SystemTime {
    SystemTime::now()
}
