//! CAs whose CRLs are accepted (RFC 5280, section 6.3.3 (f)).
//!
//! A CRL is accepted if the CA that issued the certificates signed it: a root of the trust bundle, or a valid
//! intermediate CA below one. If the CA certificate has a key usage extension, it must allow CRL signing. The
//! validity dates of a root are not checked, as in path validation.

use std::collections::HashSet;

use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::certificate::CertificateFields;
use crate::der::{self, DerReader};
use crate::signature;

/// A CA of the trust bundle or of a verified path. Its CRLs are accepted unless `fault` is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CaCertificate {
    /// The content of the CA's name, DER, as in the issuer field of the certificates that it signs.
    pub(crate) name: Vec<u8>,
    /// The CA's `SubjectPublicKeyInfo`.
    pub(crate) public_key: Vec<u8>,
    /// Why the CA's CRLs are not accepted.
    fault: Option<&'static str>,
    /// The maximum number of CAs in a path below this one.
    below: u32,
}

/// The maximum number of intermediates below a root.
const DEPTH_LIMIT: u32 = 7;
/// The fault of a CA whose certificate has expired or is not valid yet.
pub(crate) const NOT_IN_FORCE: &str = "issuer certificate has expired or is not valid yet";

impl CaCertificate {
    /// Reads a root, or a CA certificate of a verified path.
    pub(crate) fn of(certificate: &[u8]) -> Option<Self> {
        Self::read(&X509Certificate::from_der(certificate).ok()?.1)
    }

    fn read(certificate: &X509Certificate<'_>) -> Option<Self> {
        let name =
            DerReader(certificate.subject().as_raw()).expect(der::SEQUENCE)?.content.to_vec();
        let public_key = certificate.public_key().raw.to_vec();
        let usage = certificate.key_usage().ok()?.map(|usage| usage.value);
        let fault = usage
            .is_some_and(|usage| !usage.crl_sign())
            .then_some("key usage of the issuer does not allow CRL signing");
        let constraints = certificate.basic_constraints().ok()?.map(|found| found.value);
        let longest = constraints.and_then(|found| found.path_len_constraint);
        let below = match usage.is_some_and(|usage| !usage.key_cert_sign()) {
            true => 0,
            false => longest.unwrap_or(DEPTH_LIMIT),
        };
        Some(Self { name, public_key, fault, below })
    }

    /// Reads an intermediate that one of `above` signed.
    fn read_intermediate(
        certificate: &CertificateDer<'_>,
        above: &[Self],
        now: UnixTime,
    ) -> Option<Self> {
        // webpki rejects certificates that cannot be in a path, for example for an unsupported critical extension.
        let form = webpki::EndEntityCert::try_from(certificate).ok()?;
        let may_sign = |known: &&Self| known.below > 0 && known.name == form.issuer();
        let signer = above.iter().filter(may_sign).find(|known| known.signed(certificate))?;
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let intermediate = Self::read(&certificate)?;
        let at = ASN1Time::from_timestamp(i64::try_from(now.as_secs()).ok()?).ok()?;
        let fault = if certificate.validity().is_valid_at(at) {
            (!certificate.is_ca()).then_some("issuer is not a CA")
        } else {
            Some(NOT_IN_FORCE)
        };
        // A certificate that is not a valid CA now cannot issue CAs.
        let below = if fault.is_some() { 0 } else { intermediate.below.min(signer.below - 1) };
        Some(Self { fault: fault.or(intermediate.fault), below, ..intermediate })
    }

    /// Checks that the CA's CRLs are accepted.
    pub(crate) fn may_sign_crls(&self) -> Result<(), &'static str> {
        self.fault.map_or(Ok(()), Err)
    }

    /// Whether this CA signed the certificate or CRL.
    pub(crate) fn signed(&self, structure: &[u8]) -> bool {
        signature::is_signed(structure, &self.public_key)
    }
}

/// The certificates of a trust bundle.
#[derive(Debug, Default)]
pub(crate) struct Bundle {
    /// The roots in which a path may end.
    pub(crate) anchors: Vec<CertificateDer<'static>>,
    /// Certificates that others of the bundle signed: a path continues above them, and they can be revoked.
    pub(crate) intermediates: Vec<CertificateDer<'static>>,
}

impl Bundle {
    /// Sorts a trust bundle into anchors and intermediates. A certificate is an intermediate if another certificate
    /// of the bundle signed it, it is not self-signed, and its chain leads to an anchor. Certificates that sign one
    /// another in a circle are anchors.
    pub(crate) fn of(certificates: Vec<CertificateDer<'static>>) -> Self {
        let all = CertificateFields::read_all(&certificates);
        let is_signed = |one: &CertificateFields<'_>| {
            let is_named = |other: &&CertificateFields<'_>| {
                other.subject == one.issuer && other.whole != one.whole
            };
            // Most roots have a unique name, so the name comparison avoids a signature check.
            let mut named = all.iter().filter(is_named).peekable();
            named.peek().is_some()
                && !one.is_signed_by(one)
                && named.any(|other| one.is_signed_by(other))
        };
        let (signed, anchors) = all.iter().partition(|one| is_signed(one));
        let below: HashSet<_> =
            take_below(anchors, signed, |_, _| true).iter().map(|one| one.whole).collect();
        let is_below: Vec<_> = certificates.iter().map(|one| below.contains(&**one)).collect();
        let mut bundle = Self::default();
        for (certificate, is_below) in certificates.into_iter().zip(is_below) {
            let kind = if is_below { &mut bundle.intermediates } else { &mut bundle.anchors };
            kind.push(certificate);
        }
        bundle
    }
}

/// Returns the certificates of `rest` that a certificate of `accepted`, or another returned certificate, has signed,
/// and for which `is_good` accepts the certificate and its signer.
pub(crate) fn take_below<'c>(
    mut accepted: Vec<CertificateFields<'c>>,
    mut rest: Vec<CertificateFields<'c>>,
    is_good: impl Fn(&CertificateFields<'c>, &CertificateFields<'c>) -> bool,
) -> Vec<CertificateFields<'c>> {
    let mut taken = Vec::new();
    while !accepted.is_empty() {
        let has_signer = |one: &mut CertificateFields<'c>| {
            accepted.iter().any(|above| one.is_signed_by(above) && is_good(one, above))
        };
        let found: Vec<_> = rest.extract_if(.., has_signer).collect();
        taken.extend(&found);
        accepted = found;
    }
    taken
}

/// Returns the roots, and the CAs of `beside` that are below one of them.
pub(crate) fn known(
    roots: &[CertificateDer<'_>],
    beside: &[CertificateDer<'_>],
    now: UnixTime,
) -> Vec<CaCertificate> {
    let mut known = roots.iter().filter_map(|root| CaCertificate::of(root)).collect();
    add_below(&mut known, beside.iter().collect(), now);
    known
}

/// Adds the CAs of `rest` that are below one of `known`, and returns the other certificates.
pub(crate) fn add_below<'c>(
    known: &mut Vec<CaCertificate>,
    mut rest: Vec<&'c CertificateDer<'c>>,
    now: UnixTime,
) -> Vec<&'c CertificateDer<'c>> {
    for _ in 0..DEPTH_LIMIT {
        let mut found = Vec::new();
        rest.retain(|certificate| {
            match CaCertificate::read_intermediate(certificate, known, now) {
                Some(intermediate) => {
                    found.push(intermediate);
                    false
                }
                None => true,
            }
        });
        if found.is_empty() {
            break;
        }
        known.extend(found);
    }
    rest
}
