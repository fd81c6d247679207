//! The connection tracking table of the kernel: list entries, delete entries, and decode notifications about
//! them (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::sys::socket::SockProtocol;
use weft_model::{FlowTuple, Transport};

use super::{Attributes, Netlink, NetlinkMessage, NetlinkReply, find};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;

const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;

/// The length of the fixed part before the attributes: family, version and resource ID.
const FIXED_BYTES: usize = 4;

/// A conntrack entry, with the fields that matter for flows to services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConntrackEntry {
    /// The flow as its client sees it.
    pub(crate) flow: FlowTuple,
    /// The address that the flow goes to; equal to its destination when the destination was not translated.
    pub(crate) endpoint: SocketAddr,
    /// Whether the TCP connection is closed or reset: the kernel keeps such an entry for a while.
    pub(crate) is_closed: bool,
    /// The ID, which distinguishes successive entries of the same tuple.
    id: Vec<u8>,
    /// The encoded original tuple.
    original: Vec<u8>,
    family: u8,
}

#[cfg(test)]
impl ConntrackEntry {
    /// The entry of a flow that goes to `endpoint`.
    pub(crate) fn example(flow: FlowTuple, endpoint: SocketAddr) -> Self {
        Self { flow, endpoint, is_closed: false, id: Vec::new(), original: Vec::new(), family: 2 }
    }
}

/// A conntrack entry that has ended, with its counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EndedConnection {
    pub(crate) entry: ConntrackEntry,
    /// Packet bytes including headers; 0 when accounting is off.
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// The lifetime of the entry, when timestamps are enabled.
    pub(crate) duration: Option<Duration>,
}

/// The multicast group for new entries.
pub(crate) const NEW_GROUP: u32 = 1;
/// The multicast group for entries that end.
pub(crate) const DESTROY_GROUP: u32 = 1 << 2;

/// Enables byte counters and timestamps of conntrack entries in the network namespace of this process.
///
/// # Errors
/// When the sysctl files cannot be written.
pub(crate) fn enable_accounting() -> io::Result<()> {
    for setting in ["nf_conntrack_acct", "nf_conntrack_timestamp"] {
        std::fs::write(format!("/proc/sys/net/netfilter/{setting}"), "1")?;
    }
    Ok(())
}

/// A netlink socket to connection tracking.
#[derive(Debug)]
pub(crate) struct Conntrack(Netlink);

impl Conntrack {
    /// Opens a socket in the network namespace of this thread.
    ///
    /// # Errors
    /// When the kernel has no connection tracking over netlink, or the socket cannot be opened.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkNetFilter).map(Self)
    }

    /// Passes every TCP and UDP entry to `each`.
    ///
    /// # Errors
    /// The error code of the kernel.
    pub(crate) fn list(&mut self, mut each: impl FnMut(ConntrackEntry)) -> io::Result<()> {
        // One request for both families: the kernel walks the whole table for each request.
        const ANY_FAMILY: u8 = 0;
        let message = message(GET, ANY_FAMILY, Attributes::new());
        self.0.stream(&message, |reply| parse_entry(reply).into_iter().for_each(&mut each))
    }

    /// Deletes an entry, so that the next packet of its flow starts a new flow. An entry that is gone already
    /// is not an error.
    ///
    /// # Errors
    /// The error code of the kernel.
    pub(crate) fn delete(&mut self, entry: &ConntrackEntry) -> io::Result<()> {
        let which = Attributes::new().nested_bytes(ORIGINAL, &entry.original).bytes(ID, &entry.id);
        match self.0.request(&message(DELETE, entry.family, which)) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
            outcome => outcome,
        }
    }
}

fn message(kind: u16, family: u8, attributes: Attributes) -> NetlinkMessage {
    NetlinkMessage {
        kind: SUBSYSTEM << 8 | kind,
        flags: 0,
        fixed: vec![family, 0, 0, 0],
        attributes,
    }
}

/// Decodes an entry of TCP or UDP.
pub(crate) fn parse_entry(reply: &NetlinkReply) -> Option<ConntrackEntry> {
    let attributes = reply.body.get(FIXED_BYTES..)?;
    let original = find(attributes, ORIGINAL)?;
    let (transport, client, destination) = tuple(original)?;
    let (_, endpoint, _) = tuple(find(attributes, REPLY)?)?;
    Some(ConntrackEntry {
        flow: FlowTuple { transport, client, destination },
        endpoint,
        is_closed: is_closed(attributes),
        id: find(attributes, ID)?.to_vec(),
        original: original.to_vec(),
        family: *reply.body.first()?,
    })
}

