//! The control plane as a process: it watches `mesh.yaml`, publishes what it means, and serves
//! resources and certificates over mutual TLS.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, mpsc, watch};
use weft_certs::{BACKDATED, Revoked};
use weft_runtime::drain::{Drain, Phase};
use weft_runtime::memory;
use weft_xds::server::{Holders, RequestLimits, Served as Offered, serve};

use crate::accept::{Terms, accept, listen};
use crate::clock::{Clock, wall_clock};
use crate::desk;
use crate::file_watch;
use crate::issue::Registrar;
use crate::mesh::{Mesh, MeshFile};
use crate::own::{Own, Trusted};
use crate::resources::{Trust, Views, trust_holders};
use crate::store::{Generations, Store};
use crate::succession::{self, Audience, Authorities, InForce};

/// How many warnings of one mesh are logged.
const WARNING_LIMIT: usize = 20;
/// From how many services on memory is given back after each change: the views before are freed between others, by
/// whichever thread reads the file.
const MANY_SERVICES: usize = 100;
/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(250);
/// How long a revocation list is good, and when the next one is made.
const LIST_LIFE: Duration = Duration::from_secs(24 * 3600);
const LIST_RENEWAL: Duration = Duration::from_secs(6 * 3600);
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
    let mut publisher = Publisher {
        file,
        store: store.clone(),
        authorities: authorities.clone(),
        fresh: None,
        status,
        revoked: revoked.clone(),
        last: None,
        views: Arc::default(),
        seed: None,
        clock: clock.clone(),
    };
    let directory = watch::Sender::new(publisher.first()?);
    memory::give_back();

    let life = options.certificate_life;
    let registrar = Registrar {
        authorities: authorities.clone(),
        store: store.clone(),
        life,
        clock,
        refusals: Mutex::default(),
    };
    let registrar = Arc::new(registrar);
    let first = publisher.last.as_ref().ok_or("there is no trust bundle")?;
    let own = Own::first(registrar.clone(), &trust_domain, first.trusted())?;

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
            return vec!["this control plane, which takes a moment".to_owned()];
        }
        let views = self.directory.borrow().clone();
        let Some(version) = views.trust_version() else {
            return Vec::new();
        };
        let away = holders.iter().filter(|who| views.tells(who) && !self.holders.knows(who));
        let away = away.map(|who| format!("{who}, which is not connected"));
        self.holders.without(version).into_iter().chain(away).collect()
    }
}

/// From the file and the store to views.
struct Publisher {
    file: MeshFile,
    store: Arc<Store>,
    authorities: Arc<InForce>,
    /// Those that are published and not in force yet.
    fresh: Option<Authorities>,
    status: watch::Sender<Status>,
    revoked: watch::Sender<Arc<BTreeSet<String>>>,
    last: Option<Last>,
    views: Arc<Views>,
    /// The seed of the flows' hash, once it was read.
    seed: Option<u32>,
    clock: Arc<Clock>,
}

/// What is in force.
struct Last {
    text: Arc<str>,
    mesh: Arc<Mesh>,
    trust: Trust,
    listed: Vec<Revoked>,
    list_at: SystemTime,
}

impl Last {
    fn trusted(&self) -> Trusted<'_> {
        (&self.trust, &self.mesh.revocation)
    }
}

impl Publisher {
    /// The first views. Without a good file there is nothing to serve.
    fn first(&mut self) -> Result<Arc<Views>, String> {
        let text = self.file.text()?;
        let mesh = self.parse(&text).map_err(|mistakes| mistakes.join("\n"))?;
        self.apply(text, mesh)
    }

    /// Publishes what changes, until the task is dropped.
    async fn watch(
        mut self,
        mut own: Own,
        directory: watch::Sender<Arc<Views>>,
        changed: Arc<Notify>,
        audience: Arc<dyn Audience>,
    ) {
        loop {
            // An order of an operator holds at once.
            drop(tokio::time::timeout(POLL, changed.notified()).await);
            // No step is taken by a time that may be wrong.
            if let Ok(now) = self.clock.steady() {
                succession::advance_in_time(&self.store, &*audience, now);
            }
            // A large mesh takes a while to read and encode.
            let views = tokio::task::block_in_place(|| self.next());
            if let Some(views) = views {
                let is_large = views.services() >= MANY_SERVICES;
                directory.send_replace(views);
                self.settle();
                if is_large {
                    // Not before clients are sent the change.
                    tokio::task::block_in_place(memory::give_back);
                }
            }
            if let Some(last) = &self.last {
                own.update(last.trusted(), &last.listed);
            }
        }
    }

