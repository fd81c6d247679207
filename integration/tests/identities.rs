//! Client identity: which certificate names are SPIFFE IDs, which certificates are rejected, and
//! which identity headers the service receives.

use std::collections::BTreeSet;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose,
};
use rustls::AlertDescription;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tempfile::TempDir;
use weft_integration::authority::PemIdentity;
use weft_integration::bootstrap::{
    UpstreamHttp, allow_only, bootstrap, cluster, http, listener, route_to,
};
use weft_integration::crafted_pki::{
    CraftedCa, DNS, EMAIL, URI, authority_params, der, intermediate, leaf, leaf_params, names, root,
};
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, spiffe_id};
use weft_integration::port;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{SidecarLaunch, TestSidecar};
use weft_integration::tls_client::{TlsClient, client_config_trusting};
use weft_integration::tls_contexts::TestTls;

const WEB: &[u8] = b"spiffe://mesh.local/ns/default/sa/web";

/// The expected treatment of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientOutcome {
    /// The client is `web`.
    Web,
    /// The client is another workload, and the service receives its SPIFFE ID.
    Other(&'static str),
    /// The client has no SPIFFE ID: accepted only by the listener that requires none.
    NoSpiffeId,
    /// The handshake is rejected.
    Refused(AlertDescription),
}

use ClientOutcome::{NoSpiffeId, Other, Web};

const ACCESS_DENIED: ClientOutcome = ClientOutcome::Refused(AlertDescription::AccessDenied);
const MALFORMED: ClientOutcome = ClientOutcome::Refused(AlertDescription::BadCertificate);

/// A sidecar that trusts three roots and has two listeners: `guarded` allows only `web`, `open`
/// allows every client.
struct TestSetup {
    /// The root of `mesh.local`, which names its trust domain, and its intermediate.
    ours: [CraftedCa; 2],
    /// The root of `other.local`, which names its trust domain.
    other: CraftedCa,
    /// A root without a trust domain.
    any: CraftedCa,
    guarded: u16,
    open: u16,
    roots: String,
    _sidecar: TestSidecar,
    _folder: (TempDir, MeshPki),
}

fn authority(name: &str, domain: Option<&str>) -> CertificateParams {
    let mut params = authority_params(name, 7);
    if let Some(domain) = domain {
        let id = format!("spiffe://{domain}");
        params.custom_extensions.push(names(&[(URI, id.as_bytes())]));
    }
    params
}

