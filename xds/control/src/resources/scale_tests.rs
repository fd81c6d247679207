//! What a change costs in a mesh with many services.

use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use weft_model::SpiffeId;
use weft_xds::client::{Node, Variant};
use weft_xds::server::{Directory, ResourceSet, Response, ServerSession};
use weft_xds::translate::Kind;

use super::{Trust, Views};
use crate::mesh::MeshFile;

/// A mesh of so many services, each with two ports, two endpoints and a policy; the endpoints of one end with
/// `changed`.
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

/// The file of such a mesh, read and published.
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
        let mesh = self.file.parse(text).expect("a good file");
        let trust = Trust { roots: "ROOTS".into(), revocations: "LISTS".into() };
        self.views = Views::new(Arc::new(mesh), &trust, 7, &self.views).expect("closed views");
    }

    fn set_of(&self, service: &str) -> Arc<ResourceSet> {
        let peer = SpiffeId::parse(&format!("spiffe://mesh.local/ns/default/sa/{service}"));
        let set = self.views.resources(&Node::default(), Some(&peer.expect("an id")));
        set.expect("the service is there")
    }
}

/// Asks for all clusters and the endpoints of all, and acknowledges what came. Gives how many resources were sent,
/// and their bytes.
fn taken(
    session: &mut ServerSession,
    set: &ResourceSet,
    responses: Vec<Response>,
) -> (usize, usize) {
    let (mut resources, mut bytes) = (0, 0);
    let mut waiting = responses;
    while let Some(response) = waiting.pop() {
        let Response::Delta(response) = response else { panic!("a delta was asked for") };
        resources += response.resources.len();
        let sizes = response.resources.iter().filter_map(|resource| resource.resource.as_ref());
        bytes += sizes.map(|resource| resource.value.len()).sum::<usize>();
        let acknowledged = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        waiting.extend(session.on_delta(acknowledged, set).expect("within limits"));
    }
    (resources, bytes)
}

#[test]
fn changed_endpoint_among_1000_services_encodes_one_and_sends_its_endpoints() {
    const SERVICES: usize = 1000;
    let mut published = Published::new(SERVICES);
    assert_eq!(published.views.encoded(), SERVICES);
    let set = published.set_of("service-0");
    let mut session = ServerSession::new(Variant::Delta);
    for (kind, names) in [
        (Kind::Cluster, Vec::new()),
        (Kind::Endpoints, set.of(Kind::Cluster).map(|(name, _)| name.to_string()).collect()),
        (Kind::Listener, Vec::new()),
    ] {
        let request = DeltaDiscoveryRequest {
            type_url: kind.type_url(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        let responses = session.on_delta(request, &set).expect("within limits");
        let (resources, _) = taken(&mut session, &set, responses);
        assert!(resources >= 2 * SERVICES, "{kind}: {resources}");
    }
    for last in 3..6 {
        published.read(&large_mesh(SERVICES, Some((500, last))));
        assert_eq!(published.views.encoded(), 1);
        let set = published.set_of("service-0");
        let responses = session.flush(&set);
        let (resources, bytes) = taken(&mut session, &set, responses);
        assert_eq!(resources, 2, "the endpoints of two ports");
        assert!(bytes < 1024, "{bytes} bytes");
    }
    published.read(&large_mesh(SERVICES, Some((500, 5))));
    assert_eq!(published.views.encoded(), 0, "nothing has changed");
}

/// The processor time of this thread.
fn processor_time() -> std::time::Duration {
    use nix::sys::time::TimeValLike as _;
    let used = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD);
    let time = used.expect("the kernel counts").user_time();
    std::time::Duration::from_micros(u64::try_from(time.num_microseconds()).expect("above zero"))
}

#[test]
fn work_for_a_change_grows_with_the_services_and_not_with_their_square() {
    let work = |services: usize| {
        let mut published = Published::new(services);
        let change = |last| {
            let text = large_mesh(services, Some((services / 2, last)));
            let begun = processor_time();
            published.read(&text);
            drop(published.set_of("service-0"));
            processor_time() - begun
        };
        // The least is what disturbs least.
        (3..8).map(change).min().expect("several")
    };
    let (few, many) = (work(100), work(1600));
    // Sixteen times the services: the square is 256 times the work.
    assert!(many < few * 48, "{few:?} for 100 services, {many:?} for 1600");
}
