//! Reads and counts the whole content of a store.

use redb::{Database, ReadableDatabase as _, ReadableTable as _};

use super::authority_set;
use super::entries::{
    CRL_NUMBER, NUMBERS, StoreEntry, TOKENS, read_issued, read_revoked, unreadable,
};
use super::error::StoreError;

/// The content of a store, counted by a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSummary {
    /// The trust domain of the authority.
    pub trust_domain: String,
    /// The number of issued certificates.
    pub issued: usize,
    /// The number of revoked certificates.
    pub revoked: usize,
    /// The last CRL number; 0 if no CRL was signed.
    pub crl_number: u64,
}

impl std::fmt::Display for StoreSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { trust_domain, issued, revoked, crl_number } = self;
        write!(
            f,
            "trust domain {trust_domain}, {issued} certificates, {revoked} revoked, CRL number \
             {crl_number}"
        )
    }
}

/// Reads and counts all entries.
pub(super) fn summary(database: &Database) -> Result<StoreSummary, StoreError> {
    let read = database.begin_read()?;
    let authority_set = authority_set::read_authority_set(&read)?;
    let tokens = read.open_table(TOKENS)?;
    for entry in tokens.iter()? {
        let (digest, value) = entry?;
        StoreEntry::parse(value.value()).ok_or_else(|| unreadable("join token", digest.value()))?;
    }
    let numbers = read.open_table(NUMBERS)?;
    Ok(StoreSummary {
        trust_domain: authority_set.trust_domain,
        issued: read_issued(&read)?.len(),
        revoked: read_revoked(&read)?.len(),
        crl_number: numbers.get(CRL_NUMBER)?.map_or(0, |number| number.value()),
    })
}
