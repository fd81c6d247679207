//! Accepts connections on the control plane's port, and limits their number and duration.
//!
//! There are two pools of connection slots. A connection without a client certificate, including one whose handshake is
//! not complete, takes a slot of its source address. A connection with a certificate takes a slot of its identity. When
//! a pool is full, holders of many slots lose one to holders of few (see [`crate::fair_pool`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use weft_certs::{CertificateText, identity_of, validity};
use weft_runtime::socket::is_ipv6_unavailable;
use weft_xds::server::IncomingConnection;

use crate::client_connection::{CertificateValidity, RevokedSerials, XdsClientConnection};
use crate::fair_pool::{FairPool, SlotDecision, SlotId};

/// The longest duration of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The most connections without a client certificate.
const UNAUTHENTICATED_LIMIT: usize = 512;
/// How long a connection without a client certificate may last: enough to get a certificate by a join token.
const UNAUTHENTICATED_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection whose handshake is complete.
pub(crate) type AcceptedConnection = IncomingConnection<XdsClientConnection<TlsStream<TcpStream>>>;

/// The TLS configuration for handshakes, and the revocations that close connections.
#[derive(Debug, Clone)]
pub(crate) struct AcceptConfig {
    pub(crate) tls: watch::Receiver<Arc<ServerConfig>>,
    pub(crate) revoked: RevokedSerials,
}

/// Listens on an address. `[::]` accepts both IP versions; on a host without IPv6 it is replaced by `0.0.0.0`.
pub(crate) async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if is_ipv6_unavailable(address, &error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Accepts connections until the task is dropped; at most `limit` with a client certificate.
pub(crate) async fn accept(
    listener: TcpListener,
    config: AcceptConfig,
    connections: mpsc::Sender<AcceptedConnection>,
    limit: usize,
) {
    let unauthenticated = ConnectionSlots::new(UNAUTHENTICATED_LIMIT);
    let clients = ConnectionSlots::new(limit);
    let mut is_failing = false;
    loop {
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(%error, "accept paused");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        is_failing = false;
        let Some(slot) = unauthenticated.acquire(&network(from.ip())) else {
            tracing::debug!(%from, "connection refused: too many connections without a certificate");
            continue;
        };
        let config = config.clone();
        let clients = clients.clone();
        let connections = connections.clone();
        tokio::spawn(async move {
            match handshake(tcp, config, slot, &clients).await {
                // Sending fails only while the server shuts down.
                Ok(connection) => drop(connections.send(connection).await),
                Err(reason) => tracing::debug!(%from, reason, "connection refused"),
            }
        });
    }
}

async fn handshake(
    tcp: TcpStream,
    AcceptConfig { tls, revoked }: AcceptConfig,
    mut slot: SlotGuard<IpAddr>,
    clients: &Arc<ConnectionSlots<String>>,
) -> Result<AcceptedConnection, String> {
    drop(tcp.set_nodelay(true));
    let config = tls.borrow().clone();
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(tcp));
    let io = tokio::select! {
        done = handshake => done.map_err(|_| "handshake timeout".to_owned())?,
        () = slot.evicted() => return Err("connection slot taken by another address".into()),
    };
    let io = io.map_err(|error| error.to_string())?;
    let leaf = io.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let Some(leaf) = leaf else {
        let ends = async move {
            tokio::select! {
                () = tokio::time::sleep(UNAUTHENTICATED_TIMEOUT) => {}
                () = slot.evicted() => {}
            }
        };
        return Ok(IncomingConnection {
            io: XdsClientConnection::new(io, ends),
            peer: None,
            permit: None,
        });
    };
    let validity = validity_of(leaf)
        .ok_or("invalid client certificate: serial number or dates cannot be read")?;
    let peer = identity_of(leaf);
    let name = peer.as_ref().map(ToString::to_string).unwrap_or_default();
    let Some(mut slot) = clients.acquire(&name) else {
        tracing::warn!(peer = name, "connection refused: connection limit reached");
        return Err("connection limit reached".into());
    };
    let ends = async move {
        tokio::select! {
            () = validity.ended(revoked) => {}
            () = slot.evicted() => {}
        }
    };
    Ok(IncomingConnection { io: XdsClientConnection::new(io, ends), peer, permit: None })
}

/// The serial number and the expiry of a client's certificate.
fn validity_of(leaf: &CertificateDer<'_>) -> Option<CertificateValidity> {
    let (_, not_after) = validity(leaf)?;
    let serial = CertificateText::of(leaf)?.serial.to_ascii_lowercase();
    Some(CertificateValidity { serial, not_after })
}

/// The address that slots are counted by: an IPv4 address, or the /64 of an IPv6 address, since a host may have all of
/// it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(prefix).into()
        }
    }
}

/// A pool of connection slots, which notifies connections that lose their slot.
#[derive(Debug)]
struct ConnectionSlots<K>(Mutex<SlotState<K>>);

#[derive(Debug)]
struct SlotState<K> {
    pool: FairPool<K>,
    eviction_senders: BTreeMap<SlotId, oneshot::Sender<()>>,
}

/// Holds a slot until it is dropped.
#[derive(Debug)]
struct SlotGuard<K: Ord + Clone> {
    slots: Arc<ConnectionSlots<K>>,
    slot: SlotId,
    eviction: oneshot::Receiver<()>,
}

impl<K: Ord + Clone> ConnectionSlots<K> {
    fn new(limit: usize) -> Arc<Self> {
        let state = SlotState { pool: FairPool::new(limit), eviction_senders: BTreeMap::new() };
        Arc::new(Self(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, SlotState<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire(self: &Arc<Self>, key: &K) -> Option<SlotGuard<K>> {
        let mut state = self.lock();
        let slot = match state.pool.acquire(key) {
            SlotDecision::Free(slot) => slot,
            SlotDecision::Evicted { slot, from } => {
                if let Some(sender) = state.eviction_senders.remove(&from) {
                    // Sending fails when the connection has just closed.
                    let _is_sent = sender.send(());
                }
                slot
            }
            SlotDecision::Refused => return None,
        };
        let (sender, eviction) = oneshot::channel();
        state.eviction_senders.insert(slot, sender);
        Some(SlotGuard { slots: self.clone(), slot, eviction })
    }
}

impl<K: Ord + Clone> SlotGuard<K> {
    /// Resolves when the slot is taken by another connection.
    async fn evicted(&mut self) {
        // The sender lives in the pool until it is used.
        drop((&mut self.eviction).await);
    }
}

impl<K: Ord + Clone> Drop for SlotGuard<K> {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.eviction_senders.remove(&self.slot);
        state.pool.release(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_ipv6_64_share_a_slot_holder() {
        let check = |address: &str, expected: &str| {
            let [address, expected] = [address, expected].map(|one| one.parse().expect("one"));
            assert_eq!(network(address), expected);
        };
        check("10.1.2.3", "10.1.2.3");
        check("::ffff:10.1.2.3", "10.1.2.3");
        check("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::");
        check("2001:db8:1:3::1", "2001:db8:1:3::");
    }

    #[tokio::test]
    async fn evicted_holder_is_notified_and_its_slot_is_released() {
        let slots = ConnectionSlots::new(2);
        let mut first = slots.acquire(&1).expect("a free slot");
        let second = slots.acquire(&1).expect("a free slot");
        let third = slots.acquire(&2).expect("the slot of the first");
        first.evicted().await;
        drop((first, second));
        assert!(slots.acquire(&1).is_some());
        drop(third);
        assert!(slots.lock().eviction_senders.is_empty());
    }
}
