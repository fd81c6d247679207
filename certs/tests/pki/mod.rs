//! Valid and invalid certificates and CRLs for tests.
//!
//! CRLs are encoded by hand, because no library creates the invalid ones.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType, SigningKey,
};
use rustls::Connection;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use weft_certs::{TrustParts, TrustStore};
use weft_model::{RevocationPolicy, StringMatch};

/// The SPIFFE ID of valid leaves.
pub(crate) const WEB: &str = "spiffe://mesh.test/ns/a/sa/web";

/// The time of all tests: 2027-01-15, 08:00 UTC.
pub(crate) const NOW: u64 = 1_800_000_000;
pub(crate) const HOUR: i64 = 3600;

pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

/// The time this many seconds from now.
pub(crate) fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from(now()) + time::Duration::seconds(seconds)
}

pub(crate) fn unix(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(NOW.saturating_add_signed(seconds)))
}

/// Delivers the data of `from` to `to` until `to` rejects it.
pub(crate) fn carry(from: &mut Connection, to: &mut Connection) -> Result<(), rustls::Error> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets()?;
    }
    Ok(())
}

/// A CA with its certificate and key.
pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

/// A leaf, PEM: the chain that its holder presents, and its key.
pub(crate) struct Leaf {
    pub(crate) chain: String,
    pub(crate) key: String,
}

fn params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    (params.not_before, params.not_after) = (at(-HOUR), at(24 * HOUR));
    params
}

