//! What must survive a restart: the authority, the certificates issued, what was revoked, the number
//! of the revocation list, and the join tokens. One file, one transaction a change.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use weft_certs::{AuthorityFiles, Revoked, RootSigner};
use weft_model::SpiffeId;

const AUTHORITY: TableDefinition<'_, &str, &str> = TableDefinition::new("authority");
/// Serial number to `identity expiry` (seconds since 1970).
const ISSUED: TableDefinition<'_, &str, &str> = TableDefinition::new("issued");
/// Serial number to when it was revoked.
const REVOKED: TableDefinition<'_, &str, u64> = TableDefinition::new("revoked");
/// SHA-256 of a token to `identity expiry`.
const TOKENS: TableDefinition<'_, &str, &str> = TableDefinition::new("tokens");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

const FILE: &str = "weft.redb";

/// The control plane's store.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
}

/// A certificate that was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedRecord {
    /// Its serial number, hex.
    pub serial: String,
    /// For whom.
    pub identity: String,
    /// When it ends.
    pub not_after: SystemTime,
    /// Since when it is revoked.
    pub revoked: Option<SystemTime>,
}

/// Why the store cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none yet.
    #[error("{} holds no authority; make one: weft ca init --state {}", .0.display(), .0.display())]
    Missing(PathBuf),
    /// There is one already.
    #[error("{} holds an authority already; nothing was changed", .0.display())]
    Exists(PathBuf),
    /// Another process has it open.
    #[error("{} is in use by another process; a control plane takes ca revoke, list and token meanwhile", .0.display())]
    InUse(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {reason}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The database failed.
    #[error("the store failed: {0}")]
    Database(String),
}

macro_rules! from_database {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(error.to_string())
            }
        }
    )*};
}
from_database!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

