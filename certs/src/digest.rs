//! SHA-256, and the hex form of bytes.

use aws_lc_rs::digest::{Context, SHA256};

/// The SHA-256 of the parts, concatenated.
pub(crate) fn sha256<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    hash.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
    hash
}

/// Formats bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of bytes in lower-case hex.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    hex(&sha256([bytes]))
}
