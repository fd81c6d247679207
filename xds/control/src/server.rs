//! The control plane as a process: it watches `mesh.yaml`, publishes what it means, and serves
//! resources and certificates over mutual TLS.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use weft_certs::tls::{ClientAuthentication, Identity, server as tls_server};
use weft_certs::{Authority, CertificateText, Revoked, TrustStore, identity_of, request, validity};
use weft_model::SpiffeId;
use weft_runtime::drain::{Drain, Phase};
use weft_runtime::socket::is_without_ipv6;
use weft_xds::authority::Sign;
use weft_xds::server::{Incoming, serve};

use crate::desk;
use crate::issue::{Registrar, wall_clock};
use crate::mesh::Mesh;
use crate::proved::{self, Grounds, Proved};
use crate::resources::{Trust, Views, control_identity};
use crate::store::Store;

/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(250);
/// How long a revocation list is good, and when the next one is made.
const LIST_LIFE: Duration = Duration::from_secs(24 * 3600);
const LIST_RENEWAL: Duration = Duration::from_secs(6 * 3600);
/// How long a handshake may take, and how many may be under way.
const HANDSHAKE: Duration = Duration::from_secs(10);
const HANDSHAKE_LIMIT: usize = 1024;

/// How a control plane runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The mesh.
    pub mesh: PathBuf,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// How long the certificates of workloads are good.
    pub certificate_life: Duration,
}

/// What the control plane tells of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// How often a mesh came into force.
    pub applied: u64,
    /// Why the file as it is now is not in force.
    pub rejected: Vec<String>,
    /// The services in force.
    pub services: Vec<String>,
    /// The number of the revocation list in force.
    pub list_number: u64,
    /// Whether clients can connect.
    pub is_listening: bool,
}

/// Runs until `drain` is told to end.
///
/// # Errors
/// What keeps it from starting; later mistakes are logged and change nothing.
pub async fn run(
    options: Options,
    store: Arc<Store>,
    status: watch::Sender<Status>,
    drain: Drain,
) -> Result<(), String> {
    let (files, trust_domain) = store.authority().map_err(|error| error.to_string())?;
    let authority =
        Authority::load(files.clone(), &trust_domain).map_err(|error| error.to_string())?;
    let (revoked, status_of) = (watch::Sender::default(), status.clone());
    let mut publisher = Publisher {
        options: options.clone(),
        store: store.clone(),
        authority,
        status,
        revoked: revoked.clone(),
        last: None,
    };
    let views = publisher.first()?;
    let directory = watch::Sender::new(Arc::new(views));

    let signing = Authority::load(files, &trust_domain).map_err(|error| error.to_string())?;
    let registrar =
        Arc::new(Registrar { authority: signing, store, life: options.certificate_life });
    let own = own_identity(&registrar, &trust_domain)?;
    let trust =
        publisher.last.as_ref().map(|last| last.trust.clone()).ok_or("there is no trust bundle")?;
    let tls = watch::Sender::new(own_tls(&own, &trust)?);

    let listener = listen(options.listen)
        .await
        .map_err(|error| format!("listen {}: {error}", options.listen))?;
    tracing::info!(listen = %options.listen, "serving configuration and certificates");
    let (connections, waiting) = mpsc::channel(HANDSHAKE_LIMIT);
    status_of.send_modify(|status| status.is_listening = true);
    let told = (tls.subscribe(), revoked.subscribe());
    let accepting = tokio::spawn(accept(listener, told, connections));
    let receiver = directory.subscribe();
    let stop = drain.clone();
    let serving = tokio::spawn(serve(waiting, receiver, registrar.clone(), async move {
        stop.reached(Phase::Draining).await;
    }));
    let changed = Arc::new(Notify::new());
    let desk = desk::serve(publisher.store.clone(), changed.clone());
    let desk = tokio::spawn(desk.map_err(|error| format!("the socket beside the store: {error}"))?);
    let watching = tokio::spawn(async move {
        loop {
            // What was asked for at the desk holds at once.
            drop(tokio::time::timeout(POLL, changed.notified()).await);
            if let Some(views) = publisher.next() {
                if let Some(last) = &publisher.last {
                    renew_own(&registrar, &trust_domain, &last.trust, &tls);
                }
                directory.send_replace(Arc::new(views));
            }
        }
    });
    drain.reached(Phase::Draining).await;
    accepting.abort();
    watching.abort();
    desk.abort();
    // Streams that are open end when the process does; clients run on without us.
    drop(tokio::time::timeout(Duration::from_secs(1), serving).await);
    Ok(())
}

