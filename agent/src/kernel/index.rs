//! The sets of the table whose elements come and go with the services, and the names of their chains.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use weft_model::{Cidr, Transport};

use super::field::{Family, dispatch_key, full, padded};
use super::service::{Group, KernelService, Key, Place};
use super::table::{TABLE, Wanted};
use crate::netlink::Message;
use crate::netlink::nf_tables::{self as nf, Element, Holds, Keys, Set, ValueKind};

/// A set whose elements come and go with the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Index {
    /// A service's address, protocol and port: its chain.
    Services4,
    Services6,
    /// A protocol and port of any address of this host: the service's chain.
    Here4,
    Here6,
    /// The address and port of a service of datagrams.
    Datagrams4,
    Datagrams6,
    /// An endpoint's address, twice.
    Hairpin4,
    Hairpin6,
    /// A service's address and port, and those of an endpoint that it has no more.
    Ending4,
    Ending6,
    /// A service's address, protocol and port: the chain of its security group.
    Groups4,
    Groups6,
    /// The same for any address of this host.
    GroupsHere4,
    GroupsHere6,
    /// The same two, and the clients that the group lets in, by ranges.
    LetIn4,
    LetIn6,
    LetInHere4,
    LetInHere6,
}

impl Index {
    pub(super) const ALL: [Self; 18] = [
        Self::Services4,
        Self::Services6,
        Self::Here4,
        Self::Here6,
        Self::Datagrams4,
        Self::Datagrams6,
        Self::Hairpin4,
        Self::Hairpin6,
        Self::Ending4,
        Self::Ending6,
        // Before what leads to the groups.
        Self::LetIn4,
        Self::LetIn6,
        Self::LetInHere4,
        Self::LetInHere6,
        Self::Groups4,
        Self::Groups6,
        Self::GroupsHere4,
        Self::GroupsHere6,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Services4 => "services4",
            Self::Services6 => "services6",
            Self::Here4 => "here4",
            Self::Here6 => "here6",
            Self::Datagrams4 => "datagrams4",
            Self::Datagrams6 => "datagrams6",
            Self::Hairpin4 => "hairpin4",
            Self::Hairpin6 => "hairpin6",
            Self::Ending4 => "ending4",
            Self::Ending6 => "ending6",
            Self::Groups4 => "groups4",
            Self::Groups6 => "groups6",
            Self::GroupsHere4 => "groups_here4",
            Self::GroupsHere6 => "groups_here6",
            Self::LetIn4 => "let_in4",
            Self::LetIn6 => "let_in6",
            Self::LetInHere4 => "let_in_here4",
            Self::LetInHere6 => "let_in_here6",
        }
    }

    fn family(self) -> Family {
        match self {
            Self::Services4
            | Self::Here4
            | Self::Datagrams4
            | Self::Hairpin4
            | Self::Ending4
            | Self::Groups4
            | Self::GroupsHere4
            | Self::LetIn4
            | Self::LetInHere4 => Family::V4,
            Self::Services6
            | Self::Here6
            | Self::Datagrams6
            | Self::Hairpin6
            | Self::Ending6
            | Self::Groups6
            | Self::GroupsHere6
            | Self::LetIn6
            | Self::LetInHere6 => Family::V6,
        }
    }

    pub(super) fn make(self) -> Message {
        let address = self.family().kind();
        let (port, protocol) = (ValueKind::Port, ValueKind::Protocol);
        let (key, holds): (&[ValueKind], Holds<'_>) = match self {
            Self::Services4 | Self::Services6 | Self::Groups4 | Self::Groups6 => {
                (&[address, protocol, port], Holds::Verdicts)
            }
            Self::Here4 | Self::Here6 | Self::GroupsHere4 | Self::GroupsHere6 => {
                (&[protocol, port], Holds::Verdicts)
            }
            Self::Datagrams4 | Self::Datagrams6 => (&[address, port], Holds::Nothing),
            Self::Hairpin4 | Self::Hairpin6 => (&[address, address], Holds::Nothing),
            Self::Ending4 | Self::Ending6 => (&[address, port, address, port], Holds::Nothing),
            Self::LetIn4 | Self::LetIn6 => (&[address, protocol, port, address], Holds::Nothing),
            Self::LetInHere4 | Self::LetInHere6 => (&[protocol, port, address], Holds::Nothing),
        };
        let (name, has_ranges) = (self.name(), self.has_ranges());
        nf::make_set(TABLE, Set { name, key, has_ranges, holds, size: None })
    }

    fn has_ranges(self) -> bool {
        matches!(self, Self::LetIn4 | Self::LetIn6 | Self::LetInHere4 | Self::LetInHere6)
    }

    /// Whether it is of security groups: whoever is let in no more is not for a moment, and a group
    /// that is gone drops nobody for a moment.
    pub(super) fn is_of_groups(self) -> bool {
        let groups = [Self::Groups4, Self::Groups6, Self::GroupsHere4, Self::GroupsHere6];
        self.has_ranges() || groups.contains(&self)
    }

    /// Whether what it holds comes and goes with a single service.
    pub(super) fn is_per_service(self) -> bool {
        match self {
            Self::Services4
            | Self::Services6
            | Self::Here4
            | Self::Here6
            | Self::Datagrams4
            | Self::Datagrams6 => true,
            Self::Hairpin4
            | Self::Hairpin6
            | Self::Ending4
            | Self::Ending6
            | Self::Groups4
            | Self::Groups6
            | Self::GroupsHere4
            | Self::GroupsHere6
            | Self::LetIn4
            | Self::LetIn6
            | Self::LetInHere4
            | Self::LetInHere6 => false,
        }
    }

    /// What it holds for a service.
    pub(super) fn element_of(self, service: &KernelService) -> Option<Element> {
        let (transport, place) = service.key;
        if Family::of(place.is_ipv4()) != self.family() {
            return None;
        }
        let chain = || Some(Element::chain(&dispatch_key(service.key), &chain_name(service.key)));
        match (self, place) {
            (Self::Services4 | Self::Services6, Place::At(_))
            | (Self::Here4 | Self::Here6, Place::Here(_)) => chain(),
            (Self::Datagrams4 | Self::Datagrams6, Place::At(at)) if transport == Transport::Udp => {
                Some(Element::new(Keys::one(&full(at))))
            }
            _ => None,
        }
    }

    /// All that it holds.
    pub(super) fn elements(self, wanted: Wanted<'_>) -> Vec<Element> {
        let is_ours = |is_ipv4| Family::of(is_ipv4) == self.family();
        match self {
            Self::Hairpin4 | Self::Hairpin6 => {
                let services = wanted.services.iter().filter(|s| is_ours(s.key.1.is_ipv4()));
                let endpoints: BTreeSet<IpAddr> =
                    services.flat_map(|s| s.table.endpoints()).map(SocketAddr::ip).collect();
                let twice = |ip: IpAddr| Keys::one(&[padded(ip), padded(ip)].concat());
                endpoints.into_iter().map(twice).map(Element::new).collect()
            }
            Self::Ending4 | Self::Ending6 => {
                let ours = wanted.ending.iter().filter(|e| is_ours(e.destination.is_ipv4()));
                ours.map(|e| Keys::one(&[full(e.destination), full(e.endpoint)].concat()))
                    .map(Element::new)
                    .collect()
            }
            Self::Groups4 | Self::Groups6 | Self::GroupsHere4 | Self::GroupsHere6 => {
                let element = |group: &Group| {
                    Element::chain(&dispatch_key(group.key), &group_name(group.key))
                };
                self.groups(wanted).map(element).collect()
            }
            Self::LetIn4 | Self::LetIn6 | Self::LetInHere4 | Self::LetInHere6 => {
                let ranges = |group: &Group| {
                    let place = dispatch_key(group.key);
                    let ranges = widest(group.ranges.iter().filter(|r| is_ours(r.is_ipv4())));
                    let keys = move |range: &Cidr| {
                        let end = |address| [place.as_slice(), &padded(address)].concat();
                        Keys::range(&end(range.address()), &end(range.last()))
                    };
                    ranges.into_iter().map(keys).map(Element::new).collect::<Vec<_>>()
                };
                self.groups(wanted).flat_map(ranges).collect()
            }
            _ => wanted.services.iter().filter_map(|service| self.element_of(service)).collect(),
        }
    }
}

