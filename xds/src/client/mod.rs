//! The xDS client: from a stream of responses to one closed [`weft_model::Snapshot`] after another.
//!
//! [`session`] decides what to send after what arrived, [`warming`] which version of each resource is in
//! force, [`backoff`] when to try again; none of them does I/O or reads a clock.
//! [`follow`] carries their answers out.

mod backoff;
mod batch;
mod follow;
mod session;
mod subscription;
mod warming;

pub use backoff::Backoff;
pub use follow::{DnsAnswers, DnsChannels, Follower, XdsStatus, follow};
pub use session::{ClientSession, ResponseOutcome, XdsNode, XdsRequest, XdsVariant};
pub use warming::Warming;

/// The cause of a failed call in one line: gRPC's own text, or the deepest cause below it.
pub(crate) fn explain(status: &tonic::Status) -> String {
    let mut deepest = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        deepest = error.to_string();
        cause = error.source();
    }
    format!("{}: {deepest}", status.code())
}
