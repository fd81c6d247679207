//! The task that follows a control plane: dials, talks, publishes, and tries again.

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

use super::{Backoff, ClientSession, ResponseOutcome, Warming, XdsRequest, XdsVariant, explain};
use crate::dial::Dialer;
use crate::translate::Notes;

/// The largest response taken. gRPC's own default of 4 MiB is too small for a big cluster.
const MESSAGE_LIMIT_BYTES: usize = 256 * 1024 * 1024;
/// How many of our messages may wait for the stream.
const SEND_QUEUE_LIMIT: usize = 256;

/// What is known of the source, for people and for readiness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XdsStatus {
    /// Whether a stream is open and has answered.
    pub connected: bool,
    /// Why the last stream ended.
    pub last_error: Option<String>,
    /// What the server sent and we refused, by kind and name, until a good version comes or the server removes it.
    pub rejected: BTreeMap<String, String>,
    /// What has no effect here or weakens security, by kind and name; without those that have none.
    pub notes: BTreeMap<String, Notes>,
    /// Names that something in the configuration refers to and that are missing.
    pub waiting_for: Vec<MissingReference>,
    /// Whether everything of the first configuration is in force, or was waited for in vain.
    pub is_settled: bool,
}

/// The addresses of the host names that were looked up at least once; none when no lookup succeeded.
pub type DnsAnswers = BTreeMap<DnsQuery, Arc<[IpAddr]>>;

/// The connection to what resolves host names.
#[derive(Debug)]
pub struct DnsChannels {
    /// The lookups that the configuration needs.
    pub wanted: watch::Sender<BTreeSet<DnsQuery>>,
    /// Their answers.
    pub answers: watch::Receiver<Arc<DnsAnswers>>,
}

impl DnsChannels {
    /// Asks for the addresses of a configuration's host names, and adds those that are known.
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
    /// Keeps what an operator should know of `resource`, and logs what is new of it.
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

/// Where the pieces of a configuration come from and where the whole goes.
#[derive(Debug)]
pub struct Follower {
    /// What stands in the bootstrap file.
    pub fixed: Snapshot,
    /// Whether there is a server to ask. Then what stands in the file is served at once only when it
    /// has listeners: without any, the first configuration is the server's.
    pub has_server: bool,
    /// Secrets that this process makes itself, such as its own identity.
    pub local: watch::Receiver<BTreeMap<Name, Arc<Secret>>>,
    /// Where every new configuration goes.
    pub publish: watch::Sender<Arc<Snapshot>>,
    /// Where the state of things goes.
    pub status: watch::Sender<XdsStatus>,
    /// What resolves host names.
    pub hosts: DnsChannels,
    /// What decides between the two.
    pub warming: Warming,
}

impl Follower {
    /// Publishes what of the accepted resources is warm.
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
                "configuration in force"
            );
            self.publish.send_replace(Arc::new(snapshot));
        }
        for missing in self.warming.take_overdue() {
            tracing::warn!(%missing, "not received in time, serving without it");
        }
        let (waiting_for, is_settled) = (self.warming.missing(), self.warming.is_settled());
        self.status.send_if_modified(|status| {
            let changed = status.waiting_for != waiting_for || status.is_settled != is_settled;
            status.waiting_for = waiting_for;
            status.is_settled = is_settled;
            changed
        });
    }

    fn report(&self, outcome: &ResponseOutcome, session: &ClientSession) {
        for rejection in &outcome.rejections {
            tracing::warn!(%rejection, "refused a resource; its last good version stays in force");
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

/// Follows the control plane behind `dial` until the task is dropped. Without one, publishes what
/// stands in the file, and again whenever a local secret changes.
pub async fn follow(dial: Option<Dialer>, mut session: ClientSession, mut follower: Follower) {
    follower.offer(&session, now());
    let Some(dial) = dial else {
        loop {
            let event = local_event(&mut follower).await;
            handle_local_event(event, &session, &mut follower);
        }
    };
    let mut backoff = Backoff::new();
    loop {
        let mut answered = false;
        let ended = run_stream(&dial, &mut session, &mut follower, &mut answered).await;
        if answered {
            backoff.answered();
        }
        let random = fastrand::f64();
        let wait = if answered && ended.is_none() {
            backoff.closed(random)
        } else {
            backoff.failed(random)
        };
        if let Some(reason) = &ended {
            tracing::warn!(%reason, ?wait, "lost the control plane; the last good configuration stays in force");
        }
        follower.status.send_modify(|status| {
            status.connected = false;
            status.last_error = ended;
        });
        wait_before_retry(wait, &session, &mut follower).await;
    }
}

/// Waits, while what needs no server still counts.
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

/// What may happen without the server: a new local secret, an answer of DNS, or a time that is over.
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

/// One stream from open to end; the reason when it did not end in good order.
async fn run_stream(
    dial: &Dialer,
    session: &mut ClientSession,
    follower: &mut Follower,
    answered: &mut bool,
) -> Option<String> {
    let (outbox, queue) = mpsc::channel::<XdsRequest>(SEND_QUEUE_LIMIT);
    // The server may answer with headers only after our first message, so that goes in first.
    let first = session.open();
    if send(&outbox, first).await.is_err() {
        return Some("the stream closed before it began".into());
    }
    let opening = open(dial, session.variant(), queue);
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
            Some(Ok(ServerMessage::State(response))) => session.on_state(response),
            Some(Err(status)) => return Some(explain(&status)),
            None => return None,
        };
        *answered = true;
        follower.report(&outcome, session);
        // Each accepted response is offered, also one that only says what does not exist.
        follower.offer_if(outcome.changed || follower.warming.deadline().is_some(), session);
        if send(&outbox, outcome.requests).await.is_err() {
            return Some("the stream closed while we answered".into());
        }
    }
}

impl Follower {
    fn offer_if(&mut self, worth: bool, session: &ClientSession) {
        if worth || self.publish.borrow().revision == 0 {
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
    dial: &Dialer,
    variant: XdsVariant,
    queue: mpsc::Receiver<XdsRequest>,
) -> Result<ServerMessages, tonic::Status> {
    let mut client = AggregatedDiscoveryServiceClient::new(dial.channel())
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES);
    let queue = ReceiverStream::new(queue);
    match variant {
        XdsVariant::Delta => {
            let requests = queue.filter_map(|request| async {
                if let XdsRequest::Delta(request) = request { Some(*request) } else { None }
            });
            let responses =
                client.delta_aggregated_resources(dial.request(requests)).await?.into_inner();
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
                client.stream_aggregated_resources(dial.request(requests)).await?.into_inner();
            Ok(Box::pin(responses.map(|response| response.map(ServerMessage::State))))
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn new_secret_is_followed_after_the_resolver_has_ended() {
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
        assert!(idle.is_err(), "nothing happened: {idle:?}");
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
