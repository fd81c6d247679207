//! The CRLs in force under a plan, for metrics and status.

use std::collections::BTreeMap;

use weft_certs::CrlInfo;

/// The CRLs of each trust store by its name; none where revocation is not checked.
pub type CrlsByTrustStore = BTreeMap<String, Option<Vec<CrlInfo>>>;
