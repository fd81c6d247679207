//! How far a client is with a resource.

/// How far a client is with a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AckState {
    /// The client does not subscribe to it.
    NotSubscribed,
    /// The client has not acknowledged the last response, refused it, or was sent none.
    Pending,
    /// The client has acknowledged this version.
    Acked(String),
}
