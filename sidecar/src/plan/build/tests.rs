//! Tests of plans built from snapshots.

use std::time::{Duration, Instant};

use weft_certs::KeySet;
use weft_model::{
    DataSource, Discovery, DnsDiscovery, DnsFamily, DnsPolicy, Health, KeySource, OnEmptyAnswer,
    StringMatch, TlsParameters, TransportKind, Validation,
};

use super::super::test_model::{HOUR, ISSUER, Model, address, http};
use super::super::test_pki::{TestCertificate, TestPki};
use super::*;
use crate::authenticate::TokenFault;
use crate::authenticate::key_store::{FetchedKeySet, KeyOrigin};

fn named(name: &str) -> SecretSource {
    SecretSource::Named(name.into())
}

/// TLS to clients with the secrets `identity` and `trust`.
fn downstream() -> DownstreamTls {
    let validation = named("trust");
    DownstreamTls {
        identity: named("identity"),
        client_certificates: ClientCertificateMode::Verify {
            validation,
            names: Vec::new(),
            required: true,
        },
        alpn: Vec::new(),
        parameters: TlsParameters::default(),
    }
}

/// TLS to endpoints with the secrets `identity` and `trust`.
fn upstream() -> UpstreamTls {
    UpstreamTls {
        identity: Some(named("identity")),
        validation: Some(named("trust")),
        names: Vec::new(),
        sni: None,
        alpn: Vec::new(),
        parameters: TlsParameters::default(),
    }
}

fn identity(certificate: &TestCertificate) -> Secret {
    Secret::Identity(certificate.identity())
}

/// A listener and a cluster that use TLS, with their secrets.
fn tls_model(pki: &TestPki, certificate: &TestCertificate) -> Model {
    Model::default()
        .cluster("web", Some(upstream()))
        .endpoints("web", &[(2, Health::Healthy)])
        .listener(Some(downstream()), http())
        .secret("identity", identity(certificate))
        .secret("trust", Secret::Validation(pki.validation(1, &[], 0)))
}

fn chain(plan: &SidecarPlan) -> &PlannedChain {
    let listener = plan.listener("in").expect("the plan has the listener");
    listener.chain(address(1), TransportKind::Tls).expect("the listener has one chain")
}

fn service(plan: &SidecarPlan) -> &PlannedHttp {
    match &chain(plan).service {
        PlannedService::Http(http) => http,
        PlannedService::Tcp(_) => panic!("the service is HTTP"),
    }
}

fn planned_cluster<'p>(plan: &'p SidecarPlan, name: &str) -> &'p PlannedCluster {
    plan.cluster(name).expect("the plan has the cluster")
}

#[test]
fn missing_or_invalid_secret_serves_no_client_and_sends_no_request() {
    let pki = TestPki::new();
    let certificate = pki.certificate();
    let good = || tls_model(&pki, &certificate);
    let validation = || Secret::Validation(pki.validation(1, &[], 0));
    let invalid_key = TlsIdentity { key: DataSource::inline("no key"), ..certificate.identity() };
    let invalid_roots =
        Validation { roots: DataSource::inline("no root"), ..pki.validation(1, &[], 0) };
    let rows = [
        ("valid secrets", good(), None),
        ("no identity", good().without("identity"), Some("secret \"identity\" does not exist")),
        ("no trust", good().without("trust"), Some("secret \"trust\" does not exist")),
        (
            "a validation as identity",
            good().secret("identity", validation()),
            Some("expected a certificate"),
        ),
        (
            "a certificate as validation",
            good().secret("trust", identity(&certificate)),
            Some("expected a validation context"),
        ),
        ("invalid key", good().secret("identity", Secret::Identity(invalid_key)), Some("")),
        ("invalid roots", good().secret("trust", Secret::Validation(invalid_roots)), Some("")),
    ];
    for (name, model, problem) in rows {
        let BuiltPlan { plan, problems, .. } = model.build(&mut Builder::new());
        let server = &chain(&plan).tls;
        let client = &planned_cluster(&plan, "web").tls;
        match problem {
            None => {
                assert!(matches!(server, ChainTls::Terminate(_)), "{name}: {server:?}");
                let originates = matches!(client, PlannedClusterTls::Originate { .. });
                assert!(originates, "{name}: {client:?}");
                assert_eq!(problems.all().count(), 0, "{name}: {problems:?}");
            }
            Some(problem) => {
                assert!(matches!(server, ChainTls::Broken), "{name}: {server:?}");
                assert!(matches!(client, PlannedClusterTls::Broken), "{name}: {client:?}");
                let [unserved] = &problems.unserved[..] else { panic!("{name}: {problems:?}") };
                assert!(unserved.starts_with("listener \"in\" chain"), "{name}: {unserved}");
                let [unreachable] = &problems.unreachable[..] else { panic!("{problems:?}") };
                assert!(unreachable.starts_with("cluster \"web\""), "{name}: {unreachable}");
                for reported in [unserved, unreachable] {
                    assert!(reported.contains(problem), "{name}: {reported}");
                }
            }
        }
    }
}

