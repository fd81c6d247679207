//! The sets of the table, whose elements follow the services.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use weft_model::{Cidr, Transport};

use super::desired::{DesiredTable, TABLE, chain_name, group_name};
use super::packet_fields::{NetFamily, address_and_port, address_bytes, dispatch_key};
use super::service::{KernelService, SecurityGroup, ServiceAddress};
use crate::netlink::NetlinkMessage;
use crate::netlink::nf_tables::{self as nf, ElementKeys, SetData, SetElement, SetSpec, ValueKind};

/// The contents of a set. Each set is for one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SetKind {
    /// Address, protocol and port of a service -> its chain.
    Services,
    /// Protocol and port, on any address of this host -> the chain of the service.
    LocalServices,
    /// Address and port of UDP services.
    UdpServices,
    /// The address of an endpoint, twice: as source and as destination.
    Hairpin,
    /// Address and port of a service, and those of an endpoint whose drain time has passed.
    ExpiredEndpoints,
    /// Address, protocol and port of a service, and ranges of client addresses that its security group admits.
    AllowedClients,
    /// The same for any address of this host.
    LocalAllowedClients,
    /// Address, protocol and port of a service -> the chain of its security group.
    SecurityGroups,
    /// The same for any address of this host.
    LocalSecurityGroups,
}

impl SetKind {
    /// All kinds, the admitted clients before the elements that lead to the security groups.
    const ALL: [Self; 9] = [
        Self::Services,
        Self::LocalServices,
        Self::UdpServices,
        Self::Hairpin,
        Self::ExpiredEndpoints,
        Self::AllowedClients,
        Self::LocalAllowedClients,
        Self::SecurityGroups,
        Self::LocalSecurityGroups,
    ];
}

/// A set of the table, by contents and address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableSet {
    what: SetKind,
    family: NetFamily,
}

impl TableSet {
    pub(super) fn of(what: SetKind, family: NetFamily) -> Self {
        Self { what, family }
    }

