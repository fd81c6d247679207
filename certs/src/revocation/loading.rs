//! Loads CRLs and sorts them into verified CRLs, CRLs that wait for their issuer, and errors.

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateRevocationListDer, UnixTime};
use weft_model::{RevocationMode, RevocationPolicy};

use super::crl::{CrlError, name};
use super::parse::{ParsedCrl, RawCrl};
use super::pending::{PENDING_LIMIT, PendingCrl};
use crate::der;
use crate::issuer::{self, CaCertificate};

/// The result of loading one CRL.
pub(super) enum LoadedCrl {
    Verified(ParsedCrl),
    Pending(PendingCrl),
}

/// Checks that the input has at least one CRL, and that all CRLs can be parsed. Signatures are not verified.
///
/// # Errors
/// The input is neither PEM nor DER, has no CRL, or a CRL is malformed or unsupported.
pub fn check_crls(bytes: &[u8]) -> Result<(), String> {
    let lists = split(bytes)?;
    if lists.is_empty() {
        return Err("no CRL found".into());
    }
    lists.iter().try_for_each(|list| RawCrl::read(list, usize::MAX).map(drop))
}

/// Splits the input into CRLs, PEM or DER.
pub(super) fn split(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if bytes.first() == Some(&der::SEQUENCE) {
        let mut lists = Vec::new();
        let mut rest = der::DerReader(bytes);
        while !rest.is_empty() {
            let list = rest.expect(der::SEQUENCE).ok_or("malformed CRL")?;
            lists.push(list.whole.to_vec().into());
        }
        return Ok(lists);
    }
    CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("neither DER nor PEM: {error}"))
}

/// The CRLs of a load by their result.
#[derive(Default)]
pub(super) struct LoadedCrls {
    pub(super) verified: Vec<ParsedCrl>,
    pub(super) waiting: Vec<PendingCrl>,
    /// CRLs that are ignored and do not fail the load.
    pub(super) left_out: Vec<CrlError>,
    pub(super) errors: Vec<CrlError>,
}

impl LoadedCrls {
    pub(super) fn of(
        lists: Vec<CertificateRevocationListDer<'static>>,
        issuers: &[CaCertificate],
        policy: &RevocationPolicy,
        now: UnixTime,
        warnings: &mut Vec<String>,
    ) -> Self {
        let is_known = |list: &[u8]| {
            RawCrl::issuer(list).is_none_or(|name| issuers.iter().any(|known| known.name == name))
        };
        // CRLs of known issuers are first, so those of unknown issuers cannot use up the entry limit.
        let lists =
            lists.into_iter().enumerate().map(|(index, list)| (index, is_known(&list), list));
        let (own, others): (Vec<_>, Vec<_>) = lists.partition(|(_, is_known, _)| *is_known);
        let mut sorted = Self::default();
        let mut room = policy.entries_limit;
        for (index, is_known, list) in own.into_iter().chain(others) {
            match load_one(list, index, issuers, room, now) {
                Ok(LoadedCrl::Verified(read)) => {
                    room = room.saturating_sub(read.entries());
                    sorted.verified.push(read);
                }
                Ok(LoadedCrl::Pending(list)) if sorted.waiting.len() < PENDING_LIMIT => {
                    room = room.saturating_sub(list.read.entries());
                    sorted.waiting.push(list);
                }
                Ok(LoadedCrl::Pending(_)) => warnings.push(format!(
                    "CRL {index}: ignored, because {PENDING_LIMIT} CRLs wait for their issuer"
                )),
                // No certificate below an expired CA is accepted, so its CRL is not needed.
                Err(reason) if reason == issuer::NOT_IN_FORCE => {
                    sorted.left_out.push(CrlError { index, reason });
                }
                Err(reason) if !is_known && policy.mode == RevocationMode::Strict => {
                    let reason = format!("{reason}; its issuer is unknown");
                    sorted.left_out.push(CrlError { index, reason });
                }
                Err(reason) => sorted.errors.push(CrlError { index, reason }),
            }
        }
        sorted
    }
}

/// Parses one CRL, and verifies it if one of these CAs signed it.
fn load_one(
    der: CertificateRevocationListDer<'static>,
    position: usize,
    issuers: &[CaCertificate],
    room: usize,
    now: UnixTime,
) -> Result<LoadedCrl, String> {
    let read = ParsedCrl::read(&der, position, room)?;
    Ok(match signer(&der, &read.issuer, issuers)? {
        Ok(_) if read.list.this_update > now => {
            return Err("thisUpdate is in the future".into());
        }
        Ok(signer) => LoadedCrl::Verified(read.signed_by(signer)),
        Err(reason) => LoadedCrl::Pending(PendingCrl::new(read, der, reason)),
    })
}

/// Finds the CA that signed a CRL of this issuer. The inner error is the reason if none did.
///
/// # Errors
/// The CA that signed the CRL may not sign CRLs.
fn signer<'a>(
    list: &[u8],
    issuer: &[u8],
    issuers: &'a [CaCertificate],
) -> Result<Result<&'a CaCertificate, String>, String> {
    let mut named = issuers.iter().filter(|known| known.name == issuer).peekable();
    if named.peek().is_none() {
        return Ok(Err(format!("issuer {} is not in the trust bundle", name(issuer))));
    }
    let signers: Vec<_> = named.filter(|known| known.signed(list)).collect();
    // A CA may have several certificates; one that allows CRL signing is enough.
    let may_sign = signers.iter().find(|signer| signer.may_sign_crls().is_ok());
    match may_sign.or_else(|| signers.first()) {
        Some(signer) => signer.may_sign_crls().map(|()| Ok(*signer)).map_err(str::to_owned),
        None => Ok(Err(format!("CRL is not signed by {}", name(issuer)))),
    }
}
