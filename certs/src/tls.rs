//! rustls configurations for servers and clients.
//!
//! A resumed handshake skips the verifier, and with it the CRLs. Therefore only [`ServerTls`] and [`ClientTls`]
//! resume sessions: they check the stored chain again. Plain configurations resume no sessions. This applies to TLS
//! 1.2 and TLS 1.3.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::ClientCertVerifier as _;
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, CommonState, HandshakeKind, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use weft_model::{StringMatch, TlsParameters};

use crate::parameters::{PROVIDER, provider, versions};
use crate::profile::Purpose;
use crate::unverified::{AnyClient, AnyServer};
use crate::verify::Verifier;
use crate::{Proof, TrustStore};

/// A certificate chain with its private key. The key was checked to match the leaf.
#[derive(Debug, Clone)]
pub struct LoadedIdentity(Arc<CertifiedKey>);

impl PartialEq for LoadedIdentity {
    /// Compares the identity of the loaded object, not the certificate.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LoadedIdentity {}

/// An error in building an identity or a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The chain cannot be read.
    #[error("the certificate chain cannot be read: {0}")]
    Chain(String),
    /// The key cannot be read.
    #[error("the private key cannot be read: {0}")]
    Key(String),
    /// The key does not match the certificate.
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// rustls rejects the combination.
    #[error("{0}")]
    Refused(String),
}

/// Client certificate authentication.
#[derive(Debug, Clone)]
pub enum ClientAuthentication {
    /// No client certificate is requested.
    None,
    /// A client certificate is requested and optional; if presented, it must be valid.
    Optional(Arc<TrustStore>, Vec<StringMatch>),
    /// A valid client certificate is required (verify mode).
    Required(Arc<TrustStore>, Vec<StringMatch>),
    /// A client certificate is requested or required, and forwarded without verification (passthrough mode). The
    /// handshake proves only that the client has the private key.
    Unchecked {
        /// Whether a client certificate is required.
        required: bool,
    },
}

impl LoadedIdentity {
    /// Reads a PEM chain, leaf first, and the leaf's PEM key.
    ///
    /// # Errors
    /// The chain or the key cannot be read, or the key does not match the leaf.
    pub fn load(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, TlsError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain_pem)
            .collect::<Result<_, _>>()
            .map_err(|error| TlsError::Chain(error.to_string()))?;
        if chain.is_empty() {
            return Err(TlsError::Chain("no certificate found".into()));
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem)
            .map_err(|error| TlsError::Key(error.to_string()))?;
        let certified =
            CertifiedKey::from_der(chain, key, &PROVIDER).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => TlsError::Mismatch,
                other => TlsError::Key(other.to_string()),
            })?;
        Ok(Self(Arc::new(certified)))
    }

    /// The leaf certificate.
    #[must_use]
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.0.cert.first()
    }
}

/// The keys with which a server encrypts session tickets. A session can be resumed only by servers with the same
/// keys. The keys rotate every six hours.
#[derive(Debug, Clone)]
pub struct SessionTickets(Arc<Keys>);

#[derive(Debug)]
struct Keys {
    keys: Arc<dyn ProducesTickets>,
    /// The number of further tickets to decline.
    declined: AtomicU32,
}

/// The number of tickets to decline after a resumed session was rejected. The client may have a new certificate
/// although its session has the old one; in a full handshake it presents the new one. More than the
/// connections that a client usually opens at once.
const DECLINED_TICKETS: u32 = 64;

impl SessionTickets {
    /// Creates ticket keys.
    ///
    /// # Errors
    /// No random numbers are available.
    pub fn new() -> Result<Self, TlsError> {
        let keys =
            aws_lc_rs::Ticketer::new().map_err(|error| TlsError::Refused(error.to_string()))?;
        Ok(Self(Arc::new(Keys { keys, declined: AtomicU32::new(0) })))
    }
}

impl ProducesTickets for Keys {
    fn enabled(&self) -> bool {
        self.keys.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.keys.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.keys.encrypt(plain)
    }

    fn decrypt(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let plain = self.keys.decrypt(sealed)?;
        let one_less = |declined: u32| declined.checked_sub(1);
        let is_declined = self.declined.fetch_update(Relaxed, Relaxed, one_less).is_ok();
        (!is_declined).then_some(plain)
    }
}

/// The TLS configuration of a server that resumes sessions.
#[derive(Debug, Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    clients: Clients,
    tickets: SessionTickets,
    identity: LoadedIdentity,
}

/// How client certificates are checked.
#[derive(Debug, Clone)]
enum Clients {
    Unasked,
    Checked(Arc<Verifier>),
    Unchecked(Arc<AnyClient>),
}

