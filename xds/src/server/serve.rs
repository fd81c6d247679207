//! The gRPC services of the xDS server; each stream runs a [`ServerSession`].

use std::pin::Pin;
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use futures_util::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};
use weft_model::SpiffeId;

use super::guard::{GuardedService, MessageMeter, RequestGate, RequestLimits};
use super::peer::{IncomingConnection, Peer};
use super::subscribers::SubscriberHandle;
use super::{ResourceSet, ResourceSubscribers, ServerSession, XdsResponse};
use crate::authority::{self, CertificateService, CertificateSigner};
use crate::client::{XdsNode, XdsVariant};
use crate::translate::ResourceKind;

/// How many responses may be queued for a slow client: more than there are resource kinds, because at most one response
/// of each kind is unacknowledged.
const QUEUE_LIMIT: usize = 8;
/// The HTTP/2 flow-control windows of a stream and of a connection, in bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// The largest HTTP/2 header list, in bytes.
const HEADERS_LIMIT: u32 = 16 * 1024;

/// Provides the resources of each client.
pub trait ResourceProvider: Send + Sync + 'static {
    /// The resources of a client.
    ///
    /// # Errors
    /// When the client may not have any resources.
    fn resources(
        &self,
        node: &XdsNode,
        peer: Option<&SpiffeId>,
    ) -> Result<Arc<ResourceSet>, String>;

    /// Checks a client by its certificate alone, before its requests are read.
    ///
    /// # Errors
    /// When the client may not have any resources.
    fn admits(&self, peer: Option<&SpiffeId>) -> Result<(), String> {
        self.resources(&XdsNode::default(), peer).map(drop)
    }
}

/// The configuration of the xDS server.
#[derive(Debug)]
pub struct XdsServerConfig<D> {
    /// The resources of each client.
    pub provider: watch::Receiver<Arc<D>>,
    /// Is updated with the clients' acknowledgements.
    pub subscribers: Arc<ResourceSubscribers>,
    /// Limits of requests.
    pub limits: RequestLimits,
}

/// Serves resources and certificates on `connections` until `stop` resolves.
///
/// # Errors
/// When the HTTP/2 server itself fails.
pub async fn serve<D: ResourceProvider, S: CertificateSigner, IO>(
    connections: mpsc::Receiver<IncomingConnection<IO>>,
    served: XdsServerConfig<D>,
    sign: Arc<S>,
    stop: impl Future<Output = ()>,
) -> Result<(), String>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let meter = MessageMeter::new(served.limits);
    let gate = authority::gate(sign.clone());
    discovery(served, &meter)
        .add_service(GuardedService::new(CertificateService::new(sign), gate, meter))
        .serve_with_incoming_shutdown(
            ReceiverStream::new(connections).map(Ok::<_, std::io::Error>),
            stop,
        )
        .await
        .map_err(|error| error.to_string())
}

/// Serves resources without the certificate service; otherwise like [`serve`].
///
/// # Errors
/// When the HTTP/2 server itself fails.
pub async fn serve_resources<D: ResourceProvider, IO>(
    connections: mpsc::Receiver<IncomingConnection<IO>>,
    served: XdsServerConfig<D>,
    stop: impl Future<Output = ()>,
) -> Result<(), String>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connections = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
    let meter = MessageMeter::new(served.limits);
    let ended = discovery(served, &meter).serve_with_incoming_shutdown(connections, stop).await;
    ended.map_err(|error| error.to_string())
}

/// The discovery services: ADS, and SDS.
fn discovery<D: ResourceProvider>(
    XdsServerConfig { provider, subscribers, limits }: XdsServerConfig<D>,
    meter: &MessageMeter,
) -> tonic::transport::server::Router {
    let known = provider.clone();
    let gate: RequestGate = Arc::new(move |head| {
        let peer = head.extensions.get::<Peer>().and_then(|peer| peer.id.as_ref());
        let admitted = known.borrow().admits(peer);
        admitted.map_err(|reason| match peer {
            None => Status::unauthenticated(reason),
            Some(_) => Status::permission_denied(reason),
        })
    });
    let discovery = Arc::new(DiscoveryServices { provider, subscribers });
    // The guard checks each message first; tonic's default limit is 4 MiB.
    let largest = limits.authenticated.message_bytes.max(limits.unauthenticated.message_bytes);
    let all = AggregatedDiscoveryServiceServer::from_arc(discovery.clone())
        .max_decoding_message_size(largest);
    let secrets =
        SecretDiscoveryServiceServer::from_arc(discovery).max_decoding_message_size(largest);
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.streams)
        .http2_max_header_list_size(HEADERS_LIMIT)
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(10)))
        .add_service(GuardedService::new(all, gate.clone(), meter.clone()))
        .add_service(GuardedService::new(secrets, gate, meter.clone()))
}

