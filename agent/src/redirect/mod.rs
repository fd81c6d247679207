//! How the kernel is told to hand traffic over.
//!
//! [`RedirectConfig`] says what is wanted, [`rules`] what rules that comes to, as values. They are told to
//! the kernel itself ([`native`]), which needs no tool; or as text to a tool: [`nft`], or [`iptables`]
//! where the kernel has no nf_tables. Either way it is one transaction in tables or chains of our own,
//! so installing it twice changes nothing and removing it leaves nothing. [`apply`] does it, in any
//! network namespace.

mod apply;
mod dns;
mod guard;
mod iptables;
mod native;
mod nft;
mod probe;
mod report;
mod rules;

use std::hash::Hasher;
use std::net::IpAddr;

use weft_model::Cidr;

pub(crate) use apply::is_in_iptables;
pub use apply::{
    BackendChoice, Namespace, RedirectBackend, RedirectError, RedirectState, apply, plan, remove,
    remove_all, verify,
};
pub use dns::apply_once;
pub use guard::{DesiredRedirects, RedirectGuard};
pub use probe::{ProbeOutcome, probe};
pub use report::{RedirectReport, RedirectStatus};

/// The mark by which packets for other addresses are routed to sockets of ours, under [`MARK_MASK`]:
/// UDP for services, and answers to clients whose addresses we send from.
pub const LOCAL_DELIVERY_MARK: u32 = 0x111;
/// The bits of a packet's mark that are ours.
pub const MARK_MASK: u32 = 0xfff;
/// The routing table that delivers marked packets locally.
pub const ROUTE_TABLE: u8 = 100;

/// What is handed over, in one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectConfig {
    /// Who installed it, in the table's comment.
    pub owner: String,
    /// The port that takes TCP arriving for this namespace's own addresses: a sidecar's inbound.
    pub inbound: Option<u16>,
    /// The port that takes TCP leaving this namespace: a sidecar's outbound.
    pub outbound: Option<u16>,
    /// The port that takes TCP for services arriving from other hosts: an agent's.
    pub forwarded: Option<u16>,
    /// The port that takes UDP for services.
    pub udp: Option<u16>,
    /// The addresses of services. For `outbound`, empty means every address.
    pub services: Vec<Cidr>,
    /// The port of this namespace's loopback at which a DNS server takes what programs ask `resolvers`.
    pub dns: Option<u16>,
    /// Whose questions it takes, over UDP and TCP.
    pub resolvers: Vec<IpAddr>,
    /// Ports that arriving traffic keeps.
    pub exclude_inbound_ports: Vec<u16>,
    /// Ports that leaving traffic keeps.
    pub exclude_outbound_ports: Vec<u16>,
    /// Addresses that leaving traffic keeps.
    pub exclude_destinations: Vec<Cidr>,
    /// Network devices whose traffic stays as it is, both ways.
    pub exclude_interfaces: Vec<String>,
    /// Users whose leaving traffic stays as it is.
    pub exclude_users: Vec<u32>,
    /// Whether what would pass by the proxy is dropped: with `inbound`, what arrives for this
    /// namespace and is neither handed over nor excluded; with `outbound`, what leaves it so. Answers
    /// pass, and what IPv6 needs to find its neighbours.
    pub strict: bool,
    /// Whether the proxy may send from its clients' addresses: answers to them are handed to it.
    pub keep_source: bool,
    /// The mark on what the proxy itself sends.
    pub mark: u32,
    /// The user the proxy runs as, for hosts where it may not set a mark.
    pub uid: Option<u32>,
}

impl RedirectConfig {
    /// The ports of weft itself, which are never redirected.
    pub const OWN_PORTS: (u16, u16) = (15000, 15099);
    /// How many ranges, ports, devices and users it may name in all; each is a rule or more.
    pub const MAX_ENTRIES: usize = 400;

    /// Whether packets for other addresses are to be routed to sockets of ours.
    fn needs_marked_route(&self) -> bool {
        self.udp.is_some() || self.keep_source
    }