/// Whether a TCP connection is in one of the final states.
fn is_closed(attributes: &[u8]) -> bool {
    const PROTOCOL: u16 = 4;
    const TCP: u16 = 1;
    const STATE: u16 = 1;
    const TIME_WAIT: u8 = 7;
    const CLOSE: u8 = 8;
    let tcp = find(attributes, PROTOCOL).and_then(|protocol| find(protocol, TCP));
    let state = tcp.and_then(|tcp| find(tcp, STATE)?.first());
    state.is_some_and(|state| [TIME_WAIT, CLOSE].contains(state))
}

/// Decodes an entry that has ended.
pub(crate) fn parse_ended(reply: &NetlinkReply) -> Option<EndedConnection> {
    const COUNTERS: [u16; 2] = [9, 10];
    const TIMES: u16 = 20;
    let attributes = reply.body.get(FIXED_BYTES..)?;
    let number =
        |part: &[u8], kind| Some(u64::from_be_bytes(*find(part, kind)?.first_chunk::<8>()?));
    let bytes = |kind| find(attributes, kind).and_then(|part| number(part, 2)).unwrap_or(0);
    let [bytes_sent, bytes_received] = COUNTERS.map(bytes);
    let duration = find(attributes, TIMES).and_then(|times| {
        Some(Duration::from_nanos(number(times, 2)?.saturating_sub(number(times, 1)?)))
    });
    Some(EndedConnection { entry: parse_entry(reply)?, bytes_sent, bytes_received, duration })
}

/// The protocol, source and destination of a tuple; `None` for a protocol without ports.
fn tuple(attributes: &[u8]) -> Option<(Transport, SocketAddr, SocketAddr)> {
    const ADDRESSES: u16 = 1;
    const PROTOCOL: u16 = 2;
    let addresses = find(attributes, ADDRESSES)?;
    let v4 = |kind| Some(IpAddr::V4(Ipv4Addr::from(*find(addresses, kind)?.first_chunk::<4>()?)));
    let v6 = |kind| Some(IpAddr::V6(Ipv6Addr::from(*find(addresses, kind)?.first_chunk::<16>()?)));
    let protocol = find(attributes, PROTOCOL)?;
    let port = |kind| Some(u16::from_be_bytes(*find(protocol, kind)?.first_chunk()?));
    let transport = match *find(protocol, 1)?.first()? {
        6 => Transport::Tcp,
        17 => Transport::Udp,
        _ => return None,
    };
    let source = SocketAddr::new(v4(1).or_else(|| v6(3))?, port(2)?);
    let destination = SocketAddr::new(v4(2).or_else(|| v6(4))?, port(3)?);
    Some((transport, source, destination))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple_of(source: [u8; 4], destination: [u8; 4], ports: [u16; 2]) -> Attributes {
        let addresses = Attributes::new().bytes(1, &source).bytes(2, &destination);
        let protocol = Attributes::new()
            .bytes(1, &[17])
            .bytes(2, &ports[0].to_be_bytes())
            .bytes(3, &ports[1].to_be_bytes());
        Attributes::new().nested(1, addresses).nested(2, protocol)
    }

    #[test]
    fn entry_has_the_translated_endpoint() {
        let attributes = Attributes::new()
            .nested(ORIGINAL, tuple_of([10, 0, 0, 1], [10, 96, 0, 1], [4000, 53]))
            .nested(REPLY, tuple_of([10, 0, 0, 9], [10, 0, 0, 1], [5353, 4000]))
            .bytes(ID, &[1, 2, 3, 4]);
        let mut bytes = Vec::new();
        message(GET, 2, attributes).write(1, 0, &mut bytes);
        let reply = super::super::message::replies(&bytes).next().expect("one message was written");
        let entry = parse_entry(&reply).expect("the message is an entry");
        assert_eq!(entry.endpoint, "10.0.0.9:5353".parse().expect("the address is valid"));
        assert_eq!(entry.flow.destination, "10.96.0.1:53".parse().expect("the address is valid"));
        assert_eq!(entry.flow.client, "10.0.0.1:4000".parse().expect("the address is valid"));
        assert_eq!((entry.flow.transport, entry.id), (Transport::Udp, vec![1, 2, 3, 4]));
        assert_eq!(
            parse_ended(&reply).map(|ended| (ended.bytes_sent, ended.duration)),
            Some((0, None))
        );
        for end in 0..reply.body.len() {
            let cut = NetlinkReply { body: reply.body[..end].to_vec(), ..reply.clone() };
            assert_eq!(parse_entry(&cut), None, "cut at {end}");
        }
    }
}
