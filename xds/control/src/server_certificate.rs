//! The control plane's own certificate, its renewal, and the TLS configuration for its clients.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustls::ServerConfig;
use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use weft_certs::request::{self, CheckedRequest};
use weft_certs::rotation::Rotation;
use weft_certs::tls::{ClientAuthentication, LoadedIdentity, server};
use weft_certs::{IssuedCertificate, RevokedCertificate, TrustParts, TrustStore};
use weft_model::{RevocationPolicy, SpiffeId};

use crate::clock::{monotonic, wall_clock};
use crate::issue::CertificateIssuer;
use crate::resources::{Trust, control_identity};

/// The control plane renews its certificate at half of its life. Jitter is not needed: it is one process.
const NO_JITTER: f64 = 0.5;

/// How client certificates are verified: the trust bundle, and the revocation policy of the mesh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClientTrust<'a> {
    pub(crate) trust: &'a Trust,
    pub(crate) policy: &'a RevocationPolicy,
}

/// The TLS configuration in force, and the state of its certificate's renewal.
#[derive(Debug)]
pub(crate) struct ServerCertificate {
    issuer: Arc<CertificateIssuer>,
    trust_domain: String,
    certificate: IssuedPair,
    /// The trust bundle in the configuration in force.
    trust: Trust,
    policy: RevocationPolicy,
    /// When to try again after a failed renewal.
    retry: Option<Instant>,
    tls: watch::Sender<Arc<ServerConfig>>,
}

/// The certificate with its key.
#[derive(Debug)]
struct IssuedPair {
    identity: LoadedIdentity,
    issued: IssuedCertificate,
    rotation: Rotation,
}

impl ServerCertificate {
    /// Issues the first certificate.
    ///
    /// # Errors
    /// The authority cannot sign, the store fails, or the trust bundle is not usable.
    pub(crate) fn issue_first(
        issuer: Arc<CertificateIssuer>,
        trust_domain: &str,
        trusted: ClientTrust<'_>,
    ) -> Result<Self, String> {
        let certificate = issue_certificate(&issuer, trust_domain)?;
        let tls = watch::Sender::new(tls(&certificate.identity, trusted, wall_clock())?);
        Ok(Self {
            issuer,
            trust_domain: trust_domain.to_owned(),
            certificate,
            trust: trusted.trust.clone(),
            policy: *trusted.policy,
            retry: None,
            tls,
        })
    }

    /// The TLS configuration for new connections.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.tls.subscribe()
    }

    /// Applies the present trust bundle and revocations. Renews the certificate when half of its life has passed, when
    /// it was revoked or its authority is no longer trusted, or when the clock was wrong at signing. A change of the mesh
    /// alone does not renew it. While the clock has just jumped the present certificate stays.
    pub(crate) fn update(&mut self, trusted: ClientTrust<'_>, revoked: &[RevokedCertificate]) {
        if self.is_due(revoked) {
            match issue_certificate(&self.issuer, &self.trust_domain) {
                Ok(certificate) => {
                    self.certificate = certificate;
                    self.retry = None;
                    self.publish(trusted);
                    return;
                }
                Err(error) => {
                    tracing::error!(
                        error,
                        "failed to renew the control plane's certificate, keeping the last one"
                    );
                    let wait = self.certificate.rotation.failed(wall_clock(), NO_JITTER);
                    self.retry = Some(monotonic() + wait);
                }
            }
        }
        if *trusted.trust != self.trust || *trusted.policy != self.policy {
            self.publish(trusted);
        }
    }

    fn is_due(&self, revoked: &[RevokedCertificate]) -> bool {
        if let Some(at) = self.retry {
            return at <= monotonic();
        }
        if self.issuer.clock.steady().is_err() {
            return false;
        }
        let IssuedPair { issued, rotation, .. } = &self.certificate;
        rotation.is_due(wall_clock())
            || !self.issuer.authorities.get().signed(&issued.chain)
            || revoked.iter().any(|entry| entry.serial == issued.serial)
    }

    fn publish(&mut self, trusted: ClientTrust<'_>) {
        match tls(&self.certificate.identity, trusted, wall_clock()) {
            Ok(config) => {
                self.trust = trusted.trust.clone();
                self.policy = *trusted.policy;
                self.tls.send_replace(config);
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "failed to update the TLS configuration, keeping the last one"
                );
            }
        }
    }
}

fn issue_certificate(issuer: &CertificateIssuer, trust_domain: &str) -> Result<IssuedPair, String> {
    let id = SpiffeId::parse(&control_identity(trust_domain)).map_err(|error| error.to_string())?;
    let pending = request::make(&id).map_err(|error| error.to_string())?;
    let request = CheckedRequest::parse(&pending.request_pem).map_err(|error| error.to_string())?;
    let issued = issuer.sign_own(&request).map_err(|error| error.to_string())?;
    let identity =
        LoadedIdentity::load(issued.chain.concat().as_bytes(), pending.key_pem.as_bytes())
            .map_err(|error| error.to_string())?;
    let rotation = Rotation::new(wall_clock(), issued.not_after, NO_JITTER);
    Ok(IssuedPair { identity, issued, rotation })
}

/// The TLS configuration for clients. A client certificate is optional, since a client that joins has none; one that is
/// presented must be valid.
fn tls(
    own: &LoadedIdentity,
    trusted: ClientTrust<'_>,
    now: SystemTime,
) -> Result<Arc<ServerConfig>, String> {
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let parts = TrustParts {
        roots: trusted.trust.roots.as_bytes(),
        revocations: Some(trusted.trust.revocations.as_bytes()),
        names: Vec::new(),
        policy: *trusted.policy,
    };
    let store = TrustStore::build(parts, None, now).map_err(|error| error.to_string())?;
    let clients = ClientAuthentication::Optional(Arc::new(store), Vec::new());
    server(own, clients, &["h2".into()]).map_err(|error| error.to_string())
}
