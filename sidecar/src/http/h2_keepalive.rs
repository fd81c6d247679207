//! Sends keepalive PINGs to HTTP/2 clients, so that connections of clients that are gone are closed.

use std::future::{pending, poll_fn};
use std::time::Duration;

use h2::{Ping, PingPong};
use weft_model::Keepalive;

use crate::http::h2_client_guard::Http2Monitor;

/// Resolves when a PING was not acknowledged in time and no other frame was received meanwhile: a large body can delay
/// the acknowledgement. Never resolves without settings.
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
            // The connection has ended.
            return pending().await;
        }
        let answer = poll_fn(|cx| pings.poll_pong(cx));
        tokio::pin!(answer);
        loop {
            let count_before = monitor.received_count();
            if tokio::time::timeout(settings.timeout, &mut answer).await.is_ok() {
                monitor.uncount_last();
                break;
            }
            if monitor.received_count() == count_before {
                return;
            }
        }
    }
}

/// The time until the next PING, with a random part of the jitter added, so that the connections of a listener do not
/// send PINGs at the same time.
fn interval(settings: Keepalive) -> Duration {
    let jitter = f64::from(settings.jitter_percent) / 100.0 * fastrand::f64();
    settings.interval.mul_f64(1.0 + jitter)
}
