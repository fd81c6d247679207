//! TLS connections with clients and endpoints.

pub(crate) mod acceptor;
pub(crate) mod connector;
pub(crate) mod failure;
pub(crate) mod handshake;
mod server_handshake;
pub(crate) mod stream;

/// The protocol negotiated by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alpn {
    Http1,
    Http2,
    /// No protocol was negotiated.
    None,
}

impl Alpn {
    /// The protocol with this ALPN identifier.
    pub(crate) fn of(protocol: Option<&[u8]>) -> Self {
        match protocol {
            Some(b"h2") => Self::Http2,
            Some(b"http/1.1") => Self::Http1,
            _ => Self::None,
        }
    }
}
