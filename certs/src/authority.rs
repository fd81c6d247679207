//! The CA: an offline root and an intermediate that signs.
//!
//! Leaf certificates have a P-256 key, a short lifetime and one SPIFFE ID. Each has a random 128-bit serial number,
//! so a revocation affects one certificate and not others of the same key.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use weft_model::SpiffeId;

use crate::digest::hex;
use crate::request::CheckedRequest;
use crate::{KeyText, validity};

const DAY: Duration = Duration::from_secs(24 * 3600);
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const INTERMEDIATE_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are valid from this long before they are issued, for peers whose clocks are slow.
pub const BACKDATED: Duration = Duration::from_secs(300);

/// The files of a CA, PEM. The keys are secret.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthorityFiles {
    /// The root's certificate.
    pub root_certificate: String,
    /// The signer for the root: signs new intermediates and the root's CRL.
    pub root: RootSigner,
    /// The intermediate's certificate; with an external root, followed by those between the two.
    pub intermediate_certificate: String,
    /// The intermediate's key.
    pub intermediate_key: KeyText,
}

/// The signer for a root.
#[derive(Clone, PartialEq, Eq)]
pub enum RootSigner {
    /// This CA has the root's key.
    Local {
        /// The root's key, PEM.
        key: KeyText,
    },
    /// An external CA has the root's key.
    External {
        /// The CRLs of all CAs above the intermediate, PEM; empty if they publish none.
        crls: String,
    },
}

impl std::fmt::Debug for RootSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local { .. } => "Local { .. }",
            Self::External { .. } => "External { .. }",
        })
    }
}

impl std::fmt::Debug for AuthorityFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthorityFiles { .. }")
    }
}

/// Signs certificates and CRLs of one trust domain.
pub struct Authority {
    files: AuthorityFiles,
    /// None if the root is external.
    root: Option<Issuer<'static, KeyPair>>,
    /// When the intermediate's certificate expires: certificates that it signs expire no later.
    expires_at: SystemTime,
    intermediate: Issuer<'static, KeyPair>,
    trust_domain: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

/// A newly signed certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// PEM, the leaf first, the root last.
    pub chain: Vec<String>,
    /// The serial number in lower-case hex.
    pub serial: String,
    /// When the certificate expires.
    pub not_after: SystemTime,
}

/// An entry of a CRL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevokedCertificate {
    /// The serial number in hex.
    pub serial: String,
    /// The time of the revocation.
    pub at: SystemTime,
}

/// An error of the CA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// A file of the CA cannot be read.
    #[error("the CA's {part} cannot be read: {reason}")]
    Unreadable {
        /// Which file.
        part: &'static str,
        /// Why.
        reason: String,
    },
    /// The SPIFFE ID is in another trust domain.
    #[error("{id} is not in the trust domain {trust_domain:?}")]
    WrongTrustDomain {
        /// The SPIFFE ID.
        id: SpiffeId,
        /// The trust domain of the CA.
        trust_domain: String,
    },
    /// The intermediate's certificate has expired.
    #[error("the intermediate certificate has expired: run weft ca rotate")]
    IntermediateExpired,
    /// The root is external, so its key is not available.
    #[error(
        "the root key is external: pass an intermediate certificate that the external root signed, and its key"
    )]
    NoRootKey,
    /// Peers would not accept certificates of this CA.
    #[error("{0}")]
    Unusable(String),
    /// The serial number is not hexadecimal, or is longer than 20 bytes.
    #[error(
        "invalid serial number {0:?}: must be an even number of hexadecimal digits, 40 at most"
    )]
    Serial(String),
    /// The signing library failed.
    #[error("signing failed: {0}")]
    Signing(String),
}

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Signing(error.to_string())
    }
}

impl Authority {
    /// Creates a CA with a new root.
    ///
    /// # Errors
    /// The trust domain is invalid, or key generation or signing fails.
    pub fn create(trust_domain: &str, now: SystemTime) -> Result<AuthorityFiles, AuthorityError> {
        let id = format!("spiffe://{trust_domain}");
        SpiffeId::parse(&id).map_err(|e| AuthorityError::Unreadable {
            part: "trust domain",
            reason: e.to_string(),
        })?;
        let root_key = KeyPair::generate()?;
        let params =
            authority_params(&format!("weft root {trust_domain}"), &id, 1, now, ROOT_LIFE)?;
        let root_certificate = params.self_signed(&root_key)?.pem();
        Self::below(root_certificate, root_key.serialize_pem().into(), trust_domain, now)
    }

