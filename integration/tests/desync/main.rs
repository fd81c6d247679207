//! Requests that two parsers may read in different ways (HTTP desync, request smuggling). Whatever the sidecar does
//! with them, the service receives only requests with one reading, and no client gets the response of another.

#![expect(clippy::indexing_slicing, reason = "a test fails at a missing element")]

mod client;
mod corpus;
mod front;
mod http1_requests;
mod http2_corpus;
mod http2_requests;
mod identity_headers;
mod paths;
mod recorder;
mod strict_parser;
