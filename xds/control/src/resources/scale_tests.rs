//! The cost of a change in a mesh with many services.

use std::collections::BTreeSet;
use std::sync::Arc;

use weft_model::SpiffeId;
use weft_xds::client::{ClientSession, XdsNode, XdsRequest, XdsVariant};
use weft_xds::server::{RequestLimits, ResourceProvider, ResourceSet, ServerSession, XdsResponse};

use super::{Trust, Views, check_inbound};
use crate::mesh::MeshFile;

/// A mesh with this number of services, each with two ports, two endpoints and a policy. `changed` is the index of a service
/// and the last byte of its second endpoint.
fn large_mesh(services: usize, changed: Option<(usize, u8)>) -> Arc<str> {
    let mut text =
        "trust_domain: mesh.local\nservice_ranges: [10.96.0.0/12]\nservices:\n".to_owned();
    for number in 0..services {
        let [_, b, c, d] = u32::try_from(number).expect("few").to_be_bytes();
        let last = changed.filter(|(at, _)| *at == number).map_or(2, |(_, last)| last);
        text += &format!(
            "- name: service-{number}\n  addresses: [10.{}.{c}.{d}]\n  ports:\n  - {{port: 80, protocol: http}}\n  \
            - {{port: 90, protocol: grpc}}\n  endpoints:\n  - {{address: 10.{b}.{c}.{d}}}\n  \
            - {{address: 10.9.0.{last}}}\n",
            96 + b
        );
    }
    text += "security:\n  policies:\n";
    for number in 0..services {
        let caller = (number + 1) % services;
        text +=
            &format!("  - service: service-{number}\n    allow: [{{from: [service-{caller}]}}]\n");
    }
    text.into()
}

/// A mesh file and the views of its last version.
struct Published {
    file: MeshFile,
    views: Views,
}

impl Published {
    fn new(services: usize) -> Self {
        let mut published =
            Self { file: MeshFile::new("mesh.yaml".into()), views: Views::default() };
        published.read(&large_mesh(services, None));
        published
    }

    fn read(&mut self, text: &Arc<str>) {
        let mesh = self.file.parse(text).expect("a valid file");
        let trust = Trust { roots: "ROOTS".into(), revocations: "LISTS".into() };
        self.views = Views::new(Arc::new(mesh), &trust, 7, &self.views).expect("closed views");
    }

    fn set_of(&self, service: &str) -> Arc<ResourceSet> {
        let peer = SpiffeId::parse(&format!("spiffe://mesh.local/ns/default/sa/{service}"));
        let set = self.views.resources(&XdsNode::default(), Some(&peer.expect("an id")));
        set.expect("a set")
    }
}

/// The size of the server's responses.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sent {
    resources: usize,
    bytes: usize,
}

/// A client's session and the server's session of one stream.
struct Stream {
    client: ClientSession,
    server: ServerSession,
}

impl Stream {
    fn new() -> Self {
        let client = ClientSession::new(XdsVariant::Delta, XdsNode::default(), BTreeSet::new());
        Self { client, server: ServerSession::new(XdsVariant::Delta) }
    }

    /// Opens the stream: the client requests all resources and receives them.
    fn open(&mut self, set: &Arc<ResourceSet>) -> Sent {
        let requests = self.client.open();
        self.exchange(set, requests, Vec::new())
    }

    /// The server sends the changed resources.
    fn flush(&mut self, set: &Arc<ResourceSet>) -> Sent {
        let responses = self.server.flush(set);
        self.exchange(set, Vec::new(), responses)
    }

    /// Exchanges messages until both sides have none left.
    fn exchange(
        &mut self,
        set: &Arc<ResourceSet>,
        mut requests: Vec<XdsRequest>,
        mut responses: Vec<XdsResponse>,
    ) -> Sent {
        let mut sent = Sent::default();
        loop {
            for request in std::mem::take(&mut requests) {
                let XdsRequest::Delta(request) = request else { panic!("delta is spoken") };
                responses.extend(self.server.on_delta(*request, set).expect("within limits"));
            }
            if responses.is_empty() {
                return sent;
            }
            for response in std::mem::take(&mut responses) {
                let XdsResponse::Delta(response) = response else { panic!("delta is spoken") };
                sent.resources += response.resources.len();
                let bodies = response.resources.iter().filter_map(|sent| sent.resource.as_ref());
                sent.bytes += bodies.map(|body| body.value.len()).sum::<usize>();
                let outcome = self.client.on_delta(*response);
                assert!(outcome.rejections.is_empty(), "{:?}", outcome.rejections);
                requests.extend(outcome.requests);
            }
        }
    }
}

