//! What the sidecar does with HTTP beside what Envoy does with it: the same bootstrap file and the same
//! requests, before the same service. Compared are the status, the fields and the body that the client
//! gets, what becomes of the connection, and what the service is told. Where they differ, tables name how
//! and why; whatever else differs fails, and so does a difference in the tables that is none any more.

mod client_certificates;
mod connection;
mod headers;
mod http2_requests;
mod messages;
mod options;
mod peers;
mod routes;
mod versions;