    /// Creates a CA with the same root and a new intermediate.
    ///
    /// # Errors
    /// The root is external, its files cannot be read, or key generation or signing fails.
    pub fn renew_intermediate(&self, now: SystemTime) -> Result<AuthorityFiles, AuthorityError> {
        let RootSigner::Local { key } = &self.files.root else {
            return Err(AuthorityError::NoRootKey);
        };
        Self::below(self.files.root_certificate.clone(), key.clone(), &self.trust_domain, now)
    }

    /// Creates an intermediate below a root.
    fn below(
        root_certificate: String,
        root_key: KeyText,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<AuthorityFiles, AuthorityError> {
        let id = format!("spiffe://{trust_domain}");
        let root = issuer("root", &root_certificate, &root_key)?;
        let intermediate_key = KeyPair::generate()?;
        let params = authority_params(
            &format!("weft intermediate {trust_domain}"),
            &id,
            0,
            now,
            INTERMEDIATE_LIFE,
        )?;
        let intermediate_certificate = params.signed_by(&intermediate_key, &root)?.pem();
        Ok(AuthorityFiles {
            root_certificate,
            root: RootSigner::Local { key: root_key },
            intermediate_certificate,
            intermediate_key: intermediate_key.serialize_pem().into(),
        })
    }

    /// Loads a CA from its files.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn load(files: AuthorityFiles, trust_domain: &str) -> Result<Self, AuthorityError> {
        let root = match &files.root {
            RootSigner::Local { key } => Some(issuer("root", &files.root_certificate, key)?),
            RootSigner::External { .. } => None,
        };
        let intermediate =
            issuer("intermediate", &files.intermediate_certificate, &files.intermediate_key)?;
        let unreadable = || AuthorityError::Unreadable {
            part: "intermediate",
            reason: "validity dates cannot be read".into(),
        };
        let certificate = CertificateDer::from_pem_slice(files.intermediate_certificate.as_bytes());
        let dates = certificate.ok().and_then(|certificate| validity(&certificate));
        let (_, expires_at) = dates.ok_or_else(unreadable)?;
        Ok(Self { files, root, expires_at, intermediate, trust_domain: trust_domain.to_owned() })
    }

    /// When the intermediate's certificate expires.
    #[must_use]
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }

    /// The intermediate's certificate, PEM: the second of each chain that the CA signs.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.files.intermediate_certificate
    }

    /// The trust bundle: the root, PEM.
    #[must_use]
    pub fn trust_bundle(&self) -> &str {
        &self.files.root_certificate
    }

    /// Signs a request for its SPIFFE ID. The caller has checked that the applicant may have that ID.
    ///
    /// # Errors
    /// The ID is in another trust domain, the intermediate has expired, or signing fails.
    pub fn issue(
        &self,
        request: &CheckedRequest,
        life: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        let id = request.identity();
        if id.trust_domain() != self.trust_domain {
            return Err(AuthorityError::WrongTrustDomain {
                id: id.clone(),
                trust_domain: self.trust_domain.clone(),
            });
        }
        let not_after = (now + life).min(self.expires_at);
        if not_after <= now {
            return Err(AuthorityError::IntermediateExpired);
        }
        let serial = random_serial()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, id.workload());
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = OffsetDateTime::from(now - BACKDATED);
        params.not_after = OffsetDateTime::from(not_after);
        let leaf = params.signed_by(&request.public_key, &self.intermediate)?;
        let chain = vec![
            leaf.pem(),
            self.files.intermediate_certificate.clone(),
            self.files.root_certificate.clone(),
        ];
        Ok(IssuedCertificate { chain, serial: hex(&serial), not_after })
    }

    /// The CRLs of one CA; see [`Self::crls_of`].
    ///
    /// # Errors
    /// A serial number is invalid, or signing fails.
    pub fn crls(
        &self,
        revoked: &[RevokedCertificate],
        number: u64,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        Self::crls_of(&[self], revoked, number, now, life)
    }

    /// The CRLs of several CAs, PEM. The CRL of each intermediate contains all of `revoked`, whichever of them signed
    /// it, because serial numbers are unique among the CAs. The CRL of each local root is empty; those of external
    /// roots are copied. The intermediates' certificates are included, so a reader can verify the signatures.
    ///
    /// # Errors
    /// A serial number is invalid, or signing fails.
    pub fn crls_of(
        authorities: &[&Self],
        revoked: &[RevokedCertificate],
        number: u64,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        let entries = revoked.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        let list = |revoked_certs| CertificateRevocationListParams {
            this_update: OffsetDateTime::from(now - BACKDATED),
            next_update: OffsetDateTime::from(now + life),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let mut parts = Vec::new();
        let mut roots = BTreeSet::new();
        // Certificates below an expired intermediate are rejected without a CRL.
        for authority in authorities.iter().filter(|authority| authority.expires_at > now) {
            parts.push(list(entries.clone()).signed_by(&authority.intermediate)?.pem()?);
            if roots.insert(authority.files.root_certificate.as_str()) {
                parts.push(match (&authority.root, &authority.files.root) {
                    (Some(root), _) => list(Vec::new()).signed_by(root)?.pem()?,
                    (None, RootSigner::External { crls }) => format!("{}\n", crls.trim_end()),
                    (None, RootSigner::Local { .. }) => String::new(),
                });
            }
            parts.push(authority.files.intermediate_certificate.clone());
        }
        Ok(parts.concat())
    }
}

