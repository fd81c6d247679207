//! Tokens of an issuer, right or wrong in one thing each, before a sidecar that wants one: what it makes
//! of them over the wire, and that nothing of what it refuses reaches the service behind it.
//!
//! What is right stands in RFC 7515, 7517, 7518, 7519 and 8725. Each table is of one reason.

#![allow(
    clippy::indexing_slicing,
    reason = "who looks where nothing is has failed, and sees where"
)]

mod algorithms;
mod claims;
mod encodings;
mod fields;
mod front;
mod good;
mod headers;
mod issuer;
mod json;
mod key_sets;
mod lenient;
mod signatures;
