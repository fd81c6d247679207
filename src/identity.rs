//! The workload's own certificate: from a join token to a first one, then renewed for ever.
//!
//! The key is made here and never leaves this process, but for the state folder when there is one.

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
use weft_model::{DataSource, Name, Secret, SpiffeId, StringMatch, TlsIdentity};
use weft_runtime::clock;
use weft_runtime::socket::Mark;
use weft_xds::authority::{SignError, request_certificate};
use weft_xds::dial::Dialer;
use weft_xds::translate::WORKLOAD_IDENTITY;

use crate::configuration::dial_tls;

/// How long at most until the clock is looked at again while a certificate is good. A clock may be set, and
/// while a machine is suspended no timer runs.
const LOOK: Duration = Duration::from_secs(10);

const SHORTEST_LOOK: Duration = Duration::from_millis(10);
/// From which difference on between two clocks it is worth a line of the log.
const SKEW: Duration = Duration::from_secs(60);

/// How a workload comes to its certificate and configuration.
#[derive(Clone)]
pub struct Enrolment {
    /// The control plane, `HOST:PORT`.
    pub control: String,
    /// The roots by which it is known, PEM.
    pub roots: Vec<u8>,
    /// Who the workload is.
    pub identity: SpiffeId,
    /// Where its first certificate comes from.
    pub source: Source,
}

impl std::fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrolment")
            .field("control", &self.control)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Where a first certificate comes from.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file that holds a join token.
    pub token_file: Option<PathBuf>,
    /// The folder that holds the certificate of an earlier run.
    pub state: Option<PathBuf>,
}

/// A certificate in use.
#[derive(Clone)]
pub struct Current {
    chain: String,
    key: KeyText,
    identity: LoadedIdentity,
    /// Since when we have it; the beginning of time when that is not known any more.
    since: SystemTime,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Current { .. }")
    }
}

impl Current {
    /// What TLS needs of it.
    #[must_use]
    pub fn identity(&self) -> &LoadedIdentity {
        &self.identity
    }

    /// The root that the chain ends with, PEM; empty where it ends without one.
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

    /// Whether it is good at a time.
    ///
    /// # Errors
    /// Why not.
    fn check_dates(&self, now: SystemTime) -> Result<(), String> {
        let (from, to) =
            self.identity.leaf().and_then(validity).ok_or("its dates cannot be read")?;
        if from <= now && now < to {
            return Ok(());
        }
        let [from, to, now] = [from, to, now].map(date);
        Err(format!("it is good from {from} to {to}, and this host's clock shows {now}"))
    }

    fn rotation(&self) -> Option<Rotation> {
        let (from, to) = validity(self.identity.leaf()?)?;
        Some(Rotation::new(from.max(self.since), to, fastrand::f64()))
    }
}

