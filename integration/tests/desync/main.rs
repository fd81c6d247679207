//! Requests that two might read in two ways: whatever the sidecar makes of them, a service behind it
//! gets what has one reading only, and nobody gets an answer that is another's.

#![allow(
    clippy::indexing_slicing,
    reason = "who looks where nothing is has failed, and sees where"
)]

mod claims;
mod client;
mod corpus;
mod front;
mod paths;
mod recorder;
mod requests;
mod strict;
mod twins;
mod twins_corpus;
