//! The trust bundle as a secret.

use weft_model::{RevocationPolicy, Secret, Validation};
use weft_xds::server::ResourceSubscribers;
use weft_xds::translate::ResourceKind;

/// The name of the secret with the trust bundle and the CRLs.
pub(super) const TRUST: &str = "trust";

/// The trust bundle and the CRLs, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// The roots.
    pub roots: String,
    /// The CRLs.
    pub revocations: String,
}

/// Tracks which clients have acknowledged the trust bundle.
pub(crate) fn trust_subscribers() -> ResourceSubscribers {
    ResourceSubscribers::new(ResourceKind::Secret, TRUST)
}

pub(super) fn trust_secret(trust: &Trust, policy: &RevocationPolicy) -> Secret {
    let data = |text: &str| weft_model::DataSource::inline(text);
    Secret::Validation(Validation {
        roots: data(&trust.roots),
        revocations: Some(data(&trust.revocations)),
        points: Vec::new(),
        policy: *policy,
        names: Vec::new(),
    })
}
