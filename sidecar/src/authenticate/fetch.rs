//! Fetches the key set of a token issuer.

use weft_certs::{KEY_SET_LIMIT_BYTES, KeySet, KeySetError};
use weft_runtime::socket::Mark;

use super::fault::TokenFault;
use super::key_store::{FetchedKeySet, KeyFetchError};
use crate::fetch::{FetchFailure, FetchRequest, Validators, fetch};
use crate::plan::downloads::KeySetDownload;

/// Fetches a key set from the first endpoint of its cluster that responds.
///
/// # Errors
/// When no endpoint responds in time, or the response is too large or not a key set.
pub(crate) async fn fetch_keys(
    download: &KeySetDownload,
    mark: Option<Mark>,
) -> Result<FetchedKeySet, KeyFetchError> {
    let cluster = download.cluster.clone();
    let timeout = download.timeout;
    let request = FetchRequest {
        uri: download.origin.uri.clone(),
        cluster,
        timeout,
        accept: "application/json",
        limit: KEY_SET_LIMIT_BYTES,
        validators: Validators::default(),
        redirects: download.origin.redirects,
    };
    let response = fetch(&request, mark).await.map_err(|failure| {
        let fault = match failure {
            FetchFailure::Timeout(_) => TokenFault::KeysTimeout,
            FetchFailure::TooLarge(_) => TokenFault::KeysTooLarge,
            FetchFailure::Failed(_) => TokenFault::KeysFailed,
        };
        KeyFetchError { fault, reason: failure.to_string() }
    })?;
    let set = KeySet::parse(&response.body.unwrap_or_default()).map_err(|error| match error {
        KeySetError::TooLarge(reason) => KeyFetchError { fault: TokenFault::KeysTooLarge, reason },
        KeySetError::Invalid(reason) => KeyFetchError { fault: TokenFault::KeysInvalid, reason },
    })?;
    Ok(FetchedKeySet { set, max_age: response.max_age, from: response.from })
}
