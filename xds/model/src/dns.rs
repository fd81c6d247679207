//! DNS clusters: which host names are resolved, how often, and which endpoints the answers give.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::{Endpoint, EndpointSet, Health};

/// Host names that resolve to the endpoints of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsDiscovery {
    /// The host names.
    pub hosts: Vec<DnsHost>,
    /// How each of them is resolved.
    pub policy: DnsPolicy,
}

/// A host name with the port and weight of its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsHost {
    /// The host name, or an address.
    pub name: String,
    /// The port of every endpoint.
    pub port: u16,
    /// The weight of every endpoint.
    pub weight: NonZeroU32,
}

/// How host names are resolved, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DnsPolicy {
    /// Time between two successful lookups (`dns_refresh_rate`).
    pub refresh: Duration,
    /// Whether the TTL of an answer replaces `refresh` (`respect_dns_ttl`).
    pub respects_ttl: bool,
    /// The largest random time added to either (`dns_jitter`).
    pub jitter: Duration,
    /// Backoff after the first failed lookup (`dns_failure_refresh_rate.base_interval`).
    pub failure_base: Duration,
    /// Largest backoff after failed lookups (`dns_failure_refresh_rate.max_interval`).
    pub failure_max: Duration,
    /// Which addresses are used (`dns_lookup_family`).
    pub family: DnsFamily,
    /// What happens to the addresses of a name that no longer exists.
    pub on_empty_answer: OnEmptyAnswer,
}

/// The default interval between lookups, the same as Envoy's.
pub const DEFAULT_DNS_REFRESH: Duration = Duration::from_secs(5);

impl Default for DnsPolicy {
    fn default() -> Self {
        Self {
            refresh: DEFAULT_DNS_REFRESH,
            respects_ttl: false,
            jitter: Duration::ZERO,
            failure_base: Duration::from_secs(1),
            failure_max: DEFAULT_DNS_REFRESH,
            family: DnsFamily::Auto,
            on_empty_answer: OnEmptyAnswer::Drop,
        }
    }
}

/// Which addresses of a host name are used (`Cluster.dns_lookup_family`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DnsFamily {
    /// IPv6 addresses if there are any, otherwise IPv4.
    Auto,
    /// IPv4 addresses.
    V4Only,
    /// IPv6 addresses.
    V6Only,
    /// IPv4 addresses if there are any, otherwise IPv6.
    V4Preferred,
    /// Both.
    All,
}

/// What happens to the last addresses when an authoritative answer has none (NXDOMAIN, or no records).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnEmptyAnswer {
    /// The addresses are dropped, as Envoy does for `STRICT_DNS`.
    Drop,
    /// The addresses are kept, as Envoy does for `LOGICAL_DNS`.
    Keep,
}

/// A host name and how it is resolved: the key under which answers are cached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DnsQuery {
    /// The host name.
    pub name: String,
    /// How it is resolved.
    pub policy: DnsPolicy,
}

impl DnsDiscovery {
    /// The lookups that the cluster needs: none for hosts that are addresses.
    pub fn queries(&self) -> impl Iterator<Item = DnsQuery> {
        let names = self.hosts.iter().filter(|host| host.address().is_none());
        names.map(|host| DnsQuery { name: host.name.clone(), policy: self.policy })
    }

    /// The endpoints of the cluster, sorted by address; none while a host name was never looked up.
    #[must_use]
    pub fn endpoints(&self, answers: &BTreeMap<DnsQuery, Arc<[IpAddr]>>) -> Option<EndpointSet> {
        let mut endpoints = Vec::new();
        for host in &self.hosts {
            let query = || DnsQuery { name: host.name.clone(), policy: self.policy };
            let addresses = match host.address() {
                Some(address) => Arc::from([address]),
                None => answers.get(&query())?.clone(),
            };
            endpoints.extend(addresses.iter().map(|address| Endpoint {
                address: SocketAddr::new(*address, host.port),
                weight: host.weight,
                health: Health::Healthy,
            }));
        }
        endpoints.sort_by_key(|endpoint| endpoint.address);
        endpoints.dedup_by_key(|endpoint| endpoint.address);
        Some(EndpointSet { endpoints })
    }
}

impl DnsHost {
    fn address(&self) -> Option<IpAddr> {
        self.name.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn discovery(names: &[&str]) -> DnsDiscovery {
        let host =
            |name: &&str| DnsHost { name: (*name).to_owned(), port: 80, weight: NonZeroU32::MIN };
        DnsDiscovery { hosts: names.iter().map(host).collect(), policy: DnsPolicy::default() }
    }

    fn answers(known: &[(&str, &[&str])]) -> BTreeMap<DnsQuery, Arc<[IpAddr]>> {
        let query = |name: &str| DnsQuery { name: name.to_owned(), policy: DnsPolicy::default() };
        let parse = |text: &&str| text.parse().expect("an address");
        known
            .iter()
            .map(|(name, addresses)| (query(name), addresses.iter().map(parse).collect()))
            .collect()
    }

    #[test]
    fn endpoints_are_unknown_until_every_name_was_looked_up() {
        let cluster = discovery(&["a", "b"]);
        assert_eq!(cluster.endpoints(&answers(&[("a", &["10.0.0.1"])])), None);
        let set = cluster.endpoints(&answers(&[("a", &["10.0.0.2", "10.0.0.1"]), ("b", &[])]));
        let addresses: Vec<String> = set
            .expect("both names were looked up")
            .endpoints
            .iter()
            .map(|endpoint| endpoint.address.to_string())
            .collect();
        assert_eq!(addresses, ["10.0.0.1:80", "10.0.0.2:80"]);
    }

    #[test]
    fn address_as_host_name_needs_no_lookup() {
        let cluster = discovery(&["192.0.2.1", "::1"]);
        assert_eq!(cluster.queries().count(), 0);
        let set = cluster.endpoints(&BTreeMap::new()).expect("nothing to look up");
        assert_eq!(set.endpoints.len(), 2);
    }
}
