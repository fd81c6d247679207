//! The two calls of the system that no library offers: the one place of the workspace with unsafe code.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;

/// Reads a socket option whose length only the kernel knows; gives how many bytes it is. nix takes such
/// an option for a text, which ends at a zero, or for a value of a size that it insists on.
#[expect(unsafe_code, reason = "no library reads a socket option of whatever length")]
pub(crate) fn socket_option(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    into: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(into.len()).map_err(io::Error::other)?;
    let room = into.as_mut_ptr().cast();
    // SAFETY: the descriptor is borrowed, and so open, until the call is over; the kernel writes at most
    // `length` bytes, which are `into`'s, and then how many they were.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, room, &raw mut length) };
    nix::errno::Errno::result(outcome)?;
    usize::try_from(length).map_err(io::Error::other)
}

/// Has the C library give back what was freed; whether there was any.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no library offers malloc_trim")]
pub(crate) fn trim_heap() -> bool {
    // SAFETY: nothing is asked of who calls it; it touches only what is not in use.
    let outcome = unsafe { libc::malloc_trim(0) };
    outcome != 0
}

/// Other C libraries have no such call, and need none.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heap() -> bool {
    false
}
