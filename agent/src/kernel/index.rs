//! The sets of the table whose elements come and go with the services, and the names of their chains.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use weft_model::Transport;

use super::field::{Family, dispatch_key, full, padded};
use super::service::{Group, KernelService, Key, Place};
use super::table::{TABLE, Wanted};
use crate::netlink::Message;
use crate::netlink::nf_tables::{self as nf, Element, Holds, Set, ValueKind};

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
}

impl Index {
    pub(super) const ALL: [Self; 14] = [
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
            | Self::GroupsHere4 => Family::V4,
            Self::Services6
            | Self::Here6
            | Self::Datagrams6
            | Self::Hairpin6
            | Self::Ending6
            | Self::Groups6
            | Self::GroupsHere6 => Family::V6,
        }
    }

    pub(super) fn make(self) -> Message {
        let family = self.family();
        let address = family.words() * 4;
        let (key, key_bytes, holds): (&[ValueKind], u32, Holds<'_>) = match self {
            Self::Services4 | Self::Services6 | Self::Groups4 | Self::Groups6 => (
                &[family.kind(), ValueKind::Protocol, ValueKind::Port],
                address + 8,
                Holds::Verdicts,
            ),
            Self::Here4 | Self::Here6 | Self::GroupsHere4 | Self::GroupsHere6 => {
                (&[ValueKind::Protocol, ValueKind::Port], 8, Holds::Verdicts)
            }
            Self::Datagrams4 | Self::Datagrams6 => {
                (&[family.kind(), ValueKind::Port], address + 4, Holds::Nothing)
            }
            Self::Hairpin4 | Self::Hairpin6 => {
                (&[family.kind(), family.kind()], address * 2, Holds::Nothing)
            }
            Self::Ending4 | Self::Ending6 => (
                &[family.kind(), ValueKind::Port, family.kind(), ValueKind::Port],
                address * 2 + 8,
                Holds::Nothing,
            ),
        };
        nf::make_set(TABLE, Set { name: self.name(), key, key_bytes, holds, size: None })
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
            | Self::GroupsHere6 => false,
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
                Some(Element::key(&full(at)))
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
                let twice = |ip: IpAddr| Element::key(&[padded(ip), padded(ip)].concat());
                endpoints.into_iter().map(twice).collect()
            }
            Self::Ending4 | Self::Ending6 => {
                let ours = wanted.ending.iter().filter(|e| is_ours(e.destination.is_ipv4()));
                ours.map(|e| Element::key(&[full(e.destination), full(e.endpoint)].concat()))
                    .collect()
            }
            Self::Groups4 | Self::Groups6 | Self::GroupsHere4 | Self::GroupsHere6 => {
                let is_here = matches!(self, Self::GroupsHere4 | Self::GroupsHere6);
                let groups = wanted.groups.iter().filter(|group| {
                    let place = group.key.1;
                    is_ours(place.is_ipv4()) && matches!(place, Place::Here(_)) == is_here
                });
                let element = |group: &Group| {
                    Element::chain(&dispatch_key(group.key), &group_name(group.key))
                };
                groups.map(element).collect()
            }
            _ => wanted.services.iter().filter_map(|service| self.element_of(service)).collect(),
        }
    }
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
