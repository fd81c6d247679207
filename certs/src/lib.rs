//! Workload identity: certificates, trust bundles, CRLs and token keys.
//!
//! [`Authority`] signs certificates and CRLs; [`request`] creates and checks certificate requests. [`TrustStore`] verifies
//! the certificates of peers, [`CrlIndex`] holds the CRLs of a trust store, and [`tls`] builds rustls configurations. A
//! finished handshake yields a [`VerifiedPeer`], which is valid until a [`TrustDelta`] invalidates its [`Proof`].
//! [`rotation`] schedules certificate renewal. [`KeySet`] verifies signatures of tokens.
//!
//! Private keys never leave the workload that made them, are written with mode 0600, and have no
//! `Debug` form.

mod authority;
mod certificate;
mod der;
mod digest;
mod external_ca;
pub mod fault;
mod issuer;
mod key_set;
mod key_text;
mod parameters;
mod path_cache;
mod peer;
mod profile;
mod proof;
mod random;
pub mod request;
mod revocation;
pub mod rotation;
mod serial;
mod signature;
mod store;
mod system_roots;
mod text;
pub mod tls;
mod unverified;
mod verify;

pub use authority::{
    Authority, AuthorityError, AuthorityFiles, BACKDATED, IssuedCertificate, RevokedCertificate,
    RootSigner, describe_crl,
};
pub use certificate::validity;
pub use digest::digest;
pub use external_ca::ExternalCaFiles;
pub use key_set::{
    KEY_SET_LIMIT_BYTES, KeySet, KeySetError, SignatureAlgorithm, SignatureVerdict, SignedText,
};
pub use key_text::KeyText;
pub use peer::VerifiedPeer;
pub use profile::identity_of;
pub use proof::{LinkId, Proof, TrustDelta};
pub use random::{random_number, random_token};
pub use revocation::{
    CertificateRole, CrlError, CrlIndex, CrlInfo, CrlSigners, IssuerCoverage, RevocationQuery,
    RevocationStatus, check_crls,
};
pub use store::{TrustError, TrustParts, TrustStore, TrustStoreVersion};
pub use system_roots::{system_roots_file, usable_roots};
pub use text::{CertificateNames, CertificateText};
