//! Asks clients of HTTP/2 for a sign of life, so that a connection whose client is gone ends.

use std::future::{pending, poll_fn};
use std::time::Duration;

use h2::{Ping, PingPong};
use weft_model::Keepalive;

use crate::http::h2_client_guard::Http2Monitor;

/// Resolves when a PING was not answered in time, and nothing else came meanwhile: a large body may hold up
/// the answer. Without settings it never resolves.
pub(crate) async fn ping_timeout(
    settings: Option<Keepalive>,
    pings: Option<PingPong>,
    monitor: &Http2Monitor,
) {
    let Some((settings, mut pings)) = settings.zip(pings) else {
        return pending().await;
    };
    loop {
        tokio::time::sleep(interval(settings)).await;
        if pings.send_ping(Ping::opaque()).is_err() {
            // The connection has ended, and with it all that waits.
            return pending().await;
        }
        let answer = poll_fn(|cx| pings.poll_pong(cx));
        tokio::pin!(answer);
        loop {
            let seen = monitor.received_count();
            if tokio::time::timeout(settings.timeout, &mut answer).await.is_ok() {
                monitor.uncount_last();
                break;
            }
            if monitor.received_count() == seen {
                return;
            }
        }
    }
}

/// How long until the next PING: longer by a random part of the jitter, so that the connections of a listener
/// do not send theirs together.
fn interval(settings: Keepalive) -> Duration {
    let jitter = f64::from(settings.jitter_percent) / 100.0 * fastrand::f64();
    settings.interval.mul_f64(1.0 + jitter)
}
