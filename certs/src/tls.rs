//! rustls configurations from our own parts.
//!
//! A resumed handshake skips the verifier, and with it the revocation lists. So sessions are resumed by a
//! [`ServerTls`] and a [`ClientTls`] alone, which check the stored chain once more; a plain configuration resumes
//! none. All of it holds for TLS 1.2 as for TLS 1.3.

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
use crate::path_cache::Purpose;
use crate::unverified::{AnyClient, AnyServer};
use crate::verify::Verifier;
use crate::{Proof, TrustStore};

/// A certificate chain with its private key, checked to belong together.
#[derive(Debug, Clone)]
pub struct LoadedIdentity(Arc<CertifiedKey>);

impl PartialEq for LoadedIdentity {
    /// Whether it is the very same, and not only the same certificate.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LoadedIdentity {}

/// Why an identity or a configuration cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The chain cannot be read.
    #[error("the certificate chain cannot be read: {0}")]
    Chain(String),
    /// The key cannot be read.
    #[error("the private key cannot be read: {0}")]
    Key(String),
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// rustls refuses the combination.
    #[error("{0}")]
    Refused(String),
}

/// Whether clients show a certificate.
#[derive(Debug, Clone)]
pub enum ClientAuthentication {
    /// They are not asked.
    None,
    /// They are asked and may decline; what they show must be good.
    Optional(Arc<TrustStore>, Vec<StringMatch>),
    /// They must: Verify Mode.
    Required(Arc<TrustStore>, Vec<StringMatch>),
    /// They are asked, or must, and whatever they show is passed on: they have its key, and nothing else is
    /// proved.
    Unchecked {
        /// Whether they must.
        required: bool,
    },
}

impl LoadedIdentity {
    /// Reads a PEM chain, leaf first, and the leaf's PEM key.
    ///
    /// # Errors
    /// Which of the two cannot be used, or that they do not belong together.
    pub fn load(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, TlsError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain_pem)
            .collect::<Result<_, _>>()
            .map_err(|error| TlsError::Chain(error.to_string()))?;
        if chain.is_empty() {
            return Err(TlsError::Chain("it holds no certificate".into()));
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

    /// The leaf.
    #[must_use]
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.0.cert.first()
    }
}

/// The keys that a server seals sessions with, for clients to bring back: a session can be resumed where
/// these are, and nowhere else. They change by themselves every six hours.
#[derive(Debug, Clone)]
pub struct SessionTickets(Arc<Keys>);

#[derive(Debug)]
struct Keys {
    keys: Arc<dyn ProducesTickets>,
    /// How many sessions more are not taken.
    untaken: AtomicU32,
}

/// How many sessions are not taken after one whose client was refused. It may have a new certificate and not
/// know that its session still has the old one: it shows it in a whole handshake.
const UNTAKEN: u32 = 64;

impl SessionTickets {
    /// New keys.
    ///
    /// # Errors
    /// Without random numbers.
    pub fn new() -> Result<Self, TlsError> {
        let keys =
            aws_lc_rs::Ticketer::new().map_err(|error| TlsError::Refused(error.to_string()))?;
        Ok(Self(Arc::new(Keys { keys, untaken: AtomicU32::new(0) })))
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
        let one_less = |untaken: u32| untaken.checked_sub(1);
        let is_untaken = self.untaken.fetch_update(Relaxed, Relaxed, one_less).is_ok();
        (!is_untaken).then_some(plain)
    }
}

/// A server's side of TLS that resumes sessions.
#[derive(Debug, Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    clients: Clients,
    tickets: SessionTickets,
    identity: LoadedIdentity,
}

/// Who looks at what clients show.
#[derive(Debug, Clone)]
enum Clients {
    Unasked,
    Checked(Arc<Verifier>),
    Unchecked(Arc<AnyClient>),
}

impl ServerTls {
    /// A server's side. `alpn` is in order of preference.
    ///
    /// # Errors
    /// When rustls refuses the combination.
    pub fn new(
        identity: &LoadedIdentity,
        clients: ClientAuthentication,
        alpn: &[String],
        parameters: &TlsParameters,
        tickets: &SessionTickets,
    ) -> Result<Self, TlsError> {
        let clients = clients.clients();
        let mut config = server_config(identity, &clients, alpn, parameters)?;
        // A session would bring a chain back that its client no longer has.
        if !matches!(clients, Clients::Unchecked(_)) {
            config.ticketer = tickets.0.clone();
            // One for each connection: a client that comes back gets another.
            config.send_tls13_tickets = 1;
        }
        Ok(Self {
            config: Arc::new(config),
            clients,
            tickets: tickets.clone(),
            identity: identity.clone(),
        })
    }