#[test]
fn last_good_trust_bundle_stays_in_force_but_another_invalid_certificate_is_not_replaced() {
    let pki = TestPki::new();
    let certificate = pki.certificate();
    let good = tls_model(&pki, &certificate);
    let mut builder = Builder::new();
    assert_eq!(good.build(&mut builder).problems.all().count(), 0);
    let invalid_roots =
        Validation { roots: DataSource::inline("no root"), ..pki.validation(1, &[], 0) };
    let BuiltPlan { plan, problems, .. } =
        good.clone().secret("trust", Secret::Validation(invalid_roots)).build(&mut builder);
    assert!(matches!(chain(&plan).tls, ChainTls::Terminate(_)));
    assert!(matches!(planned_cluster(&plan, "web").tls, PlannedClusterTls::Originate { .. }));
    let [warning] = &problems.warnings[..] else { panic!("{problems:?}") };
    assert!(warning.contains("the last good one stays in force"), "{warning}");
    // The key may have been replaced because it leaked.
    let invalid_key = TlsIdentity { key: DataSource::inline("no key"), ..certificate.identity() };
    let plan = good.secret("identity", Secret::Identity(invalid_key)).build(&mut builder).plan;
    assert!(matches!(chain(&plan).tls, ChainTls::Broken));
    assert!(matches!(planned_cluster(&plan, "web").tls, PlannedClusterTls::Broken));
}

#[test]
fn cluster_keeps_its_number_while_its_pooled_connections_may_be_reused() {
    let pki = TestPki::new();
    let certificate = pki.certificate();
    let good = || tls_model(&pki, &certificate);
    let healthy = Health::Healthy;
    let with_tls = |tls| good().cluster("web", tls);
    let names = vec![StringMatch::Exact("spiffe://mesh.test/ns/a/sa/web".into())];
    let rows = [
        ("nothing", good(), true),
        ("endpoints", good().endpoints("web", &[(2, healthy), (3, healthy)]), true),
        ("no endpoints", good().endpoints("web", &[]), true),
        ("CRL", good().secret("trust", Secret::Validation(pki.validation(2, &["0a"], 0))), true),
        ("listener", good().without("in"), true),
        ("own certificate", good().secret("identity", identity(&pki.certificate())), false),
        ("broken TLS", good().without("identity"), false),
        ("server name", with_tls(Some(UpstreamTls { sni: Some("b".into()), ..upstream() })), false),
        ("names", with_tls(Some(UpstreamTls { names, ..upstream() })), false),
        ("no TLS", with_tls(None), false),
    ];
    for (change, model, is_kept) in rows {
        let mut builder = Builder::new();
        let before = planned_cluster(&good().build(&mut builder).plan, "web").id;
        let plan = model.build(&mut builder).plan;
        assert_eq!(planned_cluster(&plan, "web").id == before, is_kept, "{change}");
        assert_eq!(plan.has_target(before), is_kept, "{change}");
    }
    let mut builder = Builder::new();
    let before = planned_cluster(&good().build(&mut builder).plan, "web").id;
    assert!(!good().without("web").build(&mut builder).plan.has_target(before));
    let again = planned_cluster(&good().build(&mut builder).plan, "web").id;
    assert_ne!(again, before, "numbers are not reused");
}

#[test]
fn removed_listener_and_missing_route_table_are_not_served() {
    let model = Model::default()
        .listener(None, http())
        .routes(RouteTable::new("routes".into(), Vec::new()));
    let mut builder = Builder::new();
    let plan = model.build(&mut builder).plan;
    assert!(service(&plan).routes.is_some());
    assert_eq!(plan.bound().count(), 1);
    let plan = model.clone().without("routes").build(&mut builder).plan;
    assert!(service(&plan).routes.is_none());
    let plan = model.without("in").build(&mut builder).plan;
    assert!(plan.listener("in").is_none());
    assert_eq!(plan.bound().count(), 0);
}

#[test]
fn plan_carries_the_revocations_of_a_shrunken_trust_bundle() {
    let pki = TestPki::new();
    let certificate = pki.certificate();
    let good = || tls_model(&pki, &certificate);
    let trust = |validation| good().secret("trust", Secret::Validation(validation));
    let rows = [
        ("same", good(), false),
        ("another certificate revoked", trust(pki.validation(2, &["0a"], 0)), false),
        ("revoked", trust(pki.validation(2, &[&certificate.serial], 0)), true),
        ("other roots", trust(TestPki::new().validation(1, &[], 0)), true),
        ("unused", good().without("in").without("web"), true),
        ("secret missing", good().without("trust"), true),
    ];
    for (change, model, is_revoked) in rows {
        let mut builder = Builder::new();
        let plan = good().build(&mut builder).plan;
        let store =
            planned_cluster(&plan, "web").secrets.trust.clone().expect("TLS has a trust store");
        let proof = certificate.proof(&store).expect("the certificate is valid");
        assert!(!plan.revocations.invalidates(&proof, store.version()), "{change}");
        let plan = model.build(&mut builder).plan;
        let invalidates = plan.revocations.invalidates(&proof, store.version());
        assert_eq!(invalidates, is_revoked, "{change}");
    }
}

