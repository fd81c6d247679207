//! The workload certificate: obtained with a join token, then renewed before it expires.
//!
//! The private key is generated here and is only written to the state directory, if there is one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use weft_certs::rotation::Rotation;
use weft_certs::tls::{LoadedIdentity, client};
use weft_certs::{BACKDATED, KeyText, TrustStore, request, validity};
use weft_model::{Backoff, DataSource, Name, Secret, SpiffeId, StringMatch, TlsIdentity};
use weft_runtime::clock::wall_clock;
use weft_runtime::clock_watch;
use weft_runtime::socket::Mark;
use weft_xds::authority::{SignError, request_certificate};
use weft_xds::dial::Dialer;
use weft_xds::translate::WORKLOAD_IDENTITY;

use crate::dial::dial_tls;

/// The longest time between two reads of the wall clock while a certificate is valid. The clock may be set, and timers
/// stop while the machine is suspended.
const MAX_CLOCK_POLL: Duration = Duration::from_secs(10);

const MIN_CLOCK_POLL: Duration = Duration::from_millis(10);
/// The ceilings of the time between attempts to obtain the first certificate.
const FIRST_CERTIFICATE: Backoff =
    Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(5) };
/// A clock difference above this value is logged.
const SKEW: Duration = Duration::from_secs(60);

/// How a workload obtains its certificate and configuration.
#[derive(Clone)]
pub struct Enrolment {
    /// The control plane, `HOST:PORT`.
    pub control: String,
    /// The trust bundle that verifies the control plane, PEM.
    pub roots: Vec<u8>,
    /// The SPIFFE ID of the workload.
    pub identity: SpiffeId,
    /// The source of the first certificate.
    pub source: IdentitySource,
}

impl std::fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrolment")
            .field("control", &self.control)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// The source of the first certificate.
#[derive(Debug, Clone)]
pub struct IdentitySource {
    /// The file that holds a join token.
    pub token_file: Option<PathBuf>,
    /// The directory that stores the certificate across restarts.
    pub state: Option<PathBuf>,
}

/// The certificate in use.
#[derive(Clone)]
pub struct CurrentCertificate {
    chain: String,
    key: KeyText,
    identity: LoadedIdentity,
    /// When the certificate was received; the Unix epoch for a stored certificate.
    since: SystemTime,
}

impl std::fmt::Debug for CurrentCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Current { .. }")
    }
}

impl CurrentCertificate {
    /// The certificate and key for TLS.
    #[must_use]
    pub fn identity(&self) -> &LoadedIdentity {
        &self.identity
    }

    /// The root certificate at the end of the chain, PEM; empty without one.
    pub(crate) fn root(&self) -> &str {
        let at = self.chain.rfind("-----BEGIN CERTIFICATE-----").filter(|at| *at > 0);
        at.and_then(|at| self.chain.get(at..)).unwrap_or_default()
    }

    fn load(chain: String, key: KeyText, since: SystemTime) -> Result<Self, String> {
        let identity = LoadedIdentity::load(chain.as_bytes(), key.as_bytes())
            .map_err(|error| error.to_string())?;
        Ok(Self { chain, key, identity, since })
    }

    fn secret(&self) -> Arc<Secret> {
        let inline = |text: &str| DataSource::inline(text.as_bytes());
        Arc::new(Secret::Identity(TlsIdentity {
            chain: inline(&self.chain),
            key: inline(&self.key),
        }))
    }

    /// Checks that the certificate is valid at a time.
    ///
    /// # Errors
    /// The time is outside of the validity, or the validity cannot be read.
    fn check_dates(&self, now: SystemTime) -> Result<(), String> {
        let (from, to) = self
            .identity
            .leaf()
            .and_then(validity)
            .ok_or("cannot read the validity of the certificate")?;
        if from <= now && now < to {
            return Ok(());
        }
        let [from, to, now] = [from, to, now].map(date);
        Err(format!("certificate is valid from {from} to {to}; the clock of this host shows {now}"))
    }

    fn rotation(&self) -> Option<Rotation> {
        let (from, to) = validity(self.identity.leaf()?)?;
        Some(Rotation::new(from.max(self.since), to, fastrand::f64()))
    }
}

