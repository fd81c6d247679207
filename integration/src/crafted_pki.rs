//! Creates certificates and CRLs with any content, including content that a proper authority would
//! not sign.
//!
//! CRLs are encoded by hand, because no library produces the malformed ones that the tests need.

use std::fmt::Write as _;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SigningKey,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::authority::PemIdentity;

/// One hour in seconds.
pub const HOUR: i64 = 3600;

/// The GeneralName tag of an email address.
pub const EMAIL: u8 = 0x81;
/// The GeneralName tag of a DNS name.
pub const DNS: u8 = 0x82;
/// The GeneralName tag of a URI.
pub const URI: u8 = 0x86;

/// A certificate authority: its certificate and key.
pub type CraftedCa = CertifiedIssuer<'static, KeyPair>;

/// The time this many seconds from now.
#[must_use]
pub fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from(now()) + time::Duration::seconds(seconds)
}

fn params(common_name: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(common_name) = common_name {
        params.distinguished_name.push(DnType::CommonName, common_name);
    }
    (params.not_before, params.not_after) = (at(-HOUR), at(24 * HOUR));
    params
}

/// Parameters of a CA certificate.
#[must_use]
pub fn authority_params(common_name: &str, serial: u64) -> CertificateParams {
    let mut params = params(Some(common_name));
    params.serial_number = Some(serial.into());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Parameters of a workload certificate, without subject alternative names.
#[must_use]
pub fn leaf_params(common_name: Option<&str>, serial: u64) -> CertificateParams {
    let mut params = params(common_name);
    params.serial_number = Some(serial.into());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// A subject alternative name extension with names of any type and any bytes.
#[must_use]
pub fn names(names: &[(u8, &[u8])]) -> CustomExtension {
    let all: Vec<u8> = names.iter().flat_map(|(kind, name)| der(*kind, name)).collect();
    CustomExtension::from_oid_content(&[2, 5, 29, 17], der(0x30, &all))
}

/// A CRL distribution point extension with this URI.
#[must_use]
pub fn distribution_point(uri: &str) -> CustomExtension {
    let points = der(0x30, &der(0x30, &point(uri)));
    CustomExtension::from_oid_content(&[2, 5, 29, 31], points)
}

/// The encoded name of a distribution point, as in certificates and CRLs.
#[must_use]
pub fn point(uri: &str) -> Vec<u8> {
    der(0xa0, &der(0xa0, &der(URI, uri.as_bytes())))
}

/// A self-signed root.
///
/// # Panics
/// If the certificate cannot be created.
#[must_use]
pub fn root(params: CertificateParams) -> CraftedCa {
    CraftedCa::self_signed(params, key()).expect("the authority can be created")
}

/// An intermediate CA, signed by `issuer`.
///
/// # Panics
/// If the certificate cannot be created.
#[must_use]
pub fn intermediate(params: CertificateParams, issuer: &CraftedCa) -> CraftedCa {
    CraftedCa::signed_by(params, key(), issuer).expect("the authority can be created")
}

/// A certificate signed by `issuer`; its chain also has the certificates of `above`.
///
/// # Panics
/// If the certificate cannot be created.
#[must_use]
pub fn leaf(params: &CertificateParams, issuer: &CraftedCa, above: &[&CraftedCa]) -> PemIdentity {
    let key = key();
    let own = params.signed_by(&key, issuer).expect("the issuer can sign").pem();
    let chain = std::iter::once(own).chain(above.iter().map(|ca| ca.pem())).collect();
    let serial = params.serial_number.as_ref().map(ToString::to_string).unwrap_or_default();
    PemIdentity { chain, key: key.serialize_pem(), serial }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key can be generated")
}

/// The content of a CRL.
#[derive(Debug, Clone)]
pub struct CraftedCrl {
    /// The CRL number; `None` leaves it out.
    pub number: Option<u64>,
    /// `thisUpdate`, in seconds from now.
    pub this_update: i64,
    /// `nextUpdate`, in seconds from now.
    pub next_update: i64,
    /// The revoked serial numbers.
    pub serials: Vec<u64>,
    /// The extensions of each entry, DER.
    pub entry_extensions: Vec<u8>,
    /// Further extensions of the CRL, DER.
    pub extensions: Vec<u8>,
}

impl CraftedCrl {
    /// A valid CRL with this number that revokes these serial numbers.
    #[must_use]
    pub fn new(number: u64, serials: &[u64]) -> Self {
        Self {
            number: Some(number),
            this_update: -60,
            next_update: HOUR,
            serials: serials.to_vec(),
            entry_extensions: Vec::new(),
            extensions: Vec::new(),
        }
    }

    /// Sets further extensions, DER.
    #[must_use]
    pub fn with(self, extensions: Vec<u8>) -> Self {
        Self { extensions, ..self }
    }

    /// The CRL signed by `issuer`, DER.
    #[must_use]
    pub fn signed_by(&self, issuer: &CraftedCa) -> Vec<u8> {
        self.signed_as(issuer.der(), issuer)
    }

    /// The CRL with the subject of `certificate` as its issuer, but signed by `signer`; DER.
    ///
    /// # Panics
    /// If `certificate` is not a CA certificate.
    #[must_use]
    pub fn signed_as(&self, certificate: &CertificateDer<'_>, signer: &CraftedCa) -> Vec<u8> {
        let anchor = webpki::anchor_from_trusted_cert(certificate)
            .expect("the certificate is a CA certificate");
        let body = self.body(&der(0x30, &anchor.subject));
        let signature = signer.key().sign(&body).expect("the key can sign");
        let bits = der(0x03, &[&[0], signature.as_slice()].concat());
        der(0x30, &[body, ECDSA_WITH_SHA256.to_vec(), bits].concat())
    }

    fn body(&self, issuer: &[u8]) -> Vec<u8> {
        let date = der(0x17, utc(-HOUR).as_bytes());
        let extensions = match self.entry_extensions.as_slice() {
            [] => Vec::new(),
            some => der(0x30, some),
        };
        let mut entries = Vec::new();
        for serial in &self.serials {
            let serial = der(0x02, &integer(*serial));
            entries.extend(der(0x30, &[serial, date.clone(), extensions.clone()].concat()));
        }
        let number = self
            .number
            .map(|number| extension(20, ExtensionCriticality::No, &der(0x02, &integer(number))));
        let extensions = [number.unwrap_or_default(), self.extensions.clone()].concat();
        let parts = [
            der(0x02, &[1]),
            ECDSA_WITH_SHA256.to_vec(),
            issuer.to_vec(),
            der(0x17, utc(self.this_update).as_bytes()),
            der(0x17, utc(self.next_update).as_bytes()),
            if entries.is_empty() { Vec::new() } else { der(0x30, &entries) },
            der(0xa0, &der(0x30, &extensions)),
        ];
        der(0x30, &parts.concat())
    }
}

const ECDSA_WITH_SHA256: &[u8] =
    &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

/// Whether an implementation that does not know an extension must reject the certificate or CRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtensionCriticality {
    /// Critical.
    Yes,
    /// Not critical.
    No,
}

/// An X.509 extension by the last arc of its OID (2.5.29.N), DER.
#[must_use]
pub fn extension(number: u8, critical: ExtensionCriticality, value: &[u8]) -> Vec<u8> {
    let flag = if critical == ExtensionCriticality::Yes { der(0x01, &[0xff]) } else { Vec::new() };
    der(0x30, &[der(0x06, &[0x55, 0x1d, number]), flag, der(0x04, value)].concat())
}

/// A DER element.
///
/// # Panics
/// Never: a length has at most eight bytes.
#[must_use]
pub fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let digits = shortest(content.len() as u64);
    let mut element = vec![tag];
    if content.len() >= 0x80 {
        element.push(0x80 | u8::try_from(digits.len()).expect("a length has at most eight bytes"));
    }
    element.extend_from_slice(&digits);
    element.extend_from_slice(content);
    element
}

