//! The client task: connects to the control plane, runs the session, publishes snapshots, and reconnects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};
use futures_util::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use weft_model::{Discovery, DnsQuery, MissingReference, Name, Secret, Snapshot};

use super::reconnect::ReconnectDelays;
use super::{ClientSession, ResponseOutcome, Warming, XdsRequest, XdsVariant, explain};
use crate::dial::Dialer;
use crate::translate::Notes;

/// The largest accepted response. gRPC's default of 4 MiB is too small for a big cluster.
const MESSAGE_LIMIT_BYTES: usize = 256 * 1024 * 1024;
/// The most requests that may be queued for the stream.
const SEND_QUEUE_LIMIT: usize = 256;

/// The state of the configuration source, for `weft status`, `/config_dump` and readiness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XdsStatus {
    /// Whether a stream is open and the server has answered on it.
    pub connected: bool,
    /// Why the last stream ended.
    pub last_error: Option<String>,
    /// Rejected resources (NACK) with the reason, by kind and name, until a valid version arrives or the server removes
    /// the resource.
    pub rejected: BTreeMap<String, String>,
    /// Settings without effect and settings that weaken security, by kind and name of the resource. Resources without
    /// notes are not listed.
    pub notes: BTreeMap<String, Notes>,
    /// Names that the configuration refers to and that are missing.
    pub waiting_for: Vec<MissingReference>,
    /// Whether the whole first configuration is in use, or its fetch timeout has passed.
    pub is_settled: bool,
}

/// The addresses of host names that were looked up at least once; empty when no lookup succeeded.
pub type DnsAnswers = BTreeMap<DnsQuery, Arc<[IpAddr]>>;

/// The channels to the DNS resolver task.
#[derive(Debug)]
pub struct DnsChannels {
    /// The lookups that the configuration needs.
    pub wanted: watch::Sender<BTreeSet<DnsQuery>>,
    /// The answers to them.
    pub answers: watch::Receiver<Arc<DnsAnswers>>,
}

impl DnsChannels {
    /// Requests lookups of the snapshot's host names, and adds the known addresses to it.
    fn resolve(&mut self, snapshot: &mut Snapshot) {
        let answers = self.answers.borrow_and_update().clone();
        let mut queries = BTreeSet::new();
        for (name, cluster) in &snapshot.clusters {
            if let Discovery::Dns(dns) = &cluster.discovery {
                queries.extend(dns.queries());
                if let Some(set) = dns.endpoints(&answers) {
                    snapshot.resolved.insert(name.clone(), Arc::new(set));
                }
            }
        }
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != queries;
            *wanted = queries;
            changed
        });
    }
}

impl XdsStatus {
    /// Stores the notes of `resource`, and logs the new ones.
    pub fn note(&mut self, resource: String, notes: Notes) {
        let known = self.notes.remove(&resource).unwrap_or_default();
        for path in notes.not_honoured.iter().filter(|path| !known.not_honoured.contains(path)) {
            tracing::warn!(resource, path, "setting has no effect");
        }
        for warning in notes.warnings.iter().filter(|text| !known.warnings.contains(text)) {
            tracing::warn!(resource, warning, "setting weakens security");
        }
        if !notes.is_empty() {
            self.notes.insert(resource, notes);
        }
    }
}

/// The inputs and outputs of the client task.
#[derive(Debug)]
pub struct Follower {
    /// The static resources of the bootstrap file.
    pub fixed: Snapshot,
    /// Whether there is an xDS server. If so, the static resources are published before its first answer only when they
    /// have listeners.
    pub has_server: bool,
    /// Secrets that this process creates itself, such as its own identity.
    pub local: watch::Receiver<BTreeMap<Name, Arc<Secret>>>,
    /// Receives every new snapshot.
    pub publish: watch::Sender<Arc<Snapshot>>,
    /// Receives the state of the configuration source.
    pub status: watch::Sender<XdsStatus>,
    /// The DNS resolver.
    pub hosts: DnsChannels,
    /// Decides which resources are ready to use.
    pub warming: Warming,
}

