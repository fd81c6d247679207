//! CRLs: loading, verification and lookup of revoked certificates.
//!
//! A CRL is checked once on load: its syntax, its issuer and signature, its scope and its dates. The index then keeps
//! a sorted array of serial numbers per issuer, so a handshake costs a binary search.

mod coverage;
mod crl;
mod crl_set;
mod index;
mod loading;
mod parse;
mod pending;
mod serials;

pub use coverage::{CrlInfo, IssuerCoverage};
pub use crl::{CertificateRole, CrlError, RevocationQuery, RevocationStatus};
pub use index::{CrlIndex, CrlSigners};
pub use loading::check_crls;
