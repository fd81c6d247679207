//! The port of the control plane: how many connections there may be, whose, and for how long.
//!
//! Two pools bound them. Whoever has shown no certificate, during the handshake and after it, has a place by
//! address; a client with a certificate has a place by identity. When a pool is full, holders of many places
//! give way to those of few.

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

use crate::client_connection::{CertificateValidity, ClientConnection, RevokedSerials};
use crate::fair_pool::{FairPool, SlotDecision, SlotId};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many connections there may be that have shown no certificate.
const UNAUTHENTICATED_LIMIT: usize = 512;
/// How long a connection may last on which no certificate was shown: time enough to get one.
const UNAUTHENTICATED_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that the port lets in.
pub(crate) type AcceptedConnection = IncomingConnection<ClientConnection<TlsStream<TcpStream>>>;

/// What handshakes are done with, and what ends connections.
#[derive(Debug, Clone)]
pub(crate) struct AcceptConfig {
    pub(crate) tls: watch::Receiver<Arc<ServerConfig>>,
    pub(crate) revoked: RevokedSerials,
}

/// Listens on an address. `[::]` takes both families; where the host has no IPv6, the other.
pub(crate) async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if is_ipv6_unavailable(address, &error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Takes in connections until the task is dropped; at most `limit` with a certificate.
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
            tracing::debug!(%from, "connection refused: too many without a certificate");
            continue;
        };
        let (config, clients, connections) = (config.clone(), clients.clone(), connections.clone());
        tokio::spawn(async move {
            match handshake(tcp, config, slot, &clients).await {
                // The server is gone when the channel is closed.
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
        done = handshake => done.map_err(|_| "the handshake took too long".to_owned())?,
        () = slot.evicted() => return Err("it gave way to another address".into()),
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
            io: ClientConnection::new(io, ends),
            peer: None,
            permit: None,
        });
    };
    let validity = validity_of(leaf).ok_or("the certificate cannot be read")?;
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
    Ok(IncomingConnection { io: ClientConnection::new(io, ends), peer, permit: None })
}

/// What a client's connection rests on.
fn validity_of(leaf: &CertificateDer<'_>) -> Option<CertificateValidity> {
    let (_, not_after) = validity(leaf)?;
    let serial = CertificateText::of(leaf)?.serial.to_ascii_lowercase();
    Some(CertificateValidity { serial, not_after })
}

/// What counts as one address: hosts have a whole /64 of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(prefix).into()
        }
    }
}

/// A pool of places, and how to tell those who have to leave theirs.
#[derive(Debug)]
struct ConnectionSlots<K>(Mutex<SlotState<K>>);

#[derive(Debug)]
struct SlotState<K> {
    pool: FairPool<K>,
    notices: BTreeMap<SlotId, oneshot::Sender<()>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
struct SlotGuard<K: Ord + Clone> {
    slots: Arc<ConnectionSlots<K>>,
    slot: SlotId,
    notice: oneshot::Receiver<()>,
}

impl<K: Ord + Clone> ConnectionSlots<K> {
    fn new(limit: usize) -> Arc<Self> {
        let state = SlotState { pool: FairPool::new(limit), notices: BTreeMap::new() };
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
                if let Some(notice) = state.notices.remove(&from) {
                    // It may have left by itself just now.
                    let _is_sent = notice.send(());
                }
                slot
            }
            SlotDecision::Refused => return None,
        };
        let (sender, notice) = oneshot::channel();
        state.notices.insert(slot, sender);
        Some(SlotGuard { slots: self.clone(), slot, notice })
    }
}

impl<K: Ord + Clone> SlotGuard<K> {
    /// Resolves when the place has to be left.
    async fn evicted(&mut self) {
        // The sender goes with the notice only.
        drop((&mut self.notice).await);
    }
}

impl<K: Ord + Clone> Drop for SlotGuard<K> {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.notices.remove(&self.slot);
        state.pool.release(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_network_count_as_one() {
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
    async fn displaced_holder_is_is_sent_and_leaves_no_place_behind() {
        let slots = ConnectionSlots::new(2);
        let mut first = slots.acquire(&1).expect("there is room");
        let second = slots.acquire(&1).expect("there is room");
        let third = slots.acquire(&2).expect("the first gives way");
        first.evicted().await;
        drop((first, second));
        assert!(slots.acquire(&1).is_some());
        drop(third);
        assert!(slots.lock().notices.is_empty());
    }
}
