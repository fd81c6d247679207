//! Verifies a store file on a copy in memory: the file is not written to, and a damaged file cannot crash the process.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, Once, PoisonError};

use redb::{Database, StorageBackend};

use super::summary::{StoreSummary, summary};

/// The header of redb's file format: 64 bytes, then two commit slots.
const HEAD_BYTES: usize = 320;
const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";
const FLAGS: usize = 9;
const RECOVERY_REQUIRED: u8 = 2;
const TWO_PHASE_COMMIT: u8 = 4;
const PRIMARY: u8 = 1;
const SLOTS: [usize; 2] = [64, 192];
const SLOT_BYTES: usize = 128;
/// The file format version that this build reads.
const FORMAT: u8 = 3;
const PAGE_BYTES: u32 = 4096;
/// The most pages and header pages in a region. redb does not write more, and would allocate memory for them.
const REGION_PAGES_LIMIT: u32 = 1 << 20;

/// Verifies every page and entry of a store file.
///
/// # Errors
/// The damage, as the rest of a sentence that begins with the path.
pub(super) fn verify(bytes: Vec<u8>) -> Result<StoreSummary, String> {
    let bytes = prepare(bytes)?;
    let image = MemoryFile(Mutex::new(bytes));
    catch_panic(|| {
        let database = Database::builder()
            .create_with_backend(image)
            .map_err(|error| format!("is damaged: {error}"))?;
        summary(&database).map_err(|error| format!("is damaged: {error}"))
    })
    .unwrap_or_else(|panic| Err(format!("is damaged: {panic}")))
}

/// Checks the header, and marks the copy so that redb verifies all pages when it opens it. After a clean shutdown it would
/// not read them.
fn prepare(mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    if bytes.is_empty() {
        return Err("is empty".into());
    }
    let Some(head) = bytes.get_mut(..HEAD_BYTES).filter(|head| head.starts_with(MAGIC)) else {
        return Err("is not a store of weft, or its header is damaged".into());
    };
    let version = SLOTS.iter().filter_map(|at| head.get(*at)).find(|version| **version != FORMAT);
    if let Some(version) = version {
        return Err(format!(
            "has format version {version}; this version of weft reads format {FORMAT}"
        ));
    }
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?))
    };
    let is_layout = number(12) == Some(PAGE_BYTES)
        && [16, 20].into_iter().all(|at| number(at).is_some_and(|n| n <= REGION_PAGES_LIMIT));
    if !is_layout {
        return Err("is damaged: invalid page layout".into());
    }
    let flags = head.get(FLAGS).copied().unwrap_or_default();
    if flags & TWO_PHASE_COMMIT != 0 {
        // A two-phase commit is complete. redb must not fall back to the previous commit, which may lack a revocation, so
        // the slot of that commit is cleared in the copy.
        let other = SLOTS.get(usize::from(flags & PRIMARY == 0)).copied().unwrap_or_default();
        if let Some(slot) = head.get_mut(other + 1..other + SLOT_BYTES) {
            slot.fill(0);
        }
        if let Some(byte) = head.get_mut(FLAGS) {
            *byte = (flags & !TWO_PHASE_COMMIT) | RECOVERY_REQUIRED;
        }
    }
    Ok(bytes)
}

/// Calls the database library, and converts a panic in it to an error.
///
/// redb asserts properties of an intact file, so it panics on a damaged one. The process must continue to serve, and must
/// report the file. No other place catches panics.
///
/// # Errors
/// The message of the panic.
pub(super) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                previous(panic);
            }
        }));
    });
    let outer = QUIET.replace(true);
    // The caller drops the database, whose state may be inconsistent, and opens the file again.
    let done = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(outer);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("inconsistent pages").lines().next().unwrap_or("").to_owned()
    })
}

/// A file in memory.
#[derive(Debug)]
struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryFile {
    fn with<T>(
        &self,
        offset: u64,
        length: usize,
        work: impl FnOnce(&mut [u8]) -> T,
    ) -> io::Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let part = from.checked_add(length).and_then(|to| bytes.get_mut(from..to));
        part.map(work).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl StorageBackend for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(offset, out.len(), |part| out.copy_from_slice(part))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let more = len.saturating_sub(bytes.len());
        bytes.try_reserve(more).map_err(io::Error::other)?;
        bytes.resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(offset, data.len(), |part| part.copy_from_slice(data))
    }
}