struct DiscoveryServices<D> {
    provider: watch::Receiver<Arc<D>>,
    subscribers: Arc<ResourceSubscribers>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl<D: ResourceProvider> AggregatedDiscoveryService for DiscoveryServices<D> {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, Status> {
        Ok(self
            .state_of_the_world(request, |request| Ok(IncomingRequest::State(Box::new(request)))))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Ok(self.delta(request, |request| Ok(IncomingRequest::Delta(Box::new(request)))))
    }
}

/// The type URL of an SDS request; it may be empty, because SDS has only one type.
fn secret_type_url(type_url: String) -> Result<String, Status> {
    match ResourceKind::from_type_url(&type_url) {
        _ if type_url.is_empty() => Ok(ResourceKind::Secret.type_url()),
        Some(ResourceKind::Secret) => Ok(type_url),
        _ => Err(Status::invalid_argument(format!(
            "unsupported type {type_url:?}: this service serves secrets only"
        ))),
    }
}

#[tonic::async_trait]
impl<D: ResourceProvider> SecretDiscoveryService for DiscoveryServices<D> {
    type StreamSecretsStream = Responses<DiscoveryResponse>;
    type DeltaSecretsStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamSecretsStream>, Status> {
        Ok(self.state_of_the_world(request, |request| {
            let type_url = secret_type_url(request.type_url)?;
            Ok(IncomingRequest::State(Box::new(DiscoveryRequest { type_url, ..request })))
        }))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaSecretsStream>, Status> {
        Ok(self.delta(request, |request| {
            let type_url = secret_type_url(request.type_url)?;
            Ok(IncomingRequest::Delta(Box::new(DeltaDiscoveryRequest { type_url, ..request })))
        }))
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<tonic::Response<DiscoveryResponse>, Status> {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.id.clone());
        let request = request.into_inner();
        let type_url = secret_type_url(request.type_url.clone())?;
        let request = DiscoveryRequest { type_url, ..request };
        let node = IncomingRequest::State(Box::new(request.clone())).node().unwrap_or_default();
        let provider = self.provider.borrow().clone();
        let set = provider.resources(&node, peer.as_ref()).map_err(Status::permission_denied)?;
        let mut session = ServerSession::new(XdsVariant::StateOfTheWorld);
        let answers =
            session.on_state_of_the_world(request, &set).map_err(Status::resource_exhausted)?;
        let of_this = |response| match response {
            XdsResponse::StateOfTheWorld(response) => Some(*response),
            XdsResponse::Delta(_) => None,
        };
        let answer = answers.into_iter().find_map(of_this);
        answer.map(tonic::Response::new).ok_or_else(|| Status::not_found("unknown secrets"))
    }
}

enum IncomingRequest {
    Delta(Box<DeltaDiscoveryRequest>),
    State(Box<DiscoveryRequest>),
}

impl IncomingRequest {
    fn node(&self) -> Option<XdsNode> {
        let node = match self {
            Self::Delta(request) => request.node.as_ref(),
            Self::State(request) => request.node.as_ref(),
        };
        node.map(|node| XdsNode {
            id: node.id.clone(),
            cluster: node.cluster.clone(),
            ..XdsNode::default()
        })
    }

    /// The type URL and the message of a NACK.
    fn refusal(&self) -> Option<(&str, &str)> {
        let (type_url, error) = match self {
            Self::Delta(request) => (&request.type_url, &request.error_detail),
            Self::State(request) => (&request.type_url, &request.error_detail),
        };
        Some((type_url, &error.as_ref()?.message))
    }
}

impl<D: ResourceProvider> DiscoveryServices<D> {
    fn state_of_the_world(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
        wrap: fn(DiscoveryRequest) -> Result<IncomingRequest, Status>,
    ) -> tonic::Response<Responses<DiscoveryResponse>> {
        let responses = self.start(request, XdsVariant::StateOfTheWorld, wrap);
        tonic::Response::new(Box::pin(responses.filter_map(|response| async {
            match response {
                Ok(XdsResponse::StateOfTheWorld(response)) => Some(Ok(*response)),
                Ok(XdsResponse::Delta(_)) => None,
                Err(status) => Some(Err(status)),
            }
        })))
    }