impl TestSetup {
    fn start() -> Self {
        let ours = root(authority("ours", Some("mesh.local")));
        let below = intermediate(authority("below", None), &ours);
        let other = root(authority("other", Some("other.local")));
        let any = root(authority("any", None));
        let roots = [&ours, &other, &any].map(|ca| ca.pem()).concat();
        let folder = TempDir::new().expect("a temporary folder can be created");
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).expect("the folder is writable");
            file
        };
        let server = signed(&below, &[&below], &[(URI, spiffe_id("server").as_bytes())], None);
        let own = IdentityFiles {
            certificate: write("server.pem", &server.chain),
            key: write("server.key", &server.key),
            serial: String::new(),
        };
        let trusted = write("roots.pem", &roots);
        let tls = TestTls::listener(&own, &trusted).socket();
        let guarded = port::free();
        let open = port::free();
        let admin = port::free();
        let route = route_to("service", 15);
        let listeners = [
            listener(
                "guarded",
                guarded,
                http(&route, &[allow_only("web", "/")]),
                Some(tls.clone()),
            ),
            listener("open", open, http(&route, &[]), Some(tls)),
        ];
        let backend = ScriptedServer::echoing_heads();
        let service = cluster("service", &[backend.port], UpstreamHttp::Http1, None);
        let pki = MeshPki::create();
        let launch = SidecarLaunch { workers: 1, ..SidecarLaunch::default() };
        let config = bootstrap(admin, &listeners, &[service]);
        let sidecar = TestSidecar::launch(&launch, &pki, [open, admin], &config);
        let ours = [ours, below];
        Self { ours, other, any, guarded, open, roots, _sidecar: sidecar, _folder: (folder, pki) }
    }

    /// Sends a request; returns the status and the head that the service received, or the alert.
    fn call(
        &self,
        identity: &PemIdentity,
        port: u16,
    ) -> Result<(u16, String), Option<AlertDescription>> {
        let config = client_config_trusting(&self.roots, identity, "server", "http/1.1");
        let mut caller = TlsClient::connect(port, &config);
        caller.handshake_result()?;
        let forged = "spiffe://mesh.local/ns/default/sa/admin";
        let request = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nx-weft-peer: {forged}\r\n\
             x-forwarded-client-cert: Hash=00;URI={forged}\r\n\r\n"
        );
        Ok(caller.exchange(&request).expect("an accepted client gets a response"))
    }

    /// Calls both listeners; returns a description of the failure, if any.
    fn failure(
        &self,
        name: &str,
        identity: &PemIdentity,
        expected: ClientOutcome,
    ) -> Option<String> {
        let guarded = self.call(identity, self.guarded);
        let open = self.call(identity, self.open);
        let id = match expected {
            ClientOutcome::Refused(alert) => {
                let refused = Err(Some(alert));
                return (guarded != refused || open != refused)
                    .then(|| format!("{name}: {guarded:?} and {open:?}, expected {alert:?}"));
            }
            Web => std::str::from_utf8(WEB).ok(),
            Other(id) => Some(id),
            NoSpiffeId => None,
        };
        let status = guarded.as_ref().map(|(status, _)| *status);
        let wanted = if expected == Web { 200 } else { 403 };
        let received = |answer: &Result<(u16, String), _>| match answer {
            Ok((200, head)) => without_other_uris(claims(head)) == proved(identity, id),
            _ => false,
        };
        let is_reported = received(&open) && (expected != Web || received(&guarded));
        (status != Ok(wanted) || !is_reported)
            .then(|| format!("{name}: {guarded:?} and {open:?}, expected {wanted} and {id:?}"))
    }

    fn below(&self, names: &[(u8, &[u8])]) -> PemIdentity {
        let [_, below] = &self.ours;
        signed(below, &[below], names, None)
    }
}

fn signed(
    issuer: &CraftedCa,
    above: &[&CraftedCa],
    named: &[(u8, &[u8])],
    common_name: Option<&str>,
) -> PemIdentity {
    let mut params = leaf_params(common_name, 99);
    if !named.is_empty() {
        params.custom_extensions.push(names(named));
    }
    leaf(&params, issuer, above)
}

/// The identity headers of a request head.
fn claims(head: &str) -> BTreeSet<String> {
    let fields = head.lines().filter_map(|line| line.split_once(": "));
    let canonical =
        fields.map(|(name, value)| (name.to_ascii_lowercase().replace('_', "-"), value));
    let is_claim =
        |name: &str| name.starts_with("x-weft") || name.starts_with("x-forwarded-client");
    canonical
        .filter(|(name, _)| is_claim(name))
        .map(|(name, value)| format!("{name}: {value}"))
        .collect()
}

/// The claims without URIs that are not SPIFFE IDs: every client may have those.
fn without_other_uris(claims: BTreeSet<String>) -> BTreeSet<String> {
    let without = |claim: String| match claim.split_once(";URI=") {
        Some((before, uri)) if !uri.to_ascii_lowercase().starts_with("spiffe:") => {
            before.to_owned()
        }
        _ => claim,
    };
    claims.into_iter().map(without).collect()
}

/// The identity headers that the service must receive for a client with this SPIFFE ID.
fn proved(identity: &PemIdentity, id: Option<&str>) -> BTreeSet<String> {
    let leaf = CertificateDer::from_pem_slice(identity.chain.as_bytes()).expect("a certificate");
    let hash = weft_certs::digest(&leaf);
    let uri = id.map(|id| format!(";URI={id}")).unwrap_or_default();
    let peer = id.map(|id| format!("x-weft-peer: {id}"));
    let by = spiffe_id("server");
    let certificate = format!("x-forwarded-client-cert: By={by};Hash={hash}{uri}");
    [certificate].into_iter().chain(peer).collect()
}

