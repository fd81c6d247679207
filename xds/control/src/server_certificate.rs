//! The control plane's own certificate, and how it does TLS with its clients.

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

/// Our own certificate is renewed at half of its life: there is nobody who would do so at the same time.
const NO_JITTER: f64 = 0.5;

/// What clients are checked by, as everybody in the mesh is.
pub(crate) type ClientTrust<'a> = (&'a Trust, &'a RevocationPolicy);

/// The configuration of TLS in force, and when the certificate in it is due for another.
#[derive(Debug)]
pub(crate) struct ServerCertificate {
    issuer: Arc<CertificateIssuer>,
    trust_domain: String,
    certificate: IssuedPair,
    /// By what clients are checked in the configuration in force.
    trust: Trust,
    policy: RevocationPolicy,
    /// When the next attempt may be made after one that failed.
    retry: Option<Instant>,
    tls: watch::Sender<Arc<ServerConfig>>,
}

/// Our certificate.
#[derive(Debug)]
struct IssuedPair {
    identity: LoadedIdentity,
    issued: IssuedCertificate,
    rotation: Rotation,
}

impl ServerCertificate {
    /// Gets a first certificate.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn first(
        issuer: Arc<CertificateIssuer>,
        trust_domain: &str,
        trusted: ClientTrust<'_>,
    ) -> Result<Self, String> {
        let certificate = make(&issuer, trust_domain)?;
        let (trust, policy) = trusted;
        let tls = watch::Sender::new(tls(&certificate.identity, trusted, wall_clock())?);
        let (trust_domain, trust, policy) = (trust_domain.to_owned(), trust.clone(), *policy);
        Ok(Self { issuer, trust_domain, certificate, trust, policy, retry: None, tls })
    }

    /// What handshakes are done with.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.tls.subscribe()
    }

    /// Takes in what is trusted and revoked now. Gets another certificate only when clients would refuse the
    /// present one, or half of its life is over, or the clock was wrong when it was signed: a change of the mesh
    /// is no reason. While the clock has just jumped the present one stays.
    pub(crate) fn update(&mut self, trusted: ClientTrust<'_>, revoked: &[RevokedCertificate]) {
        if self.is_due(revoked) {
            match make(&self.issuer, &self.trust_domain) {
                Ok(certificate) => {
                    (self.certificate, self.retry) = (certificate, None);
                    self.publish(trusted);
                    return;
                }
                Err(error) => {
                    tracing::error!(
                        error,
                        "the control plane's own certificate was not renewed; the last one stays"
                    );
                    let wait = self.certificate.rotation.failed(wall_clock(), NO_JITTER);
                    self.retry = Some(monotonic() + wait);
                }
            }
        }
        let (trust, policy) = trusted;
        if *trust != self.trust || *policy != self.policy {
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
                (self.trust, self.policy) = (trusted.0.clone(), *trusted.1);
                self.tls.send_replace(config);
            }
            Err(error) => {
                tracing::error!(error, "the TLS configuration was not renewed; the last one stays");
            }
        }
    }
}

fn make(issuer: &CertificateIssuer, trust_domain: &str) -> Result<IssuedPair, String> {
    let id = SpiffeId::parse(&control_identity(trust_domain)).map_err(|error| error.to_string())?;
    let pending = request::make(&id).map_err(|error| error.to_string())?;
    let asked = CheckedRequest::parse(&pending.request_pem).map_err(|error| error.to_string())?;
    let issued = issuer.sign_own(&asked).map_err(|error| error.to_string())?;
    let identity =
        LoadedIdentity::load(issued.chain.concat().as_bytes(), pending.key_pem.as_bytes())
            .map_err(|error| error.to_string())?;
    let rotation = Rotation::new(wall_clock(), issued.not_after, NO_JITTER);
    Ok(IssuedPair { identity, issued, rotation })
}

/// Clients may come without a certificate, for their first one; what they show must be good.
fn tls(
    own: &LoadedIdentity,
    (trust, policy): ClientTrust<'_>,
    now: SystemTime,
) -> Result<Arc<ServerConfig>, String> {
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let parts = TrustParts {
        roots: trust.roots.as_bytes(),
        revocations: Some(trust.revocations.as_bytes()),
        names: Vec::new(),
        policy: *policy,
    };
    let store = TrustStore::build(parts, None, now).map_err(|error| error.to_string())?;
    let clients = ClientAuthentication::Optional(Arc::new(store), Vec::new());
    server(own, clients, &["h2".into()]).map_err(|error| error.to_string())
}