    fn delta(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
        wrap: fn(DeltaDiscoveryRequest) -> Result<IncomingRequest, Status>,
    ) -> tonic::Response<Responses<DeltaDiscoveryResponse>> {
        let responses = self.start(request, XdsVariant::Delta, wrap);
        tonic::Response::new(Box::pin(responses.filter_map(|response| async {
            match response {
                Ok(XdsResponse::Delta(response)) => Some(Ok(*response)),
                Ok(XdsResponse::StateOfTheWorld(_)) => None,
                Err(status) => Some(Err(status)),
            }
        })))
    }

    /// Starts the task of a stream, and returns the stream of its responses.
    fn start<R: Send + 'static>(
        &self,
        request: Request<Streaming<R>>,
        variant: XdsVariant,
        wrap: fn(R) -> Result<IncomingRequest, Status>,
    ) -> ReceiverStream<Result<XdsResponse, Status>> {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.id.clone());
        let requests = request.into_inner().map(move |request| request.and_then(wrap));
        let (outbox, queue) = mpsc::channel(QUEUE_LIMIT);
        let provider = self.provider.clone();
        let subscriber = self.subscribers.register();
        let who = peer.as_ref().map(ToString::to_string);
        tokio::spawn(async move {
            let task = StreamTask {
                node: XdsNode::default(),
                peer,
                provider,
                session: ServerSession::new(variant),
                subscriber,
            };
            if let Err(status) = task.run(requests, &outbox).await {
                if status.code() == tonic::Code::ResourceExhausted {
                    tracing::warn!(peer = who, reason = status.message(), "xDS stream rejected");
                }
                tracing::debug!(%status, "xDS stream ended");
                // Sending fails when the client has already disconnected.
                drop(outbox.send(Err(status)).await);
            }
        });
        ReceiverStream::new(queue)
    }
}

/// The task of one stream.
struct StreamTask<D> {
    node: XdsNode,
    peer: Option<SpiffeId>,
    provider: watch::Receiver<Arc<D>>,
    session: ServerSession,
    subscriber: SubscriberHandle,
}

impl<D: ResourceProvider> StreamTask<D> {
    async fn run(
        mut self,
        mut requests: impl Stream<Item = Result<IncomingRequest, Status>> + Unpin,
        outbox: &mpsc::Sender<Result<XdsResponse, Status>>,
    ) -> Result<(), Status> {
        let mut introduced = false;
        loop {
            let responses = tokio::select! {
                request = requests.next() => match request {
                    None => return Ok(()),
                    Some(Err(status)) => return Err(status),
                    Some(Ok(request)) => {
                        if let Some(node) = request.node() {
                            self.node = node;
                            introduced = true;
                        }
                        if !introduced {
                            return Err(Status::invalid_argument("the first request of a stream must contain the node"));
                        }
                        self.answer(request)?
                    }
                },
                changed = self.provider.changed(), if introduced => match changed {
                    Ok(()) => {
                        let set = self.resources()?;
                        self.session.flush(&set)
                    }
                    Err(_) => return Ok(()),
                },
            };
            let who = self.peer.as_ref().map_or(self.node.id.as_str(), SpiffeId::as_str);
            self.subscriber.update(who, &self.session);
            for response in responses {
                if outbox.send(Ok(response)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }

    fn answer(&mut self, request: IncomingRequest) -> Result<Vec<XdsResponse>, Status> {
        if let Some((type_url, reason)) = request.refusal() {
            tracing::warn!(
                node = self.node.id,
                type_url,
                reason,
                "client rejected a configuration (NACK)"
            );
        }
        let set = self.resources()?;
        let answer = match request {
            IncomingRequest::Delta(request) => self.session.on_delta(*request, &set),
            IncomingRequest::State(request) => self.session.on_state_of_the_world(*request, &set),
        };
        answer.map_err(Status::resource_exhausted)
    }

    fn resources(&mut self) -> Result<Arc<ResourceSet>, Status> {
        let provider = self.provider.borrow_and_update().clone();
        provider.resources(&self.node, self.peer.as_ref()).map_err(Status::permission_denied)
    }
}