impl ServerTls {
    /// Builds the configuration. `alpn` is in order of preference.
    ///
    /// # Errors
    /// rustls rejects the combination.
    pub fn new(
        identity: &LoadedIdentity,
        clients: ClientAuthentication,
        alpn: &[String],
        parameters: &TlsParameters,
        tickets: &SessionTickets,
    ) -> Result<Self, TlsError> {
        let clients = clients.clients();
        let mut config = server_config(identity, &clients, alpn, parameters)?;
        // A resumed session would forward a certificate that the client may no longer have.
        if !matches!(clients, Clients::Unchecked(_)) {
            config.ticketer = tickets.0.clone();
            // One ticket per connection: a client that resumes gets another.
            config.send_tls13_tickets = 1;
        }
        Ok(Self {
            config: Arc::new(config),
            clients,
            tickets: tickets.clone(),
            identity: identity.clone(),
        })
    }

    /// The certificate that the server presents.
    #[must_use]
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.identity.leaf()
    }

    /// The rustls configuration for handshakes.
    #[must_use]
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// The trust store for client certificates; none if they are not verified.
    #[must_use]
    pub fn trust(&self) -> Option<&TrustStore> {
        match &self.clients {
            Clients::Checked(verifier) => Some(verifier.trust()),
            Clients::Unasked | Clients::Unchecked(_) => None,
        }
    }

    /// The certificates of the client of a finished handshake, leaf first, if they are forwarded without
    /// verification.
    #[must_use]
    pub fn unchecked<'s>(&self, session: &'s CommonState) -> Option<&'s [CertificateDer<'static>]> {
        match &self.clients {
            Clients::Unchecked(_) => session.peer_certificates().filter(|chain| !chain.is_empty()),
            Clients::Unasked | Clients::Checked(_) => None,
        }
    }

    /// The verified certificates of the client of a finished handshake, leaf first. After a resumed handshake, which
    /// skips the verifier, they are verified again. None when no certificate was requested or presented.
    ///
    /// # Errors
    /// The certificates have become invalid, or are required and missing.
    pub fn client<'s>(
        &self,
        session: &'s CommonState,
        now: UnixTime,
    ) -> Result<Option<&'s [CertificateDer<'static>]>, rustls::Error> {
        let Clients::Checked(clients) = &self.clients else {
            // Certificates of a session with another server, and unverified certificates, prove nothing here.
            return Ok(None);
        };
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        match session.peer_certificates() {
            Some(chain @ [leaf, above @ ..]) => {
                if resumed && let Err(error) = clients.verify_client_cert(leaf, above, now) {
                    self.tickets.0.declined.store(DECLINED_TICKETS, Relaxed);
                    return Err(error);
                }
                Ok(Some(chain))
            }
            Some([]) | None if clients.client_auth_mandatory() => {
                Err(rustls::Error::NoCertificatesPresented)
            }
            Some([]) | None => Ok(None),
        }
    }

    /// The proof of the client that [`Self::client`] returned, with the verified path. None if clients are not
    /// verified, or `chain` is not valid.
    #[must_use]
    pub fn proof(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<Proof> {
        match &self.clients {
            Clients::Checked(verifier) => verifier.proof(chain, Purpose::Client, now),
            Clients::Unasked | Clients::Unchecked(_) => None,
        }
    }
}

/// The TLS configuration of a client that resumes sessions.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    /// The configuration without session resumption.
    plain: Arc<ClientConfig>,
    /// None: any server certificate is accepted.
    servers: Option<Arc<Verifier>>,
}

impl ClientTls {
    /// The size of the session cache of each configuration. rustls keeps up to eight sessions per server name.
    const SESSIONS: usize = 32;

    /// Builds the configuration. The server's chain must end in a root of `trust`, and its certificate must have one
    /// of `names`.
    ///
    /// # Errors
    /// rustls rejects the combination.
    pub fn new(
        identity: Option<&LoadedIdentity>,
        trust: Arc<TrustStore>,
        names: Vec<StringMatch>,
        alpn: &[String],
        parameters: &TlsParameters,
    ) -> Result<Self, TlsError> {
        let servers = Arc::new(Verifier::new(trust, names, true));
        let plain = client_config(identity, servers.clone(), alpn, parameters)?;
        Ok(Self::resuming(plain, Some(servers)))
    }

    /// Builds a configuration that accepts any server certificate without verification.
    ///
    /// # Errors
    /// rustls rejects the combination.
    pub fn unverified(
        identity: Option<&LoadedIdentity>,
        alpn: &[String],
        parameters: &TlsParameters,
    ) -> Result<Self, TlsError> {
        let plain = client_config(identity, Arc::new(AnyServer), alpn, parameters)?;
        Ok(Self::resuming(plain, None))
    }

    fn resuming(plain: ClientConfig, servers: Option<Arc<Verifier>>) -> Self {
        let mut config = plain.clone();
        config.resumption = Resumption::in_memory_sessions(Self::SESSIONS);
        Self { config: Arc::new(config), plain: Arc::new(plain), servers }
    }

    /// The rustls configuration for handshakes.
    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// The trust store for server certificates; none if any certificate is accepted.
    #[must_use]
    pub fn trust(&self) -> Option<&TrustStore> {
        self.servers.as_ref().map(|verifier| verifier.trust())
    }

    /// The configuration without session resumption. It is used when [`Self::check_server`] rejects a resumed
    /// session, because the server may have a new certificate.
    #[must_use]
    pub fn full_handshake_config(&self) -> &Arc<ClientConfig> {
        &self.plain
    }