impl Follower {
    /// Publishes the accepted resources that are warm.
    fn offer(&mut self, session: &ClientSession, now: Instant) {
        let alone = self.fixed.listeners.is_empty();
        if self.has_server && alone && !session.has_answered() {
            return;
        }
        let mut candidate = self.fixed.clone();
        session.fill(&mut candidate);
        candidate.secrets.extend(self.local.borrow_and_update().clone());
        self.hosts.resolve(&mut candidate);
        let passed = self.warming.offer(candidate, |missing| session.is_absent(missing), now);
        self.publish_if_changed(passed);
    }

    fn publish_if_changed(&mut self, passed: Option<Snapshot>) {
        if let Some(snapshot) = passed {
            tracing::info!(
                revision = snapshot.revision,
                listeners = snapshot.listeners.len(),
                clusters = snapshot.clusters.len(),
                "configuration applied"
            );
            self.publish.send_replace(Arc::new(snapshot));
        }
        for missing in self.warming.take_overdue() {
            tracing::warn!(%missing, "resource not received in time, serving without it");
        }
        let waiting_for = self.warming.missing();
        let is_settled = self.warming.is_settled();
        self.status.send_if_modified(|status| {
            let changed = status.waiting_for != waiting_for || status.is_settled != is_settled;
            status.waiting_for = waiting_for;
            status.is_settled = is_settled;
            changed
        });
    }

    fn report(&self, outcome: &ResponseOutcome, session: &ClientSession) {
        for rejection in &outcome.rejections {
            tracing::warn!(%rejection, "resource rejected, keeping its last good version");
        }
        self.status.send_modify(|status| {
            status.connected = true;
            status.last_error = None;
            status.rejected = session.rejected();
            for (kind, name, notes) in &outcome.notes {
                if !notes.is_empty() || !status.notes.is_empty() {
                    status.note(format!("{kind} {name}"), notes.clone());
                }
            }
        });
    }
}

/// Runs the client until the task is dropped. Without a dialer, publishes the static resources, and again whenever a
/// local secret or a DNS answer changes.
pub async fn follow(dialer: Option<Dialer>, mut session: ClientSession, mut follower: Follower) {
    follower.offer(&session, now());
    let Some(dialer) = dialer else {
        loop {
            let event = local_event(&mut follower).await;
            handle_local_event(event, &session, &mut follower);
        }
    };
    let mut delays = ReconnectDelays::default();
    loop {
        let mut answered = false;
        let ended = run_stream(&dialer, &mut session, &mut follower, &mut answered).await;
        if answered {
            delays.answered();
        }
        let random = fastrand::f64();
        let wait =
            if answered && ended.is_none() { delays.closed(random) } else { delays.failed(random) };
        if let Some(reason) = &ended {
            tracing::warn!(%reason, ?wait, "control plane connection lost, keeping the last good configuration");
        }
        follower.status.send_modify(|status| {
            status.connected = false;
            status.last_error = ended;
        });
        wait_before_retry(wait, &session, &mut follower).await;
    }
}

