//! What is known of a connection, for all its requests.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use weft_certs::VerifiedPeer;
use weft_model::{Name, TransportKind};

use crate::authenticate::Sender;
use crate::forwarded::Origin;
use crate::identity_headers::ProvedFields;
use crate::mutate::About;
use crate::plan::{Plan, PlannedHttp, Service, Target};
use crate::record::Trace;
use crate::standing::Standing;
use crate::underscores::DroppedHeaders;
use crate::upstream::PinnedConnection;
use crate::worker::Worker;

/// What is known of a connection, for all its requests.
pub(crate) struct Connection {
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<VerifiedPeer>,
    pub(crate) proved: Option<ProvedFields>,
    /// Whether what the peer proved still stands; none where it proved nothing.
    pub(crate) standing: Option<Rc<Standing>>,
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

impl Connection {
    /// How the connection's requests are served by a plan; none when the plan no longer serves it.
    pub(crate) fn service<'p>(&self, plan: &'p Plan) -> Option<&'p PlannedHttp> {
        match &plan.listener(&self.listener)?.chain(self.destination, self.kind)?.service {
            Service::Http(http) => Some(http),
            Service::Tcp(_) => None,
        }
    }

    /// Notes the headers of its requests that are dropped.
    pub(crate) fn dropped(&self, worker: &Worker) -> &Rc<DroppedHeaders> {
        let new = || DroppedHeaders::new(worker.metrics.clone(), self.listener.clone());
        self.dropped.get_or_init(|| Rc::new(new()))
    }

    /// Where its requests come from.
    pub(crate) fn origin(&self) -> Origin {
        Origin { client: self.client, port: self.destination.port(), is_tls: self.is_tls }
    }

    /// What variables of header values say of its requests.
    pub(crate) fn about<'a>(&'a self, route: &'a str) -> About<'a> {
        About {
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
    pub(crate) fn sender(&self, client: IpAddr) -> Sender<'_> {
        Sender {
            peer: self.peer.as_ref(),
            address: self.client.ip().to_canonical(),
            client,
            destination: self.destination,
            is_tls: self.is_tls,
        }
    }

    /// Says whether it waits for a request, so that it may be ended.
    pub(crate) fn rest(&self, rests: bool) {
        self.idle.set(rests);
        if let Some(standing) = &self.standing {
            standing.rest(rests);
        }
    }

    /// Whether no request may be begun over it any more.
    pub(crate) fn is_leaving(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_leaving())
    }

    /// Resolves when no request may be begun over it any more.
    pub(crate) async fn leaves(&self) {
        match &self.standing {
            Some(standing) => standing.leaves().await,
            None => std::future::pending().await,
        }
    }

    /// Resolves when it must end at once. Whoever asks tells the client of it, and closes.
    pub(crate) async fn ends(&self) {
        match &self.standing {
            Some(standing) => {
                standing.will_bid_farewell();
                standing.ends().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Where the connection would go whatever comes over it, if there is one such place.
    pub(crate) fn only_target(&self, worker: &Worker) -> Option<Arc<Target>> {
        let plan = worker.plan();
        plan.target(self.service(&plan)?.only.as_ref()?).cloned()
    }
}
