//! What an issuer's key set is fetched by, and what becomes of the answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_certs::{KEY_SET_LIMIT_BYTES, KeySet, KeySetError};
use weft_model::Discovery;
use weft_runtime::socket::Mark;

use super::fault::TokenFault;
use super::key_store::{FetchError, FetchedSet, KeyOrigin};
use crate::fetch::{Failure, Validators, Wanted, fetch};
use crate::plan::Target;

/// A key set to fetch.
#[derive(Debug, Clone)]
pub(crate) struct WantedKeys {
    pub(crate) origin: KeyOrigin,
    /// The cluster that serves it.
    pub(crate) target: Arc<Target>,
    pub(crate) timeout: Duration,
    pub(crate) cache: Duration,
}

impl WantedKeys {
    /// Whether an address belongs to the cluster. One from DNS does whatever the last answer was: answers take
    /// turns, and other addresses are no sign of other keys.
    pub(crate) fn has_endpoint(&self, address: SocketAddr) -> bool {
        let Target { cluster, balancer, .. } = &*self.target;
        matches!(cluster.discovery, Discovery::Dns(_)) || balancer.has(address)
    }
}

/// Fetches a set from the first endpoint of its cluster that answers.
///
/// # Errors
/// Why no set could be had.
pub(crate) async fn fetch_keys(
    wanted: &WantedKeys,
    mark: Option<Mark>,
) -> Result<FetchedSet, FetchError> {
    let (target, timeout) = (wanted.target.clone(), wanted.timeout);
    let asked = Wanted {
        uri: wanted.origin.uri.clone(),
        target,
        timeout,
        accept: "application/json",
        limit: KEY_SET_LIMIT_BYTES,
        held: Validators::default(),
        redirects: wanted.origin.redirects,
    };
    let answer = fetch(&asked, mark).await.map_err(|failure| {
        let fault = match failure {
            Failure::Late(_) => TokenFault::KeysTimeout,
            Failure::TooLarge(_) => TokenFault::KeysTooLarge,
            Failure::Failed(_) => TokenFault::KeysFailed,
        };
        FetchError { fault, reason: failure.to_string() }
    })?;
    let set = KeySet::parse(&answer.body.unwrap_or_default()).map_err(|error| match error {
        KeySetError::TooLarge(reason) => FetchError { fault: TokenFault::KeysTooLarge, reason },
        KeySetError::Invalid(reason) => FetchError { fault: TokenFault::KeysInvalid, reason },
    })?;
    Ok(FetchedSet { set, age: answer.age, from: answer.from })
}