/// A change of trust needs a new configuration of our own TLS too, and while we are at it, a new
/// certificate.
fn renew_own(
    registrar: &Registrar,
    trust_domain: &str,
    trust: &Trust,
    tls: &watch::Sender<Arc<ServerConfig>>,
) {
    match own_identity(registrar, trust_domain).and_then(|own| own_tls(&own, trust)) {
        Ok(config) => drop(tls.send_replace(config)),
        Err(error) => tracing::error!(error, "our own TLS was not renewed; the last one stays"),
    }
}

/// From the file and the store to views.
struct Publisher {
    options: Options,
    store: Arc<Store>,
    authority: Authority,
    status: watch::Sender<Status>,
    revoked: watch::Sender<Arc<BTreeSet<String>>>,
    last: Option<Last>,
}

/// What is in force.
struct Last {
    text: Vec<u8>,
    mesh: Mesh,
    trust: Trust,
    listed: Vec<Revoked>,
    list_at: SystemTime,
}

impl Publisher {
    /// The first views. Without a good file there is nothing to serve.
    fn first(&mut self) -> Result<Views, String> {
        let text = read(&self.options.mesh)?;
        let mesh = self.parse(&text).map_err(|mistakes| mistakes.join("\n"))?;
        self.apply(text, mesh)
    }

    /// New views, when the file or the revocations changed, or the list is due.
    fn next(&mut self) -> Option<Views> {
        let text = match read(&self.options.mesh) {
            Ok(text) => text,
            Err(error) => {
                self.reject(vec![error]);
                return None;
            }
        };
        let last = self.last.as_ref()?;
        let due = wall_clock() >= last.list_at + LIST_RENEWAL;
        let revoked = self.revoked(&last.mesh);
        if text == last.text && revoked == last.listed && !due {
            self.reject(Vec::new());
            return None;
        }
        match self.parse(&text) {
            Ok(mesh) => match self.apply(text, mesh) {
                Ok(views) => Some(views),
                Err(error) => {
                    self.reject(vec![error]);
                    None
                }
            },
            Err(mistakes) => {
                self.reject(mistakes);
                None
            }
        }
    }

    fn parse(&self, text: &[u8]) -> Result<Mesh, Vec<String>> {
        let file = self.options.mesh.display().to_string();
        let text = std::str::from_utf8(text).map_err(|error| vec![format!("{file}: {error}")])?;
        let folder = self.options.mesh.parent().unwrap_or_else(|| Path::new("."));
        let mesh = Mesh::parse(text, folder).map_err(|problems| {
            problems.iter().map(|p| format!("{file}: {p}")).collect::<Vec<_>>()
        })?;
        let (_, trust_domain) = self.store.authority().map_err(|error| vec![error.to_string()])?;
        if mesh.trust_domain != trust_domain {
            return Err(vec![format!(
                "{file}: trust_domain: {:?} is not the authority's, {trust_domain:?}",
                mesh.trust_domain
            )]);
        }
        Ok(mesh)
    }

    fn apply(&mut self, text: Vec<u8>, mesh: Mesh) -> Result<Views, String> {
        let now = wall_clock();
        let listed = self.revoked(&mesh);
        let kept = self
            .last
            .as_ref()
            .filter(|last| last.listed == listed && now < last.list_at + LIST_RENEWAL);
        let (trust, list_at) = match kept {
            Some(last) => (last.trust.clone(), last.list_at),
            None => (self.trust(&listed, now)?, now),
        };
        let seed = self.store.flow_seed().map_err(|error| error.to_string())?;
        let views = Views::new(&mesh, &trust, seed).map_err(|problems| problems.join("; "))?;
        self.status.send_modify(|status| {
            status.applied += 1;
            status.rejected.clear();
            status.services = mesh.services.keys().cloned().collect();
        });
        tracing::info!(
            services = mesh.services.len(),
            revoked = listed.len(),
            "a mesh is in force"
        );
        let serials: BTreeSet<String> = listed.iter().map(|entry| entry.serial.clone()).collect();
        self.revoked.send_if_modified(|revoked| {
            let is_new = **revoked != serials;
            if is_new {
                *revoked = Arc::new(serials);
            }
            is_new
        });
        self.last = Some(Last { text, mesh, trust, listed, list_at });
        Ok(views)
    }

    fn trust(&self, revoked: &[Revoked], now: SystemTime) -> Result<Trust, String> {
        let number = self.store.next_list_number().map_err(|error| error.to_string())?;
        let revocations = self
            .authority
            .revocation_lists(revoked, number, now, LIST_LIFE)
            .map_err(|error| error.to_string())?;
        self.status.send_modify(|status| status.list_number = number);
        Ok(Trust { roots: self.authority.trust_bundle().to_owned(), revocations })
    }

