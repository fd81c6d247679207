//! HTTP behavior of the sidecar compared with Envoy: the same bootstrap file, the same requests and the same service.
//! The tests compare the status, headers and body that the client gets, the state of the connection, and the request
//! that the service receives. Tables list every accepted difference with its reason; any other difference fails, and
//! so does a listed difference that no longer occurs.

mod client_certificates;
mod comparison;
mod connection;
mod headers;
mod http2_requests;
mod messages;
mod options;
mod routes;
mod versions;
