//! What an operator may ask of an authority, whether or not a control plane runs on it: revoke, list, make
//! join tokens.
//!
//! One process has the store open at a time. A control plane that has it listens on a socket beside it, in a
//! folder that nobody else may look into: who can reach the socket could as well read the authority's keys.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use weft_certs::ExternalCaFiles;
use weft_model::SpiffeId;

use crate::audit;
use crate::ca_rotation::{
    self, Authorities, NoClients, RotationStep, Timestamp, TrustDistribution,
};
use crate::clock::wall_clock;
use crate::issue::{check_trust_domain, make_token};
use crate::store::{IssuedRecord, STORE_FILE, Store, StoreCheck, StoreError};

const SOCKET: &str = "control.sock";
/// The longest order, and the longest answer.
const LIMIT_BYTES: u64 = 16 * 1024 * 1024;
/// How long a list is good that is signed by order.
const CRL_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long an order and its answer may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminCommand {
    /// Revoke certificates: by serial number, by SPIFFE id, or by service.
    Revoke(Vec<String>),
    /// List the certificates that were issued.
    List,
    /// Make a join token for an id.
    Token(String),
    /// Have one authority follow another.
    Rotate(RotationStep),
    /// Have an authority follow that somebody else's root has signed, PEM.
    Follow {
        /// The root's certificate.
        root: String,
        /// Ours, and those between the two.
        certificate: String,
        /// The key of ours.
        key: PrivateKey,
        /// The revocation lists of those above; empty: those that we have.
        lists: String,
    },
    /// Replace the revocation lists of somebody else's root and of those between it and ours, PEM.
    #[serde(rename = "RootLists")]
    RootCrls(String),
    /// Tell what is trusted.
    Roots,
    /// Verify the store and its backups.
    Check,
}

/// A private key, PEM. It goes to the desk and nowhere else.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateKey(pub String);

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// What came of it: lines to print, or why it was not done.
pub type AdminResult = Result<Vec<String>, String>;

/// Carries an order out where no control plane runs.
///
/// # Errors
/// Why not.
pub fn execute(store: &Store, command: &AdminCommand) -> AdminResult {
    execute_with(store, command, &NoClients)
}

fn execute_with(
    store: &Store,
    command: &AdminCommand,
    distribution: &dyn TrustDistribution,
) -> AdminResult {
    let now = wall_clock();
    match command {
        AdminCommand::Revoke(targets) => revoke(store, targets, now),
        AdminCommand::List => list(store, now),
        AdminCommand::Token(identity) => {
            let id = SpiffeId::parse(identity).map_err(|error| error.to_string())?;
            check_trust_domain(store, &id)?;
            let token = make_token(store, &id, now).map_err(|error| error.to_string())?;
            audit::line(store.path(), "token_made", &[("identity", identity)]);
            Ok(vec![token])
        }
        AdminCommand::Rotate(step) => ca_rotation::rotate(store, *step, distribution, now),
        AdminCommand::Follow { root, certificate, key, lists } => {
            let given = ExternalCaFiles {
                root: root.clone(),
                certificate: certificate.clone(),
                key: key.0.clone().into(),
                lists: lists.clone(),
            };
            ca_rotation::import(store, given, now)
        }
        AdminCommand::Check => check(store.check(), store.path()),
        AdminCommand::RootCrls(lists) => ca_rotation::replace_root_crls(store, lists, now),
        AdminCommand::Roots => {
            let authority_set = store.authority_set().map_err(|error| error.to_string())?;
            let authorities =
                Authorities::load(authority_set).map_err(|error| error.to_string())?;
            Ok(authorities.trust_bundle().lines().map(str::to_owned).collect())
        }
    }
}

fn revoke(store: &Store, targets: &[String], now: SystemTime) -> AdminResult {
    let known = store.list().map_err(|error| error.to_string())?;
    let mut serials = Vec::new();
    for target in targets {
        let lower = target.to_ascii_lowercase();
        let of_service = |identity: &str| {
            SpiffeId::parse(identity).is_ok_and(|id| id.workload() == target.as_str())
        };
        let named: Vec<&str> = known
            .iter()
            .filter(|record| {
                let is_open = record.not_after > now;
                record.serial == lower
                    || (is_open && (record.identity == *target || of_service(&record.identity)))
            })
            .map(|record| record.serial.as_str())
            .collect();
        if named.is_empty() {
            return Err(format!(
                "{target:?} is the serial number, id or service of no certificate issued here that is \
                 still good; weft ca list shows them"
            ));
        }
        serials.extend(named);
    }
    let serials: Vec<String> = serials.into_iter().map(str::to_owned).collect();
    let new = store.revoke(&serials, now).map_err(|error| error.to_string())?;
    let mut lines = Vec::new();
    for (serial, is_new) in new {
        if is_new {
            audit::line(store.path(), "revoked", &[("serial", &serial)]);
        }
        lines.push(format!("{serial} {}", if is_new { "revoked" } else { "was revoked already" }));
    }
    Ok(lines)
}

