//! The admin socket: executes the commands of `weft ca` (revoke, list, create join tokens, rotate) on a running control
//! plane.
//!
//! One process has the store open at a time. A running control plane has it open and listens on a Unix socket in the same
//! folder, which only its user can enter: a process that can connect to the socket could read the authority's keys as
//! well. Without a control plane, `weft ca` opens the store and executes the command itself.

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
use crate::issue::{check_trust_domain, create_join_token};
use crate::store::{IssuedRecord, STORE_FILE, Store, StoreCheck, StoreError};

const SOCKET: &str = "control.sock";
/// The longest command, and the longest response.
const LIMIT_BYTES: u64 = 16 * 1024 * 1024;
/// The validity of a CRL that is signed by command.
const CRL_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a command and its response may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// A command of an operator. Its JSON form is the request on the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminCommand {
    /// Revoke certificates, by serial number, SPIFFE ID or service name.
    Revoke(Vec<String>),
    /// List the issued certificates.
    List,
    /// Create a join token for a SPIFFE ID.
    Token(String),
    /// Begin or continue the rotation of the authority.
    Rotate(RotationStep),
    /// Rotate to an authority whose certificate was issued by an external root, PEM.
    #[serde(rename = "Follow")]
    RotateToExternal {
        /// The root's certificate.
        root: String,
        /// The authority's certificate, and the intermediates between it and the root.
        certificate: String,
        /// The private key of the authority.
        key: PrivateKey,
        /// The CRLs of the root and of the intermediates; empty: those that are stored.
        #[serde(rename = "lists")]
        crls: String,
    },
    /// Replace the CRLs of an external root and of the intermediates below it, PEM.
    #[serde(rename = "RootLists")]
    RootCrls(String),
    /// Print the trust bundle.
    Roots,
    /// Verify the store and its backups.
    Check,
}

/// A private key, PEM. Its `Debug` form does not show it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateKey(pub String);

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// The lines to print, or the error of a command.
pub type AdminResult = Result<Vec<String>, String>;

/// Executes a command on a store that no control plane has open.
///
/// # Errors
/// The command is invalid, or the store or the authority fails.
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
            let token = create_join_token(store, &id, now).map_err(|error| error.to_string())?;
            audit::line(store.path(), "token_made", &[("identity", identity)]);
            Ok(vec![token])
        }
        AdminCommand::Rotate(step) => ca_rotation::rotate(store, *step, distribution, now),
        AdminCommand::RotateToExternal { root, certificate, key, crls } => {
            let given = ExternalCaFiles {
                root: root.clone(),
                certificate: certificate.clone(),
                key: key.0.clone().into(),
                crls: crls.clone(),
            };
            ca_rotation::import(store, given, now)
        }
        AdminCommand::Check => check(store.check(), store.path()),
        AdminCommand::RootCrls(crls) => ca_rotation::replace_root_crls(store, crls, now),
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
                "invalid target {target:?}: must be the serial number of an issued certificate, or the SPIFFE ID or \
                 service of an unexpired one; weft ca list prints them"
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
        lines.push(format!("{serial} {}", if is_new { "revoked" } else { "already revoked" }));
    }
    Ok(lines)
}

/// Signs the CRLs of all authorities with the present revocations, PEM.
///
/// # Errors
/// The store fails, or the authority cannot sign.
pub fn sign_crls(store: &Store, now: SystemTime) -> Result<String, String> {
    let authority_set = store.authority_set().map_err(|error| error.to_string())?;
    let authorities = Authorities::load(authority_set).map_err(|error| error.to_string())?;
    let number = store.next_crl_number().map_err(|error| error.to_string())?;
    let revoked = store.revoked().map_err(|error| error.to_string())?;
    let crls = authorities.crls(&revoked, number, now, CRL_LIFE);
    let crls = crls.map_err(|error| error.to_string())?;
    audit::line(store.path(), "lists_signed", &[("number", &number.to_string())]);
    Ok(crls)
}

fn check(findings: StoreCheck, path: &Path) -> AdminResult {
    let mut lines = Vec::new();
    let mut newest = None;
    for (backup, checked) in findings.backups {
        let is_good = checked.is_ok();
        newest.get_or_insert(is_good);
        let result = checked.map_or_else(|reason| reason, |summary| format!("good: {summary}"));
        lines.push(format!("{}: {result}", backup.display()));
    }
    let store = findings.store?;
    lines.insert(0, format!("{}: good: {store}", path.display()));
    match newest {
        Some(true) => Ok(lines),
        Some(false) => {
            Err([lines, vec!["the newest backup is damaged".into()]].concat().join("\n"))
        }
        None => Err([lines, vec!["no backup found".into()]].concat().join("\n")),
    }
}

/// Verifies the store in a folder and its backups, in this process or in the control plane that has it open.
///
/// # Errors
/// The store or its newest backup is damaged or missing.
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

/// Sends a command to the control plane that has the store of a folder open, and returns its response.
///
/// # Errors
/// The control plane returns an error, or the socket fails.
pub fn send(folder: &Path, command: &AdminCommand) -> AdminResult {
    let path = folder.join(SOCKET);
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    stream.set_read_timeout(Some(EXCHANGE_TIMEOUT)).map_err(failed)?;
    let text = serde_json::to_string(command).map_err(|error| error.to_string())?;
    stream.write_all(format!("{text}\n").as_bytes()).map_err(failed)?;
    let mut response = String::new();
    BufReader::new(stream.take(LIMIT_BYTES)).read_line(&mut response).map_err(failed)?;
    serde_json::from_str(&response).map_err(|error| format!("{}: {error}", path.display()))?
}

/// Serves the admin socket until the task is dropped. Notifies `changed` after each command.
///
/// # Errors
/// The socket cannot be created.
pub(crate) fn serve(
    store: Arc<Store>,
    changed: Arc<Notify>,
    distribution: Arc<dyn TrustDistribution>,
) -> std::io::Result<impl Future<Output = ()>> {
    let path = socket(store.path());
    // A socket that exists was left by a process that was killed: this process has the store open.
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
            // Serving one command at a time is enough, and bounds the load.
            let served =
                tokio::time::timeout(EXCHANGE_TIMEOUT, serve_one(stream, &store, &*distribution))
                    .await;
            if !matches!(served, Ok(Ok(()))) {
                tracing::debug!("admin command failed");
            }
            changed.notify_one();
        }
    })
}

async fn serve_one(
    stream: tokio::net::UnixStream,
    store: &Store,
    distribution: &dyn TrustDistribution,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut text = String::new();
    tokio::io::BufReader::new(read.take(LIMIT_BYTES)).read_line(&mut text).await?;
    let result: AdminResult = match serde_json::from_str(&text) {
        Ok(command) => execute_with(store, &command, distribution),
        Err(error) => Err(format!("invalid admin command: {error}")),
    };
    let text = serde_json::to_string(&result).map_err(std::io::Error::other)?;
    write.write_all(format!("{text}\n").as_bytes()).await
}

fn socket(store: &Path) -> PathBuf {
    store.with_file_name(SOCKET)
}
