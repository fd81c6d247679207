//! Who may ask the admin port, and who may give it orders.
//!
//! A web page in a browser on this host can send requests to loopback. It cannot choose what the browser
//! writes into `Host`, `Origin` and `Sec-Fetch-Site`, so these decide.

use std::net::{IpAddr, SocketAddr};

use http::header::{HOST, HeaderName, ORIGIN};
use http::{Method, Request};

/// The rules of one admin port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AdminAccess {
    /// Whether it takes orders (POST) at all.
    pub(super) allows_post: bool,
    /// Names by which it may be asked, beside addresses and `localhost`.
    pub(super) host_names: Vec<String>,
}

impl AdminAccess {
    /// Whether a request may be answered.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), String> {
        let hosts: Vec<&[u8]> =
            request.headers().get_all(HOST).iter().map(|value| value.as_bytes()).collect();
        let host = match hosts.as_slice() {
            // Only HTTP/1.0 has none, and no browser speaks that.
            [] => None,
            [host] => Some(String::from_utf8_lossy(host).to_ascii_lowercase()),
            _ => return Err("invalid request: several Host headers".into()),
        };
        if let Some(host) = &host
            && !self.is_known_host(host)
        {
            return Err(format!(
                "unknown Host {host:?}: must be an address, localhost or a name given by --admin-host"
            ));
        }
        if request.method() == Method::GET || request.method() == Method::HEAD {
            return Ok(());
        }
        if !self.allows_post {
            let method = request.method();
            return Err(format!(
                "method {method} refused: this admin address accepts GET and HEAD only, because it is not \
                 loopback and --allow-remote-admin-orders is not given"
            ));
        }
        for origin in request.headers().get_all(ORIGIN) {
            let origin = String::from_utf8_lossy(origin.as_bytes()).to_ascii_lowercase();
            if host.is_none() || origin.strip_prefix("http://") != host.as_deref() {
                return Err(format!("orders from the web origin {origin:?} are refused"));
            }
        }
        let site = HeaderName::from_static("sec-fetch-site");
        for site in request.headers().get_all(site) {
            if !matches!(site.as_bytes(), b"same-origin" | b"none") {
                let site = String::from_utf8_lossy(site.as_bytes());
                return Err(format!("orders with Sec-Fetch-Site {site:?} are refused"));
            }
        }
        Ok(())
    }

    fn is_known_host(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let bare = |text: &str| {
            let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
            inner.unwrap_or(text).to_owned()
        };
        host.parse::<SocketAddr>().is_ok()
            || bare(host).parse::<IpAddr>().is_ok()
            || bare(name).parse::<IpAddr>().is_ok()
            || name == "localhost"
            || self.host_names.iter().any(|known| known.eq_ignore_ascii_case(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(access: &AdminAccess, method: &str, headers: &[(&str, &str)]) -> bool {
        let mut request = Request::builder().method(method).uri("/drain");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        access.check(&request.body(()).expect("a request")).is_ok()
    }

    fn local() -> AdminAccess {
        AdminAccess { allows_post: true, host_names: vec!["weft.example".into()] }
    }

    #[test]
    fn host_must_be_an_address_localhost_or_a_configured_name() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:15000",
            "[::1]:15000",
            "[::1]",
            "localhost",
            "LOCALHOST:15000",
            "weft.example",
            "Weft.Example:15000",
        ] {
            assert!(check(&local(), "GET", &[("host", host)]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""] {
            assert!(!check(&local(), "GET", &[("host", host)]), "{host}");
        }
        assert!(!check(&local(), "GET", &[("host", "127.0.0.1"), ("host", "evil.example")]));
        assert!(check(&local(), "GET", &[]), "HTTP/1.0");
    }

    #[test]
    fn orders_of_foreign_web_pages_are_refused() {
        let host = ("host", "127.0.0.1:15000");
        let order =
            |headers: &[(&str, &str)]| check(&local(), "POST", &[&[host], headers].concat());
        assert!(order(&[]));
        assert!(order(&[("origin", "http://127.0.0.1:15000"), ("sec-fetch-site", "same-origin")]));
        for header in [
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("origin", "http://127.0.0.1:8080"),
            ("origin", "https://127.0.0.1:15000"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert!(!order(&[header]), "{header:?}");
            assert!(check(&local(), "GET", &[host, header]), "reading is no order: {header:?}");
        }
    }

    #[test]
    fn port_beyond_loopback_takes_no_orders_unless_allowed() {
        let remote = AdminAccess { allows_post: false, ..local() };
        let host = ("host", "10.0.0.1:15000");
        assert!(!check(&remote, "POST", &[host]));
        assert!(!check(&remote, "DELETE", &[host]));
        assert!(check(&remote, "GET", &[host]));
        assert!(check(&local(), "POST", &[host]));
    }
}