/// Signs the revocation lists as they are now, PEM.
///
/// # Errors
/// When the store fails, or the authority cannot sign.
pub fn sign_crls(store: &Store, now: SystemTime) -> Result<String, String> {
    let authority_set = store.authority_set().map_err(|error| error.to_string())?;
    let authorities = Authorities::load(authority_set).map_err(|error| error.to_string())?;
    let number = store.next_crl_number().map_err(|error| error.to_string())?;
    let revoked = store.revoked().map_err(|error| error.to_string())?;
    let lists = authorities.crls(&revoked, number, now, CRL_LIFE);
    let lists = lists.map_err(|error| error.to_string())?;
    audit::line(store.path(), "lists_signed", &[("number", &number.to_string())]);
    Ok(lists)
}

fn check(findings: StoreCheck, path: &Path) -> AdminResult {
    let mut lines = Vec::new();
    let mut newest = None;
    for (backup, checked) in findings.backups {
        let is_good = checked.is_ok();
        newest.get_or_insert(is_good);
        let found = checked.map_or_else(|reason| reason, |summary| format!("good: {summary}"));
        lines.push(format!("{}: {found}", backup.display()));
    }
    let store = findings.store?;
    lines.insert(0, format!("{}: good: {store}", path.display()));
    match newest {
        Some(true) => Ok(lines),
        Some(false) => {
            Err([lines, vec!["the newest backup is damaged".into()]].concat().join("\n"))
        }
        None => Err([lines, vec!["there is no backup".into()]].concat().join("\n")),
    }
}

/// Checks the store of a folder and its backups, in this process or in the control plane that has it open.
///
/// # Errors
/// What is damaged or missing.
pub fn check_store(folder: &Path) -> AdminResult {
    match Store::check_closed(folder) {
        Ok(findings) => check(findings, &folder.join(STORE_FILE)),
        Err(StoreError::InUse(_)) => send(folder, &AdminCommand::Check),
        Err(error) => Err(error.to_string()),
    }
}

fn list(store: &Store, now: SystemTime) -> AdminResult {
    let records = store.list().map_err(|error| error.to_string())?;
    let title = format!(
        "{:32} {:8} {:20} {:20} {:20} ID",
        "SERIAL", "STATE", "ISSUED", "EXPIRES", "REVOKED"
    );
    let lines = records.iter().map(|record| list_line(record, now));
    Ok(std::iter::once(title).chain(lines).collect())
}

fn list_line(record: &IssuedRecord, now: SystemTime) -> String {
    let state = match record.revoked {
        Some(_) => "revoked",
        None if record.not_after <= now => "expired",
        None => "good",
    };
    let date =
        |at: Option<SystemTime>| at.map_or_else(|| "-".to_owned(), |at| Timestamp(at).to_string());
    let [issued, expires, revoked] =
        [record.issued, Some(record.not_after), record.revoked].map(date);
    let IssuedRecord { serial, identity, .. } = record;
    format!("{serial:32} {state:8} {issued:20} {expires:20} {revoked:20} {identity}")
}

/// Asks the control plane that has the store of a folder open.
///
/// # Errors
/// What it says, or that it cannot be reached.
pub fn send(folder: &Path, command: &AdminCommand) -> AdminResult {
    let path = folder.join(SOCKET);
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    stream.set_read_timeout(Some(EXCHANGE_TIMEOUT)).map_err(failed)?;
    let text = serde_json::to_string(command).map_err(|error| error.to_string())?;
    stream.write_all(format!("{text}\n").as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LIMIT_BYTES)).read_line(&mut answer).map_err(failed)?;
    serde_json::from_str(&answer).map_err(|error| format!("{}: {error}", path.display()))?
}

/// Listens beside the store until the task is dropped. `changed` is told of each order.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) fn serve(
    store: Arc<Store>,
    changed: Arc<Notify>,
    distribution: Arc<dyn TrustDistribution>,
) -> std::io::Result<impl Future<Output = ()>> {
    let path = socket(store.path());
    // Of a process that was killed: who has the store open is the only one here.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            // One after the other is enough, and bounds them.
            let answered =
                tokio::time::timeout(EXCHANGE_TIMEOUT, answer(stream, &store, &*distribution))
                    .await;
            if !matches!(answered, Ok(Ok(()))) {
                tracing::debug!("admin command failed");
            }
            changed.notify_one();
        }
    })
}

async fn answer(
    stream: tokio::net::UnixStream,
    store: &Store,
    distribution: &dyn TrustDistribution,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut text = String::new();
    tokio::io::BufReader::new(read.take(LIMIT_BYTES)).read_line(&mut text).await?;
    let outcome: AdminResult = match serde_json::from_str(&text) {
        Ok(command) => execute_with(store, &command, distribution),
        Err(error) => Err(format!("invalid request: {error}")),
    };
    let text = serde_json::to_string(&outcome).map_err(std::io::Error::other)?;
    write.write_all(format!("{text}\n").as_bytes()).await
}

fn socket(store: &Path) -> PathBuf {
    store.with_file_name(SOCKET)
}
