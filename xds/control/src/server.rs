//! The control plane as a process: it watches `mesh.yaml`, publishes what it means, and serves
//! resources and certificates over mutual TLS.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use weft_runtime::drain::{Drain, Phase};
use weft_runtime::memory;
use weft_xds::server::{Holders, RequestLimits, Served as Offered, serve};

use crate::accept::{Terms, accept, listen};
use crate::clock::Clock;
use crate::desk;
use crate::file_watch;
use crate::issue::Registrar;
use crate::mesh::MeshFile;
use crate::own::Own;
use crate::publisher::{Publisher, Sources};
use crate::resources::{Views, trust_holders};
use crate::store::{Generations, Store};
use crate::succession::{Audience, Authorities, InForce};

/// How many connections may wait to be taken by the server.
const WAITING: usize = 64;

/// How a control plane runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// How long the certificates of workloads are good.
    pub certificate_life: Duration,
    /// How many clients with a certificate may be connected.
    pub connections: usize,
    /// What their requests may take.
    pub requests: RequestLimits,
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
    /// Why the store cannot be used now: no certificate is issued, and no revocation is taken.
    pub store: Option<String>,
}

/// Runs until `drain` is told to end.
///
/// # Errors
/// What keeps it from starting; later mistakes are logged and change nothing.
pub async fn run(
    options: Options,
    file: MeshFile,
    store: Arc<Store>,
    status: watch::Sender<Status>,
    drain: Drain,
) -> Result<(), String> {
    let generations = store.generations().map_err(|error| error.to_string())?;
    let trust_domain = generations.trust_domain.clone();
    let authorities = Authorities::load(generations).map_err(|error| error.to_string())?;
    let authorities = Arc::new(InForce::new(authorities));
    let clock = Arc::new(Clock::start());
    let (revoked, status_of) = (watch::Sender::default(), status.clone());
    let path = file.path().to_owned();
    let sources = Sources {
        file,
        store: store.clone(),
        authorities: authorities.clone(),
        clock: clock.clone(),
    };
    let mut publisher = Publisher::new(sources, status, revoked.clone());
    let directory = watch::Sender::new(publisher.first()?);
    memory::trim_heap();

    let life = options.certificate_life;
    let registrar = Registrar {
        authorities: authorities.clone(),
        store: store.clone(),
        life,
        clock,
        refusals: Mutex::default(),
    };
    let registrar = Arc::new(registrar);
    let trusted = publisher.trusted().ok_or("there is no trust bundle")?;
    let own = Own::first(registrar.clone(), &trust_domain, trusted)?;

    let listener = listen(options.listen)
        .await
        .map_err(|error| format!("listen {}: {error}", options.listen))?;
    tracing::info!(listen = %options.listen, "serving configuration and certificates");
    let (connections, waiting) = mpsc::channel(WAITING);
    status_of.send_modify(|status| status.is_listening = true);
    let terms = Terms { tls: own.subscribe(), revoked: revoked.subscribe() };
    let accepting = tokio::spawn(accept(listener, terms, connections, options.connections));
    let receiver = directory.subscribe();
    let stop = drain.clone();
    let holders = Arc::new(trust_holders());
    let served = Served { directory: directory.subscribe(), holders: holders.clone(), authorities };
    let served: Arc<dyn Audience> = Arc::new(served);
    let offered = Offered { directory: receiver, holders, limits: options.requests };
    let serving = tokio::spawn(serve(waiting, offered, registrar, async move {
        stop.reached(Phase::Draining).await;
    }));
    let changed = Arc::new(Notify::new());
    if let Err(error) = file_watch::notify_changes(&path, Arc::downgrade(&changed)) {
        tracing::warn!(file = %path.display(), %error, "file watch failed; the file is polled");
    }
    let desk = desk::serve(store, changed.clone(), served.clone());
    let desk = tokio::spawn(desk.map_err(|error| format!("the socket beside the store: {error}"))?);
    let watching = tokio::spawn(publisher.watch(own, directory, changed, served));
    drain.reached(Phase::Draining).await;
    accepting.abort();
    watching.abort();
    desk.abort();
    // Streams that are open end when the process does; clients run on without us.
    drop(tokio::time::timeout(Duration::from_secs(1), serving).await);
    Ok(())
}

/// Those that a control plane serves.
struct Served {
    directory: watch::Receiver<Arc<Views>>,
    holders: Arc<Holders>,
    authorities: Arc<InForce>,
}

impl Audience for Served {
    fn behind(&self, generations: &Generations, holders: &BTreeSet<String>) -> Vec<String> {
        if self.authorities.get().generations() != generations {
            return vec!["the control plane has not applied the new authority yet".to_owned()];
        }
        let views = self.directory.borrow().clone();
        let Some(version) = views.trust_version() else {
            return Vec::new();
        };
        let connected = self.holders.names();
        let away = holders.iter().filter(|who| views.tells(who) && !connected.contains(*who));
        let away = away.map(|who| format!("{who}, which is not connected"));
        self.holders.without(version).into_iter().chain(away).collect()
    }
}
