//! Connections whose bytes are not ours to read: moved as they are, with TLS where it is asked for.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::io::copy_bidirectional;
use weft_model::{Discovery, TcpProxy, WeightedCluster};

use crate::balance::Chosen;
use crate::detect::Spoken;
use crate::plan::Target;
use crate::standing::Standing;
use crate::stream::Stream;
use crate::tls::{Alpn, connector};
use crate::upstream::Slot;
use crate::worker::Worker;

/// How many other endpoints are tried when one cannot be reached, as for requests.
const OTHERS: usize = 2;

/// Carries a connection to an endpoint of its cluster and back, until both sides are done.
pub(crate) async fn carry(
    mut client: Stream,
    from: SocketAddr,
    destination: SocketAddr,
    tcp: &TcpProxy,
    worker: &Worker,
) {
    let plan = worker.plan();
    let cluster = WeightedCluster::draw(&tcp.clusters, fastrand::u32(..));
    let Some(target) = cluster.and_then(|cluster| plan.target(&cluster.name)).cloned() else {
        return;
    };
    drop(plan);
    let reached = match reach(&target, destination, worker).await {
        Ok(reached) => reached,
        Err(error) => {
            tracing::debug!(%from, %error, "connection refused: no endpoint can be reached");
            return weft_runtime::socket::reset_on_close(client.tcp());
        }
    };
    let Reached { mut endpoint, address, _slot, _chosen } = reached;
    worker.metrics.upstream_connections.increment();
    let (ours, theirs) = (client.standing().cloned(), endpoint.standing().cloned());
    let moved = tokio::select! {
        moved = copy_bidirectional(&mut client, &mut endpoint) => moved,
        // A side that is done is not read any more, so that its socket wakes nobody.
        () = falls(ours) => Err(io::ErrorKind::ConnectionAborted.into()),
        () = falls(theirs) => Err(io::ErrorKind::ConnectionAborted.into()),
    };
    if moved.is_err() {
        weft_runtime::socket::reset_on_close(client.tcp());
    }
    tracing::debug!(%from, %address, ?moved, "a connection was carried");
}

/// A connection to an endpoint, with what counts it.
struct Reached {
    endpoint: Stream,
    address: SocketAddr,
    _slot: Slot,
    _chosen: Option<Chosen>,
}

/// Connects to an endpoint of `target`. An endpoint that cannot be reached is followed by another: no byte of the
/// client was sent to the first.
///
/// # Errors
/// When there is no endpoint or no room for a connection, or why the last endpoint that was tried cannot be reached.
async fn reach(target: &Target, destination: SocketAddr, worker: &Worker) -> io::Result<Reached> {
    let goes_on = target.cluster.discovery == Discovery::OriginalDestination;
    let mut tried = Vec::new();
    let mut failed = io::Error::other("the cluster has no endpoint");
    for _ in 0..=OTHERS {
        let chosen = target.balancer.choose(&tried);
        let address = match &chosen {
            _ if goes_on => destination,
            Some(chosen) => chosen.address,
            None => return Err(failed),
        };
        if !tried.is_empty() {
            worker.metrics.upstream_retries.increment();
        }
        let Some(slot) = worker.pools.slots.take(target, address) else {
            return Err(io::Error::other(format!("max_connections is used up at {address}")));
        };
        match connector::connect(target, address, Alpn::None, worker).await {
            Ok(endpoint) => return Ok(Reached { endpoint, address, _slot: slot, _chosen: chosen }),
            Err(error) => {
                tracing::debug!(%address, %error, "an endpoint could not be reached");
                failed = error;
            }
        }
        if goes_on {
            break;
        }
        tried.push(address);
    }
    Err(failed)
}

/// Resolves when what a peer proved does not stand any more; never where it proved nothing.
async fn falls(standing: Option<Rc<Standing>>) {
    match standing {
        Some(standing) => standing.falls().await,
        None => std::future::pending().await,
    }
}

/// Carries a connection whose service spoke first.
pub(crate) async fn relay(mut client: Stream, from: SocketAddr, mut service: Spoken) {
    let address = service.address;
    let moved = copy_bidirectional(&mut client, &mut service.stream).await;
    tracing::debug!(%from, %address, ?moved, "a connection was carried whose service spoke first");
}
