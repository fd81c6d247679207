//! What to redirect in a network namespace.

use std::net::IpAddr;

use weft_model::Cidr;

/// The DNS port (RFC 1035, section 4.2).
pub(super) const DNS_PORT: u16 = 53;
/// The mark of packets for other addresses that are delivered to local sockets, under [`MARK_MASK`]: UDP for
/// services, and responses to clients whose addresses the agent sends from.
pub(super) const LOCAL_DELIVERY_MARK: u32 = 0x111;
/// The bits of a packet mark that weft uses.
pub(crate) const MARK_MASK: u32 = 0xfff;
/// The routing table that delivers marked packets to this host.
pub(super) const ROUTE_TABLE: u8 = 100;

/// What to redirect in one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectConfig {
    /// The owner, which the comment of the table names.
    pub owner: String,
    /// The port for TCP connections to the namespace's own addresses: the inbound port of a sidecar.
    pub inbound: Option<u16>,
    /// The port for TCP connections from programs in the namespace: the outbound port of a sidecar.
    pub outbound: Option<u16>,
    /// The port for TCP connections from other hosts to services: the capture port of an agent.
    pub forwarded: Option<u16>,
    /// The port for UDP datagrams to services.
    pub udp: Option<u16>,
    /// The address ranges of services. For `outbound`, empty means every address.
    pub services: Vec<Cidr>,
    /// The port on loopback of the DNS server that takes DNS queries to `resolvers`.
    pub dns: Option<u16>,
    /// The resolvers whose queries are redirected, over UDP and TCP.
    pub resolvers: Vec<IpAddr>,
    /// Destination ports of inbound traffic that is not redirected.
    pub exclude_inbound_ports: Vec<u16>,
    /// Destination ports of outbound traffic that is not redirected.
    pub exclude_outbound_ports: Vec<u16>,
    /// Destination ranges of outbound traffic that is not redirected.
    pub exclude_destinations: Vec<Cidr>,
    /// Network devices whose traffic is not redirected, in either direction.
    pub exclude_interfaces: Vec<String>,
    /// User IDs whose outbound traffic is not redirected.
    pub exclude_users: Vec<u32>,
    /// Whether to drop traffic that bypasses the proxy: with `inbound`, arriving packets, and with
    /// `outbound`, leaving packets, that are neither redirected nor excluded. Responses and IPv6 neighbour
    /// discovery pass.
    pub strict: bool,
    /// Whether the proxy may send from addresses of its clients: responses to these are delivered to the proxy.
    pub keep_source: bool,
    /// The mark on packets that the proxy sends, which are not redirected.
    pub mark: u32,
    /// The user that the proxy runs as, for hosts where the proxy may not set a mark.
    pub uid: Option<u32>,
}

impl RedirectConfig {
    /// The first and last port of weft itself, which are never redirected.
    pub const OWN_PORTS: (u16, u16) = (15000, 15099);
    /// The most ranges, ports, devices and users in total; each becomes one or more rules.
    pub const MAX_ENTRIES: usize = 400;

    /// Whether packets for other addresses must be delivered to local sockets.
    pub(super) fn needs_marked_route(&self) -> bool {
        self.udp.is_some() || self.keep_source
    }

    /// Whether nothing is redirected.
    pub(super) fn is_empty(&self) -> bool {
        self.ports().iter().all(Option::is_none)
    }

    /// The ports that traffic is redirected to.
    fn ports(&self) -> [Option<u16>; 5] {
        [self.inbound, self.outbound, self.forwarded, self.udp, self.dns]
    }

    /// The same without DNS, for while the DNS server does not answer: programs query their resolvers directly.
    pub(super) fn without_dns(&self) -> Self {
        Self { dns: None, resolvers: Vec::new(), ..self.clone() }
    }

    /// Checks that the configuration is valid.
    ///
    /// # Errors
    /// Nothing to redirect, settings that conflict or need each other, an invalid port, device name or owner, or more
    /// than [`Self::MAX_ENTRIES`] entries.
    pub fn check(&self) -> Result<(), String> {
        if self.is_empty() {
            return Err(
                "nothing to redirect: set at least one of inbound, outbound, forwarded, udp and dns"
                    .into(),
            );
        }
        if self.dns.is_some() == self.resolvers.is_empty() {
            return Err("dns and resolvers must be set together".into());
        }
        if self.dns.is_some() && self.exclude_outbound_ports.contains(&DNS_PORT) {
            return Err(
                "exclude_outbound_ports: port 53 conflicts with dns, which redirects it: remove one of them".into()
            );
        }
        let excluded = self.exclude_inbound_ports.iter().chain(&self.exclude_outbound_ports);
        if self.ports().contains(&Some(0)) || excluded.copied().any(|port| port == 0) {
            return Err("invalid port 0: must be 1 to 65535".into());
        }
        if (self.udp.is_some() || self.forwarded.is_some()) && self.services.is_empty() {
            return Err("udp and forwarded need services, the virtual addresses to redirect".into());
        }
        if self.strict && self.inbound.is_none() && self.outbound.is_none() {
            return Err("strict needs inbound or outbound".into());
        }
        // What the kernel accepts, without quotes, wildcards and options of the tools.
        let is_device = |name: &str| {
            (1..=15).contains(&name.len())
                && ![".", ".."].contains(&name)
                && !name.starts_with(['-', '!'])
                && name.chars().all(|c| c.is_ascii_graphic() && !"/\"*+\\'".contains(c))
        };
        if let Some(name) = self.exclude_interfaces.iter().find(|name| !is_device(name)) {
            return Err(format!(
                "exclude_interfaces: invalid device name {name:?}: must be the full name of a network device, 1 to 15 characters"
            ));
        }
        let named = self.services.len()
            + self.resolvers.len()
            + self.exclude_inbound_ports.len()
            + self.exclude_outbound_ports.len()
            + self.exclude_destinations.len()
            + self.exclude_interfaces.len()
            + self.exclude_users.len();
        if named > Self::MAX_ENTRIES {
            return Err(format!(
                "too many services, resolvers and exclusions: {named}, at most {} in total: merge adjacent ranges",
                Self::MAX_ENTRIES
            ));
        }
        let clean = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.owner.is_empty() || self.owner.len() > 40 || !self.owner.chars().all(clean) {
            return Err(format!(
                "invalid owner {:?}: must be 1 to 40 characters of A-Z a-z 0-9 - _ .",
                self.owner
            ));
        }
        Ok(())
    }
}

/// An IP address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    pub(super) const BOTH: [Self; 2] = [Self::V4, Self::V6];
}
