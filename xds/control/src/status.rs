//! What a control plane reports about itself.

/// The status of a control plane, for metrics, readiness and `/config_dump`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ControlStatus {
    /// How often a mesh was applied.
    pub applied: u64,
    /// The errors of the present file; empty when it is in force.
    pub rejected: Vec<String>,
    /// The services of the mesh in force.
    pub services: Vec<String>,
    /// The CRL number in force.
    pub crl_number: u64,
    /// Whether the port accepts connections.
    pub is_listening: bool,
    /// Why the store cannot be used. Meanwhile no certificate is issued and no revocation accepted.
    pub store: Option<String>,
}
