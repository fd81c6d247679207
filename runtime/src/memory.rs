//! The memory of this process: free memory is returned to the kernel, and other processes cannot read it.

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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn resident() -> usize {
        let counts = std::fs::read_to_string("/proc/self/statm").expect("procfs is mounted");
        let pages = counts.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
        pages.expect("the second field is the resident page count") * 4096
    }

    #[test]
    fn freed_memory_between_used_blocks_is_returned() {
        let mut pieces: Vec<Box<[u8]>> = (0..64 * 1024).map(|_| vec![1; 1024].into()).collect();
        let last = pieces.pop();
        drop(pieces);
        let before = resident();
        trim_heap();
        let after = resident();
        assert!(before > after + 32 * MIB, "{} KiB, then {} KiB", before / 1024, after / 1024);
        drop(last);
    }
}