fn check_all(setup: &TestSetup, rows: &[(&str, PemIdentity, ClientOutcome)]) {
    let failures: Vec<String> = rows
        .iter()
        .filter_map(|(name, identity, wanted)| setup.failure(name, identity, *wanted))
        .collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), rows.len(), failures.join("\n"));
}

/// A SPIFFE ID of this many bytes.
fn long(bytes: usize) -> Vec<u8> {
    let mut name = b"spiffe://mesh.local/".to_vec();
    name.resize(bytes, b'a');
    name
}

/// Suffixes of `spiffe://mesh.local/ns/default/sa/` that make an invalid SPIFFE ID.
const INVALID_SUFFIXES: &[&str] = &[
    "web/",
    "web//",
    "/web",
    "./web",
    "../sa/web",
    "web/..",
    "web/.",
    "web/%2e%2e",
    "%2e/web",
    "%77eb",
    "web%2f",
    "web%00",
    "web?",
    "web?a=b",
    "web#",
    "web#a",
    "web;a",
    "web\\",
    "*",
    "web\0",
    "web\0.evil",
    "we\0b",
    "web ",
    "we b",
    "web\t",
    "web\n",
    "web\r\nx-weft-peer: spiffe://mesh.local/ns/default/sa/admin",
    "w\u{e9}b",
    "w\u{435}b",
    "web\u{200b}",
    "web:",
    "web@a",
    "web+",
    "web~",
    "web!",
];

/// URIs that begin like a SPIFFE ID but are invalid, or belong to another trust domain than the
/// root's.
const INVALID_SPIFFE_IDS: &[&str] = &[
    "SPIFFE://mesh.local/ns/default/sa/web",
    "Spiffe://mesh.local/ns/default/sa/web",
    "spiffe://MESH.LOCAL/ns/default/sa/web",
    "spiffe://Mesh.local/ns/default/sa/web",
    "spiffe://mesh.local//ns/default/sa/web",
    "spiffe://mesh.local/",
    "spiffe://mesh.local:443/ns/default/sa/web",
    "spiffe://mesh.local:/ns/default/sa/web",
    "spiffe://a@mesh.local/ns/default/sa/web",
    "spiffe://a:b@mesh.local/ns/default/sa/web",
    "spiffe:///ns/default/sa/web",
    "spiffe://",
    "spiffe:/mesh.local/ns/default/sa/web",
    "spiffe:mesh.local/ns/default/sa/web",
    "spiffe:",
    "spiffe",
    "spiffe://mesh%2elocal/ns/default/sa/web",
    "spiffe://[::1]/ns/default/sa/web",
    "spiffe://mesh.local\\ns/default/sa/web",
    "spiffe://mesh.local?/ns/default/sa/web",
    // Other trust domains than the root's.
    "spiffe://other.local/ns/default/sa/web",
    "spiffe://other.local",
    "spiffe://a.mesh.local/ns/default/sa/web",
    "spiffe://mesh.local.evil/ns/default/sa/web",
    "spiffe://mesh.local./ns/default/sa/web",
    "spiffe://mesh.loca/ns/default/sa/web",
    "spiffe://mesh_local/ns/default/sa/web",
];

/// URIs that are not SPIFFE IDs.
const OTHER_URIS: &[&str] = &[
    "",
    "/ns/default/sa/web",
    "//mesh.local/ns/default/sa/web",
    "mesh.local/ns/default/sa/web",
    " spiffe://mesh.local/ns/default/sa/web",
    "\0spiffe://mesh.local/ns/default/sa/web",
    "xspiffe://mesh.local/ns/default/sa/web",
    "https://mesh.local/ns/default/sa/web",
    "urn:spiffe://mesh.local/ns/default/sa/web",
];