    /// New views, when the file or the revocations changed, or the list is due.
    fn next(&mut self) -> Option<Arc<Views>> {
        let text = match self.file.text() {
            Ok(text) => text,
            Err(error) => {
                self.reject(vec![error]);
                return None;
            }
        };
        let last = self.last.as_ref()?;
        let due = self.clock.steady().is_ok_and(|now| is_list_due(last.list_at, now));
        let unreadable = self.store.revoked().err().map(|error| error.to_string());
        let problem = self.store.problem().or(unreadable);
        self.status.send_if_modified(|status| {
            let changed = status.store != problem;
            status.store.clone_from(&problem);
            changed
        });
        let revoked = self.revoked(&last.mesh).unwrap_or_else(|_| last.listed.clone());
        self.fresh = if problem.is_none() { self.changed_authorities() } else { None };
        if text == last.text && revoked == last.listed && !due && self.fresh.is_none() {
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

    fn parse(&mut self, text: &Arc<str>) -> Result<Mesh, Vec<String>> {
        let mesh = self.file.parse(text)?;
        let trust_domain = self.authorities.get().generations().trust_domain.clone();
        if mesh.trust_domain != trust_domain {
            return Err(vec![format!(
                "{}: trust_domain: {:?} is not the authority's, {trust_domain:?}",
                self.file.path().display(),
                mesh.trust_domain
            )]);
        }
        Ok(mesh)
    }

    fn apply(&mut self, text: Arc<str>, mesh: Mesh) -> Result<Arc<Views>, String> {
        let now = wall_clock();
        let listed = self.revoked(&mesh)?;
        let kept = self
            .last
            .as_ref()
            .filter(|last| last.listed == listed)
            .filter(|last| self.clock.steady().is_err() || !is_list_due(last.list_at, now))
            .filter(|_| self.fresh.is_none());
        let (trust, list_at) = match kept {
            Some(last) => (last.trust.clone(), last.list_at),
            None => (self.trust(&listed, now)?, now),
        };
        let seed = match self.seed {
            Some(seed) => seed,
            None => self.store.flow_seed().map_err(|error| error.to_string())?,
        };
        self.seed = Some(seed);
        let mesh = Arc::new(mesh);
        let views = Views::new(mesh.clone(), &trust, seed, &self.views)
            .map_err(|problems| problems.join("; "))?;
        self.views = Arc::new(views);
        self.status.send_modify(|status| {
            status.applied += 1;
            status.rejected.clear();
            status.services = mesh.services.keys().cloned().collect();
        });
        tracing::info!(
            services = mesh.services.len(),
            encoded = self.views.encoded(),
            revoked = listed.len(),
            "a mesh is in force"
        );
        if self.last.as_ref().is_none_or(|last| last.mesh.warnings != mesh.warnings) {
            for warning in mesh.warnings.iter().take(WARNING_LIMIT) {
                let warning = warning.in_file(self.file.path().display());
                tracing::warn!(%warning, "mesh warning");
            }
            let more = mesh.warnings.len().saturating_sub(WARNING_LIMIT);
            if more > 0 {
                tracing::warn!(more, "mesh warnings left out; --check-config prints all");
            }
        }
        let serials: BTreeSet<String> = listed.iter().map(|entry| entry.serial.clone()).collect();
        self.revoked.send_if_modified(|revoked| {
            let is_new = **revoked != serials;
            if is_new {
                *revoked = Arc::new(serials);
            }
            is_new
        });
        self.last = Some(Last { text, mesh, trust, listed, list_at });
        Ok(self.views.clone())
    }

    fn trust(&self, revoked: &[Revoked], now: SystemTime) -> Result<Trust, String> {
        let number = self.store.next_list_number().map_err(|error| error.to_string())?;
        let in_force = self.authorities.get();
        let authorities = self.fresh.as_ref().unwrap_or(&in_force);
        let revocations = authorities
            .revocation_lists(revoked, number, now, LIST_LIFE)
            .map_err(|error| error.to_string())?;
        if revocations.is_empty() {
            return Err("every authority has ended by the clock of this host".into());
        }
        self.status.send_modify(|status| status.list_number = number);
        Ok(Trust { roots: authorities.trust_bundle(), revocations })
    }

    /// The authorities of the store, where they are others than those in force.
    fn changed_authorities(&self) -> Option<Authorities> {
        let loaded = self.store.generations().map_err(|error| error.to_string());
        let in_force = self.authorities.get();
        let changed = match loaded {
            Ok(generations) if generations == *in_force.generations() => return None,
            loaded => loaded.and_then(|generations| {
                Authorities::load(generations).map_err(|error| error.to_string())
            }),
        };
        match changed {
            Ok(authorities) => Some(authorities),
            Err(error) => {
                tracing::error!(error, "the authorities could not be read; the last ones stay");
                None
            }
        }
    }

    /// What was published is in force.
    fn settle(&mut self) {
        if let Some(fresh) = self.fresh.take() {
            self.authorities.set(fresh);
        }
    }

    /// What the store and the file revoke, by serial number.
    ///
    /// # Errors
    /// When the store's part cannot be read and never was, or the file's part cannot be stored.
    fn revoked(&self, mesh: &Mesh) -> Result<Vec<Revoked>, String> {
        let mut revoked = match (self.store.revoked(), &self.last) {
            (Ok(revoked), _) => revoked,
            // None of them becomes good because the store cannot be read.
            (Err(_), Some(last)) => last.listed.clone(),
            (Err(error), None) => return Err(error.to_string()),
        };
        for serial in &mesh.revocations {
            let serial = serial.to_ascii_lowercase();
            if !revoked.iter().any(|known| known.serial == serial) {
                // Stored, so that deleting the line does not make the certificate good again.
                let at = wall_clock();
                let stored = self.store.revoke(std::slice::from_ref(&serial), at);
                stored.map_err(|error| format!("revocation of {serial}: {error}"))?;
                revoked.push(Revoked { serial, at });
            }
        }
        revoked.sort_by(|a, b| a.serial.cmp(&b.serial));
        for entry in &mut revoked {
            // Whole seconds, as the list and the store have them.
            let whole = entry.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            entry.at = UNIX_EPOCH + Duration::from_secs(whole);
        }
        Ok(revoked)
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

/// Whether another revocation list is due: the present one is old, or was signed by a clock that was ahead, so
/// that others refuse it as of the future.
fn is_list_due(signed: SystemTime, now: SystemTime) -> bool {
    now >= signed + LIST_RENEWAL || now + BACKDATED < signed
}
