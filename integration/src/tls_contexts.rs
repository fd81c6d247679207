//! Builds the transport sockets of listeners and clusters that tests need: whose certificate they
//! present, and which certificates of the other side they accept.

use std::path::Path;

use serde_json::{Value, json};

use crate::bootstrap::{any, with};
use crate::mesh_pki::{IdentityFiles, spiffe_id, text};

const TLS: &str = "envoy.extensions.transport_sockets.tls.v3";

/// TLS of a listener (`DownstreamTlsContext`) or to the endpoints of a cluster (`UpstreamTlsContext`).
#[derive(Debug, Clone)]
pub struct TestTls {
    /// The name of the message.
    message: &'static str,
    /// Fields that only this message has.
    own_fields: Value,
    /// `TlsCertificate`.
    certificate: Value,
    /// `CertificateValidationContext`.
    validation: Value,
    /// `TlsParameters`.
    parameters: Value,
}

impl TestTls {
    /// A listener whose clients must present a certificate that chains to one of `roots`.
    #[must_use]
    pub fn listener(own: &IdentityFiles, roots: &Path) -> Self {
        Self::new("DownstreamTlsContext", own, roots).requires_certificate(true)
    }

    /// Mutual TLS to the endpoints of a cluster, whose SPIFFE ID must be that of `service`.
    #[must_use]
    pub fn cluster(own: &IdentityFiles, roots: &Path, service: &str) -> Self {
        let id = json!({"san_type": "URI", "matcher": {"exact": spiffe_id(service)}});
        let tls = Self::new("UpstreamTlsContext", own, roots);
        tls.validation_field("match_typed_subject_alt_names", json!([id]))
    }

    fn new(message: &'static str, own: &IdentityFiles, roots: &Path) -> Self {
        Self {
            message,
            own_fields: json!({}),
            certificate: json!({"certificate_chain": {"filename": text(&own.certificate)},
                                "private_key": {"filename": text(&own.key)}}),
            validation: json!({"trusted_ca": {"filename": text(roots)}}),
            parameters: json!({}),
        }
    }

    fn validation_field(mut self, field: &str, value: Value) -> Self {
        self.validation = with(self.validation, field, value);
        self
    }

    /// Rejects certificates of the other side that a CRL of this file revokes.
    #[must_use]
    pub fn crls(self, crls: &Path) -> Self {
        self.validation_field("crl", json!({"filename": text(crls)}))
    }

    /// Sets the revocation policy, weft's certificate validator extension.
    #[must_use]
    pub fn revocation_policy(self, settings: &Value) -> Self {
        let config = any("google.protobuf.Struct", json!({"value": settings}));
        let validator = json!({"name": "weft.revocation", "typed_config": config});
        self.validation_field("custom_validator_config", validator)
    }

    /// Accepts certificates of the other side without verifying them.
    #[must_use]
    pub fn unverified(mut self) -> Self {
        self.validation = json!({"trust_chain_verification": "ACCEPT_UNTRUSTED"});
        self
    }

    /// Sets whether a client of the listener must present a certificate.
    #[must_use]
    pub fn requires_certificate(mut self, requires_certificate: bool) -> Self {
        self.own_fields = json!({"require_client_certificate": requires_certificate});
        self
    }

    /// Sets `TlsParameters`: versions, cipher suites and groups.
    #[must_use]
    pub fn parameters(mut self, parameters: Value) -> Self {
        self.parameters = parameters;
        self
    }

    /// Presents this certificate, which is part of the configuration.
    #[must_use]
    pub fn inline_certificate(mut self, chain: &str, key: &str) -> Self {
        self.certificate = json!({"certificate_chain": {"inline_string": chain},
                                  "private_key": {"inline_string": key}});
        self
    }

    /// The transport socket.
    #[must_use]
    pub fn socket(self) -> Value {
        let common = json!({
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [self.certificate],
            "tls_params": self.parameters,
            "validation_context": self.validation,
        });
        let context = with(self.own_fields, "common_tls_context", common);
        json!({"name": "tls", "typed_config": any(&format!("{TLS}.{}", self.message), context)})
    }
}

/// Verify Mode: clients must present a certificate that chains to `root` and that no CRL in `crls`
/// revokes.
#[must_use]
pub fn verify_mode(own: &IdentityFiles, root: &Path, crls: &Path) -> Value {
    TestTls::listener(own, root).crls(crls).socket()
}

/// Mutual TLS to endpoints whose SPIFFE ID must be that of `service`.
#[must_use]
pub fn mutual_tls(own: &IdentityFiles, root: &Path, service: &str) -> Value {
    TestTls::cluster(own, root, service).socket()
}