/// Gets a first certificate, however long it takes, and renews it in a task of its own. The local
/// secrets get each new one.
pub async fn enrol(
    enrolment: &Enrolment,
    mark: Option<Mark>,
    local: watch::Sender<BTreeMap<Name, Arc<Secret>>>,
) -> watch::Receiver<Current> {
    let first = first(enrolment, mark).await;
    let publish = move |current: &Current| {
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

async fn first(enrolment: &Enrolment, mark: Option<Mark>) -> Current {
    let mut wait = Duration::from_millis(100);
    loop {
        // Each time, since it is the clock that says whether that one is over.
        match enrolment.source.state.as_deref().and_then(restore) {
            Some(Ok(kept)) => {
                tracing::info!(identity = %enrolment.identity, "took up the certificate of an earlier run");
                return kept;
            }
            Some(Err(reason)) => {
                tracing::warn!(reason, "the certificate of an earlier run is not taken up");
            }
            None => {}
        }
        let token = enrolment.source.token_file.as_deref().and_then(read_token);
        match obtain(enrolment, None, token.as_deref().map(str::trim), mark).await {
            Ok(current) => return current,
            Err(error) => {
                tracing::warn!(%error, control = enrolment.control, ?wait, "no certificate yet");
                tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                wait = (wait * 2).min(Duration::from_secs(5));
            }
        }
    }
}

/// The join token, if the file can be read. It may come later, or be needed no longer.
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
    sender: watch::Sender<Current>,
    publish: impl Fn(&Current) + Send,
) {
    let Some(mut rotation) = sender.borrow().rotation() else {
        return;
    };
    loop {
        let now = wall_clock();
        if !rotation.is_due(now) {
            let left = rotation.due().duration_since(now).unwrap_or_default();
            tokio::time::sleep(left.clamp(SHORTEST_LOOK, LOOK)).await;
            continue;
        }
        let current = sender.borrow().clone();
        match obtain(&enrolment, Some(&current), None, mark).await {
            Ok(renewed) => {
                tracing::info!(identity = %enrolment.identity, "renewed the certificate");
                publish(&renewed);
                if let Some(next) = renewed.rotation() {
                    rotation = next;
                }
                sender.send_replace(renewed);
            }
            Err(error) => {
                tracing::warn!(%error, "the certificate was not renewed yet");
                tokio::time::sleep(rotation.failed(wall_clock(), fastrand::f64())).await;
            }
        }
    }
}

/// Asks for a certificate: with the present one, or with a join token.
async fn obtain(
    enrolment: &Enrolment,
    current: Option<&Current>,
    token: Option<&str>,
    mark: Option<Mark>,
) -> Result<Current, SignError> {
    let unavailable = SignError::Unavailable;
    let pending =
        request::make(&enrolment.identity).map_err(|error| unavailable(error.to_string()))?;
    let identity = current.map(Current::identity);
    let root_above = current.map(Current::root).unwrap_or_default();
    let dial = control_dial(enrolment, identity, root_above, mark).map_err(unavailable)?;
    let chain = request_certificate(&dial, pending.request_pem, token).await?;
    let current =
        Current::load(chain.concat(), pending.key_pem, wall_clock()).map_err(unavailable)?;
    current.check_dates(wall_clock()).map_err(|reason| {
        unavailable(format!("the control plane's certificate is not taken: {reason}"))
    })?;
    report_skew(&current);
    if let Some(state) = &enrolment.source.state
        && let Err(error) = keep(state, &current)
    {
        tracing::warn!(%error, state = %state.display(), "the certificate is not kept over a restart");
    }
    Ok(current)
}

/// Reports by how much the control plane's clock differs from ours, by the date of a new certificate.
fn report_skew(current: &Current) {
    let Some((from, _)) = current.identity.leaf().and_then(validity) else {
        return;
    };
    let skew = clock::absolute_difference(from + BACKDATED, wall_clock());
    clock::report_skew(skew);
    if skew > SKEW {
        tracing::warn!(?skew, "the clocks of this host and of the control plane differ");
    }
}

fn date(at: SystemTime) -> String {
    let at = time::OffsetDateTime::from(at);
    at.format(&time::format_description::well_known::Rfc3339).unwrap_or_else(|_| at.to_string())
}

/// The way to the control plane, which must prove that it is one. `root_above` is the root above our own
/// certificate, PEM; empty where there is none.
///
/// # Errors
/// When the roots cannot be used.
pub fn control_dial(
    enrolment: &Enrolment,
    identity: Option<&LoadedIdentity>,
    root_above: &str,
    mark: Option<Mark>,
) -> Result<Dialer, String> {
    let now =
        UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default());
    // A new root is known by the certificate that it stands above, which came from who proved the old one.
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

/// The certificate of an earlier run, if there is one, unless it is not good now.
fn restore(state: &Path) -> Option<Result<Current, String>> {
    let chain = std::fs::read_to_string(state.join(CHAIN_FILE)).ok()?;
    let key = std::fs::read_to_string(state.join(KEY_FILE)).ok()?;
    let current = Current::load(chain, key.into(), UNIX_EPOCH);
    Some(current.and_then(|current| current.check_dates(wall_clock()).map(|()| current)))
}

/// Writes the certificate and its key for nobody else to read. The key goes first: a certificate
/// without its key is of no use, and `restore` checks that they belong together.
fn keep(state: &Path, current: &Current) -> std::io::Result<()> {
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

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use weft_certs::Authority;

    use super::*;

    #[test]
    fn certificate_is_taken_up_only_within_its_dates() {
        let hour = Duration::from_secs(3600);
        let now = UNIX_EPOCH + 280_000 * hour;
        let files = Authority::create("mesh.test", now - hour).expect("an authority");
        let authority = Authority::load(files, "mesh.test").expect("it is one");
        let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id");
        let pending = request::make(&id).expect("a request");
        let asked = request::CheckedRequest::parse(&pending.request_pem).expect("a good one");
        let issued = authority.issue(&asked, hour, now).expect("it signs");
        let current = Current::load(issued.chain.concat(), pending.key_pem, now).expect("one");
        let second = Duration::from_secs(1);
        let good = [now - BACKDATED, now, now + hour - second];
        assert!(good.into_iter().all(|at| current.check_dates(at).is_ok()));
        for bad in [now - BACKDATED - second, now - 24 * hour, now + hour, now + 24 * hour] {
            let reason = current.check_dates(bad).expect_err("it is not good then");
            assert!(reason.starts_with("it is good from 2001-12-10T15:55:00Z to"), "{reason}");
        }
        let folder = std::env::temp_dir().join(format!("weft-{}", std::process::id()));
        keep(&folder, &current).expect("the folder takes it");
        let restored = restore(&folder).expect("there is one");
        std::fs::remove_dir_all(&folder).expect("it was made");
        assert!(restored.is_err(), "it was good in 2001");
    }
}
