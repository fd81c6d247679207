//! The control plane as a process: it watches `mesh.yaml`, publishes xDS resources, and serves them and certificates over
//! mutual TLS.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use weft_runtime::drain::{Drain, Phase};
use weft_runtime::memory;
use weft_xds::server::{RequestLimits, ResourceSubscribers, XdsServerConfig, serve};

use crate::accept::{AcceptConfig, accept, listen};
use crate::admin_socket;
use crate::ca_rotation::{Authorities, CurrentAuthorities, TrustDistribution};
use crate::clock::SteadyClock;
use crate::file_watch;
use crate::issue::CertificateIssuer;
use crate::mesh::MeshFile;
use crate::publisher::{Publisher, PublisherSources};
use crate::resources::{Views, trust_subscribers};
use crate::server_certificate::ServerCertificate;
use crate::status::ControlStatus;
use crate::store::{AuthoritySet, Store};

/// How many accepted connections may wait for the xDS server.
const ACCEPT_QUEUE: usize = 64;

/// The settings of a control plane.
#[derive(Debug, Clone)]
pub struct ControlOptions {
    /// The address that clients connect to.
    pub listen: SocketAddr,
    /// The lifetime of workload certificates.
    pub certificate_life: Duration,
    /// The most connections with a client certificate.
    pub connections: usize,
    /// The size and rate limits of requests.
    pub requests: RequestLimits,
}

/// Runs until `drain` begins to drain.
///
/// # Errors
/// The mesh is invalid, the store or the authority cannot be used, or the port or the admin socket is not available.
/// After the start, errors are logged and the last valid state stays in force.
pub async fn run(
    options: ControlOptions,
    file: MeshFile,
    store: Arc<Store>,
    status: watch::Sender<ControlStatus>,
    drain: Drain,
) -> Result<(), String> {
    let authority_set = store.authority_set().map_err(|error| error.to_string())?;
    let trust_domain = authority_set.trust_domain.clone();
    let authorities = Authorities::load(authority_set).map_err(|error| error.to_string())?;
    let authorities = Arc::new(CurrentAuthorities::new(authorities));
    let clock = Arc::new(SteadyClock::start());
    let revoked = watch::Sender::default();
    let status_of = status.clone();
    let path = file.path().to_owned();
    let sources = PublisherSources {
        file,
        store: store.clone(),
        authorities: authorities.clone(),
        clock: clock.clone(),
    };
    let mut publisher = Publisher::new(sources, status, revoked.clone());
    let views = watch::Sender::new(publisher.first()?);
    memory::trim_heap();

    let life = options.certificate_life;
    let issuer = CertificateIssuer {
        authorities: authorities.clone(),
        store: store.clone(),
        life,
        clock,
        refusals: Mutex::default(),
    };
    let issuer = Arc::new(issuer);
    let trusted = publisher.trusted().ok_or("no trust bundle")?;
    let certificate = ServerCertificate::issue_first(issuer.clone(), &trust_domain, trusted)?;

    let listener = listen(options.listen)
        .await
        .map_err(|error| format!("listen {}: {error}", options.listen))?;
    tracing::info!(listen = %options.listen, "serving configuration and certificates");
    let (connections, waiting) = mpsc::channel(ACCEPT_QUEUE);
    status_of.send_modify(|status| status.is_listening = true);
    let config = AcceptConfig { tls: certificate.subscribe(), revoked: revoked.subscribe() };
    let accepting = tokio::spawn(accept(listener, config, connections, options.connections));
    let stop = drain.clone();
    let subscribers = Arc::new(trust_subscribers());
    let clients =
        ControlClients { views: views.subscribe(), subscribers: subscribers.clone(), authorities };
    let clients: Arc<dyn TrustDistribution> = Arc::new(clients);
    let served =
        XdsServerConfig { provider: views.subscribe(), subscribers, limits: options.requests };
    let serving = tokio::spawn(serve(waiting, served, issuer, async move {
        stop.reached(Phase::Draining).await;
    }));
    let changed = Arc::new(Notify::new());
    if let Err(error) = file_watch::notify_changes(&path, Arc::downgrade(&changed)) {
        tracing::warn!(file = %path.display(), %error, "file watch failed, polling instead");
    }
    let admin = admin_socket::serve(store, changed.clone(), clients.clone());
    let admin = tokio::spawn(admin.map_err(|error| format!("admin socket: {error}"))?);
    let watching = tokio::spawn(publisher.watch(certificate, views, changed, clients));
    drain.reached(Phase::Draining).await;
    accepting.abort();
    watching.abort();
    admin.abort();
    // Open streams end with the process; clients continue with their last configuration.
    drop(tokio::time::timeout(Duration::from_secs(1), serving).await);
    Ok(())
}

/// The clients of this control plane.
struct ControlClients {
    views: watch::Receiver<Arc<Views>>,
    subscribers: Arc<ResourceSubscribers>,
    authorities: Arc<CurrentAuthorities>,
}

impl TrustDistribution for ControlClients {
    fn pending_clients(
        &self,
        authority_set: &AuthoritySet,
        holders: &BTreeSet<String>,
    ) -> Vec<String> {
        if self.authorities.get().authority_set() != authority_set {
            return vec![
                "the control plane, which has not applied the new authority yet".to_owned(),
            ];
        }
        let views = self.views.borrow().clone();
        let Some(version) = views.trust_version() else {
            return Vec::new();
        };
        let connected = self.subscribers.names();
        let away = holders
            .iter()
            .filter(|name| views.receives_trust_bundle(name) && !connected.contains(*name));
        let away = away.map(|name| format!("{name}, which is not connected"));
        self.subscribers.not_acknowledged(version).into_iter().chain(away).collect()
    }
}
