//! Publishes what `mesh.yaml` and the store mean: views for clients, and what is revoked.
//!
//! A file that cannot be used leaves the last good mesh in force. What the store decides does not wait for the file:
//! revocations, the renewal of the revocation list and new authorities are published with the last good mesh.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};
use weft_certs::{BACKDATED, RevokedCertificate};
use weft_runtime::memory;

use crate::ca_rotation::{self, Authorities, CurrentAuthorities, TrustDistribution};
use crate::clock::{SteadyClock, monotonic, wall_clock};
use crate::mesh::{Mesh, MeshFile};
use crate::resources::{Trust, Views, check_inbound};
use crate::server::ControlStatus;
use crate::server_certificate::{ClientTrust, ServerCertificate};
use crate::store::Store;

/// How many warnings of one mesh are logged.
const WARNING_LIMIT: usize = 20;
/// From how many services on memory is given back after each change: the views before are freed between others, by
/// whichever thread reads the file.
const MANY_SERVICES: usize = 100;
/// How often the file is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How often it is evaluated whether one authority may follow another, which reads all certificates that were issued.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(2);
/// How long a revocation list is good, and when the next one is made.
const CRL_LIFE: Duration = Duration::from_secs(24 * 3600);
const CRL_RENEWAL: Duration = Duration::from_secs(6 * 3600);

/// From the file and the store to views.
pub(crate) struct Publisher {
    file: MeshFile,
    store: Arc<Store>,
    authorities: Arc<CurrentAuthorities>,
    /// Those that are published and not in force yet.
    fresh: Option<Authorities>,
    /// A good mesh that is not published yet, since the store failed.
    pending: Option<Arc<Mesh>>,
    /// What is wrong with the file as it is now.
    errors: Vec<String>,
    status: watch::Sender<ControlStatus>,
    revoked: watch::Sender<Arc<BTreeSet<String>>>,
    last: Option<AppliedMesh>,
    views: Arc<Views>,
    /// The seed of the flows' hash, once it was read.
    seed: Option<u32>,
    clock: Arc<SteadyClock>,
}

/// What is in force.
struct AppliedMesh {
    mesh: Arc<Mesh>,
    trust: Trust,
    listed: Vec<RevokedCertificate>,
    crl_signed_at: SystemTime,
}

impl AppliedMesh {
    fn trusted(&self) -> ClientTrust<'_> {
        (&self.trust, &self.mesh.revocation)
    }
}

/// Why a mesh is not published.
#[derive(Debug)]
enum PublishError {
    /// It cannot be sent to clients: another try gives the same.
    Mesh(Vec<String>),
    /// The store or the authority failed.
    Store(String),
}

impl PublishError {
    fn into_lines(self) -> Vec<String> {
        match self {
            Self::Mesh(lines) => lines,
            Self::Store(line) => vec![line],
        }
    }
}

impl From<String> for PublishError {
    fn from(error: String) -> Self {
        Self::Store(error)
    }
}

/// What a publisher reads.
pub(crate) struct PublisherSources {
    pub(crate) file: MeshFile,
    pub(crate) store: Arc<Store>,
    pub(crate) authorities: Arc<CurrentAuthorities>,
    pub(crate) clock: Arc<SteadyClock>,
}

impl Publisher {
    /// A publisher that has published nothing yet. `revoked` gets the serial numbers of what is revoked.
    pub(crate) fn new(
        PublisherSources { file, store, authorities, clock }: PublisherSources,
        status: watch::Sender<ControlStatus>,
        revoked: watch::Sender<Arc<BTreeSet<String>>>,
    ) -> Self {
        Self {
            file,
            store,
            authorities,
            fresh: None,
            pending: None,
            errors: Vec::new(),
            status,
            revoked,
            last: None,
            views: Arc::default(),
            seed: None,
            clock,
        }
    }

