//! The memory of this process: free memory is returned to the kernel, and other processes cannot read it.

use nix::unistd::{SysconfVar, sysconf};

/// Returns freed memory to the kernel, also from the middle of the heap: the C library by itself returns only
/// memory at its end.
///
/// Call it after large work such as reading a configuration. Allocations of other threads may block
/// meanwhile, for milliseconds.
pub fn trim_heap() {
    let gave_back = crate::raw::trim_heap();
    tracing::debug!(gave_back, "free memory returned to the kernel");
}

/// Keeps the memory of this process, which holds private keys, out of core dumps and away from other
/// processes of its user (`PR_SET_DUMPABLE`).
pub fn disable_core_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "core dumps not disabled: processes of the same user can read this memory");
    }
}

/// The resident memory of this process in bytes; 0 where the kernel does not report it.
#[must_use]
pub fn resident_bytes() -> u64 {
    let counts = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = counts.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let page_bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    pages * page_bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn freed_memory_between_used_blocks_is_returned() {
        let mut pieces: Vec<Box<[u8]>> = (0..64 * 1024).map(|_| vec![1; 1024].into()).collect();
        let last = pieces.pop();
        drop(pieces);
        let before = resident_bytes();
        trim_heap();
        let after = resident_bytes();
        assert!(before > after + 32 * MIB, "{} KiB, then {} KiB", before / 1024, after / 1024);
        drop(last);
    }
}