    /// All sets of the table.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        SetKind::ALL
            .into_iter()
            .flat_map(|what| NetFamily::BOTH.map(|family| Self { what, family }))
    }

    pub(super) fn name(self) -> &'static str {
        let (v4, v6) = match self.what {
            SetKind::Services => ("services4", "services6"),
            SetKind::LocalServices => ("here4", "here6"),
            SetKind::UdpServices => ("datagrams4", "datagrams6"),
            SetKind::Hairpin => ("hairpin4", "hairpin6"),
            SetKind::ExpiredEndpoints => ("ending4", "ending6"),
            SetKind::AllowedClients => ("let_in4", "let_in6"),
            SetKind::LocalAllowedClients => ("let_in_here4", "let_in_here6"),
            SetKind::SecurityGroups => ("groups4", "groups6"),
            SetKind::LocalSecurityGroups => ("groups_here4", "groups_here6"),
        };
        self.family.pick(v4, v6)
    }

    pub(super) fn make(self) -> NetlinkMessage {
        let address = self.family.kind();
        let port = ValueKind::Port;
        let protocol = ValueKind::Protocol;
        let (key, holds): (&[ValueKind], SetData<'_>) = match self.what {
            SetKind::Services | SetKind::SecurityGroups => {
                (&[address, protocol, port], SetData::Verdicts)
            }
            SetKind::LocalServices | SetKind::LocalSecurityGroups => {
                (&[protocol, port], SetData::Verdicts)
            }
            SetKind::UdpServices => (&[address, port], SetData::None),
            SetKind::Hairpin => (&[address, address], SetData::None),
            SetKind::ExpiredEndpoints => (&[address, port, address, port], SetData::None),
            SetKind::AllowedClients => (&[address, protocol, port, address], SetData::None),
            SetKind::LocalAllowedClients => (&[protocol, port, address], SetData::None),
        };
        let has_ranges =
            matches!(self.what, SetKind::AllowedClients | SetKind::LocalAllowedClients);
        nf::make_set(TABLE, SetSpec { name: self.name(), key, has_ranges, holds, size: None })
    }

    /// Whether the set belongs to security groups. Stale elements of these are removed first: for a moment
    /// they would admit removed clients, or drop packets of a removed group.
    pub(super) fn is_for_security_groups(self) -> bool {
        matches!(
            self.what,
            SetKind::AllowedClients
                | SetKind::LocalAllowedClients
                | SetKind::SecurityGroups
                | SetKind::LocalSecurityGroups
        )
    }

    /// Whether each element belongs to a single service.
    pub(super) fn is_per_service(self) -> bool {
        matches!(self.what, SetKind::Services | SetKind::LocalServices | SetKind::UdpServices)
    }

    /// The element for a service.
    pub(super) fn element_of(self, service: &KernelService) -> Option<SetElement> {
        let key = service.key;
        if !self.is_for(key.address) {
            return None;
        }
        match (self.what, key.address) {
            (SetKind::Services, ServiceAddress::Exact(_))
            | (SetKind::LocalServices, ServiceAddress::AnyLocal(_)) => {
                Some(SetElement::chain(&dispatch_key(key), &chain_name(key)))
            }
            (SetKind::UdpServices, ServiceAddress::Exact(at))
                if key.transport == Transport::Udp =>
            {
                Some(SetElement::new(ElementKeys::one(&address_and_port(at))))
            }
            _ => None,
        }
    }

    /// All desired elements.
    pub(super) fn elements(self, desired: DesiredTable<'_>) -> Vec<SetElement> {
        let is_ours = |is_ipv4| NetFamily::of(is_ipv4) == self.family;
        match self.what {
            SetKind::Services | SetKind::LocalServices | SetKind::UdpServices => {
                desired.services.iter().filter_map(|service| self.element_of(service)).collect()
            }
            SetKind::Hairpin => {
                let services = desired.services.iter().filter(|s| self.is_for(s.key.address));
                let endpoints: BTreeSet<IpAddr> =
                    services.flat_map(|s| s.table.endpoints()).map(SocketAddr::ip).collect();
                let twice =
                    |ip: IpAddr| ElementKeys::one(&[address_bytes(ip), address_bytes(ip)].concat());
                endpoints.into_iter().map(twice).map(SetElement::new).collect()
            }
            SetKind::ExpiredEndpoints => {
                let ours = desired.expired.iter().filter(|e| is_ours(e.destination.is_ipv4()));
                ours.map(|e| {
                    ElementKeys::one(
                        &[address_and_port(e.destination), address_and_port(e.endpoint)].concat(),
                    )
                })
                .map(SetElement::new)
                .collect()
            }
            SetKind::SecurityGroups | SetKind::LocalSecurityGroups => {
                let element = |group: &SecurityGroup| {
                    SetElement::chain(&dispatch_key(group.key), &group_name(group.key))
                };
                self.groups(desired).map(element).collect()
            }
            SetKind::AllowedClients | SetKind::LocalAllowedClients => {
                let ranges = |group: &SecurityGroup| {
                    let place = dispatch_key(group.key);
                    let ranges = widest(group.ranges.iter().filter(|r| is_ours(r.is_ipv4())));
                    let keys = move |range: &Cidr| {
                        let end = |address| [place.as_slice(), &address_bytes(address)].concat();
                        ElementKeys::range(&end(range.address()), &end(range.last()))
                    };
                    ranges.into_iter().map(keys).map(SetElement::new).collect::<Vec<_>>()
                };
                self.groups(desired).flat_map(ranges).collect()
            }
        }
    }

    /// The security groups that this set is about.
    fn groups(self, desired: DesiredTable<'_>) -> impl Iterator<Item = &SecurityGroup> {
        let is_here =
            matches!(self.what, SetKind::LocalAllowedClients | SetKind::LocalSecurityGroups);
        let is_ours = move |place| {
            self.is_for(place) && matches!(place, ServiceAddress::AnyLocal(_)) == is_here
        };
        desired.groups.iter().filter(move |group| is_ours(group.key.address))
    }

    fn is_for(self, place: ServiceAddress) -> bool {
        NetFamily::of(place.is_ipv4()) == self.family
    }
}

/// The ranges that no other range contains: the kernel accepts no overlapping ranges.
fn widest<'a>(ranges: impl Iterator<Item = &'a Cidr>) -> Vec<&'a Cidr> {
    let mut ranges: Vec<&Cidr> = ranges.collect();
    // Of two overlapping ranges one contains the other, starts no later, and has the shorter prefix.
    ranges.sort_by_key(|range| (range.address(), range.prefix_bits()));
    ranges.dedup_by(|later, kept| kept.contains(later.address()));
    ranges
}