#[test]
fn single_uri_name_is_accepted_only_as_a_valid_spiffe_id() {
    let setup = TestSetup::start();
    const BELOW: &str = "spiffe://mesh.local/ns/default/sa/";
    let mut uris: Vec<(Vec<u8>, ClientOutcome)> =
        vec![(WEB.to_vec(), Web), (long(2049), ACCESS_DENIED), (long(12_000), ACCESS_DENIED)];
    for id in [
        "spiffe://mesh.local",
        "spiffe://mesh.local/ns/default/sa/admin",
        "spiffe://mesh.local/ns/default/sa/web2",
        "spiffe://mesh.local/ns/default/sa/we",
        "spiffe://mesh.local/ns/default/sa/Web",
        "spiffe://mesh.local/ns/default/sa/web/more",
        "spiffe://mesh.local/ns/default/sa/w.e_b-",
        "spiffe://mesh.local/ns/default/sa/.../web",
        "spiffe://mesh.local/ns/other/sa/web",
        "spiffe://mesh.local/web",
    ] {
        uris.push((id.into(), Other(id)));
    }
    uris.extend(
        INVALID_SUFFIXES
            .iter()
            .map(|after| (format!("{BELOW}{after}").into_bytes(), ACCESS_DENIED)),
    );
    uris.extend(INVALID_SPIFFE_IDS.iter().map(|uri| ((*uri).into(), ACCESS_DENIED)));
    uris.extend(OTHER_URIS.iter().map(|uri| ((*uri).into(), NoSpiffeId)));
    let shown = |uri: &[u8]| String::from_utf8_lossy(uri).chars().take(80).collect::<String>();
    let names: Vec<String> = uris.iter().map(|(uri, _)| shown(uri)).collect();
    let rows = names.iter().zip(&uris);
    let rows = rows.map(|(name, (uri, wanted))| {
        (name.as_str(), setup.below(&[(URI, uri.as_slice())]), *wanted)
    });
    check_all(&setup, &rows.collect::<Vec<_>>());
}

#[test]
fn spiffe_id_of_2048_bytes_is_accepted() {
    let setup = TestSetup::start();
    let id: &'static str = String::from_utf8(long(2048)).expect("it is ASCII").leak();
    check_all(&setup, &[("2048 bytes", setup.below(&[(URI, id.as_bytes())]), Other(id))]);
}

#[test]
fn second_uri_name_is_rejected_and_other_names_are_not_spiffe_ids() {
    let setup = TestSetup::start();
    let [_, below] = &setup.ours;
    let admin: &[u8] = b"spiffe://mesh.local/ns/default/sa/admin";
    let web = Some("spiffe://mesh.local/ns/default/sa/web");
    let of = |names: &[(u8, &[u8])]| setup.below(names);
    let called = |names: &[(u8, &[u8])], name| signed(below, &[below], names, name);
    check_all(
        &setup,
        &[
            ("web and admin", of(&[(URI, WEB), (URI, admin)]), ACCESS_DENIED),
            ("admin and web", of(&[(URI, admin), (URI, WEB)]), ACCESS_DENIED),
            ("web twice", of(&[(URI, WEB), (URI, WEB)]), ACCESS_DENIED),
            ("https and web", of(&[(URI, b"https://mesh.local"), (URI, WEB)]), ACCESS_DENIED),
            ("web and https", of(&[(URI, WEB), (URI, b"https://mesh.local")]), ACCESS_DENIED),
            ("web and urn", of(&[(URI, WEB), (URI, b"urn:a")]), ACCESS_DENIED),
            ("web and an empty URI", of(&[(URI, WEB), (URI, b"")]), ACCESS_DENIED),
            ("two https URIs", of(&[(URI, b"https://a"), (URI, b"https://b")]), NoSpiffeId),
            ("web and a DNS name", of(&[(DNS, b"admin.mesh.local"), (URI, WEB)]), Web),
            ("web and an email address", of(&[(URI, WEB), (EMAIL, b"admin@mesh.local")]), Web),
            ("web and an IP address", of(&[(URI, WEB), (0x87, &[127, 0, 0, 1])]), Web),
            ("a SPIFFE ID as DNS name", of(&[(DNS, WEB)]), NoSpiffeId),
            ("a SPIFFE ID as email address", of(&[(EMAIL, WEB)]), NoSpiffeId),
            ("a SPIFFE ID as registered ID", of(&[(0x88, WEB)]), NoSpiffeId),
            ("a SPIFFE ID as common name", called(&[], web), NoSpiffeId),
            ("web as the common name of admin", called(&[(URI, admin)], web), ADMIN),
            ("admin as the common name of web", called(&[(URI, WEB)], Some("admin")), Web),
            ("no names", called(&[], None), NoSpiffeId),
        ],
    );
}