    /// Whether there is nothing to redirect.
    pub(crate) fn is_empty(&self) -> bool {
        self.ports().iter().all(Option::is_none)
    }

    /// What takes traffic, each where it is wanted.
    fn ports(&self) -> [Option<u16>; 5] {
        [self.inbound, self.outbound, self.forwarded, self.udp, self.dns]
    }

    /// The same as long as nobody answers DNS: programs ask their resolvers themselves.
    pub(crate) fn without_dns(&self) -> Self {
        Self { dns: None, resolvers: Vec::new(), ..self.clone() }
    }

    /// A hash of everything that is wanted, to tell whether what is installed is that.
    #[must_use]
    pub fn hash(&self) -> String {
        let mut hasher = siphasher::sip::SipHasher13::new();
        hasher.write(format!("{self:?}").as_bytes());
        format!("{:016x}", hasher.finish())
    }

    /// What stands in the comment of the table or chain: whose it is, how often rules of ours were
    /// installed there, and what these are.
    #[must_use]
    pub fn comment(&self, generation: u64) -> String {
        format!("owner={} generation={generation} hash={}", self.owner, self.hash())
    }

    /// Whether a comment is of these rules, of whatever generation.
    fn matches_comment(&self, comment: &str) -> bool {
        let (owner, hash) = (format!("owner={}", self.owner), format!("hash={}", self.hash()));
        [owner, hash].iter().all(|wanted| words(comment).any(|word| word == wanted))
    }

    /// Whether it wants anything that can be done.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.is_empty() {
            return Err(
                "nothing to redirect: give at least one of inbound, outbound, forwarded, udp and dns"
                    .into(),
            );
        }
        if self.dns.is_some() == self.resolvers.is_empty() {
            return Err("dns, a port, and resolvers, addresses, need each other".into());
        }
        if self.dns.is_some() && self.exclude_outbound_ports.contains(&dns::PORT) {
            return Err(
                "exclude_outbound_ports: 53 is what dns takes; leave one of them out".into()
            );
        }
        let excluded = self.exclude_inbound_ports.iter().chain(&self.exclude_outbound_ports);
        if self.ports().contains(&Some(0)) || excluded.copied().any(|port| port == 0) {
            return Err("invalid port 0: must be 1 to 65535".into());
        }
        if (self.udp.is_some() || self.forwarded.is_some()) && self.services.is_empty() {
            return Err("udp and forwarded need services, the addresses to take".into());
        }
        if self.strict && self.inbound.is_none() && self.outbound.is_none() {
            return Err("strict needs inbound or outbound, whose ways it closes".into());
        }
        // What the kernel takes, and neither a quote of ours nor a wildcard or an option of a tool's.
        let is_device = |name: &str| {
            (1..=15).contains(&name.len())
                && ![".", ".."].contains(&name)
                && !name.starts_with(['-', '!'])
                && name.chars().all(|c| c.is_ascii_graphic() && !"/\"*+\\'".contains(c))
        };
        if let Some(name) = self.exclude_interfaces.iter().find(|name| !is_device(name)) {
            return Err(format!(
                "exclude_interfaces: {name:?} is not the whole name of a network device, 1 to 15 characters"
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
                "services, resolvers and exclusions are {named} in all, of {} at most: join ranges that touch",
                Self::MAX_ENTRIES
            ));
        }
        let clean = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.owner.is_empty() || self.owner.len() > 40 || !self.owner.chars().all(clean) {
            return Err(format!("owner {:?} is not 1 to 40 of A-Z a-z 0-9 - _ .", self.owner));
        }
        Ok(())
    }
}

/// The words of a comment, as it stands in whatever listing.
fn words(comment: &str) -> impl Iterator<Item = &str> {
    comment.split_whitespace().map(|word| word.trim_matches('"'))
}

/// The generation that a comment tells; 0 when it tells none.
fn generation(comment: &str) -> u64 {
    let told = words(comment).find_map(|word| word.strip_prefix("generation=")?.parse().ok());
    told.unwrap_or(0)
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

#[cfg(test)]
mod tests;
