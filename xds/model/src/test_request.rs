//! A request for the tests of matchers.

use std::net::{IpAddr, SocketAddr};

use crate::{RequestFacts, SpiffeId, query_parameter};

/// The properties of a request.
#[derive(Debug, Clone)]
pub(crate) struct TestRequest {
    pub(crate) method: String,
    /// Path and query; empty for a CONNECT request.
    pub(crate) target: String,
    /// Names in lower case, and values.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) client: IpAddr,
    pub(crate) destination: SocketAddr,
}

impl Default for TestRequest {
    /// `GET http://a/` from 10.0.0.1.
    fn default() -> Self {
        Self {
            method: "GET".into(),
            target: "/".into(),
            headers: Vec::new(),
            client: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 80).into(),
        }
    }
}

impl RequestFacts for TestRequest {
    fn method(&self) -> &str {
        &self.method
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        !self.target.is_empty() && fits(self.target.as_bytes())
    }

    fn scheme(&self) -> &'static str {
        "http"
    }

    fn authority(&self) -> &'static str {
        "a"
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let mut values = self.headers.iter().filter(|(known, _)| known == name);
        values.any(|(_, value)| fits(value.as_bytes()))
    }

    fn query(&self, name: &str) -> Option<&str> {
        query_parameter(&self.target, name)
    }

    fn has_claim(&self, _: &str, _: &[String], _: &mut dyn FnMut(&str) -> bool) -> bool {
        false
    }

    fn peer(&self) -> Option<&SpiffeId> {
        None
    }

    fn remote_address(&self) -> IpAddr {
        [10, 0, 0, 1].into()
    }

    fn client_address(&self) -> IpAddr {
        self.client
    }

    fn destination_address(&self) -> IpAddr {
        self.destination.ip()
    }

    fn destination_port(&self) -> u16 {
        self.destination.port()
    }
}
