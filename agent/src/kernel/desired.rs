//! What the kernel's table should contain, and the names of the table and its chains.

use super::flows::ExpiredEndpoint;
use super::service::{KernelService, SecurityGroup, ServiceAddress, ServiceKey};

/// The name of the table.
pub(super) const TABLE: &str = "weft_services";
/// The comment of the table.
pub(super) const COMMENT: &str = "owner=weft-agent";

/// The desired contents of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct DesiredTable<'a> {
    pub(super) services: &'a [KernelService],
    pub(super) groups: &'a [SecurityGroup],
    /// Endpoints whose TCP connections are reset at their next packet.
    pub(super) expired: &'a [ExpiredEndpoint],
    /// Whether iptables may capture UDP packets before their destination is translated.
    pub(super) may_be_captured_by_iptables: bool,
}

impl DesiredTable<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.groups.is_empty() && self.expired.is_empty()
    }
}

/// The name of the chain and counter of a service.
pub(super) fn chain_name(key: ServiceKey) -> String {
    let transport = key.transport.word();
    // The nft command does not allow a colon in a name.
    match key.address {
        ServiceAddress::Exact(at) => {
            format!("{transport}_{}_{}", at.ip(), at.port()).replace(':', "-")
        }
        ServiceAddress::AnyLocal(at) if at.is_ipv4() => format!("{transport}_here4_{}", at.port()),
        ServiceAddress::AnyLocal(at) => format!("{transport}_here6_{}", at.port()),
    }
}

/// The name of the chain and counter of a service's security group.
pub(super) fn group_name(key: ServiceKey) -> String {
    format!("{GROUP_PREFIX}{}", chain_name(key))
}

/// The prefix of the names of security group chains.
pub(super) const GROUP_PREFIX: &str = "group_";
