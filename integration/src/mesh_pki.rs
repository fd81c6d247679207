//! Certificates for a mesh: those of `weft ca`, and those made by other hands.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::process::{counterpart, run, weft};

/// The trust domain of every test.
pub const TRUST_DOMAIN: &str = "mesh.local";

/// The identity of a workload.
#[must_use]
pub fn spiffe_id(service: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}")
}

/// A certificate with its key.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// The chain, PEM.
    pub certificate: PathBuf,
    /// The key, PEM.
    pub key: PathBuf,
    /// The serial number, hex.
    pub serial: String,
}

/// An authority made by `weft ca`, in a folder that goes when the test ends.
#[derive(Debug)]
pub struct MeshPki {
    folder: TempDir,
}

impl MeshPki {
    /// Makes an authority.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn create() -> Self {
        let pki = Self { folder: TempDir::new().expect("a temporary folder can be made") };
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

    /// A file of the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The root certificate.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.path("root.pem")
    }

    /// The revocation lists, as they were last published.
    #[must_use]
    pub fn crl_file(&self) -> PathBuf {
        self.path("revoked.pem")
    }

    /// Makes a certificate for a service.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn issue(&self, service: &str) -> IdentityFiles {
        let said =
            run(self.ca("issue").arg(spiffe_id(service)).arg("--out").arg(self.path(service)));
        let serial = said.split_whitespace().next().expect("a serial number").to_owned();
        let file = |extension| self.path(service).with_extension(extension);
        IdentityFiles { certificate: file("pem"), key: file("key"), serial }
    }

    /// Makes a join token for an identity: a file, `NAME.token`.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn join_token(&self, name: &str, identity: &str) {
        let token = run(self.ca("token").arg(identity));
        let file = self.path(name).with_extension("token");
        std::fs::write(file, token).expect("the folder takes files");
    }

    /// Revokes a certificate and publishes the lists anew.
    ///
    /// # Panics
    /// When the authority does not know it.
    pub fn revoke(&self, identity: &IdentityFiles) {
        run(self.ca("revoke").arg(&identity.serial));
        self.publish_revocations();
    }

    fn publish_revocations(&self) {
        let lists = run(&mut self.ca("crl"));
        std::fs::write(self.crl_file(), lists).expect("the folder takes files");
    }
}

/// An authority made with Python's `cryptography`: it signs also what `weft ca` would not.
#[derive(Debug)]
pub struct PythonPki {
    folder: TempDir,
}

impl PythonPki {
    /// Makes an authority, with a certificate for each of `good`, `expired` and `revoked`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn create() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        run(counterpart("authority.py").arg(folder.path()).arg(TRUST_DOMAIN));
        Self { folder }
    }

    /// The root certificate.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root.pem")
    }

    /// The revocation list.
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

/// A path as the text that configuration files hold.
///
/// # Panics
/// When it is no text.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
