//! The SPIFFE IDs of weft's own roles.

/// The SPIFFE ID of agents.
#[must_use]
pub fn agent_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/agent")
}

/// The SPIFFE ID of the control plane.
#[must_use]
pub fn control_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/control")
}
