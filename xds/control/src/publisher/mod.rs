//! Publishes xDS resources and revocations from `mesh.yaml` and the store.
//!
//! If the file is invalid, the last valid mesh stays in force. Changes in the store do not wait for the file: revocations,
//! CRL renewal and new authorities are published with the last valid mesh.

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
use crate::server_certificate::{ClientTrust, ServerCertificate};
use crate::status::ControlStatus;
use crate::store::Store;

/// The most warnings of one mesh that are logged.
const WARNING_LIMIT: usize = 20;
/// From this number of services on, free memory is returned to the system after each change: the old views leave gaps in
/// the heap.
const MANY_SERVICES: usize = 100;
/// The longest time between two checks of the file. Where inotify works, a change is noticed at once.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How often a rotation of the authority is checked for its next step, which reads all issued certificates.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(2);
/// The validity of a CRL, and the age at which it is renewed.
const CRL_LIFE: Duration = Duration::from_secs(24 * 3600);
const CRL_RENEWAL: Duration = Duration::from_secs(6 * 3600);

/// Builds views from the file and the store.
pub(crate) struct Publisher {
    file: MeshFile,
    store: Arc<Store>,
    authorities: Arc<CurrentAuthorities>,
    /// Authorities of the store that are not published yet.
    fresh: Option<Authorities>,
    /// A valid mesh that is not published yet, because the store failed.
    pending: Option<Arc<Mesh>>,
    /// The errors of the present file.
    errors: Vec<String>,
    status: watch::Sender<ControlStatus>,
    revoked_serials: watch::Sender<Arc<BTreeSet<String>>>,
    last: Option<AppliedMesh>,
    views: Arc<Views>,
    /// The seed of the flow hash, once it was read.
    seed: Option<u32>,
    clock: Arc<SteadyClock>,
}

/// The mesh and the trust bundle in force.
struct AppliedMesh {
    mesh: Arc<Mesh>,
    trust: Trust,
    listed: Vec<RevokedCertificate>,
    crl_signed_at: SystemTime,
}

impl AppliedMesh {
    fn trusted(&self) -> ClientTrust<'_> {
        ClientTrust { trust: &self.trust, policy: &self.mesh.revocation }
    }
}

/// Why a mesh was not published.
#[derive(Debug)]
enum PublishError {
    /// The mesh cannot be encoded. A retry would fail as well.
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

/// The inputs of a publisher.
pub(crate) struct PublisherSources {
    pub(crate) file: MeshFile,
    pub(crate) store: Arc<Store>,
    pub(crate) authorities: Arc<CurrentAuthorities>,
    pub(crate) clock: Arc<SteadyClock>,
}

impl Publisher {
    /// A publisher that has published nothing yet. `revoked_serials` receives those of the revoked certificates.
    pub(crate) fn new(
        PublisherSources { file, store, authorities, clock }: PublisherSources,
        status: watch::Sender<ControlStatus>,
        revoked_serials: watch::Sender<Arc<BTreeSet<String>>>,
    ) -> Self {
        Self {
            file,
            store,
            authorities,
            fresh: None,
            pending: None,
            errors: Vec::new(),
            status,
            revoked_serials,
            last: None,
            views: Arc::default(),
            seed: None,
            clock,
        }
    }

    /// How client certificates are verified. None before the first mesh.
    pub(crate) fn trusted(&self) -> Option<ClientTrust<'_>> {
        self.last.as_ref().map(AppliedMesh::trusted)
    }

    /// The first views.
    ///
    /// # Errors
    /// The file is invalid, or the store or the authority fails.
    pub(crate) fn first(&mut self) -> Result<Arc<Views>, String> {
        let read = self.file.read(wall_clock());
        let mesh = self.check_mesh(read).map_err(|errors| errors.join("\n"))?;
        self.apply(mesh).map_err(|error| error.into_lines().join("\n"))
    }

    /// Publishes changes until the task is dropped.
    pub(crate) async fn watch(
        mut self,
        mut own: ServerCertificate,
        published: watch::Sender<Arc<Views>>,
        changed: Arc<Notify>,
        distribution: Arc<dyn TrustDistribution>,
    ) {
        let mut evaluated: Option<Instant> = None;
        loop {
            // Changes of the file (`file_watch.rs`) and admin commands take effect at once.
            drop(tokio::time::timeout(POLL_INTERVAL, changed.notified()).await);
            // No rotation step is taken while the clock may be wrong.
            if let Ok(now) = self.clock.steady()
                && evaluated.is_none_or(|at| at.elapsed() >= ADVANCE_INTERVAL)
            {
                evaluated = Some(monotonic());
                ca_rotation::advance_if_due(&self.store, &*distribution, now);
            }
            // Reading and encoding a large mesh takes long.
            let views = tokio::task::block_in_place(|| self.next());
            if let Some(views) = views {
                let is_large = views.services() >= MANY_SERVICES;
                published.send_replace(views);
                self.commit_authorities();
                if is_large {
                    // After the change was passed to the clients' sessions.
                    tokio::task::block_in_place(memory::trim_heap);
                }
            }
            if let Some(last) = &self.last {
                own.update(last.trusted(), &last.listed);
            }
        }
    }

