//! What is known of a connection, for all its requests.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use weft_certs::VerifiedPeer;
use weft_model::{Name, TransportKind};

use crate::authenticate::ClientInfo;
use crate::connection_registry::ConnectionStatus;
use crate::forwarded::PreviousHop;
use crate::header_mutation::HeaderVariables;
use crate::identity_headers::ClientCertificateHeaders;
use crate::plan::{PlannedCluster, PlannedHttp, PlannedService, SidecarPlan};
use crate::record::Trace;
use crate::underscore_headers::DroppedHeaders;
use crate::upstream::PinnedConnection;
use crate::worker::SidecarWorker;

/// What is known of a connection, for all its requests.
pub(crate) struct ClientConnection {
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<VerifiedPeer>,
    pub(crate) proved: Option<ClientCertificateHeaders>,
    /// Whether what the peer proved still stands; none where it proved nothing.
    pub(crate) standing: Option<Rc<ConnectionStatus>>,
    pub(crate) kind: TransportKind,
    pub(crate) is_tls: bool,
    /// How lines of its requests name it.
    pub(crate) trace: Option<Trace>,
    pub(crate) listener: Name,
    /// Whether it waits for a request, so that draining may end it.
    pub(crate) idle: Rc<Cell<bool>>,
    /// The connection to an endpoint on which its client has logged in, or may.
    pub(crate) pinned: RefCell<Option<PinnedConnection>>,
    /// Notes the headers that its listener drops.
    pub(crate) dropped: OnceCell<Rc<DroppedHeaders>>,
}

impl ClientConnection {
    /// How the connection's requests are served by a plan; none when the plan no longer serves it.
    pub(crate) fn service<'p>(&self, plan: &'p SidecarPlan) -> Option<&'p PlannedHttp> {
        match &plan.listener(&self.listener)?.chain(self.destination, self.kind)?.service {
            PlannedService::Http(http) => Some(http),
            PlannedService::Tcp(_) => None,
        }
    }

    /// Notes the headers of its requests that are dropped.
    pub(crate) fn dropped(&self, worker: &SidecarWorker) -> &Rc<DroppedHeaders> {
        let new = || DroppedHeaders::new(worker.metrics.clone(), self.listener.clone());
        self.dropped.get_or_init(|| Rc::new(new()))
    }

    /// Where its requests come from.
    pub(crate) fn previous_hop(&self) -> PreviousHop {
        PreviousHop { client: self.client, port: self.destination.port(), is_tls: self.is_tls }
    }

    /// What variables of header values say of its requests.
    pub(crate) fn header_variables<'a>(&'a self, route: &'a str) -> HeaderVariables<'a> {
        HeaderVariables {
            client: self.client.ip().to_canonical(),
            peer: self.client,
            local: self.destination,
            proof: self.peer.as_ref(),
            is_tls: self.is_tls,
            route,
            cluster: "",
        }
    }

    /// Who sends its requests.
    pub(crate) fn client_info(&self, address: IpAddr) -> ClientInfo<'_> {
        ClientInfo {
            peer: self.peer.as_ref(),
            peer_address: self.client.ip().to_canonical(),
            address,
            destination: self.destination,
            is_tls: self.is_tls,
        }
    }

    /// Says whether it waits for a request, so that it may be ended.
    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
        if let Some(standing) = &self.standing {
            standing.set_idle(idle);
        }
    }

    /// Whether no request may be begun over it any more.
    pub(crate) fn is_draining(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_draining())
    }

    /// Resolves when no request may be begun over it any more.
    pub(crate) async fn draining(&self) {
        match &self.standing {
            Some(standing) => standing.draining().await,
            None => std::future::pending().await,
        }
    }

    /// Resolves when it must end at once. Whoever asks tells the client of it, and closes.
    pub(crate) async fn closed(&self) {
        match &self.standing {
            Some(standing) => {
                standing.keep_writable();
                standing.closed_at_next_poll().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Where the connection would go whatever comes over it, if there is one such place.
    pub(crate) fn only_target(&self, worker: &SidecarWorker) -> Option<Arc<PlannedCluster>> {
        let plan = worker.plan();
        plan.target(self.service(&plan)?.only.as_ref()?).cloned()
    }
}
