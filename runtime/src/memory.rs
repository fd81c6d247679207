//! What becomes of this process' memory: given back when it is free, and shown to nobody.

/// Gives back what was freed and lies between what is in use: the C library by itself gives back only
/// what lies at the end.
///
/// For when something large was done, such as the reading of a configuration: other threads that ask
/// for memory meanwhile may wait, for milliseconds.
pub fn trim_heap() {
    let gave_back = crate::raw::trim_heap();
    tracing::debug!(gave_back, "memory given back");
}

/// Keeps what this process holds, keys among it, out of core dumps and from other processes of its user
/// (`PR_SET_DUMPABLE`).
pub fn disable_core_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "other processes of this user may look into this one's memory");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn resident() -> usize {
        let counts = std::fs::read_to_string("/proc/self/statm").expect("the kernel tells of us");
        let pages = counts.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
        pages.expect("the second count is that of the pages in memory") * 4096
    }

    #[test]
    fn what_lies_between_is_given_back() {
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