    /// The certificate that clients are shown.
    #[must_use]
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.identity.leaf()
    }

    /// What a handshake is done with.
    #[must_use]
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// By which store clients are checked; none where they are not asked.
    #[must_use]
    pub fn trust(&self) -> Option<&TrustStore> {
        match &self.clients {
            Clients::Checked(verifier) => Some(verifier.trust()),
            Clients::Unasked | Clients::Unchecked(_) => None,
        }
    }

    /// What the client of a finished handshake showed, leaf first, where it is passed on and not checked.
    #[must_use]
    pub fn unchecked<'s>(&self, session: &'s CommonState) -> Option<&'s [CertificateDer<'static>]> {
        match &self.clients {
            Clients::Unchecked(_) => session.peer_certificates().filter(|chain| !chain.is_empty()),
            Clients::Unasked | Clients::Checked(_) => None,
        }
    }

    /// The certificates of the client of a finished handshake, leaf first. After a resumed session, which skips the
    /// verifier, they are checked again. None when the client was not asked for any, or declined.
    ///
    /// # Errors
    /// When the certificates are no longer valid, or are missing where they are required.
    pub fn client<'s>(
        &self,
        session: &'s CommonState,
        now: UnixTime,
    ) -> Result<Option<&'s [CertificateDer<'static>]>, rustls::Error> {
        let Clients::Checked(clients) = &self.clients else {
            // What it once showed to a server that asked proves nothing here, nor does what nobody checks.
            return Ok(None);
        };
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        match session.peer_certificates() {
            Some(chain @ [leaf, above @ ..]) => {
                if resumed && let Err(error) = clients.verify_client_cert(leaf, above, now) {
                    self.tickets.0.untaken.store(UNTAKEN, Relaxed);
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

    /// The proof of the client that [`Self::client`] returned, by the path that was verified. None where clients
    /// are not checked, and when `chain` is not valid.
    #[must_use]
    pub fn proof(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<Proof> {
        match &self.clients {
            Clients::Checked(verifier) => verifier.proof(chain, Purpose::Client, now),
            Clients::Unasked | Clients::Unchecked(_) => None,
        }
    }
}

/// A client's side of TLS that resumes sessions.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    /// The same without sessions.
    plain: Arc<ClientConfig>,
    /// None: any server is accepted.
    servers: Option<Arc<Verifier>>,
}

impl ClientTls {
    /// How many sessions are kept, for each configuration: the library keeps up to eight for a name.
    const SESSIONS: usize = 32;

    /// A client's side. The server must chain to `trust` and have one of `names`.
    ///
    /// # Errors
    /// When rustls refuses the combination.
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

    /// A client's side that accepts any server: nothing is proved of it.
    ///
    /// # Errors
    /// When rustls refuses the combination.
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

    /// What a handshake is done with.
    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// By which store servers are checked; none where any is accepted.
    #[must_use]
    pub fn trust(&self) -> Option<&TrustStore> {
        self.servers.as_ref().map(|verifier| verifier.trust())
    }

    /// What a handshake is done with that resumes nothing: for when [`Self::check_server`] has refused, since
    /// the server may have a new certificate where the session has the old one.
    #[must_use]
    pub fn full_handshake_config(&self) -> &Arc<ClientConfig> {
        &self.plain
    }

    /// Checks the server of a finished handshake where the handshake did not: when a session was resumed.
    ///
    /// # Errors
    /// Why the server is not trusted any more.
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

    /// The proof of the server that [`Self::check_server`] accepted, by the path that was verified. None where
    /// any server is accepted, and when `chain` is not valid.
    #[must_use]
    pub fn proof(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<Proof> {
        self.servers.as_ref()?.proof(chain, Purpose::Server, now)
    }
}

/// A server's configuration between parts of the mesh: TLS 1.3 alone, and no session is resumed. `alpn` is in
/// order of preference.
///
/// # Errors
/// When rustls refuses the combination.
pub fn server(
    identity: &LoadedIdentity,
    clients: ClientAuthentication,
    alpn: &[String],
) -> Result<Arc<ServerConfig>, TlsError> {
    let parameters = TlsParameters::meshed(Vec::new());
    Ok(Arc::new(server_config(identity, &clients.clients(), alpn, &parameters)?))
}

/// A client's configuration between parts of the mesh: TLS 1.3 alone, and no session is resumed. The server
/// must chain to `trust` and have one of `names`.
///
/// # Errors
/// When rustls refuses the combination.
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

/// Checks the certificates that a client shows, leaf first, as a handshake does that asks for them: for chains
/// that come without a handshake, as those of the suites that we are held against. That the client has the
/// leaf's key it does not show.
///
/// # Errors
/// Why the client would not be let in.
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

/// The proof of a client that [`check_client`] lets in by these certificates, leaf first. None when they are not
/// valid.
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
    // Without it, a session of TLS 1.2 is not bound to the handshake that it began with (RFC 7627, section 1).
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
