//! Access control of the admin port: which requests are answered, and which may change the process.
//!
//! A web page in a browser on this host can send requests to loopback. The page cannot choose what the
//! browser writes into `Host`, `Origin` and `Sec-Fetch-Site`, so these headers decide.

use std::net::{IpAddr, SocketAddr};

use http::header::{HOST, HeaderName, ORIGIN};
use http::{Method, Request};

/// The access rules of one admin port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AdminAccess {
    /// Whether the port accepts requests other than GET and HEAD.
    pub(super) allows_post: bool,
    /// Host names accepted in `Host`, besides IP addresses and `localhost`.
    pub(super) host_names: Vec<String>,
}

impl AdminAccess {
    /// Checks whether a request may be answered.
    ///
    /// # Errors
    /// A `Host` that is repeated or unknown, a method other than GET and HEAD where these alone are allowed,
    /// and a POST from a web page of another origin. The text names the value and what is accepted.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), String> {
        let hosts: Vec<&[u8]> =
            request.headers().get_all(HOST).iter().map(|value| value.as_bytes()).collect();
        let host = match hosts.as_slice() {
            // Only HTTP/1.0 requests have no Host, and no browser sends HTTP/1.0.
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
                let method = request.method();
                return Err(format!(
                    "{method} refused: Origin {origin:?} is not this admin address"
                ));
            }
        }
        let site = HeaderName::from_static("sec-fetch-site");
        for site in request.headers().get_all(site) {
            if !matches!(site.as_bytes(), b"same-origin" | b"none") {
                let site = String::from_utf8_lossy(site.as_bytes());
                let method = request.method();
                return Err(format!(
                    "{method} refused: Sec-Fetch-Site is {site:?}, must be same-origin or none"
                ));
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
        access.check(&request.body(()).expect("the request is valid")).is_ok()
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
    fn post_requests_of_other_web_origins_are_refused() {
        let host = ("host", "127.0.0.1:15000");
        let post = |headers: &[(&str, &str)]| check(&local(), "POST", &[&[host], headers].concat());
        assert!(post(&[]));
        assert!(post(&[("origin", "http://127.0.0.1:15000"), ("sec-fetch-site", "same-origin")]));
        for header in [
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("origin", "http://127.0.0.1:8080"),
            ("origin", "https://127.0.0.1:15000"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert!(!post(&[header]), "{header:?}");
            assert!(check(&local(), "GET", &[host, header]), "GET is allowed: {header:?}");
        }
    }

    #[test]
    fn non_loopback_admin_port_refuses_post_requests_unless_allowed() {
        let remote = AdminAccess { allows_post: false, ..local() };
        let host = ("host", "10.0.0.1:15000");
        assert!(!check(&remote, "POST", &[host]));
        assert!(!check(&remote, "DELETE", &[host]));
        assert!(check(&remote, "GET", &[host]));
        assert!(check(&local(), "POST", &[host]));
    }
}