    /// Verifies the server certificate after a resumed handshake, which skips the verifier. Does nothing after a full
    /// handshake.
    ///
    /// # Errors
    /// The server certificate has become invalid.
    pub fn check_server(
        &self,
        session: &CommonState,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let Some(servers) = &self.servers else {
            return Ok(());
        };
        if session.handshake_kind() != Some(HandshakeKind::Resumed) {
            return Ok(());
        }
        match session.peer_certificates() {
            Some([leaf, above @ ..]) => {
                servers.verify_server_cert(leaf, above, name, &[], now).map(drop)
            }
            Some([]) | None => Err(rustls::Error::NoCertificatesPresented),
        }
    }

    /// The proof of the server that [`Self::check_server`] accepted, with the verified path. None if any server is
    /// accepted, or `chain` is not valid.
    #[must_use]
    pub fn proof(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<Proof> {
        self.servers.as_ref()?.proof(chain, Purpose::Server, now)
    }
}

/// Builds a server configuration for connections between mesh components: TLS 1.3 only, without session resumption.
/// `alpn` is in order of preference.
///
/// # Errors
/// rustls rejects the combination.
pub fn server(
    identity: &LoadedIdentity,
    clients: ClientAuthentication,
    alpn: &[String],
) -> Result<Arc<ServerConfig>, TlsError> {
    let parameters = TlsParameters::meshed(Vec::new());
    Ok(Arc::new(server_config(identity, &clients.clients(), alpn, &parameters)?))
}

/// Builds a client configuration for connections between mesh components: TLS 1.3 only, without session resumption.
/// The server's chain must end in a root of `trust`, and its certificate must have one of `names`.
///
/// # Errors
/// rustls rejects the combination.
pub fn client(
    identity: Option<&LoadedIdentity>,
    trust: Arc<TrustStore>,
    names: Vec<StringMatch>,
    alpn: &[String],
) -> Result<Arc<ClientConfig>, TlsError> {
    let servers = Arc::new(Verifier::new(trust, names, true));
    let parameters = TlsParameters::meshed(Vec::new());
    Ok(Arc::new(client_config(identity, servers, alpn, &parameters)?))
}

/// Verifies client certificates, leaf first, like a handshake that requires them. It is for chains without a
/// handshake, such as those of test suites, and does not prove that the client has the private key.
///
/// # Errors
/// The certificates would be rejected in a handshake.
pub fn check_client(
    trust: Arc<TrustStore>,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), rustls::Error> {
    let [leaf, above @ ..] = chain else {
        return Err(rustls::Error::NoCertificatesPresented);
    };
    Verifier::new(trust, Vec::new(), true).verify_client_cert(leaf, above, now).map(drop)
}

/// The proof of a client that [`check_client`] accepts, leaf first. None if the certificates are not valid.
#[must_use]
pub fn prove_client(
    trust: Arc<TrustStore>,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Option<Proof> {
    Verifier::new(trust, Vec::new(), true).proof(chain, Purpose::Client, now)
}

impl ClientAuthentication {
    fn clients(self) -> Clients {
        let (trust, names, mandatory) = match self {
            Self::None => return Clients::Unasked,
            Self::Unchecked { required } => {
                return Clients::Unchecked(Arc::new(AnyClient { mandatory: required }));
            }
            Self::Optional(trust, names) => (trust, names, false),
            Self::Required(trust, names) => (trust, names, true),
        };
        Clients::Checked(Arc::new(Verifier::new(trust, names, mandatory)))
    }
}

fn server_config(
    identity: &LoadedIdentity,
    clients: &Clients,
    alpn: &[String],
    parameters: &TlsParameters,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider(parameters))
        .with_protocol_versions(&versions(parameters))
        .map_err(|error| TlsError::Refused(error.to_string()))?;
    let builder = match clients {
        Clients::Unasked => builder.with_no_client_auth(),
        Clients::Checked(verifier) => builder.with_client_cert_verifier(verifier.clone()),
        Clients::Unchecked(verifier) => builder.with_client_cert_verifier(verifier.clone()),
    };
    let mut config = builder
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity.0.clone())));
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.ignore_client_order = true;
    // Without the extended master secret, a TLS 1.2 session is not bound to its first handshake (RFC 7627, section
    // 1).
    config.require_ems = true;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn client_config(
    identity: Option<&LoadedIdentity>,
    servers: Arc<dyn ServerCertVerifier>,
    alpn: &[String],
    parameters: &TlsParameters,
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider(parameters))
        .with_protocol_versions(&versions(parameters))
        .map_err(|error| TlsError::Refused(error.to_string()))?
        .with_root_certificates(RootCertStore::empty());
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(Arc::new(
            rustls::sign::SingleCertAndKey::from(identity.0.clone()),
        )),
        None => builder.with_no_client_auth(),
    };
    config.dangerous().set_certificate_verifier(servers);
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.require_ems = true;
    config.resumption = Resumption::disabled();
    Ok(config)
}
