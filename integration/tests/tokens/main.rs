//! JWT authentication: tokens that are valid, or invalid in exactly one way, are sent to a sidecar
//! that requires one. The tests check the response, and that nothing of a rejected request reaches
//! the service.
//!
//! The rules are those of RFC 7515, 7517, 7518, 7519 and 8725. Each table has the tokens of one
//! rule.

#![expect(clippy::indexing_slicing, reason = "a test may panic on unexpected values")]

mod algorithms;
mod authorization_header;
mod claims;
mod encodings;
mod front;
mod headers;
mod issuer;
mod json;
mod key_sets;
mod signatures;
mod strictness;
mod valid;