/// Obtains the first certificate, retrying until it succeeds, and spawns a task that renews it. Publishes every
/// certificate in the local secrets.
pub async fn enrol(
    enrolment: &Enrolment,
    mark: Option<Mark>,
    local: watch::Sender<BTreeMap<Name, Arc<Secret>>>,
) -> watch::Receiver<CurrentCertificate> {
    let first = first(enrolment, mark).await;
    let publish = move |current: &CurrentCertificate| {
        local.send_modify(|secrets| {
            secrets.insert(WORKLOAD_IDENTITY.into(), current.secret());
        });
    };
    publish(&first);
    let sender = watch::Sender::new(first);
    let receiver = sender.subscribe();
    tokio::spawn(renew(enrolment.clone(), mark, sender, publish));
    receiver
}

async fn first(enrolment: &Enrolment, mark: Option<Mark>) -> CurrentCertificate {
    let mut failures = 0;
    loop {
        // On every attempt: the clock may have been corrected, which makes the stored certificate valid.
        match enrolment.source.state.as_deref().and_then(restore) {
            Some(Ok(stored)) => {
                tracing::info!(identity = %enrolment.identity, "stored certificate loaded");
                return stored;
            }
            Some(Err(reason)) => {
                tracing::warn!(reason, "stored certificate not usable");
            }
            None => {}
        }
        let token = enrolment.source.token_file.as_deref().and_then(read_token);
        match obtain(enrolment, None, token.as_deref().map(str::trim), mark).await {
            Ok(current) => return current,
            Err(error) => {
                let wait = FIRST_CERTIFICATE.delay(failures);
                failures = failures.saturating_add(1);
                tracing::warn!(%error, control = enrolment.control, ?wait, "no certificate yet");
                tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            }
        }
    }
}

/// The join token; none when the file cannot be read. The file may appear later.
fn read_token(file: &Path) -> Option<String> {
    let read = std::fs::read_to_string(file);
    let read = read.inspect_err(|error| {
        tracing::warn!(%error, file = %file.display(), "failed to read the join token file");
    });
    read.ok()
}

async fn renew(
    enrolment: Enrolment,
    mark: Option<Mark>,
    sender: watch::Sender<CurrentCertificate>,
    publish: impl Fn(&CurrentCertificate) + Send,
) {
    let Some(mut rotation) = sender.borrow().rotation() else {
        return;
    };
    loop {
        let now = wall_clock();
        if !rotation.is_due(now) {
            let left = rotation.due().duration_since(now).unwrap_or_default();
            tokio::time::sleep(left.clamp(MIN_CLOCK_POLL, MAX_CLOCK_POLL)).await;
            continue;
        }
        let current = sender.borrow().clone();
        match obtain(&enrolment, Some(&current), None, mark).await {
            Ok(renewed) => {
                tracing::info!(identity = %enrolment.identity, "certificate renewed");
                publish(&renewed);
                if let Some(next) = renewed.rotation() {
                    rotation = next;
                }
                sender.send_replace(renewed);
            }
            Err(error) => {
                tracing::warn!(%error, "certificate renewal failed, will retry");
                tokio::time::sleep(rotation.failed(wall_clock(), fastrand::f64())).await;
            }
        }
    }
}

/// Requests a certificate, authenticated by the current one or by a join token.
async fn obtain(
    enrolment: &Enrolment,
    current: Option<&CurrentCertificate>,
    token: Option<&str>,
    mark: Option<Mark>,
) -> Result<CurrentCertificate, SignError> {
    let unavailable = SignError::Unavailable;
    let pending =
        request::make(&enrolment.identity).map_err(|error| unavailable(error.to_string()))?;
    let identity = current.map(CurrentCertificate::identity);
    let root_above = current.map(CurrentCertificate::root).unwrap_or_default();
    let dial = control_dial(enrolment, identity, root_above, mark).map_err(unavailable)?;
    let chain = request_certificate(&dial, pending.request_pem, token).await?;
    let current = CurrentCertificate::load(chain.concat(), pending.key_pem, wall_clock())
        .map_err(unavailable)?;
    current.check_dates(wall_clock()).map_err(|reason| {
        unavailable(format!("certificate from the control plane not usable: {reason}"))
    })?;
    report_skew(&current);
    if let Some(state) = &enrolment.source.state
        && let Err(error) = store(state, &current)
    {
        tracing::warn!(%error, state = %state.display(), "failed to store the certificate, it will not survive a restart");
    }
    Ok(current)
}

