//! Policy routing (man 7 rtnetlink): packets with a mark are delivered to this host, whatever their
//! destination.

use std::io;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::SockProtocol;

use super::{Attributes, CREATE, EXCLUSIVE, Netlink, NetlinkMessage, NetlinkReply, REPLACE};

/// The multicast groups for changes of rules and routes, of both address families.
pub(crate) const CHANGES: u32 = 1 << 6 | 1 << 10 | 1 << 7 | 1 << 18;

const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const GET_RULE: u16 = 34;
/// The length of the fixed part of a rule and of a route.
const FIXED_BYTES: usize = 12;

/// A routing rule that sends packets with a mark to a routing table, and the local route in that table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MarkedRoute {
    pub(crate) mark: u32,
    pub(crate) mask: u32,
    /// At most 252; higher numbers are reserved by the kernel.
    pub(crate) table: u8,
    /// The priority of the rule, which also identifies it. Below 32766, the priority of the rule for the main
    /// table.
    pub(crate) priority: u32,
}

impl MarkedRoute {
    /// Creates the rule and the route, for each address family of the host. Has no effect if they exist.
    ///
    /// # Errors
    /// The error code of the kernel.
    pub(crate) fn install(self) -> io::Result<()> {
        let mut kernel = Netlink::open(SockProtocol::NetlinkRoute)?;
        for family in [libc_family(true), libc_family(false)] {
            let rule = kernel.request(&self.rule(NEW_RULE, CREATE | EXCLUSIVE, family));
            match ignoring(rule, &[Errno::EEXIST]) {
                Err(error) if is_absent(family, &error) => continue,
                made => made?,
            }
            kernel.request(&self.route(NEW_ROUTE, CREATE | REPLACE, family)?)?;
        }
        Ok(())
    }

    /// Describes which parts are missing.
    ///
    /// # Errors
    /// The error code of the kernel.
    pub(crate) fn missing(self) -> io::Result<Vec<String>> {
        let mut kernel = Netlink::open(SockProtocol::NetlinkRoute)?;
        let mut missing = Vec::new();
        for (family, name) in [(libc_family(true), "IPv4"), (libc_family(false), "IPv6")] {
            let desired = self.rule(GET_RULE, 0, family);
            let rules = match kernel
                .dump(&NetlinkMessage { attributes: Attributes::new(), ..desired.clone() })
            {
                Err(error) if is_absent(family, &error) => continue,
                reply => reply?,
            };
            if !rules.iter().any(|rule| matches(rule, &desired)) {
                missing.push(format!("{name}: missing rule from the mark to table {}", self.table));
            }
            let desired = self.route(GET_ROUTE, 0, family)?;
            let routes = kernel
                .dump(&NetlinkMessage { attributes: Attributes::new(), ..desired.clone() })?;
            if !routes.iter().any(|route| matches(route, &desired)) {
                missing.push(format!("{name}: missing local route in table {}", self.table));
            }
        }
        Ok(missing)
    }

    /// Removes the rule and the route. Removing what does not exist is not an error.
    ///
    /// # Errors
    /// The error code of the kernel.
    pub(crate) fn remove(self) -> io::Result<()> {
        let mut kernel = Netlink::open(SockProtocol::NetlinkRoute)?;
        for family in [libc_family(true), libc_family(false)] {
            let absent = [Errno::ENOENT, Errno::ESRCH, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP];
            ignoring(kernel.request(&self.rule(DELETE_RULE, 0, family)), &absent)?;
            ignoring(kernel.request(&self.route(DELETE_ROUTE, 0, family)?), &absent)?;
        }
        Ok(())
    }

    fn rule(self, kind: u16, flags: u16, family: u8) -> NetlinkMessage {
        const TO_TABLE: u8 = 1;
        let fixed = vec![family, 0, 0, 0, self.table, 0, 0, TO_TABLE, 0, 0, 0, 0];
        let attributes = Attributes::new()
            .native(6, self.priority)
            .native(10, self.mark)
            .native(16, self.mask)
            .native(15, self.table.into());
        NetlinkMessage { kind, flags, fixed, attributes }
    }

    fn route(self, kind: u16, flags: u16, family: u8) -> io::Result<NetlinkMessage> {
        const STATIC: u8 = 4;
        const WITHIN_HOST: u8 = 254;
        const LOCAL: u8 = 2;
        let fixed = vec![family, 0, 0, 0, self.table, STATIC, WITHIN_HOST, LOCAL, 0, 0, 0, 0];
        let attributes = Attributes::new().native(4, if_nametoindex("lo")?);
        Ok(NetlinkMessage { kind, flags, fixed, attributes })
    }
}

/// Whether a message describes the desired rule or route: same table and kind in its fixed part, and the
/// attributes.
fn matches(reply: &NetlinkReply, desired: &NetlinkMessage) -> bool {
    let same = |offset: usize| reply.body.get(offset) == desired.fixed.get(offset);
    [0, 1, 4, 7].into_iter().all(same)
        && desired.attributes.is_contained_in(reply.body.get(FIXED_BYTES..).unwrap_or_default())
}

fn libc_family(is_v4: bool) -> u8 {
    let family = if is_v4 { nix::libc::AF_INET } else { nix::libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

/// Whether the error says that the host has no addresses of this family.
fn is_absent(family: u8, error: &io::Error) -> bool {
    let unknown = [Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP].map(|errno| Some(errno as i32));
    family == libc_family(false) && unknown.contains(&error.raw_os_error())
}

fn ignoring(result: io::Result<()>, harmless: &[Errno]) -> io::Result<()> {
    match result {
        Err(error) if harmless.iter().any(|e| error.raw_os_error() == Some(*e as i32)) => Ok(()),
        other => other,
    }
}
