//! An authority in the test's own process, for as many certificates as it takes.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use weft_certs::request::{self, CheckedRequest};
use weft_certs::{Authority, AuthorityFiles, Revoked};
use weft_model::SpiffeId;

use crate::mesh_pki::{IdentityFiles, TRUST_DOMAIN, spiffe_id};

/// Signs, and publishes what it revokes in a file.
#[derive(Debug)]
pub struct TestAuthority {
    folder: TempDir,
    authority: Authority,
    number: AtomicU64,
}

/// A certificate with its key, PEM.
#[derive(Debug, Clone)]
pub struct PemIdentity {
    /// The chain.
    pub chain: String,
    /// The key.
    pub key: String,
    /// The serial number, hex.
    pub serial: String,
}

impl TestAuthority {
    /// Makes an authority that has revoked nothing.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn create() -> Self {
        Self::of(Authority::create(TRUST_DOMAIN, now()).expect("an authority can be made"))
    }

    /// Signs by the keys of an authority that is there already, which does not hear of it.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn of(files: AuthorityFiles) -> Self {
        let authority = Authority::load(files, TRUST_DOMAIN).expect("it is one");
        let folder = TempDir::new().expect("a temporary folder can be made");
        let root = folder.path().join("root.pem");
        std::fs::write(root, authority.trust_bundle()).expect("the folder takes files");
        let signer = Self { folder, authority, number: AtomicU64::new(1) };
        signer.revoke(&[]);
        signer
    }

    /// A certificate for a service, good for so long.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn sign(&self, service: &str, life: Duration) -> PemIdentity {
        let id = SpiffeId::parse(&spiffe_id(service)).expect("an id");
        let pending = request::make(&id).expect("a request");
        let asked = CheckedRequest::parse(&pending.request_pem).expect("a good one");
        let issued = self.authority.issue(&asked, life, now()).expect("it signs");
        PemIdentity {
            chain: issued.chain.concat(),
            key: pending.key_pem.to_string(),
            serial: issued.serial,
        }
    }

    /// The same in files.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn write_files(&self, service: &str, holder: &PemIdentity) -> IdentityFiles {
        let file = |extension| self.folder.path().join(service).with_extension(extension);
        let (certificate, key) = (file("pem"), file("key"));
        std::fs::write(&certificate, &holder.chain).expect("the folder takes files");
        std::fs::write(&key, &holder.key).expect("the folder takes files");
        let ours = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&key, ours).expect("it is ours");
        IdentityFiles { certificate, key, serial: holder.serial.clone() }
    }

    /// A file of its folder.
    #[must_use]
    pub fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// Where the root's certificate is.
    #[must_use]
    pub fn root(&self) -> std::path::PathBuf {
        self.file("root.pem")
    }

    /// Where the revocation lists are.
    #[must_use]
    pub fn crl_file(&self) -> std::path::PathBuf {
        self.file("revoked.pem")
    }

    /// The root's certificate, PEM.
    #[must_use]
    pub fn roots(&self) -> &str {
        self.authority.trust_bundle()
    }

    /// Publishes lists that revoke these serial numbers, and no others, as a whole file at once.
    ///
    /// # Panics
    /// When they cannot be made.
    pub fn revoke(&self, serials: &[&str]) {
        let entry = |serial: &&str| Revoked { serial: (*serial).to_owned(), at: now() };
        let revoked: Vec<Revoked> = serials.iter().map(entry).collect();
        let number = self.number.fetch_add(1, Relaxed);
        let life = Duration::from_secs(3600);
        let lists = self.authority.revocation_lists(&revoked, number, now(), life);
        let mut lists = lists.expect("it signs lists");
        writeln!(lists, "# number {number}").expect("a text takes more");
        let (new, file) = (self.file("revoked.new"), self.crl_file());
        std::fs::write(&new, lists).expect("the folder takes files");
        std::fs::rename(new, file).expect("it may be replaced");
    }
}

#[allow(clippy::disallowed_methods, reason = "a test happens now")]
fn now() -> SystemTime {
    SystemTime::now()
}