    /// What clients are checked by; none before the first mesh.
    pub(crate) fn trusted(&self) -> Option<ClientTrust<'_>> {
        self.last.as_ref().map(AppliedMesh::trusted)
    }

    /// The first views. Without a good file there is nothing to serve.
    pub(crate) fn first(&mut self) -> Result<Arc<Views>, String> {
        let read = self.file.read(wall_clock());
        let mesh = self.checked(read).map_err(|errors| errors.join("\n"))?;
        self.apply(mesh).map_err(|error| error.into_lines().join("\n"))
    }

    /// Publishes what changes, until the task is dropped.
    pub(crate) async fn watch(
        mut self,
        mut own: ServerCertificate,
        directory: watch::Sender<Arc<Views>>,
        changed: Arc<Notify>,
        distribution: Arc<dyn TrustDistribution>,
    ) {
        let mut evaluated: Option<Instant> = None;
        loop {
            // An order of an operator holds at once.
            drop(tokio::time::timeout(POLL_INTERVAL, changed.notified()).await);
            // No step is taken by a time that may be wrong.
            if let Ok(now) = self.clock.steady()
                && evaluated.is_none_or(|at| at.elapsed() >= ADVANCE_INTERVAL)
            {
                evaluated = Some(monotonic());
                ca_rotation::advance_if_due(&self.store, &*distribution, now);
            }
            // A large mesh takes a while to read and encode.
            let views = tokio::task::block_in_place(|| self.next());
            if let Some(views) = views {
                let is_large = views.services() >= MANY_SERVICES;
                directory.send_replace(views);
                self.settle();
                if is_large {
                    // Not before clients are sent the change.
                    tokio::task::block_in_place(memory::trim_heap);
                }
            }
            if let Some(last) = &self.last {
                own.update(last.trusted(), &last.listed);
            }
        }
    }

    /// New views: of the file, where it changed and can be used, or else of the last good mesh, where the
    /// revocations or the authorities changed or the list is due.
    fn next(&mut self) -> Option<Arc<Views>> {
        let is_due = self.is_due();
        self.look_at_file();
        let mut failures = Vec::new();
        if let Some(mesh) = self.pending.take() {
            match self.apply(mesh.clone()) {
                Ok(views) => {
                    self.report(&[]);
                    return Some(views);
                }
                Err(PublishError::Mesh(errors)) => self.errors = errors,
                Err(PublishError::Store(error)) => {
                    self.pending = Some(mesh);
                    failures.push(error);
                }
            }
        }
        let last = self.last.as_ref().filter(|_| is_due).map(|last| last.mesh.clone());
        let applied = last.map(|last| self.apply(last));
        let views = match applied {
            Some(Ok(views)) => Some(views),
            Some(Err(error)) => {
                failures.extend(error.into_lines());
                None
            }
            None => None,
        };
        self.report(&failures);
        views
    }

    /// Reads the file where it, or one that it names, has changed.
    fn look_at_file(&mut self) {
        let Some(read) = self.file.read_changed(wall_clock()) else { return };
        match self.checked(read) {
            Ok(mesh) => {
                self.errors.clear();
                self.pending = Some(mesh);
            }
            Err(errors) => {
                self.errors = errors;
                self.pending = None;
            }
        }
    }

    /// Whether the last good mesh has to be published again: what the store revokes or its authorities have changed,
    /// or the revocation list is due.
    fn is_due(&mut self) -> bool {
        let unreadable = self.store.revoked().err().map(|error| error.to_string());
        let problem = self.store.problem().or(unreadable);
        self.fresh = if problem.is_none() { self.changed_authorities() } else { None };
        self.status.send_if_modified(|status| {
            let changed = status.store != problem;
            status.store = problem;
            changed
        });
        let Some(last) = &self.last else { return false };
        let revoked = self.revoked(&last.mesh).unwrap_or_else(|_| last.listed.clone());
        self.fresh.is_some()
            || revoked != last.listed
            || self.clock.steady().is_ok_and(|now| is_crl_due(last.crl_signed_at, now))
    }

    /// A mesh that was read, where it is of the authority's trust domain and sidecars can be sent their inbound side.
    /// Only what is not as in the mesh in force is encoded.
    ///
    /// # Errors
    /// Each of its mistakes.
    fn checked(&self, read: Result<Mesh, Vec<String>>) -> Result<Arc<Mesh>, Vec<String>> {
        let mesh = read?;
        let trust_domain = self.authorities.get().authority_set().trust_domain.clone();
        if mesh.trust_domain != trust_domain {
            return Err(vec![format!(
                "{}: trust_domain: {:?} is not the authority's, {trust_domain:?}",
                self.file.path().display(),
                mesh.trust_domain
            )]);
        }
        // At the start all services would be encoded, which doubles its time, and one that cannot be must not keep the
        // others from being served: its sidecars get an error, which is logged. `--check-config` encodes all.
        if let Some(last) = &self.last {
            check_inbound(&mesh, Some(&last.mesh))?;
        }
        Ok(Arc::new(mesh))
    }

    /// Publishes a mesh.
    ///
    /// # Errors
    /// Why it is not published.
    fn apply(&mut self, mesh: Arc<Mesh>) -> Result<Arc<Views>, PublishError> {
        let now = wall_clock();
        let listed = self.revoked(&mesh)?;
        let kept = self
            .last
            .as_ref()
            .filter(|last| last.listed == listed)
            .filter(|last| self.clock.steady().is_err() || !is_crl_due(last.crl_signed_at, now))
            .filter(|_| self.fresh.is_none());
        let (trust, crl_signed_at) = match kept {
            Some(last) => (last.trust.clone(), last.crl_signed_at),
            None => (self.trust(&listed, now)?, now),
        };
        let seed = match self.seed {
            Some(seed) => seed,
            None => self.store.flow_seed().map_err(|error| error.to_string())?,
        };
        self.seed = Some(seed);
        let views =
            Views::new(mesh.clone(), &trust, seed, &self.views).map_err(PublishError::Mesh)?;
        self.views = Arc::new(views);
        self.status.send_modify(|status| {
            status.applied += 1;
            status.services = mesh.services.keys().cloned().collect();
        });
        tracing::info!(
            services = mesh.services.len(),
            encoded = self.views.encoded(),
            revoked = listed.len(),
            "mesh applied"
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
        self.last = Some(AppliedMesh { mesh, trust, listed, crl_signed_at });
        Ok(self.views.clone())
    }

    fn trust(&self, revoked: &[RevokedCertificate], now: SystemTime) -> Result<Trust, String> {
        let number = self.store.next_crl_number().map_err(|error| error.to_string())?;
        let in_force = self.authorities.get();
        let authorities = self.fresh.as_ref().unwrap_or(&in_force);
        let revocations =
            authorities.crls(revoked, number, now, CRL_LIFE).map_err(|error| error.to_string())?;
        if revocations.is_empty() {
            return Err("every authority has ended by the clock of this host".into());
        }
        self.status.send_modify(|status| status.crl_number = number);
        Ok(Trust { roots: authorities.trust_bundle(), revocations })
    }

    /// The authorities of the store, where they are others than those in force.
    fn changed_authorities(&self) -> Option<Authorities> {
        let loaded = self.store.authority_set().map_err(|error| error.to_string());
        let in_force = self.authorities.get();
        let changed = match loaded {
            Ok(authority_set) if authority_set == *in_force.authority_set() => return None,
            loaded => loaded.and_then(|authority_set| {
                Authorities::load(authority_set).map_err(|error| error.to_string())
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
    fn revoked(&self, mesh: &Mesh) -> Result<Vec<RevokedCertificate>, String> {
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
                revoked.push(RevokedCertificate { serial, at });
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

    /// Reports what is wrong with the file, and what failed; each once.
    fn report(&self, failures: &[String]) {
        let rejected = [&self.errors, failures].concat();
        self.status.send_if_modified(|status| {
            let changed = status.rejected != rejected;
            if changed {
                for error in &rejected {
                    tracing::error!(error, "mesh.yaml rejected, the last good mesh stays in force");
                }
                status.rejected = rejected;
            }
            changed
        });
    }
}

/// Whether another revocation list is due: the present one is old, or was signed by a clock that was ahead, so
/// that others refuse it as of the future.
fn is_crl_due(signed: SystemTime, now: SystemTime) -> bool {
    now >= signed + CRL_RENEWAL || now + BACKDATED < signed
}

#[cfg(test)]
mod tests;
