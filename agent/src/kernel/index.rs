//! The sets of the table whose elements come and go with the services, and the names of their chains.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use weft_model::{Cidr, Transport};

use super::field::{Family, dispatch_key, full, padded};
use super::service::{Group, KernelService, Key, Place};
use super::table::{TABLE, Wanted};
use crate::netlink::Message;
use crate::netlink::nf_tables::{self as nf, Element, Holds, Keys, Set, ValueKind};

/// What a set of one family of addresses holds, whose elements come and go with the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// A service's address, protocol and port: its chain.
    Services,
    /// A protocol and port of any address of this host: the service's chain.
    Here,
    /// The address and port of a service of datagrams.
    Datagrams,
    /// An endpoint's address, twice.
    Hairpin,
    /// A service's address and port, and those of an endpoint that it has no more.
    Ending,
    /// A service's address, protocol and port, and the clients that its security group lets in, by
    /// ranges.
    LetIn,
    /// The same for any address of this host.
    LetInHere,
    /// A service's address, protocol and port: the chain of its security group.
    Groups,
    /// The same for any address of this host.
    GroupsHere,
}

impl What {
    /// All of them; whom groups let in before what leads to the groups.
    const ALL: [Self; 9] = [
        Self::Services,
        Self::Here,
        Self::Datagrams,
        Self::Hairpin,
        Self::Ending,
        Self::LetIn,
        Self::LetInHere,
        Self::Groups,
        Self::GroupsHere,
    ];
}

/// One of these sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Index {
    what: What,
    family: Family,
}

impl Index {
    pub(super) fn of(what: What, family: Family) -> Self {
        Self { what, family }
    }

    /// Every one that there is.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        What::ALL.into_iter().flat_map(|what| Family::BOTH.map(|family| Self { what, family }))
    }

    pub(super) fn name(self) -> &'static str {
        let (v4, v6) = match self.what {
            What::Services => ("services4", "services6"),
            What::Here => ("here4", "here6"),
            What::Datagrams => ("datagrams4", "datagrams6"),
            What::Hairpin => ("hairpin4", "hairpin6"),
            What::Ending => ("ending4", "ending6"),
            What::LetIn => ("let_in4", "let_in6"),
            What::LetInHere => ("let_in_here4", "let_in_here6"),
            What::Groups => ("groups4", "groups6"),
            What::GroupsHere => ("groups_here4", "groups_here6"),
        };
        self.family.pick(v4, v6)
    }

    pub(super) fn make(self) -> Message {
        let address = self.family.kind();
        let (port, protocol) = (ValueKind::Port, ValueKind::Protocol);
        let (key, holds): (&[ValueKind], Holds<'_>) = match self.what {
            What::Services | What::Groups => (&[address, protocol, port], Holds::Verdicts),
            What::Here | What::GroupsHere => (&[protocol, port], Holds::Verdicts),
            What::Datagrams => (&[address, port], Holds::Nothing),
            What::Hairpin => (&[address, address], Holds::Nothing),
            What::Ending => (&[address, port, address, port], Holds::Nothing),
            What::LetIn => (&[address, protocol, port, address], Holds::Nothing),
            What::LetInHere => (&[protocol, port, address], Holds::Nothing),
        };
        let has_ranges = matches!(self.what, What::LetIn | What::LetInHere);
        nf::make_set(TABLE, Set { name: self.name(), key, has_ranges, holds, size: None })
    }

    /// Whether it is of security groups: whoever is let in no more is not for a moment, and a group
    /// that is gone drops nobody for a moment.
    pub(super) fn is_of_groups(self) -> bool {
        matches!(self.what, What::LetIn | What::LetInHere | What::Groups | What::GroupsHere)
    }

    /// Whether what it holds comes and goes with a single service.
    pub(super) fn is_per_service(self) -> bool {
        matches!(self.what, What::Services | What::Here | What::Datagrams)
    }

    /// What it holds for a service.
    pub(super) fn element_of(self, service: &KernelService) -> Option<Element> {
        let (transport, place) = service.key;
        if !self.is_for(place) {
            return None;
        }
        match (self.what, place) {
            (What::Services, Place::At(_)) | (What::Here, Place::Here(_)) => {
                Some(Element::chain(&dispatch_key(service.key), &chain_name(service.key)))
            }
            (What::Datagrams, Place::At(at)) if transport == Transport::Udp => {
                Some(Element::new(Keys::one(&full(at))))
            }
            _ => None,
        }
    }

    /// All that it holds.
    pub(super) fn elements(self, wanted: Wanted<'_>) -> Vec<Element> {
        let is_ours = |is_ipv4| Family::of(is_ipv4) == self.family;
        match self.what {
            What::Services | What::Here | What::Datagrams => {
                wanted.services.iter().filter_map(|service| self.element_of(service)).collect()
            }
            What::Hairpin => {
                let services = wanted.services.iter().filter(|s| self.is_for(s.key.1));
                let endpoints: BTreeSet<IpAddr> =
                    services.flat_map(|s| s.table.endpoints()).map(SocketAddr::ip).collect();
                let twice = |ip: IpAddr| Keys::one(&[padded(ip), padded(ip)].concat());
                endpoints.into_iter().map(twice).map(Element::new).collect()
            }
            What::Ending => {
                let ours = wanted.ending.iter().filter(|e| is_ours(e.destination.is_ipv4()));
                ours.map(|e| Keys::one(&[full(e.destination), full(e.endpoint)].concat()))
                    .map(Element::new)
                    .collect()
            }
            What::Groups | What::GroupsHere => {
                let element = |group: &Group| {
                    Element::chain(&dispatch_key(group.key), &group_name(group.key))
                };
                self.groups(wanted).map(element).collect()
            }
            What::LetIn | What::LetInHere => {
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
        }
    }

    /// The groups that an index of groups is about.
    fn groups(self, wanted: Wanted<'_>) -> impl Iterator<Item = &Group> {
        let is_here = matches!(self.what, What::LetInHere | What::GroupsHere);
        let is_ours = move |place| self.is_for(place) && matches!(place, Place::Here(_)) == is_here;
        wanted.groups.iter().filter(move |group| is_ours(group.key.1))
    }

    fn is_for(self, place: Place) -> bool {
        Family::of(place.is_ipv4()) == self.family
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
