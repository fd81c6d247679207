//! Parsers for option values. clap reports their errors as usage errors before a command starts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;

use clap::builder::RangedU64ValueParser;
use weft_runtime::log;

/// The highest accepted limit on connections or flows.
const LIMIT: u64 = 1_000_000;
/// The highest accepted number of worker threads.
const WORKER_LIMIT: usize = 1024;

/// Parses a log filter.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    log::check(text).map(|()| text.to_owned())
}

/// Parses a limit on the connections or flows of one worker.
pub(super) fn limit() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=LIMIT)
}

/// Parses a number of worker threads.
pub(super) fn workers(text: &str) -> Result<NonZeroUsize, String> {
    let count = text.parse().ok().filter(|count: &NonZeroUsize| count.get() <= WORKER_LIMIT);
    count.ok_or_else(|| format!("must be 1 to {WORKER_LIMIT}"))
}

/// Parses `HOST:PORT`, where HOST is a name, an IPv4 address, or an IPv6 address in brackets.
pub(super) fn host_and_port(text: &str) -> Result<String, String> {
    let refuse = |why: &str| {
        Err(format!(
            "invalid address: {why}: must be HOST:PORT, such as control.example:15010 or [fd00::1]:15010"
        ))
    };
    if text.parse::<Ipv6Addr>().is_ok() {
        return refuse("an IPv6 address needs brackets and a port");
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return refuse("the port is missing");
    };
    if port.parse().ok().is_none_or(|port: u16| port == 0) {
        return refuse(&format!("port {port:?} is not in 1 to 65535"));
    }
    let is_address = host.starts_with('[') && text.parse::<SocketAddr>().is_ok();
    if is_address || is_host_name(host) {
        return Ok(text.to_owned());
    }
    refuse(&format!("host {host:?} is neither a host name nor an IP address"))
}

/// Parses a host name or an IPv4 address, without a port.
pub(super) fn host_name(text: &str) -> Result<String, String> {
    if is_host_name(text) {
        return Ok(text.to_owned());
    }
    Err("must be a host name without a port: labels of A-Z a-z 0-9 - _ joined by dots".to_owned())
}

/// Parses a local source address for upstream connections.
pub(super) fn source_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| "must be an IP address".to_owned())?;
    if address.is_unspecified() || address.is_multicast() {
        return Err("must be an address of this host".to_owned());
    }
    Ok(address)
}

/// Parses the client or destination of a flow: `ADDRESS:PORT`.
pub(super) fn flow_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "must be ADDRESS:PORT, such as 10.96.0.3:7000 or [fd96::3]:7000".to_owned())?;
    if address.port() == 0 {
        return Err("invalid port 0: must be 1 to 65535".to_owned());
    }
    match address.ip().to_canonical() {
        canonical if canonical == address.ip() => Ok(address),
        // The agent reports flows of IPv4 with IPv4 addresses only.
        canonical => Err(format!(
            "IPv4-mapped IPv6 address: must be {}",
            SocketAddr::new(canonical, address.port())
        )),
    }
}

/// Whether the text is a host name or an IPv4 address (RFC 1123, section 2.1). Underscores are accepted: container
/// names have them. When the last label is a number, the text must be an IPv4 address: no top-level domain is a
/// number, and some resolvers read `1.2.3` as 1.2.0.3.
fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(is_name_byte)
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit());
    if is_number {
        return text.parse::<Ipv4Addr>().is_ok();
    }
    name.len() <= 253 && name.split('.').all(is_label)
}