pub(crate) fn ca_params(common_name: &str) -> CertificateParams {
    let mut params = params(common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub(crate) fn root(common_name: &str) -> Ca {
    Ca::self_signed(ca_params(common_name), KeyPair::generate().unwrap()).unwrap()
}

pub(crate) fn intermediate(params: CertificateParams, issuer: &Ca) -> Ca {
    Ca::signed_by(params, KeyPair::generate().unwrap(), issuer).unwrap()
}

/// The parameters of a valid leaf with this serial number.
pub(crate) fn leaf_params(uri: &str, serial: u64) -> CertificateParams {
    let mut params = params("leaf");
    params.serial_number = Some(serial.into());
    params.subject_alt_names = vec![
        SanType::URI(uri.try_into().unwrap()),
        SanType::DnsName("server.test".try_into().unwrap()),
    ];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// A leaf that `issuer` signs, with the certificates of `above` in its chain.
pub(crate) fn leaf(params: &CertificateParams, issuer: &Ca, above: &[&Ca]) -> Leaf {
    let key = KeyPair::generate().unwrap();
    let own = params.signed_by(&key, issuer).unwrap().pem();
    let chain = std::iter::once(own).chain(above.iter().map(|ca| ca.pem())).collect();
    Leaf { chain, key: key.serialize_pem() }
}

/// A root, an intermediate with serial number 50, and a valid leaf with serial number 1000.
pub(crate) struct World {
    pub(crate) root: Ca,
    pub(crate) below: Ca,
    pub(crate) good: Leaf,
}

impl World {
    pub(crate) fn new() -> Self {
        let root = root("root");
        let mut params = ca_params("below");
        params.serial_number = Some(50.into());
        let below = intermediate(params, &root);
        let good = leaf(&leaf_params(WEB, 1000), &below, &[&below]);
        Self { root, below, good }
    }

    /// A store with the root and without CRLs.
    pub(crate) fn trust(&self) -> TrustStore {
        self.named(Vec::new())
    }

    pub(crate) fn named(&self, names: Vec<StringMatch>) -> TrustStore {
        TrustStore::load(self.root.pem().as_bytes(), None, names, None, unix(0)).unwrap()
    }

    /// A store with CRLs of the intermediate and of the root.
    pub(crate) fn listed(&self, below: Option<&List>, root: Option<&List>) -> TrustStore {
        self.listed_under(RevocationPolicy::default(), below, root)
    }

    /// The same with a policy.
    pub(crate) fn listed_under(
        &self,
        policy: RevocationPolicy,
        below: Option<&List>,
        root: Option<&List>,
    ) -> TrustStore {
        let below = below.map(|list| crl_pem(&list.signed_by(&self.below)));
        let root = root.map(|list| crl_pem(&list.signed_by(&self.root)));
        let lists =
            [below.unwrap_or_default(), root.unwrap_or_default(), self.below.pem()].concat();
        let roots = self.root.pem();
        let parts = TrustParts {
            roots: roots.as_bytes(),
            revocations: Some(lists.as_bytes()),
            names: Vec::new(),
            policy,
        };
        TrustStore::build(parts, None, unix(0)).unwrap()
    }
}

/// A CRL to be signed.
#[derive(Clone)]
pub(crate) struct List {
    /// As encoded: 1 is version 2.
    pub(crate) version: u8,
    pub(crate) number: Option<u64>,
    /// In seconds from now.
    pub(crate) this_update: i64,
    pub(crate) next_update: i64,
    /// The contents of the serial numbers, two's complement.
    pub(crate) serials: Vec<Vec<u8>>,
    /// The extensions of each entry, DER.
    pub(crate) entry_extensions: Vec<u8>,
    /// Additional CRL extensions, DER.
    pub(crate) extensions: Vec<u8>,
}

impl List {
    /// A valid CRL with this number and these serial numbers.
    pub(crate) fn new(number: u64, serials: &[u64]) -> Self {
        Self {
            version: 1,
            number: Some(number),
            this_update: -60,
            next_update: HOUR,
            serials: serials.iter().map(|serial| integer(*serial)).collect(),
            entry_extensions: Vec::new(),
            extensions: Vec::new(),
        }
    }

    /// The CRL, DER, signed by `issuer`.
    pub(crate) fn signed_by(&self, issuer: &Ca) -> Vec<u8> {
        self.signed_as(issuer.der(), issuer)
    }

    /// The CRL, DER, with the subject of `certificate` as issuer but signed by `signer`.
    pub(crate) fn signed_as(&self, certificate: &CertificateDer<'_>, signer: &Ca) -> Vec<u8> {
        let anchor = webpki::anchor_from_trusted_cert(certificate).unwrap();
        let body = self.body(&der(0x30, &anchor.subject));
        let signature = signer.key().sign(&body).unwrap();
        let bits = der(0x03, &[&[0], signature.as_slice()].concat());
        der(0x30, &[body, ECDSA_WITH_SHA256.to_vec(), bits].concat())
    }

    fn body(&self, issuer: &[u8]) -> Vec<u8> {
        let date = der(0x17, utc(-HOUR).as_bytes());
        let entries: Vec<u8> = self
            .serials
            .iter()
            .flat_map(|serial| {
                let extensions = match self.entry_extensions.as_slice() {
                    [] => Vec::new(),
                    some => der(0x30, some),
                };
                der(0x30, &[der(0x02, serial), date.clone(), extensions].concat())
            })
            .collect();
        let number = self.number.map(|number| {
            extension(&[0x55, 0x1d, 0x14], Critical::No, &der(0x02, &integer(number)))
        });
        let extensions = [number.unwrap_or_default(), self.extensions.clone()].concat();
        let parts = [
            der(0x02, &[self.version]),
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

/// Whether an implementation must reject an extension that it does not support.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Critical {
    Yes,
    No,
}

/// An extension, DER.
pub(crate) fn extension(id: &[u8], critical: Critical, value: &[u8]) -> Vec<u8> {
    let flag = if critical == Critical::Yes { der(0x01, &[0xff]) } else { Vec::new() };
    der(0x30, &[der(0x06, id), flag, der(0x04, value)].concat())
}

/// An element, DER.
pub(crate) fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let digits = &length[length.iter().position(|byte| *byte != 0).unwrap_or(7)..];
    let mut element = vec![tag];
    if content.len() >= 0x80 {
        element.push(0x80 | u8::try_from(digits.len()).unwrap());
    }
    element.extend_from_slice(digits);
    element.extend_from_slice(content);
    element
}

/// The content of a positive INTEGER.
pub(crate) fn integer(number: u64) -> Vec<u8> {
    let bytes = number.to_be_bytes();
    let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(7);
    let sign: &[u8] = if bytes[start] & 0x80 != 0 { &[0] } else { &[] };
    [sign, &bytes[start..]].concat()
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

/// A CRL as PEM.
pub(crate) fn crl_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("X509 CRL", der))
}