fn issuer(
    part: &'static str,
    certificate: &str,
    key: &str,
) -> Result<Issuer<'static, KeyPair>, AuthorityError> {
    let unreadable =
        |error: rcgen::Error| AuthorityError::Unreadable { part, reason: error.to_string() };
    let key = KeyPair::from_pem(key).map_err(unreadable)?;
    Issuer::from_ca_cert_pem(certificate, key).map_err(unreadable)
}

fn authority_params(
    common_name: &str,
    id: &str,
    depth: u8,
    now: SystemTime,
    life: Duration,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(depth));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    params.not_before = OffsetDateTime::from(now - DAY);
    params.not_after = OffsetDateTime::from(now + life);
    Ok(params)
}

fn entry(revoked: &RevokedCertificate) -> Result<RevokedCertParams, AuthorityError> {
    let digits = serial_bytes(&revoked.serial)
        .ok_or_else(|| AuthorityError::Serial(revoked.serial.clone()))?;
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&digits),
        revocation_time: OffsetDateTime::from(revoked.at),
        reason_code: Some(RevocationReason::Unspecified),
        invalidity_date: None,
    })
}

fn serial_bytes(text: &str) -> Option<Vec<u8>> {
    let even = text.len().is_multiple_of(2);
    // Checked here, because `from_str_radix` accepts a sign.
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if text.is_empty() || text.len() > 40 || !digits || !even {
        return None;
    }
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// 128 random bits. The first two bits are 01, so the number is positive in 16 bytes and not 0.
fn random_serial() -> Result<[u8; 16], AuthorityError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial)
        .map_err(|_| AuthorityError::Signing("no random numbers available".into()))?;
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    Ok(serial)
}

/// Describes each CRL of a PEM text: its issuer, its number, its next update and its entries.
#[must_use]
pub fn describe_crl(pem: &str) -> Vec<String> {
    use x509_parser::prelude::FromDer;
    x509_parser::pem::Pem::iter_from_buffer(pem.as_bytes())
        .filter_map(Result::ok)
        .filter(|block| block.label == "X509 CRL")
        .filter_map(|block| {
            let (_, list) =
                x509_parser::revocation_list::CertificateRevocationList::from_der(&block.contents)
                    .ok()?;
            let serials: Vec<String> = list
                .iter_revoked_certificates()
                .map(|entry| format!("  {}", hex(entry.raw_serial())))
                .collect();
            let head = format!(
                "{}: {} revoked, number {}, next update {}",
                list.issuer(),
                serials.len(),
                list.crl_number().map_or_else(|| "-".to_owned(), ToString::to_string),
                list.next_update().map_or_else(|| "-".to_owned(), |time| time.to_string())
            );
            Some([vec![head], serials].concat().join("\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_number_must_be_whole_hexadecimal_bytes() {
        let check = |text: &str, expected: Option<&[u8]>| {
            assert_eq!(serial_bytes(text).as_deref(), expected, "{text:?}");
        };
        check("0a0B", Some(&[0x0a, 0x0b]));
        check(&"7f".repeat(20), Some(&[0x7f; 20]));
        check(&"7f".repeat(21), None);
        check("", None);
        check("123", None);
        check("+1+2", None);
        check("0x12", None);
        check("1é3", None);
    }
}