const ADMIN: ClientOutcome = Other("spiffe://mesh.local/ns/default/sa/admin");

#[test]
fn unparsable_uri_name_is_rejected() {
    let setup = TestSetup::start();
    let of = |names: &[(u8, &[u8])]| setup.below(names);
    let [_, below] = &setup.ours;
    let mut params = leaf_params(None, 99);
    let half = [der(URI, WEB), vec![URI, 5, b'a']].concat();
    let half = CustomExtension::from_oid_content(&[2, 5, 29, 17], der(0x30, &half));
    params.custom_extensions.push(half);
    check_all(
        &setup,
        &[
            ("web and a truncated name", leaf(&params, below, &[below]), ACCESS_DENIED),
            (
                "web and a name with a non-ASCII byte",
                of(&[(URI, WEB), (URI, b"spiffe://mesh.local/\xff")]),
                ACCESS_DENIED,
            ),
            (
                "a name with a non-ASCII byte and web",
                of(&[(URI, b"spiffe://mesh.local/\xff"), (URI, WEB)]),
                ACCESS_DENIED,
            ),
            ("web and a non-ASCII byte", of(&[(URI, WEB), (URI, b"\xff")]), ACCESS_DENIED),
            (
                "web followed by a non-ASCII byte",
                of(&[(URI, &[WEB, b"\xff"].concat())]),
                ACCESS_DENIED,
            ),
        ],
    );
}

#[test]
fn authority_signs_for_its_own_trust_domain_only() {
    let setup = TestSetup::start();
    let TestSetup { ours: [ours, _], other, any, .. } = &setup;
    let by = |ca: &CraftedCa, id: &[u8]| signed(ca, &[], &[(URI, id)], None);
    let foreign = b"spiffe://other.local/ns/default/sa/web";
    let other_web = Other("spiffe://other.local/ns/default/sa/web");
    let stranger = root(authority("ours", Some("mesh.local")));
    let unknown = ClientOutcome::Refused(AlertDescription::CertificateUnknown);
    check_all(
        &setup,
        &[
            ("web signed by its root", by(ours, WEB), Web),
            ("web signed by the root of other.local", by(other, WEB), ACCESS_DENIED),
            ("web of other.local signed by its root", by(other, foreign), other_web),
            (
                "web of other.local signed by the root of mesh.local",
                by(ours, foreign),
                ACCESS_DENIED,
            ),
            (
                "other.local signed by the root of mesh.local",
                by(ours, b"spiffe://other.local"),
                ACCESS_DENIED,
            ),
            ("web signed by a root without trust domain", by(any, WEB), Web),
            (
                "web of other.local signed by a root without trust domain",
                by(any, foreign),
                other_web,
            ),
            ("web signed by an untrusted root of the same name", by(&stranger, WEB), unknown),
        ],
    );
}

#[test]
fn certificate_with_ca_or_foreign_key_usage_is_rejected() {
    let setup = TestSetup::start();
    let [_, below] = &setup.ours;
    let like = |change: fn(&mut CertificateParams)| {
        let mut params = leaf_params(None, 99);
        params.custom_extensions.push(names(&[(URI, WEB)]));
        change(&mut params);
        leaf(&params, below, &[below])
    };
    let authority = |params: &mut CertificateParams| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    };
    let for_something_else = ClientOutcome::Refused(AlertDescription::UnsupportedCertificate);
    check_all(
        &setup,
        &[
            ("valid", like(|_| {}), Web),
            ("explicitly not a CA", like(|p| p.is_ca = IsCa::ExplicitNoCa), Web),
            ("no extended key usage", like(|p| p.extended_key_usages.clear()), Web),
            ("a CA", like(authority), MALFORMED),
            (
                "key usage keyCertSign",
                like(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
                MALFORMED,
            ),
            (
                "key usage keyAgreement only",
                like(|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]),
                MALFORMED,
            ),
            (
                "extended key usage serverAuth only",
                like(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
                for_something_else,
            ),
            (
                "extended key usage codeSigning",
                like(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
                for_something_else,
            ),
        ],
    );
}
