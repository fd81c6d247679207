//! System root certificates.

use std::io;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::profile;

/// Paths of the bundle: Debian and Alpine, Fedora and RHEL (two paths), openSUSE, BSD.
const PATHS: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The file of the system root certificates: `SSL_CERT_FILE`, or the first known path that exists.
///
/// # Errors
/// `SSL_CERT_FILE` is not set and no known path exists.
pub fn system_roots_file() -> io::Result<PathBuf> {
    if let Some(named) = std::env::var_os("SSL_CERT_FILE") {
        return Ok(named.into());
    }
    PATHS.map(Path::new).into_iter().find(|place| place.is_file()).map(Path::to_owned).ok_or_else(
        || {
            let paths = PATHS.join(", ");
            let reason =
                format!("system root certificates not found in {paths}; set SSL_CERT_FILE");
            io::Error::new(io::ErrorKind::NotFound, reason)
        },
    )
}

/// The certificates of a PEM bundle that can be trust anchors. A system bundle may contain others, which must not
/// make the whole bundle unusable.
#[must_use]
pub fn usable_roots(bundle: &[u8]) -> Vec<u8> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    let text = String::from_utf8_lossy(bundle);
    let blocks = text.split(BEGIN).skip(1).map(|rest| format!("{BEGIN}{rest}"));
    let is_usable = |block: &String| {
        CertificateDer::from_pem_slice(block.as_bytes()).is_ok_and(|certificate| {
            webpki::anchor_from_trusted_cert(&certificate).is_ok()
                && profile::identity(&certificate).is_ok()
        })
    };
    blocks.filter(is_usable).collect::<String>().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_certificate_of_a_bundle_leaves_the_others() {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let broken = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        let bundle = format!("# roots\n{broken}{root}# end\n");
        let usable = String::from_utf8(usable_roots(bundle.as_bytes())).unwrap();
        assert!(usable.starts_with(&root) && !usable.contains("MAA="), "{usable}");
        assert!(usable_roots(broken.as_bytes()).is_empty());
        assert!(usable_roots(b"").is_empty());
    }
}
