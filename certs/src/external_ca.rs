//! An intermediate CA below an external root: reads its files and tests them.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::PublicKeyData;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_model::{RevocationDepth, RevocationPolicy, SpiffeId};

use crate::request::{self, CheckedRequest};
use crate::tls::check_client;
use crate::{
    Authority, AuthorityError, AuthorityFiles, KeyText, RootSigner, TrustParts, TrustStore,
    check_crls, fault,
};

/// The files of an intermediate CA that an external root signed, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct ExternalCaFiles {
    /// The root's certificate.
    pub root: String,
    /// The certificate of the intermediate CA, followed by those between the root and it.
    pub certificate: String,
    /// The private key of the intermediate CA.
    pub key: KeyText,
    /// The CRLs of the root and of the CAs between; empty if they publish none.
    pub crls: String,
}

impl std::fmt::Debug for ExternalCaFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExternalCaFiles { .. }")
    }
}

impl ExternalCaFiles {
    /// Builds the CA and tests that peers would accept its certificates for the trust domain now.
    ///
    /// # Errors
    /// A part cannot be read, the key does not match the certificate, or peers would reject the certificates that the
    /// CA signs.
    pub fn into_authority(
        self,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<AuthorityFiles, AuthorityError> {
        let Self { root, certificate, key, crls } = self;
        let roots = certificates("root", &root)?;
        let [(root_text, root)] = &roots[..] else {
            return Err(unreadable("root", "must be exactly one certificate"));
        };
        let mut chain = certificates("certificate", &certificate)?;
        // The file may contain the root too.
        chain.retain(|(_, one)| one != root);
        let Some((_, own)) = chain.first() else {
            return Err(unreadable("certificate", "no certificate other than the root"));
        };
        let own_key = webpki::EndEntityCert::try_from(own)
            .map_err(|error| unreadable("certificate", &error.to_string()))?;
        let pair = rcgen::KeyPair::from_pem(&key)
            .map_err(|error| unreadable("key", &format!("{error}: must be PKCS #8 in PEM")))?;
        if own_key.subject_public_key_info().as_ref() != pair.subject_public_key_info() {
            return Err(AuthorityError::Unusable("the key does not match the certificate".into()));
        }
        let files = AuthorityFiles {
            root_certificate: root_text.clone(),
            root: RootSigner::External { crls },
            intermediate_certificate: chain.into_iter().map(|(text, _)| text).collect(),
            intermediate_key: key,
        };
        files.self_test(trust_domain, now)?;
        Ok(files)
    }
}

impl AuthorityFiles {
    /// Checks that peers with this trust bundle and these CRLs would accept a certificate of this CA now.
    ///
    /// # Errors
    /// A file cannot be read, or a peer would reject the certificate.
    pub fn self_test(&self, trust_domain: &str, now: SystemTime) -> Result<(), AuthorityError> {
        const TEST_LIFETIME: Duration = Duration::from_secs(60);
        let unusable =
            |reason: &dyn std::fmt::Display| AuthorityError::Unusable(reason.to_string());
        let authority = Authority::load(self.clone(), trust_domain)?;
        let id = SpiffeId::parse(&format!("spiffe://{trust_domain}/ns/weft/sa/self-test"))
            .map_err(|error| unusable(&error))?;
        let pending = request::make(&id).map_err(|error| unusable(&error))?;
        let request =
            CheckedRequest::parse(&pending.request_pem).map_err(|error| unusable(&error))?;
        let issued = authority.issue(&request, TEST_LIFETIME, now)?;
        let at = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        let mut policy = RevocationPolicy::default();
        match &self.root {
            RootSigner::External { crls } if crls.is_empty() => {
                policy.depth = RevocationDepth::Leaf;
            }
            RootSigner::External { crls } => {
                check_crls(crls.as_bytes()).map_err(|reason| unreadable("root CRL", &reason))?;
            }
            RootSigner::Local { .. } => {}
        }
        let crls = authority.crls(&[], 1, now, TEST_LIFETIME)?;
        let roots = self.root_certificate.as_bytes();
        let revocations = Some(crls.as_bytes());
        let parts = TrustParts { roots, revocations, names: Vec::new(), policy };
        let store = TrustStore::build(parts, None, at).map_err(|error| unusable(&error))?;
        let mut chain = certificates("chain", &issued.chain.concat())?;
        // Peers have the root in their trust bundle.
        chain.pop();
        let chain: Vec<_> = chain.into_iter().map(|(_, certificate)| certificate).collect();
        check_client(Arc::new(store), &chain, at).map_err(|error| {
            let refusal = fault::take(&error);
            unusable(&format!(
                "peers would reject the certificates of this CA: {} ({})",
                refusal.fault, refusal.detail
            ))
        })
    }
}

/// The certificates in a PEM text, each with its own text.
fn certificates(
    part: &'static str,
    text: &str,
) -> Result<Vec<(String, CertificateDer<'static>)>, AuthorityError> {
    const END: &str = "-----END CERTIFICATE-----";
    let begun = text.split("-----BEGIN CERTIFICATE-----").skip(1);
    let blocks = begun.filter_map(|rest| rest.split_once(END));
    blocks
        .map(|(middle, _)| {
            let block = format!("-----BEGIN CERTIFICATE-----{middle}{END}\n").replace('\r', "");
            CertificateDer::from_pem_slice(block.as_bytes())
                .map(|certificate| (block, certificate))
                .map_err(|error| unreadable(part, &error.to_string()))
        })
        .collect()
}

fn unreadable(part: &'static str, reason: &str) -> AuthorityError {
    AuthorityError::Unreadable { part, reason: reason.to_owned() }
}