impl Store {
    /// Opens the store in a folder; `Missing` when there is none.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Err(StoreError::Missing(folder.to_owned()));
        }
        Self::database(path, folder)
    }

    /// Makes a store with a new authority in a folder, readable by nobody else.
    ///
    /// # Errors
    /// When there is one already, or it cannot be made.
    pub fn create(
        folder: &Path,
        trust_domain: &str,
        files: &AuthorityFiles,
    ) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        let io = |error: std::io::Error| StoreError::Io {
            path: path.clone(),
            reason: error.to_string(),
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io)?;
        if path.exists() {
            return Err(StoreError::Exists(folder.to_owned()));
        }
        // Made empty with its mode first, so that there is no moment in which others may read it.
        let made = fs::OpenOptions::new().write(true).create_new(true).open(&path).map_err(io)?;
        made.set_permissions(fs::Permissions::from_mode(0o600)).map_err(io)?;
        drop(made);
        let store = Self::database(path, folder)?;
        let write = store.database.begin_write()?;
        {
            let mut table = write.open_table(AUTHORITY)?;
            table.insert("trust_domain", trust_domain)?;
            for (name, text) in parts(files) {
                table.insert(name, text)?;
            }
            write.open_table(ISSUED)?;
            write.open_table(REVOKED)?;
            write.open_table(TOKENS)?;
            write.open_table(NUMBERS)?;
        }
        write.commit()?;
        Ok(store)
    }

    fn database(path: PathBuf, folder: &Path) -> Result<Self, StoreError> {
        match Database::create(&path) {
            Ok(database) => Ok(Self { database, path }),
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                Err(StoreError::InUse(folder.to_owned()))
            }
            Err(error) => Err(StoreError::Io { path, reason: error.to_string() }),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The authority and its trust domain.
    ///
    /// # Errors
    /// When a part is missing.
    pub fn authority(&self) -> Result<(AuthorityFiles, String), StoreError> {
        let table = self.database.begin_read()?.open_table(AUTHORITY)?;
        let part = |name: &str| -> Result<String, StoreError> {
            let value = table
                .get(name)?
                .ok_or_else(|| StoreError::Database(format!("{name} is missing")))?;
            Ok(value.value().to_owned())
        };
        let files = AuthorityFiles {
            root_certificate: part("root_certificate")?,
            root: root_signer(part("root_key")?, part("root_lists").unwrap_or_default()),
            intermediate_certificate: part("intermediate_certificate")?,
            intermediate_key: part("intermediate_key")?.into(),
        };
        Ok((files, part("trust_domain")?))
    }

    /// The authorities: the one that signs, and those that are trusted beside it.
    ///
    /// # Errors
    /// When a part is missing or cannot be read.
    pub fn generations(&self) -> Result<Generations, StoreError> {
        let (signing, trust_domain) = self.authority()?;
        let table = self.database.begin_read()?.open_table(AUTHORITY)?;
        let beside = match table.get(BESIDE)? {
            Some(text) => serde_json::from_str(text.value())
                .map_err(|error| StoreError::Database(format!("{BESIDE}: {error}")))?,
            None => Beside::default(),
        };
        let read = |kept: Kept| (kept.files(), UNIX_EPOCH + Duration::from_secs(kept.due));
        Ok(Generations {
            trust_domain,
            signing,
            next: beside.next.map(read),
            former: beside.former.into_iter().map(read).collect(),
        })
    }

    /// Replaces the authorities, all at once.
    ///
    /// # Errors
    /// When the database fails.
    pub fn replace_generations(&self, generations: &Generations) -> Result<(), StoreError> {
        let kept = |(files, due): &(AuthorityFiles, SystemTime)| Kept::of(files, *due);
        let beside = Beside {
            next: generations.next.as_ref().map(kept),
            former: generations.former.iter().map(kept).collect(),
        };
        let text = serde_json::to_string(&beside)
            .map_err(|error| StoreError::Database(error.to_string()))?;
        let write = self.database.begin_write()?;
        {
            let mut table = write.open_table(AUTHORITY)?;
            for (name, text) in parts(&generations.signing) {
                table.insert(name, text)?;
            }
            table.insert(BESIDE, text.as_str())?;
        }
        write.commit()?;
        Ok(())
    }

    /// When the last of the certificates ends that are good now; none when there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub fn last_end(&self, now: SystemTime) -> Result<Option<SystemTime>, StoreError> {
        let records = self.list()?;
        let good = records.iter().filter(|record| record.revoked.is_none());
        Ok(good.map(|record| record.not_after).filter(|end| *end > now).max())
    }

    /// Remembers a certificate.
    ///
    /// # Errors
    /// When the database fails.
    pub fn issued(
        &self,
        serial: &str,
        identity: &SpiffeId,
        not_after: SystemTime,
    ) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.open_table(ISSUED)?.insert(serial, record(identity, not_after).as_str())?;
        write.commit()?;
        Ok(())
    }

    /// Every certificate that was issued, by serial number.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self) -> Result<Vec<IssuedRecord>, StoreError> {
        let read = self.database.begin_read()?;
        let (issued, revoked) = (read.open_table(ISSUED)?, read.open_table(REVOKED)?);
        let mut records = Vec::new();
        for entry in issued.iter()? {
            let (serial, value) = entry?;
            let (identity, not_after) = parse(value.value());
            let since =
                revoked.get(serial.value())?.map(|at| UNIX_EPOCH + Duration::from_secs(at.value()));
            records.push(IssuedRecord {
                serial: serial.value().to_owned(),
                identity,
                not_after,
                revoked: since,
            });
        }
        Ok(records)
    }

    /// Revokes a serial number; whether it was not revoked before.
    ///
    /// # Errors
    /// When the database fails.
    pub fn revoke(&self, serial: &str, now: SystemTime) -> Result<bool, StoreError> {
        let write = self.database.begin_write()?;
        let new = {
            let mut table = write.open_table(REVOKED)?;
            let known = table.get(serial)?.is_some();
            if !known {
                table.insert(serial, seconds(now))?;
            }
            !known
        };
        write.commit()?;
        Ok(new)
    }

    /// What is revoked.
    ///
    /// # Errors
    /// When the database fails.
    pub fn revoked(&self) -> Result<Vec<Revoked>, StoreError> {
        let table = self.database.begin_read()?.open_table(REVOKED)?;
        let mut revoked = Vec::new();
        for entry in table.iter()? {
            let (serial, at) = entry?;
            let at = UNIX_EPOCH + Duration::from_secs(at.value());
            revoked.push(Revoked { serial: serial.value().to_owned(), at });
        }
        Ok(revoked)
    }

    /// The next number of the revocation list: never the same twice.
    ///
    /// # Errors
    /// When the database fails.
    pub fn next_list_number(&self) -> Result<u64, StoreError> {
        let write = self.database.begin_write()?;
        let next = {
            let mut table = write.open_table(NUMBERS)?;
            let next = table.get("revocation_list")?.map_or(0, |number| number.value()) + 1;
            table.insert("revocation_list", next)?;
            next
        };
        write.commit()?;
        Ok(next)
    }

    /// The seed with which agents hash flows: made once, at random, so that nobody outside can tell
    /// which endpoint a flow would fall on.
    ///
    /// # Errors
    /// When the database fails, or there are no random numbers.
    pub fn flow_seed(&self) -> Result<u32, StoreError> {
        let write = self.database.begin_write()?;
        let seed = {
            let mut table = write.open_table(NUMBERS)?;
            let kept = table.get("flow_seed")?.and_then(|seed| u32::try_from(seed.value()).ok());
            match kept {
                Some(seed) => seed,
                None => {
                    let seed = weft_certs::random_number();
                    let seed =
                        seed.ok_or_else(|| StoreError::Database("no random numbers".into()))?;
                    table.insert("flow_seed", u64::from(seed))?;
                    seed
                }
            }
        };
        write.commit()?;
        Ok(seed)
    }

    /// Remembers a join token by its digest.
    ///
    /// # Errors
    /// When the database fails.
    pub fn add_token(
        &self,
        digest: &str,
        identity: &SpiffeId,
        until: SystemTime,
    ) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.open_table(TOKENS)?.insert(digest, record(identity, until).as_str())?;
        write.commit()?;
        Ok(())
    }

    /// Uses a join token up: the identity it was for, if it is good now. It is gone in any case.
    ///
    /// # Errors
    /// When the database fails.
    pub fn use_token(&self, digest: &str, now: SystemTime) -> Result<Option<String>, StoreError> {
        let write = self.database.begin_write()?;
        let found = write.open_table(TOKENS)?.remove(digest)?.map(|value| parse(value.value()));
        write.commit()?;
        Ok(found.filter(|(_, until)| *until > now).map(|(identity, _)| identity))
    }
}

