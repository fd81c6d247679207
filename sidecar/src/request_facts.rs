//! The facts about a request that policies and routes match on.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use weft_certs::VerifiedPeer;
use weft_model::path::PathReading;
use weft_model::{RequestFacts, SpiffeId, query_parameter};

use crate::authenticate::verified::VerifiedTokens;
use crate::http::head::{RequestHead, Upgrade, path_of, query_part_of, scheme};
use crate::http::headers::Headers;

/// The client of a request, and the destination of its connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClientInfo<'a> {
    pub(crate) peer: Option<&'a VerifiedPeer>,
    /// The address of the other end of the connection.
    pub(crate) peer_address: IpAddr,
    /// The client address, after trusted hops.
    pub(crate) address: IpAddr,
    /// The destination of the connection.
    pub(crate) destination: SocketAddr,
    pub(crate) is_tls: bool,
}

/// The facts about a request that policies and routes can match on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HttpRequestFacts<'a> {
    pub(crate) head: &'a RequestHead,
    /// Path and query: those of the head, or the original ones if the head was rewritten.
    pub(crate) target: &'a str,
    /// The authority, in the same way.
    pub(crate) authority: &'a str,
    /// The headers, in the same way.
    pub(crate) headers: &'a Headers,
    pub(crate) client: ClientInfo<'a>,
    pub(crate) tokens: Option<&'a VerifiedTokens>,
    /// The index of the reading of the path, where the path is ambiguous.
    pub(crate) reading: usize,
}

impl<'a> HttpRequestFacts<'a> {
    /// The same request with each reading of its path.
    pub(crate) fn readings(self) -> impl Iterator<Item = Self> {
        let count = self.head.readings.as_ref().map_or(1, |readings| readings.iter().count());
        (0..count).map(move |reading| Self { reading, ..self })
    }

    fn reading(&self) -> Option<&'a PathReading> {
        self.head.readings.as_ref()?.get(self.reading)
    }

    /// The value of a header that Envoy policies see although it is not among the headers, because each hop sets its own.
    fn implied(&self, name: &str) -> Option<Cow<'static, str>> {
        let is_websocket = self.head.upgrade == Some(Upgrade::WebSocket);
        match name {
            "content-length" => self.head.content_length.map(|length| length.to_string().into()),
            "x-forwarded-proto" => Some(scheme(self.client.is_tls).into()),
            "upgrade" if is_websocket => Some("websocket".into()),
            "connection" if is_websocket => Some("Upgrade".into()),
            _ => None,
        }
    }

    /// The facts about a request whose head was not rewritten.
    pub(crate) fn new(
        head: &'a RequestHead,
        client: ClientInfo<'a>,
        tokens: Option<&'a VerifiedTokens>,
    ) -> Self {
        Self {
            head,
            target: &head.target,
            authority: &head.authority,
            headers: &head.headers,
            client,
            tokens,
            reading: 0,
        }
    }
}

impl RequestFacts for HttpRequestFacts<'_> {
    fn method(&self) -> &str {
        self.head.method.as_str()
    }

    fn path(&self) -> &str {
        self.reading().map_or_else(|| path_of(self.target), PathReading::path)
    }

    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match self.reading() {
            Some(reading) => reading.fits(fits),
            None => fits(path_of(self.target)),
        }
    }

    fn authority(&self) -> &str {
        self.authority
    }

    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        match self.reading() {
            Some(reading) => {
                let query = query_part_of(self.target);
                reading.fits(&mut |path| fits(format!("{path}{query}").as_bytes()))
            }
            None => !self.target.is_empty() && fits(self.target.as_bytes()),
        }
    }

    /// The scheme as Envoy determines it for HTTP/1.1: from a trusted hop, else from the connection.
    fn scheme(&self) -> &str {
        match self.headers.get("x-forwarded-proto") {
            Some(b"http") => "http",
            Some(b"https") => "https",
            _ => scheme(self.client.is_tls),
        }
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let mut is_there = false;
        let mut found = false;
        self.headers.each(name, |value| {
            is_there = true;
            found = found || fits(value);
        });
        found || (!is_there && self.implied(name).is_some_and(|value| fits(value.as_bytes())))
    }

    fn query(&self, name: &str) -> Option<&str> {
        query_parameter(self.target, name)
    }

    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool {
        self.tokens.is_some_and(|tokens| tokens.has_claim(name, way, fits))
    }

    fn peer(&self) -> Option<&SpiffeId> {
        self.client.peer.and_then(VerifiedPeer::identity)
    }

    fn remote_address(&self) -> IpAddr {
        self.client.peer_address
    }

    fn client_address(&self) -> IpAddr {
        self.client.address
    }

    fn destination_address(&self) -> IpAddr {
        self.client.destination.ip().to_canonical()
    }

    fn destination_port(&self) -> u16 {
        self.client.destination.port()
    }
}