    /// New views: of the file if it has changed and is valid, or else of the last valid mesh if revocations or authorities
    /// have changed or the CRL is due. None if nothing has changed.
    fn next(&mut self) -> Option<Arc<Views>> {
        let is_due = self.check_store();
        self.read_changed_file();
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

    /// Reads the file again if it, or a file that it refers to, has changed.
    fn read_changed_file(&mut self) {
        let Some(read) = self.file.read_changed(wall_clock()) else { return };
        match self.check_mesh(read) {
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

    /// Loads changed authorities and revocations from the store, and updates its status. Returns whether the last valid
    /// mesh has to be published again: something has changed, or the CRL is due.
    fn check_store(&mut self) -> bool {
        let unreadable = self.store.revoked().err().map(|error| error.to_string());
        let problem = self.store.problem().or(unreadable);
        self.fresh = if problem.is_none() { self.changed_authorities() } else { None };
        self.status.send_if_modified(|status| {
            let changed = status.store != problem;
            status.store = problem;
            changed
        });
        let Some(last) = &self.last else { return false };
        let revoked = self.merge_revocations(&last.mesh).unwrap_or_else(|_| last.listed.clone());
        self.fresh.is_some()
            || revoked != last.listed
            || self.clock.steady().is_ok_and(|now| is_crl_due(last.crl_signed_at, now))
    }

    /// Checks that a mesh has the authority's trust domain, and that the inbound configuration of its services can be
    /// encoded. Only services that differ from the mesh in force are encoded.
    ///
    /// # Errors
    /// Every error of the mesh.
    fn check_mesh(&self, read: Result<Mesh, Vec<String>>) -> Result<Arc<Mesh>, Vec<String>> {
        let mesh = read?;
        let trust_domain = self.authorities.get().authority_set().trust_domain.clone();
        if mesh.trust_domain != trust_domain {
            return Err(vec![format!(
                "{}: trust_domain: invalid trust domain {:?}: must be {trust_domain:?}, which the authority has",
                self.file.path().display(),
                mesh.trust_domain
            )]);
        }
        // Not at the start: encoding all services would double the start time, and one that cannot be encoded must not
        // stop the others. Its sidecars get an error, which is logged. `--check-config` encodes all.
        if let Some(last) = &self.last {
            check_inbound(&mesh, Some(&last.mesh))?;
        }
        Ok(Arc::new(mesh))
    }

    /// Builds the views of a mesh, which [`Self::watch`] publishes.
    ///
    /// # Errors
    /// The mesh cannot be encoded, or the store or the authority fails.
    fn apply(&mut self, mesh: Arc<Mesh>) -> Result<Arc<Views>, PublishError> {
        let now = wall_clock();
        let listed = self.merge_revocations(&mesh)?;
        let unchanged = self
            .last
            .as_ref()
            .filter(|last| last.listed == listed)
            .filter(|last| self.clock.steady().is_err() || !is_crl_due(last.crl_signed_at, now))
            .filter(|_| self.fresh.is_none());
        let (trust, crl_signed_at) = match unchanged {
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
                tracing::warn!(more, "further mesh warnings not logged; --check-config prints all");
            }
        }
        let serials: BTreeSet<String> = listed.iter().map(|entry| entry.serial.clone()).collect();
        self.revoked_serials.send_if_modified(|revoked| {
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
            return Err("all authorities have expired, by the clock of this host".into());
        }
        self.status.send_modify(|status| status.crl_number = number);
        Ok(Trust { roots: authorities.trust_bundle(), revocations })
    }

    /// The authorities of the store, if they differ from those in force.
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
                tracing::error!(error, "failed to load the authorities, keeping the last ones");
                None
            }
        }
    }

    /// Puts the published authorities into force.
    fn commit_authorities(&mut self) {
        if let Some(fresh) = self.fresh.take() {
            self.authorities.set(fresh);
        }
    }

    /// Stores the revocations of the file that are new. Returns all, ordered by serial number. If the store cannot be
    /// read, its last revocations are used.
    ///
    /// # Errors
    /// The store cannot be read and never was, or a revocation of the file cannot be stored.
    fn merge_revocations(&self, mesh: &Mesh) -> Result<Vec<RevokedCertificate>, String> {
        let mut revoked = match (self.store.revoked(), &self.last) {
            (Ok(revoked), _) => revoked,
            // A failure of the store must not make a revoked certificate valid.
            (Err(_), Some(last)) => last.listed.clone(),
            (Err(error), None) => return Err(error.to_string()),
        };
        for serial in &mesh.revocations {
            let serial = serial.to_ascii_lowercase();
            if !revoked.iter().any(|known| known.serial == serial) {
                // Stored, so that the revocation stays when the line is deleted from the file.
                let at = wall_clock();
                let stored = self.store.revoke(std::slice::from_ref(&serial), at);
                stored.map_err(|error| format!("revocation of {serial}: {error}"))?;
                revoked.push(RevokedCertificate { serial, at });
            }
        }
        revoked.sort_by(|a, b| a.serial.cmp(&b.serial));
        for entry in &mut revoked {
            // Whole seconds, as in the CRL and the store.
            let whole = entry.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            entry.at = UNIX_EPOCH + Duration::from_secs(whole);
        }
        Ok(revoked)
    }

    /// Updates the status with the errors of the file and other failures, and logs each change.
    fn report(&self, failures: &[String]) {
        let rejected = [&self.errors, failures].concat();
        self.status.send_if_modified(|status| {
            let changed = status.rejected != rejected;
            if changed {
                for error in &rejected {
                    tracing::error!(
                        error,
                        "mesh.yaml rejected, the last valid mesh stays in force"
                    );
                }
                status.rejected = rejected;
            }
            changed
        });
    }
}

/// Whether a new CRL is due: the present one is old, or its date is in the future, because the clock was ahead when it was
/// signed, so that peers refuse it.
fn is_crl_due(signed: SystemTime, now: SystemTime) -> bool {
    now >= signed + CRL_RENEWAL || now + BACKDATED < signed
}

#[cfg(test)]
mod tests;