/// The content of a positive INTEGER.
#[must_use]
pub fn integer(number: u64) -> Vec<u8> {
    let digits = shortest(number);
    let is_high = digits.first().is_some_and(|digit| digit & 0x80 != 0);
    let sign: &[u8] = if is_high { &[0] } else { &[] };
    [sign, &digits].concat()
}

fn shortest(number: u64) -> Vec<u8> {
    let bytes = number.to_be_bytes();
    let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(7);
    bytes.iter().skip(start).copied().collect()
}

fn utc(seconds: i64) -> String {
    let time = at(seconds);
    format!(
        "{:02}{:02}{:02}{:02}{:02}{:02}Z",
        time.year() % 100,
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

/// Encodes bytes as PEM.
///
/// # Panics
/// Never: base64 is ASCII.
#[must_use]
pub fn pem(label: &str, der: &[u8]) -> String {
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in STANDARD.encode(der).as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        text.push('\n');
    }
    writeln!(text, "-----END {label}-----").expect("a String is writable");
    text
}

/// Encodes a CRL as PEM.
#[must_use]
pub fn crl_pem(list: &[u8]) -> String {
    pem("X509 CRL", list)
}

#[expect(clippy::disallowed_methods, reason = "tests issue certificates for the current time")]
fn now() -> SystemTime {
    SystemTime::now()
}