/// Waits before a reconnect, and handles local events meanwhile.
async fn wait_before_retry(wait: Duration, session: &ClientSession, follower: &mut Follower) {
    let waited = tokio::time::sleep(wait);
    tokio::pin!(waited);
    loop {
        tokio::select! {
            () = &mut waited => return,
            event = local_event(follower) => handle_local_event(event, session, follower),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum LocalEvent {
    Offer,
    Deadline,
}

/// Waits for the next event that does not come from the server: a new local secret, a DNS answer, or a warming deadline.
async fn local_event(follower: &mut Follower) -> LocalEvent {
    let deadline = follower.warming.deadline();
    let overdue = async {
        match deadline {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = changed(&mut follower.local) => LocalEvent::Offer,
        () = changed(&mut follower.hosts.answers) => LocalEvent::Offer,
        () = overdue => LocalEvent::Deadline,
    }
}

/// Waits for a new value; does not return once the sender is dropped.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending().await
    }
}

fn handle_local_event(event: LocalEvent, session: &ClientSession, follower: &mut Follower) {
    match event {
        LocalEvent::Offer => follower.offer(session, now()),
        LocalEvent::Deadline => {
            let passed = follower.warming.tick(now());
            follower.publish_if_changed(passed);
        }
    }
}

enum ServerMessage {
    Delta(DeltaDiscoveryResponse),
    State(DiscoveryResponse),
}

type ServerMessages = Pin<Box<dyn Stream<Item = Result<ServerMessage, tonic::Status>> + Send>>;

/// Runs one stream until it ends; returns the reason unless the server closed it without an error.
async fn run_stream(
    dialer: &Dialer,
    session: &mut ClientSession,
    follower: &mut Follower,
    answered: &mut bool,
) -> Option<String> {
    let (outbox, queue) = mpsc::channel::<XdsRequest>(SEND_QUEUE_LIMIT);
    // Some servers send response headers only after the first request, so it is queued before the call.
    let first = session.open();
    if send(&outbox, first).await.is_err() {
        return Some("stream closed before the first request was sent".into());
    }
    let opening = open(dialer, session.variant(), queue);
    tokio::pin!(opening);
    let mut arrivals: ServerMessages = loop {
        tokio::select! {
            opened = &mut opening => match opened {
                Ok(arrivals) => break arrivals,
                Err(status) => return Some(explain(&status)),
            },
            event = local_event(follower) => handle_local_event(event, session, follower),
        }
    };
    loop {
        let arrived = tokio::select! {
            arrived = arrivals.next() => arrived,
            event = local_event(follower) => {
                handle_local_event(event, session, follower);
                continue;
            }
        };
        let outcome = match arrived {
            Some(Ok(ServerMessage::Delta(response))) => session.on_delta(response),
            Some(Ok(ServerMessage::State(response))) => session.on_state_of_the_world(response),
            Some(Err(status)) => return Some(explain(&status)),
            None => return None,
        };
        *answered = true;
        follower.report(&outcome, session);
        // While a change waits for names, a response that changes nothing may tell that a name is absent.
        follower.offer_if(outcome.changed || follower.warming.deadline().is_some(), session);
        if send(&outbox, outcome.requests).await.is_err() {
            return Some("stream closed before the ACK was sent".into());
        }
    }
}

impl Follower {
    fn offer_if(&mut self, changed: bool, session: &ClientSession) {
        if changed || self.publish.borrow().revision == 0 {
            self.offer(session, now());
        }
    }
}

async fn send(outbox: &mpsc::Sender<XdsRequest>, requests: Vec<XdsRequest>) -> Result<(), ()> {
    for request in requests {
        outbox.send(request).await.map_err(|_| ())?;
    }
    Ok(())
}

async fn open(
    dialer: &Dialer,
    variant: XdsVariant,
    queue: mpsc::Receiver<XdsRequest>,
) -> Result<ServerMessages, tonic::Status> {
    let mut client = AggregatedDiscoveryServiceClient::new(dialer.channel())
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES);
    let queue = ReceiverStream::new(queue);
    match variant {
        XdsVariant::Delta => {
            let requests = queue.filter_map(|request| async {
                if let XdsRequest::Delta(request) = request { Some(*request) } else { None }
            });
            let responses =
                client.delta_aggregated_resources(dialer.request(requests)).await?.into_inner();
            Ok(Box::pin(responses.map(|response| response.map(ServerMessage::Delta))))
        }
        XdsVariant::StateOfTheWorld => {
            let requests = queue.filter_map(|request| async {
                if let XdsRequest::StateOfTheWorld(request) = request {
                    Some(*request)
                } else {
                    None
                }
            });
            let responses =
                client.stream_aggregated_resources(dialer.request(requests)).await?.into_inner();
            Ok(Box::pin(responses.map(|response| response.map(ServerMessage::State))))
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the only place where this crate reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn new_secret_is_published_after_the_resolver_task_has_ended() {
        let (local, receiver) = watch::channel(BTreeMap::new());
        let (answers, hosts) = watch::channel(Arc::default());
        let mut follower = Follower {
            fixed: Snapshot::default(),
            has_server: false,
            local: receiver,
            publish: watch::Sender::default(),
            status: watch::Sender::default(),
            hosts: DnsChannels { wanted: watch::Sender::default(), answers: hosts },
            warming: Warming::new(),
        };
        drop(answers);
        let wait = Duration::from_millis(50);
        let idle = tokio::time::timeout(wait, local_event(&mut follower)).await;
        assert!(idle.is_err(), "expected no event: {idle:?}");
        let (event, ()) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(5), local_event(&mut follower)),
            async {
                tokio::time::sleep(wait).await;
                local.send_replace(BTreeMap::new());
            }
        );
        assert!(matches!(event, Ok(LocalEvent::Offer)), "{event:?}");
    }
}
