//! Creates certificates for a mesh, with `weft ca` and with Python's `cryptography`.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::process::{counterpart, run, weft};

/// The trust domain of all tests.
pub const TRUST_DOMAIN: &str = "mesh.local";

/// The SPIFFE ID of a service's workloads.
#[must_use]
pub fn spiffe_id(service: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}")
}

/// The files of a certificate and its key.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
    /// The serial number, hex.
    pub serial: String,
}

/// A certificate authority of `weft ca`, in a temporary folder.
#[derive(Debug)]
pub struct MeshPki {
    folder: TempDir,
}

impl MeshPki {
    /// Creates an authority.
    ///
    /// # Panics
    /// If it cannot be created.
    #[must_use]
    pub fn create() -> Self {
        let pki = Self { folder: TempDir::new().expect("a temporary folder can be created") };
        let mut init = pki.ca("init");
        run(init.args(["--trust-domain", TRUST_DOMAIN, "--trust-file"]).arg(pki.root()));
        pki.publish_revocations();
        pki
    }

    fn ca(&self, command: &str) -> std::process::Command {
        let mut ca = weft();
        ca.args(["ca", command, "--state"]).arg(self.path("state"));
        ca
    }

    /// The path of a file in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The path of the root certificate.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.path("root.pem")
    }

    /// The path of the published CRLs.
    #[must_use]
    pub fn crl_file(&self) -> PathBuf {
        self.path("revoked.pem")
    }

    /// Issues a certificate for a service.
    ///
    /// # Panics
    /// If it cannot be issued.
    #[must_use]
    pub fn issue(&self, service: &str) -> IdentityFiles {
        let printed =
            run(self.ca("issue").arg(spiffe_id(service)).arg("--out").arg(self.path(service)));
        let serial = printed
            .split_whitespace()
            .next()
            .expect("`weft ca issue` prints the serial number")
            .to_owned();
        let file = |extension| self.path(service).with_extension(extension);
        IdentityFiles { certificate: file("pem"), key: file("key"), serial }
    }

    /// Creates a join token for an identity, in the file `NAME.token`.
    ///
    /// # Panics
    /// If it cannot be created.
    pub fn join_token(&self, name: &str, identity: &str) {
        let token = run(self.ca("token").arg(identity));
        let file = self.path(name).with_extension("token");
        std::fs::write(file, token).expect("the folder is writable");
    }

    /// Revokes a certificate and publishes new CRLs.
    ///
    /// # Panics
    /// If the authority did not issue the certificate.
    pub fn revoke(&self, identity: &IdentityFiles) {
        run(self.ca("revoke").arg(&identity.serial));
        self.publish_revocations();
    }

    fn publish_revocations(&self) {
        let lists = run(&mut self.ca("crl"));
        std::fs::write(self.crl_file(), lists).expect("the folder is writable");
    }
}

/// A certificate authority of Python's `cryptography`, which also signs certificates that `weft ca`
/// would refuse.
#[derive(Debug)]
pub struct PythonPki {
    folder: TempDir,
}

impl PythonPki {
    /// Creates an authority, with the certificates `good`, `expired` and `revoked`.
    ///
    /// # Panics
    /// If it cannot be created.
    #[must_use]
    pub fn create() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        run(counterpart("authority.py").arg(folder.path()).arg(TRUST_DOMAIN));
        Self { folder }
    }

    /// The path of the root certificate.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root.pem")
    }

    /// The path of the CRL.
    #[must_use]
    pub fn crl_file(&self) -> PathBuf {
        self.folder.path().join("list.pem")
    }

    /// The certificate of that name.
    #[must_use]
    pub fn identity(&self, name: &str) -> IdentityFiles {
        let file = |extension| self.folder.path().join(name).with_extension(extension);
        IdentityFiles { certificate: file("pem"), key: file("key"), serial: String::new() }
    }
}

/// A path as UTF-8 text.
///
/// # Panics
/// If the path is not UTF-8.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of temporary folders are UTF-8")
}
