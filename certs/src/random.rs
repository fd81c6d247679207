//! Random secrets and numbers of the cryptographic library.

use crate::digest::hex;

/// 256 random bits in hex, for a secret that is shown once; none without random numbers.
#[must_use]
pub fn random_token() -> Option<String> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(hex(&bytes))
}

/// 32 random bits; none without random numbers.
#[must_use]
pub fn random_number() -> Option<u32> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(u32::from_ne_bytes(bytes))
}
