//! Builds the transport sockets of listeners and clusters that tests need: whose certificate they
//! present, and which certificates of the other side they accept.

use std::path::Path;

use serde_json::{Value, json};

use crate::bootstrap::{any, with};
use crate::mesh_pki::{IdentityFiles, spiffe_id, text};

const TLS: &str = "envoy.extensions.transport_sockets.tls.v3";

/// `CommonTlsContext`: what listeners and clusters share.
#[derive(Debug, Clone)]
struct SharedTlsFields {
    /// `TlsCertificate`.
    certificate: Value,
    /// `CertificateValidationContext`.
    validation: Value,
    /// `TlsParameters`.
    parameters: Value,
}

impl SharedTlsFields {
    fn new(own: &IdentityFiles, roots: &Path) -> Self {
        Self {
            certificate: json!({"certificate_chain": {"filename": text(&own.certificate)},
                                "private_key": {"filename": text(&own.key)}}),
            validation: json!({"trusted_ca": {"filename": text(roots)}}),
            parameters: json!({}),
        }
    }

    fn set_validation(&mut self, field: &str, value: Value) {
        self.validation = with(self.validation.take(), field, value);
    }

    fn set_inline_certificate(&mut self, chain: &str, key: &str) {
        self.certificate = json!({"certificate_chain": {"inline_string": chain},
                                  "private_key": {"inline_string": key}});
    }

    fn context(self) -> Value {
        json!({
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [self.certificate],
            "tls_params": self.parameters,
            "validation_context": self.validation,
        })
    }
}

/// TLS of a listener (`DownstreamTlsContext`).
#[derive(Debug, Clone)]
pub struct ListenerTls {
    common: SharedTlsFields,
    requires_certificate: bool,
}

impl ListenerTls {
    /// A listener whose clients must present a certificate that chains to one of `roots`.
    #[must_use]
    pub fn verifying(own: &IdentityFiles, roots: &Path) -> Self {
        Self { common: SharedTlsFields::new(own, roots), requires_certificate: true }
    }

    /// Rejects client certificates that a CRL of this file revokes.
    #[must_use]
    pub fn crls(mut self, crls: &Path) -> Self {
        self.common.set_validation("crl", json!({"filename": text(crls)}));
        self
    }

    /// Sets the revocation policy, weft's certificate validator extension.
    #[must_use]
    pub fn revocation_policy(mut self, settings: &Value) -> Self {
        let config = any("google.protobuf.Struct", json!({"value": settings}));
        let validator = json!({"name": "weft.revocation", "typed_config": config});
        self.common.set_validation("custom_validator_config", validator);
        self
    }

    /// Accepts client certificates without verifying them.
    #[must_use]
    pub fn unverified(mut self) -> Self {
        self.common.validation = json!({"trust_chain_verification": "ACCEPT_UNTRUSTED"});
        self
    }

    /// Sets whether a client must present a certificate.
    #[must_use]
    pub fn requires_certificate(self, requires_certificate: bool) -> Self {
        Self { requires_certificate, ..self }
    }

    /// Sets `TlsParameters`: versions, cipher suites and groups.
    #[must_use]
    pub fn parameters(mut self, parameters: Value) -> Self {
        self.common.parameters = parameters;
        self
    }

    /// Presents this certificate, which is part of the configuration.
    #[must_use]
    pub fn inline_certificate(mut self, chain: &str, key: &str) -> Self {
        self.common.set_inline_certificate(chain, key);
        self
    }

    /// The transport socket.
    #[must_use]
    pub fn socket(self) -> Value {
        let context = json!({
            "require_client_certificate": self.requires_certificate,
            "common_tls_context": self.common.context(),
        });
        json!({"name": "tls", "typed_config": any(&format!("{TLS}.DownstreamTlsContext"), context)})
    }
}

/// TLS to the endpoints of a cluster (`UpstreamTlsContext`).
#[derive(Debug, Clone)]
pub struct ClusterTls {
    common: SharedTlsFields,
}

impl ClusterTls {
    /// Mutual TLS to endpoints whose SPIFFE ID must be that of `service`.
    #[must_use]
    pub fn to_service(own: &IdentityFiles, roots: &Path, service: &str) -> Self {
        let mut common = SharedTlsFields::new(own, roots);
        let id = json!({"san_type": "URI", "matcher": {"exact": spiffe_id(service)}});
        common.set_validation("match_typed_subject_alt_names", json!([id]));
        Self { common }
    }

    /// Rejects endpoint certificates that a CRL of this file revokes.
    #[must_use]
    pub fn crls(mut self, crls: &Path) -> Self {
        self.common.set_validation("crl", json!({"filename": text(crls)}));
        self
    }

    /// Presents this certificate, which is part of the configuration.
    #[must_use]
    pub fn inline_certificate(mut self, chain: &str, key: &str) -> Self {
        self.common.set_inline_certificate(chain, key);
        self
    }

    /// The transport socket.
    #[must_use]
    pub fn socket(self) -> Value {
        let context = json!({"common_tls_context": self.common.context()});
        json!({"name": "tls", "typed_config": any(&format!("{TLS}.UpstreamTlsContext"), context)})
    }
}

/// Verify Mode: clients must present a certificate that chains to `root` and that no CRL in `crls`
/// revokes.
#[must_use]
pub fn verify_mode(own: &IdentityFiles, root: &Path, crls: &Path) -> Value {
    ListenerTls::verifying(own, root).crls(crls).socket()
}

/// Mutual TLS to endpoints whose SPIFFE ID must be that of `service`.
#[must_use]
pub fn mutual_tls(own: &IdentityFiles, root: &Path, service: &str) -> Value {
    ClusterTls::to_service(own, root, service).socket()
}
