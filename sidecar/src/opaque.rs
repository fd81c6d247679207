//! Connections whose bytes are not ours to read: moved as they are, with TLS where it is asked for.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::io::copy_bidirectional;
use weft_model::{Discovery, TcpProxy, WeightedCluster};

use crate::detect::Spoken;
use crate::standing::Standing;
use crate::stream::Stream;
use crate::tls::{Alpn, connector};
use crate::worker::Worker;

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
    let chosen = target.balancer.choose(&[]);
    let address = match (&target.cluster.discovery, &chosen) {
        (Discovery::OriginalDestination, _) => destination,
        (_, Some(chosen)) => chosen.address,
        (_, None) => return,
    };
    let Some(_slot) = worker.pools.slots.take(&target, address) else {
        tracing::debug!(%from, %address, "max_connections is used up");
        return weft_runtime::socket::reset_on_close(client.tcp());
    };
    match connector::connect(&target, address, Alpn::None, worker).await {
        Ok(mut endpoint) => {
            worker.metrics.upstream_connections.increment();
            let (ours, theirs) = (client.standing().cloned(), endpoint.standing().cloned());
            let moved = tokio::select! {
                moved = copy_bidirectional(&mut client, &mut endpoint) => moved,
                // A side that is done is not read any more, so that its socket wakes nobody.
                () = falls(ours) => Err(std::io::ErrorKind::ConnectionAborted.into()),
                () = falls(theirs) => Err(std::io::ErrorKind::ConnectionAborted.into()),
            };
            if moved.is_err() {
                weft_runtime::socket::reset_on_close(client.tcp());
            }
            tracing::debug!(%from, %address, ?moved, "a connection was carried");
        }
        Err(error) => {
            tracing::debug!(%from, %address, %error, "an endpoint could not be reached");
            weft_runtime::socket::reset_on_close(client.tcp());
        }
    }
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