/// Reports the clock difference to the control plane, measured by the start of validity of a new certificate.
fn report_skew(current: &CurrentCertificate) {
    let Some((from, _)) = current.identity.leaf().and_then(validity) else {
        return;
    };
    let skew = clock_watch::absolute_difference(from + BACKDATED, wall_clock());
    clock_watch::report_skew(skew);
    if skew > SKEW {
        tracing::warn!(?skew, "clocks of this host and the control plane differ");
    }
}

fn date(at: SystemTime) -> String {
    let at = time::OffsetDateTime::from(at);
    at.format(&time::format_description::well_known::Rfc3339).unwrap_or_else(|_| at.to_string())
}

/// A dialer to the control plane, which must present the control-plane SPIFFE ID. `root_above` is the root of the own
/// certificate chain, PEM; empty without one.
///
/// # Errors
/// The trust bundle is invalid.
pub fn control_dial(
    enrolment: &Enrolment,
    identity: Option<&LoadedIdentity>,
    root_above: &str,
    mark: Option<Mark>,
) -> Result<Dialer, String> {
    let now =
        UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default());
    // After a CA rotation, the new root is known from the own chain, which a control plane below the old root issued.
    let roots = [enrolment.roots.as_slice(), b"\n", root_above.as_bytes()].concat();
    let trust =
        TrustStore::load(&roots, None, Vec::new(), None, now).map_err(|error| error.to_string())?;
    let control = weft_control::resources::control_identity(enrolment.identity.trust_domain());
    let names = vec![StringMatch::Exact(control)];
    let config = client(identity, Arc::new(trust), names, &["h2".into()])
        .map_err(|error| error.to_string())?;
    Ok(dial_tls(enrolment.control.clone(), Some(config), mark))
}

const CHAIN_FILE: &str = "certificate.pem";
const KEY_FILE: &str = "key.pem";

/// Loads the stored certificate; none without one, an error when it is not valid now.
fn restore(state: &Path) -> Option<Result<CurrentCertificate, String>> {
    let chain = std::fs::read_to_string(state.join(CHAIN_FILE)).ok()?;
    let key = std::fs::read_to_string(state.join(KEY_FILE)).ok()?;
    let current = CurrentCertificate::load(chain, key.into(), UNIX_EPOCH);
    Some(current.and_then(|current| current.check_dates(wall_clock()).map(|()| current)))
}

/// Stores the certificate and its key with mode 0600. The key is written first: `restore` checks that the certificate
/// matches the key.
fn store(state: &Path, current: &CurrentCertificate) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state)?;
    for (name, text) in [(KEY_FILE, &*current.key), (CHAIN_FILE, &*current.chain)] {
        let part = state.join(format!("{name}.part"));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&part, state.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use weft_certs::Authority;

    use super::*;

    #[test]
    fn stored_certificate_is_used_only_within_its_validity() {
        let hour = Duration::from_secs(3600);
        let now = UNIX_EPOCH + 280_000 * hour;
        let files = Authority::create("mesh.test", now - hour).expect("an authority");
        let authority = Authority::load(files, "mesh.test").expect("it is one");
        let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id");
        let pending = request::make(&id).expect("a request");
        let asked = request::CheckedRequest::parse(&pending.request_pem).expect("a good one");
        let issued = authority.issue(&asked, hour, now).expect("it signs");
        let current =
            CurrentCertificate::load(issued.chain.concat(), pending.key_pem, now).expect("one");
        let second = Duration::from_secs(1);
        let good = [now - BACKDATED, now, now + hour - second];
        assert!(good.into_iter().all(|at| current.check_dates(at).is_ok()));
        for bad in [now - BACKDATED - second, now - 24 * hour, now + hour, now + 24 * hour] {
            let reason = current.check_dates(bad).expect_err("it is not good then");
            assert!(
                reason.starts_with("certificate is valid from 2001-12-10T15:55:00Z to"),
                "{reason}"
            );
        }
        let folder = std::env::temp_dir().join(format!("weft-{}", std::process::id()));
        store(&folder, &current).expect("the folder takes it");
        let restored = restore(&folder).expect("there is one");
        std::fs::remove_dir_all(&folder).expect("it was made");
        assert!(restored.is_err(), "the certificate expired in 2001");
    }
}
