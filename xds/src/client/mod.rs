//! The xDS client: turns a stream of responses into a series of complete [`weft_model::Snapshot`]s.
//!
//! [`session`] decides which requests to send, [`warming`] which version of each resource is in use, [`reconnect`] when to
//! reconnect; none of them does I/O or reads a clock. [`follow`] does the I/O.

mod batch;
mod follow;
mod reconnect;
mod session;
mod subscription;
mod warming;

pub use follow::{DnsAnswers, DnsChannels, Follower, XdsStatus, follow};
pub use session::{ClientSession, ResponseOutcome, XdsNode, XdsRequest, XdsVariant};
pub use warming::Warming;

/// The cause of a failed call in one line: the innermost error, or gRPC's text when there is none.
pub(crate) fn explain(status: &tonic::Status) -> String {
    let mut deepest = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        deepest = error.to_string();
        cause = error.source();
    }
    format!("{}: {deepest}", status.code())
}
