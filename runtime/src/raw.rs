//! The only unsafe code of the workspace: two system calls that no library offers.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;

/// Reads a socket option of variable length into `into`, and returns its length in bytes. nix reads such an
/// option only as a zero-terminated text or as a value of fixed size.
#[expect(unsafe_code, reason = "no library reads a socket option of variable length")]
pub(crate) fn socket_option(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    into: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(into.len()).map_err(io::Error::other)?;
    let room = into.as_mut_ptr().cast();
    // SAFETY: the descriptor is borrowed, so it stays open during the call. The kernel writes at most
    // `length` bytes, the length of `into`, and then stores in `length` how many it wrote.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, room, &raw mut length) };
    nix::errno::Errno::result(outcome)?;
    usize::try_from(length).map_err(io::Error::other)
}

/// Calls `malloc_trim`. Returns whether it returned memory to the kernel.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no library offers malloc_trim")]
pub(crate) fn trim_heap() -> bool {
    // SAFETY: malloc_trim has no preconditions; it touches only free memory.
    let outcome = unsafe { libc::malloc_trim(0) };
    outcome != 0
}

/// C libraries other than glibc have no such call.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heap() -> bool {
    false
}