/// The authorities of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generations {
    /// Of all of them.
    pub trust_domain: String,
    /// The one that signs.
    pub signing: AuthorityFiles,
    /// The one that is trusted already and will sign from then on.
    pub next: Option<(AuthorityFiles, SystemTime)>,
    /// Those that have signed and are trusted until then, the oldest first.
    pub former: Vec<(AuthorityFiles, SystemTime)>,
}

impl Generations {
    /// All of them, the one that signs first.
    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut AuthorityFiles> {
        let next = self.next.as_mut().map(|(files, _)| files);
        let former = self.former.iter_mut().map(|(files, _)| files);
        std::iter::once(&mut self.signing).chain(next).chain(former)
    }
}

/// The part of the table that holds the authorities which do not sign.
const BESIDE: &str = "beside";

#[derive(Default, Serialize, Deserialize)]
struct Beside {
    next: Option<Kept>,
    former: Vec<Kept>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    root_certificate: String,
    root_key: String,
    #[serde(default)]
    root_lists: String,
    intermediate_certificate: String,
    intermediate_key: String,
    /// In seconds since 1970.
    due: u64,
}

impl Kept {
    fn of(files: &AuthorityFiles, due: SystemTime) -> Self {
        let files = files.clone();
        let (root_key, root_lists) = match files.root {
            RootSigner::Ours { key } => (key.to_string(), String::new()),
            RootSigner::Theirs { lists } => (String::new(), lists),
        };
        Self {
            root_certificate: files.root_certificate,
            root_key,
            root_lists,
            intermediate_certificate: files.intermediate_certificate,
            intermediate_key: files.intermediate_key.to_string(),
            due: seconds(due),
        }
    }

    fn files(&self) -> AuthorityFiles {
        AuthorityFiles {
            root_certificate: self.root_certificate.clone(),
            root: root_signer(self.root_key.clone(), self.root_lists.clone()),
            intermediate_certificate: self.intermediate_certificate.clone(),
            intermediate_key: self.intermediate_key.clone().into(),
        }
    }
}

/// No key of the root: somebody else has it.
fn root_signer(key: String, lists: String) -> RootSigner {
    if key.is_empty() { RootSigner::Theirs { lists } } else { RootSigner::Ours { key: key.into() } }
}

fn parts(files: &AuthorityFiles) -> [(&'static str, &str); 5] {
    let (key, lists) = match &files.root {
        RootSigner::Ours { key } => (&**key, ""),
        RootSigner::Theirs { lists } => ("", lists.as_str()),
    };
    [
        ("root_certificate", &files.root_certificate),
        ("root_key", key),
        ("root_lists", lists),
        ("intermediate_certificate", &files.intermediate_certificate),
        ("intermediate_key", &files.intermediate_key),
    ]
}

fn record(identity: &SpiffeId, until: SystemTime) -> String {
    format!("{identity} {}", seconds(until))
}

fn parse(text: &str) -> (String, SystemTime) {
    let (identity, until) = text.rsplit_once(' ').unwrap_or((text, "0"));
    (identity.to_owned(), UNIX_EPOCH + Duration::from_secs(until.parse().unwrap_or(0)))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
