//! The closed sets of values in the access log, and what the reference pages print about them.

use serde::{Serialize, Serializer};

/// A word of a closed set.
#[derive(Debug, Clone, Copy)]
pub struct WordInfo {
    /// The word in logs and metrics.
    pub word: &'static str,
    /// The lines of its meaning.
    pub meaning: &'static [&'static str],
}

/// A refusal by weft itself.
#[derive(Debug, Clone, Copy)]
pub struct RefusalInfo {
    /// The word in metrics and in the body of the response.
    pub reason: &'static str,
    /// The HTTP status; 0 for connections and flows.
    pub status: u16,
    /// The gRPC status.
    pub grpc_status: u8,
    /// The response flag, if there is one.
    pub flag: Option<ResponseFlag>,
    /// `response_code_details` or `connection_termination_details`.
    pub details: &'static str,
    /// The lines of its meaning.
    pub meaning: &'static [&'static str],
    /// What to do about it.
    pub action: &'static str,
}

/// Defines a closed set of words, each with its meaning.
macro_rules! closed_set {
    ($(#[doc = $doc:literal])+ $name:ident {
        $($(#[doc = $meaning:literal])+ $variant:ident: $word:literal;)+
    }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $meaning])+ $variant,)+
        }

        impl $name {
            /// Every word with its meaning.
            pub const WORDS: &[WordInfo] =
                &[$(WordInfo { word: $word, meaning: &[$($meaning),+] },)+];

            /// The word in logs.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.word())
            }
        }
    };
}

closed_set! {
    /// Why a request, connection or flow did not take its normal course. The codes are those of Envoy.
    ResponseFlag {
        /// The client closed the connection or stream.
        DownstreamConnectionTermination: "DC";
        /// The client violated its protocol.
        DownstreamProtocolError: "DPE";
        /// A header of the request has a value that is checked strictly.
        InvalidRequestHeader: "IH";
        /// No route, service or listener matches.
        NoRoute: "NR";
        /// A timeout for the client passed: no bytes of a head, body, connection or flow.
        StreamIdleTimeout: "SI";
        /// A policy, token or security group does not allow it.
        Unauthorized: "UAEX";
        /// The endpoint closed the connection, or it was lost.
        UpstreamConnectionTermination: "UC";
        /// No endpoint could be connected to.
        UpstreamConnectionFailure: "UF";
        /// The cluster has no endpoint that may be used.
        NoHealthyUpstream: "UH";
        /// A limit on connections, requests or flows is reached.
        Overflow: "UO";
        /// The endpoint sent an invalid response.
        UpstreamProtocolError: "UPE";
        /// The endpoint reset the HTTP/2 stream.
        UpstreamRemoteReset: "UR";
        /// The response took too long.
        UpstreamRequestTimeout: "UT";
    }
}

closed_set! {
    /// How a TCP connection or UDP flow that was not refused ended.
    TerminationDetails {
        /// Client and endpoint closed the connection.
        Closed: "closed";
        /// The client reset the connection.
        DownstreamReset: "downstream_reset";
        /// The endpoint reset the connection.
        UpstreamReset: "upstream_reset";
        /// One side reset the connection, and the agent reset the other side.
        Reset: "reset";
        /// Neither side sent bytes for the idle timeout.
        IdleTimeout: "idle_timeout";
        /// The process ended before the connection did.
        DrainTimeout: "drain_timeout";
        /// A changed policy no longer allows the connection, or the worker closed it at the end of a drain.
        Aborted: "aborted";
        /// The certificate of the client or endpoint was revoked, or its root was removed.
        CertificateRevoked: "certificate_revoked";
        /// The endpoint was removed from the service.
        EndpointRemoved: "endpoint_removed";
        /// The kernel removed the conntrack entry of the flow.
        ConntrackEntryRemoved: "conntrack_entry_removed";
    }
}

impl TerminationDetails {
    /// The response flag of the end, if there is one.
    #[must_use]
    pub fn flag(self) -> Option<ResponseFlag> {
        match self {
            Self::DownstreamReset => Some(ResponseFlag::DownstreamConnectionTermination),
            Self::UpstreamReset => Some(ResponseFlag::UpstreamConnectionTermination),
            Self::IdleTimeout => Some(ResponseFlag::StreamIdleTimeout),
            Self::Closed
            | Self::Reset
            | Self::DrainTimeout
            | Self::Aborted
            | Self::CertificateRevoked
            | Self::EndpointRemoved
            | Self::ConntrackEntryRemoved => None,
        }
    }
}
