//! The control plane's own certificate, and how it does TLS with its clients.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustls::ServerConfig;
use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use weft_certs::request::{self, CheckedRequest};
use weft_certs::rotation::Rotation;
use weft_certs::tls::{ClientAuthentication, Identity, server};
use weft_certs::{TrustParts, TrustStore};
use weft_model::{RevocationPolicy, SpiffeId};

use crate::issue::{Registrar, wall_clock};
use crate::resources::{Trust, control_identity};

/// Our own certificate is renewed at half of its life: there is nobody who would do so at the same time.
const NO_JITTER: f64 = 0.5;

/// What clients are checked by, as everybody in the mesh is.
pub(crate) type Trusted<'a> = (&'a Trust, &'a RevocationPolicy);

/// The configuration of TLS in force, and when the certificate in it is due for another.
#[derive(Debug)]
pub(crate) struct Own {
    registrar: Arc<Registrar>,
    trust_domain: String,
    rotation: Rotation,
    /// When the next attempt may be made after one that failed.
    retry: Option<Instant>,
    tls: watch::Sender<Arc<ServerConfig>>,
}

impl Own {
    /// Gets a first certificate.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn first(
        registrar: Arc<Registrar>,
        trust_domain: &str,
        trusted: Trusted<'_>,
    ) -> Result<Self, String> {
        let (config, rotation) = make(&registrar, trust_domain, trusted)?;
        let tls = watch::Sender::new(config);
        Ok(Self { registrar, trust_domain: trust_domain.to_owned(), rotation, retry: None, tls })
    }

    /// What handshakes are done with.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.tls.subscribe()
    }

    /// Whether half of its life is over. Once all of it is, no client knows us by its roots, not even to
    /// get a certificate of its own.
    pub(crate) fn is_due(&self) -> bool {
        match self.retry {
            Some(at) => at <= now(),
            None => self.rotation.due() <= wall_clock(),
        }
    }

    /// Another certificate, by what is trusted now. Without one the last stays.
    pub(crate) fn renew(&mut self, trusted: Trusted<'_>) {
        match make(&self.registrar, &self.trust_domain, trusted) {
            Ok((config, rotation)) => {
                (self.rotation, self.retry) = (rotation, None);
                self.tls.send_replace(config);
            }
            Err(error) => {
                tracing::error!(error, "our own TLS was not renewed; the last one stays");
                self.retry = Some(now() + self.rotation.failed(wall_clock(), NO_JITTER));
            }
        }
    }
}

fn make(
    registrar: &Registrar,
    trust_domain: &str,
    trusted: Trusted<'_>,
) -> Result<(Arc<ServerConfig>, Rotation), String> {
    let id = SpiffeId::parse(&control_identity(trust_domain)).map_err(|error| error.to_string())?;
    let pending = request::make(&id).map_err(|error| error.to_string())?;
    let asked = CheckedRequest::parse(&pending.request_pem).map_err(|error| error.to_string())?;
    let issued = registrar.sign_own(&asked).map_err(|error| error.to_string())?;
    let own = Identity::load(issued.chain.concat().as_bytes(), pending.key_pem.as_bytes())
        .map_err(|error| error.to_string())?;
    let now = wall_clock();
    Ok((tls(&own, trusted, now)?, Rotation::new(now, issued.not_after, NO_JITTER)))
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}

/// Clients may come without a certificate, for their first one; what they show must be good.
fn tls(
    own: &Identity,
    (trust, policy): Trusted<'_>,
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