const KEYS: &[u8] =
    br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

fn origin() -> KeyOrigin {
    let issuer = ISSUER.into();
    let uri = "http://keys.test/".into();
    KeyOrigin { issuer, uri, cluster: "keys".into(), redirects: 0, tls: None }
}

fn fetched_keys() -> KeySource {
    let KeyOrigin { uri, cluster, redirects, .. } = origin();
    KeySource::Http { uri, cluster, timeout: HOUR, cache: HOUR, redirects }
}

/// Stores a key set that the second address served.
fn fetch(keys: &mut KeyStore, now: Instant) {
    let set = KeySet::parse(KEYS).expect("a set");
    let set = FetchedKeySet { set, max_age: None, from: address(2) };
    assert!(keys.fetched(&origin(), Ok(set), HOUR, now));
}

/// Why the provider of a plan has no keys.
fn key_fault(plan: &SidecarPlan) -> Option<TokenFault> {
    let tokens = service(plan).tokens.as_ref().expect("the service has a token policy");
    let provider = tokens.provider("issuer").expect("the policy has the provider");
    provider.keys.as_ref().err().copied()
}

#[expect(clippy::disallowed_methods, reason = "tests need a start time")]
fn start() -> Instant {
    Instant::now()
}

#[test]
fn provider_without_keys_is_planned_with_its_fault() {
    let local = |keys: &[u8]| KeySource::Local(DataSource::inline(keys));
    let rows = [
        ("valid keys", local(KEYS), None),
        ("invalid keys", local(b"{}"), Some(TokenFault::KeysInvalid)),
        ("keys not fetched yet", fetched_keys(), Some(TokenFault::KeysTimeout)),
    ];
    for (name, keys, fault) in rows {
        let model = Model::default().cluster("keys", None).tokens(keys.clone());
        let built = model.build(&mut Builder::new());
        assert_eq!(key_fault(&built.plan), fault, "{name}");
        let is_fetched = matches!(keys, KeySource::Http { .. });
        assert_eq!(built.key_sets.downloads.len(), usize::from(is_fetched), "{name}");
        assert_eq!(built.key_sets.origins.len(), usize::from(is_fetched), "{name}");
        let is_unserved = fault == Some(TokenFault::KeysInvalid);
        assert_eq!(built.problems.unserved.len(), usize::from(is_unserved), "{name}");
    }
}

#[test]
fn missing_cluster_is_a_warning_once_its_keys_were_fetched() {
    let model = Model::default().tokens(fetched_keys());
    let mut keys = KeyStore::default();
    let missing = "keys of \"issuer\": cluster \"keys\" does not exist";
    let built = model.build_with(&mut Builder::new(), &keys);
    assert_eq!(built.problems.unserved, [missing]);
    assert_eq!(key_fault(&built.plan), Some(TokenFault::KeysTimeout));
    fetch(&mut keys, start());
    let built = model.build_with(&mut Builder::new(), &keys);
    let warning = format!("{missing}; the last good keys stay in force");
    assert_eq!(built.problems.warnings, [warning]);
    assert!(built.problems.unserved.is_empty());
    assert_eq!(key_fault(&built.plan), None);
}

#[test]
fn keys_are_fetched_again_when_their_endpoint_left_but_not_when_dns_answers_rotate() {
    let mut keys = KeyStore::default();
    let start = start();
    fetch(&mut keys, start);
    let check = |discovery: &Discovery, endpoints: &[(u8, Health)], expected: bool| {
        let model = Model::default()
            .cluster("keys", None)
            .change_cluster("keys", |cluster| cluster.discovery = discovery.clone())
            .endpoints("keys", endpoints)
            .tokens(fetched_keys());
        let built = model.build_with(&mut Builder::new(), &keys);
        let [download] = &built.key_sets.downloads[..] else { panic!("there is one provider") };
        let later = start + Duration::from_secs(600);
        let is_due = keys.is_due(&download.origin, |at| download.has_endpoint(at), later);
        assert_eq!(is_due, expected, "{discovery:?} {endpoints:?}");
    };
    let policy = DnsPolicy {
        refresh: HOUR,
        respects_ttl: true,
        jitter: HOUR,
        failure_base: HOUR,
        failure_max: HOUR,
        family: DnsFamily::Auto,
        on_empty_answer: OnEmptyAnswer::Keep,
    };
    let dns = Discovery::Dns(DnsDiscovery { hosts: Vec::new(), policy });
    let eds = Discovery::Endpoints("keys".into());
    let healthy = Health::Healthy;
    let unhealthy = Health::Unhealthy;
    check(&eds, &[(1, healthy), (2, healthy)], false);
    check(&eds, &[(1, healthy), (2, unhealthy)], false);
    check(&eds, &[(1, healthy)], true);
    check(&eds, &[], false);
    check(&dns, &[(1, healthy)], false);
}