    /// What the store and the file revoke, by serial number.
    fn revoked(&self, mesh: &Mesh) -> Vec<Revoked> {
        let mut revoked = self.store.revoked().unwrap_or_else(|error| {
            tracing::error!(%error, "the store's revocations could not be read");
            Vec::new()
        });
        for serial in &mesh.revocations {
            let serial = serial.to_ascii_lowercase();
            if !revoked.iter().any(|known| known.serial == serial) {
                // Remembered, so that deleting the line does not make the certificate good again.
                let at = wall_clock();
                if let Err(error) = self.store.revoke(&serial, at) {
                    tracing::error!(%error, "a revocation could not be remembered");
                }
                revoked.push(Revoked { serial, at });
            }
        }
        revoked.sort_by(|a, b| a.serial.cmp(&b.serial));
        for entry in &mut revoked {
            // Whole seconds, as the list and the store have them.
            let whole = entry.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            entry.at = UNIX_EPOCH + Duration::from_secs(whole);
        }
        revoked
    }

    /// Says why the file is not in force, once for each reason.
    fn reject(&self, mistakes: Vec<String>) {
        self.status.send_if_modified(|status| {
            let changed = status.rejected != mistakes;
            if changed {
                for mistake in &mistakes {
                    tracing::error!(mistake, "the mesh was rejected; the last good one serves on");
                }
                status.rejected = mistakes;
            }
            changed
        });
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Our own certificate, signed by our own authority.
fn own_identity(registrar: &Registrar, trust_domain: &str) -> Result<Identity, String> {
    let id = SpiffeId::parse(&control_identity(trust_domain)).map_err(|error| error.to_string())?;
    let pending = request::make(&id).map_err(|error| error.to_string())?;
    let applicant = weft_xds::authority::Applicant { peer: Some(id), token: None };
    let chain =
        registrar.sign(&applicant, &pending.request_pem).map_err(|error| error.to_string())?;
    Identity::load(chain.concat().as_bytes(), pending.key_pem.as_bytes())
        .map_err(|error| error.to_string())
}

/// Clients may come without a certificate, for their first one; what they show must be good.
fn own_tls(own: &Identity, trust: &Trust) -> Result<Arc<ServerConfig>, String> {
    let now =
        UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default());
    let store = TrustStore::load(
        trust.roots.as_bytes(),
        Some(trust.revocations.as_bytes()),
        Vec::new(),
        None,
        now,
    )
    .map_err(|error| error.to_string())?;
    let clients = ClientAuthentication::Optional(Arc::new(store), Vec::new());
    tls_server(own, clients, &["h2".into()]).map_err(|error| error.to_string())
}

/// Listens on an address. `[::]` takes both families; where the host has no IPv6, the other.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if is_without_ipv6(address, &error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

async fn accept(
    listener: TcpListener,
    (tls, revoked): (watch::Receiver<Arc<ServerConfig>>, proved::Revoked),
    connections: mpsc::Sender<Incoming<Proved<TlsStream<TcpStream>>>>,
) {
    let room = Arc::new(tokio::sync::Semaphore::new(HANDSHAKE_LIMIT));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        let Ok((tcp, from)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (config, connections) = (tls.borrow().clone(), connections.clone());
        let revoked = revoked.clone();
        tokio::spawn(async move {
            drop(tcp.set_nodelay(true));
            match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(config).accept(tcp)).await {
                Ok(Ok(io)) => {
                    let chain = io.get_ref().1.peer_certificates();
                    let leaf = chain.and_then(<[_]>::first);
                    let peer = leaf.and_then(identity_of);
                    let grounds = leaf.and_then(grounds);
                    if leaf.is_some() && grounds.is_none() {
                        return tracing::debug!(%from, "a certificate could not be read");
                    }
                    let io = Proved::new(io, grounds, revoked, wall_clock());
                    // The server is gone when nobody takes it.
                    drop(connections.send(Incoming { io, peer }).await);
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "a handshake was refused"),
                Err(_) => tracing::debug!(%from, "a handshake took too long"),
            }
            drop(permit);
        });
    }
}

/// What a client's connection stands on.
fn grounds(leaf: &CertificateDer<'_>) -> Option<Grounds> {
    let (_, not_after) = validity(leaf)?;
    let serial = CertificateText::of(leaf)?.serial.to_ascii_lowercase();
    Some(Grounds { serial, not_after })
}
