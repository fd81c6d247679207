//! A connection from a client, as its requests see it.

use std::cell::{OnceCell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use weft_certs::VerifiedPeer;
use weft_model::{AccessLogSinks, Name, TransportKind};
use weft_runtime::access::ConnectionTraceId;
use weft_runtime::connections::ConnectionStatus;

use crate::connection_info::ConnectionInfo;
use crate::forwarded::PreviousHop;
use crate::header_mutation::HeaderVariables;
use crate::identity_headers::ClientCertificateHeaders;
use crate::metrics::SidecarMetrics;
use crate::plan::{PlannedCluster, PlannedHttp, PlannedService, SidecarPlan};
use crate::request_facts::ClientInfo;
use crate::request_metrics::ConnectionSeries;
use crate::underscore_headers::DroppedHeaders;
use crate::upstream::PinnedConnection;
use crate::worker::SidecarWorker;

/// A connection from a client, as its requests see it.
pub(crate) struct ClientConnection {
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<VerifiedPeer>,
    pub(crate) certificate_headers: Option<ClientCertificateHeaders>,
    /// Whether it may be read, written and take requests.
    pub(crate) status: Rc<ConnectionStatus>,
    pub(crate) kind: TransportKind,
    /// The TLS version; none without TLS.
    pub(crate) tls_version: Option<&'static str>,
    /// Its identifier in the access log.
    pub(crate) trace: Option<ConnectionTraceId>,
    pub(crate) listener: Name,
    /// The upstream connection that belongs to this client alone, because the client has authenticated on it or may do so.
    pub(crate) pinned: RefCell<Option<PinnedConnection>>,
    pub(crate) metrics: Arc<SidecarMetrics>,
    /// Records the headers that the listener drops.
    pub(crate) dropped: OnceCell<Rc<DroppedHeaders>>,
    /// The request metrics of its last request.
    pub(crate) series: ConnectionSeries,
}

impl ClientConnection {
    /// The HTTP service that serves the connection under a plan; none when the plan has none.
    pub(crate) fn service<'p>(&self, plan: &'p SidecarPlan) -> Option<&'p PlannedHttp> {
        match &plan.listener(&self.listener)?.chain(self.destination, self.kind)?.service {
            PlannedService::Http(http) => Some(http),
            PlannedService::Tcp(_) => None,
        }
    }

    /// Where the requests of the connection are logged: standard output if no filter chain of the plan serves the
    /// connection any longer.
    pub(crate) fn access_log(&self, worker: &SidecarWorker) -> AccessLogSinks {
        let plan = worker.plan_ref();
        let service = self.service(&plan);
        service.map_or(AccessLogSinks::Stdout, |http| http.http.access_log.clone())
    }

    /// Whether the client uses TLS.
    pub(crate) fn is_tls(&self) -> bool {
        self.tls_version.is_some()
    }

    /// What the access log of TCP connections needs of it.
    pub(crate) fn info(&self) -> ConnectionInfo<'_> {
        ConnectionInfo {
            peer: self.peer.as_ref(),
            client: self.client,
            destination: self.destination,
            tls_version: self.tls_version,
            trace: self.trace,
        }
    }

    /// The recorder of the headers that the listener drops.
    pub(crate) fn dropped(&self) -> &Rc<DroppedHeaders> {
        let new = || DroppedHeaders::new(self.metrics.clone(), self.listener.clone());
        self.dropped.get_or_init(|| Rc::new(new()))
    }

    /// The previous hop of its requests.
    pub(crate) fn previous_hop(&self) -> PreviousHop {
        PreviousHop { client: self.client, port: self.destination.port(), is_tls: self.is_tls() }
    }

    /// The values of the variables in header formats, apart from the cluster.
    pub(crate) fn header_variables<'a>(&'a self, route: &'a str) -> HeaderVariables<'a> {
        HeaderVariables {
            client: self.client.ip().to_canonical(),
            peer_address: self.client,
            local: self.destination,
            peer: self.peer.as_ref(),
            is_tls: self.is_tls(),
            route,
            cluster: "",
        }
    }

    /// The client of its requests. `address` is the one after trusted hops.
    pub(crate) fn client_info(&self, address: IpAddr) -> ClientInfo<'_> {
        ClientInfo {
            peer: self.peer.as_ref(),
            peer_address: self.client.ip().to_canonical(),
            address,
            destination: self.destination,
            is_tls: self.is_tls(),
        }
    }

    /// The one cluster that serves every request of the connection, if there is such a cluster.
    pub(crate) fn only_cluster(&self, worker: &SidecarWorker) -> Option<Arc<PlannedCluster>> {
        let plan = worker.plan();
        plan.cluster(self.service(&plan)?.only.as_ref()?).cloned()
    }
}