#[test]
fn changed_endpoint_among_1000_services_encodes_one_and_sends_its_endpoints() {
    const SERVICES: usize = 1000;
    let mut published = Published::new(SERVICES);
    assert_eq!(published.views.encoded(), SERVICES);
    let mut stream = Stream::new();
    let sent = stream.open(&published.set_of("service-0"));
    assert!(sent.resources >= 6 * SERVICES, "clusters, endpoints and listeners: {sent:?}");
    for last in 3..6 {
        published.read(&large_mesh(SERVICES, Some((500, last))));
        assert_eq!(published.views.encoded(), 1);
        let sent = stream.flush(&published.set_of("service-0"));
        assert_eq!(sent.resources, 2, "the endpoints of two ports");
        assert!(sent.bytes < 1024, "{sent:?}");
    }
    published.read(&large_mesh(SERVICES, Some((500, 5))));
    assert_eq!(published.views.encoded(), 0, "nothing has changed");
}

#[test]
fn changed_policy_among_1000_services_checks_one_inbound_configuration() {
    const SERVICES: usize = 1000;
    let text = large_mesh(SERVICES, None);
    let mut file = MeshFile::new("mesh.yaml".into());
    let before = file.parse(&text).expect("a valid file");
    assert_eq!(check_inbound(&before, None), Ok(SERVICES));
    // A policy at the beginning shifts all others, without renaming their clauses.
    let new = "  policies:\n  - service: service-7\n    deny: [{from: [service-9]}]\n";
    let after = file.parse(&text.replace("  policies:\n", new).into()).expect("a valid file");
    assert_eq!(check_inbound(&after, Some(&before)), Ok(1));
}

/// The size of the names and versions of a request, with an upper bound of their encoding, in bytes.
fn text_bytes(request: &XdsRequest) -> usize {
    let XdsRequest::Delta(request) = request else { panic!("delta is spoken") };
    let names = request.resource_names_subscribe.iter().map(|name| name.len() + 4);
    let versions = request.initial_resource_versions.iter();
    let versions = versions.map(|(name, version)| name.len() + version.len() + 8);
    names.chain(versions).sum()
}

#[test]
fn reconnect_with_10000_services_stays_below_the_request_limit_and_resends_nothing() {
    const SERVICES: usize = 1000;
    // Ten times the services, with names that are one digit longer.
    const TIMES: usize = 11;
    let published = Published::new(SERVICES);
    let set = published.set_of("service-0");
    let mut stream = Stream::new();
    stream.open(&set);
    stream.server = ServerSession::new(XdsVariant::Delta);
    let requests = stream.client.open();
    let largest = requests.iter().map(text_bytes).max().expect("a request");
    let limit = RequestLimits::for_message_bytes(RequestLimits::DEFAULT_MESSAGE_BYTES);
    let identified = limit.authenticated.message_bytes;
    assert!(largest * TIMES < identified, "{largest} bytes for {SERVICES} services");
    let sent = stream.exchange(&set, requests, Vec::new());
    assert_eq!(sent, Sent::default());
}

/// The CPU time of this thread, in nanoseconds. The kernel's statistics count in ticks, which are longer than a change of a
/// small mesh takes.
fn processor_time() -> std::time::Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    nix::time::clock_gettime(clock).expect("a supported clock").into()
}

#[test]
fn cost_of_a_change_grows_less_than_quadratically() {
    let work = |services: usize| {
        let mut published = Published::new(services);
        let change = |last| {
            let text = large_mesh(services, Some((services / 2, last)));
            let begun = processor_time();
            published.read(&text);
            drop(published.set_of("service-0"));
            processor_time() - begun
        };
        // The minimum has the least noise.
        (3..8).map(change).min().expect("several")
    };
    let few = work(100);
    let many = work(1600);
    // Sixteen times the services: the square is 256 times the work.
    assert!(many < few * 48, "{few:?} for 100 services, {many:?} for 1600");
}
