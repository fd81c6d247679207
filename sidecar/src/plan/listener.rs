//! Listeners and filter chains prepared for serving.

use std::net::SocketAddr;
use std::sync::Arc;

use weft_certs::tls::ServerTls;
use weft_model::{
    AccessLogSinks, FilterChain, HttpService, Listener, Name, RbacFilter, RouteIndex, TcpProxy,
    TransportKind,
};

use crate::authenticate::TokenPolicy;

/// A listener with its filter chains prepared.
#[derive(Debug)]
pub(crate) struct PlannedListener {
    pub(crate) listener: Arc<Listener>,
    pub(super) chains: Vec<Arc<PlannedChain>>,
    pub(super) default: Option<Arc<PlannedChain>>,
}

/// A filter chain prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedChain {
    pub(crate) tls: ChainTls,
    /// The policies for connections.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    pub(crate) service: PlannedService,
}

/// TLS on the client side of a filter chain.
#[derive(Debug, Clone)]
pub(crate) enum ChainTls {
    /// Plaintext.
    None,
    /// TLS with this configuration.
    Terminate(ServerTls),
    /// TLS is configured, but its secrets are missing or invalid. No client is served.
    Broken,
}

/// How the connections of a filter chain are served.
#[derive(Debug)]
pub(crate) enum PlannedService {
    Tcp(TcpProxy),
    Http(Box<PlannedHttp>),
}

impl PlannedService {
    /// Where the connections and requests of the filter chain are logged.
    pub(crate) fn access_log(&self) -> &AccessLogSinks {
        match self {
            Self::Tcp(tcp) => &tcp.access_log,
            Self::Http(http) => &http.http.access_log,
        }
    }
}

/// An HTTP service prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedHttp {
    pub(crate) http: Arc<HttpService>,
    /// None when the route table does not exist.
    pub(crate) routes: Option<RouteIndex>,
    pub(crate) tokens: Option<TokenPolicy>,
    /// The policies: the chain's policies for connections, then the service's own for requests.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    /// The one cluster that serves every request, where all routes lead to it and no policy applies to requests.
    pub(crate) only: Option<Name>,
}

impl PlannedListener {
    /// The filter chain that serves a connection.
    pub(crate) fn chain(
        &self,
        destination: SocketAddr,
        kind: TransportKind,
    ) -> Option<&Arc<PlannedChain>> {
        let chosen = self.listener.chain_for(destination, kind)?;
        let is = |chain: &FilterChain| std::ptr::eq(chain, chosen);
        match self.listener.chains.iter().position(is) {
            Some(index) => self.chains.get(index),
            None => self.default.as_ref(),
        }
    }
}