impl Index {
    /// The groups that an index of groups is about.
    fn groups(self, wanted: Wanted<'_>) -> impl Iterator<Item = &Group> {
        let here = [Self::GroupsHere4, Self::GroupsHere6, Self::LetInHere4, Self::LetInHere6];
        let is_here = here.contains(&self);
        wanted.groups.iter().filter(move |group| {
            let place = group.key.1;
            Family::of(place.is_ipv4()) == self.family()
                && matches!(place, Place::Here(_)) == is_here
        })
    }
}

/// The ranges that no other holds: the kernel takes none that overlap.
fn widest<'a>(ranges: impl Iterator<Item = &'a Cidr>) -> Vec<&'a Cidr> {
    let mut ranges: Vec<&Cidr> = ranges.collect();
    // Of two that overlap one holds the other, begins no later, and is the wider.
    ranges.sort_by_key(|range| (range.address(), range.prefix_bits()));
    ranges.dedup_by(|later, kept| kept.contains(later.address()));
    ranges
}

/// The name of a service's chain and counter.
pub(super) fn chain_name((transport, place): Key) -> String {
    let transport = transport.word();
    // The nft command knows no colon in a name.
    match place {
        Place::At(at) => format!("{transport}_{}_{}", at.ip(), at.port()).replace(':', "-"),
        Place::Here(at) if at.is_ipv4() => format!("{transport}_here4_{}", at.port()),
        Place::Here(at) => format!("{transport}_here6_{}", at.port()),
    }
}

/// The name of the chain and counter of a service's security group.
pub(super) fn group_name(key: Key) -> String {
    format!("{GROUP_PREFIX}{}", chain_name(key))
}

/// How the names of security groups begin.
pub(super) const GROUP_PREFIX: &str = "group_";
