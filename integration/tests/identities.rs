//! Who a client is, by the names in its certificate: what is a SPIFFE id, what is none, and what a service
//! is told of it.

use std::collections::BTreeSet;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose,
};
use rustls::AlertDescription;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;
use tempfile::TempDir;
use weft_integration::authority::PemIdentity;
use weft_integration::bootstrap::{
    UpstreamHttp, allow_only, bootstrap, cluster, http, listener, route_to, verify_mode,
};
use weft_integration::crafted_pki::{
    CraftedCa, DNS, EMAIL, URI, authority_params, der, intermediate, leaf, leaf_params, names, root,
};
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, spiffe_id};
use weft_integration::port;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{SidecarLaunch, TestSidecar};
use weft_integration::tls_client::{TlsClient, client_config_trusting};

const WEB: &[u8] = b"spiffe://mesh.local/ns/default/sa/web";

/// What must come of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It is `web`.
    Web,
    /// It is somebody else, whose id the service is told.
    Other(&'static str),
    /// It is let in where nobody is asked for an id, and nowhere else.
    Nameless,
    /// The handshake is refused.
    Refused(AlertDescription),
}

use Outcome::{Nameless, Other, Web};

const REFUSED: Outcome = Outcome::Refused(AlertDescription::AccessDenied);
const MALFORMED: Outcome = Outcome::Refused(AlertDescription::BadCertificate);

/// Three authorities that are trusted, and a sidecar that trusts them: with a listener for `web` alone, and
/// one for everybody.
struct World {
    /// Of `mesh.local`, which its certificate names; and what it has signed, which signs.
    ours: [CraftedCa; 2],
    /// Of `other.local`, likewise.
    other: CraftedCa,
    /// Of no domain.
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

impl World {
    fn start() -> Self {
        let ours = root(authority("ours", Some("mesh.local")));
        let below = intermediate(authority("below", None), &ours);
        let other = root(authority("other", Some("other.local")));
        let any = root(authority("any", None));
        let roots = [&ours, &other, &any].map(|ca| ca.pem()).concat();
        let folder = TempDir::new().expect("a folder");
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).expect("the folder takes files");
            file
        };
        let server = signed(&below, &[&below], &[(URI, spiffe_id("server").as_bytes())], None);
        let own = IdentityFiles {
            certificate: write("server.pem", &server.chain),
            key: write("server.key", &server.key),
            serial: String::new(),
        };
        let trusted = write("roots.pem", &roots);
        let mut tls = verify_mode(&own, &trusted, &trusted);
        let validation = tls.pointer_mut("/typed_config/common_tls_context/validation_context");
        let validation = validation.and_then(Value::as_object_mut).expect("clients are asked");
        validation.remove("crl");
        let (guarded, open, admin) = (port::free(), port::free(), port::free());
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
        let (pki, launch) =
            (MeshPki::create(), SidecarLaunch { workers: 1, ..SidecarLaunch::default() });
        let config = bootstrap(admin, &listeners, &[service]);
        let sidecar = TestSidecar::launch(&launch, &pki, [open, admin], &config);
        let ours = [ours, below];
        Self { ours, other, any, guarded, open, roots, _sidecar: sidecar, _folder: (folder, pki) }
    }

    /// Calls a listener; the status and the head that the service saw, or the alert.
    fn call(
        &self,
        holder: &PemIdentity,
        port: u16,
    ) -> Result<(u16, String), Option<AlertDescription>> {
        let config = client_config_trusting(&self.roots, holder, "server", "http/1.1");
        let mut caller = TlsClient::connect(port, &config);
        caller.handshake_result()?;
        let forged = "spiffe://mesh.local/ns/default/sa/admin";
        let request = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nx-weft-peer: {forged}\r\n\
             x-forwarded-client-cert: Hash=00;URI={forged}\r\n\r\n"
        );
        Ok(caller.exchange(&request).expect("who is let in has an answer"))
    }

    /// What is wrong with what comes of a client.
    fn fault(&self, name: &str, holder: &PemIdentity, expected: Outcome) -> Option<String> {
        let (guarded, open) = (self.call(holder, self.guarded), self.call(holder, self.open));
        let id = match expected {
            Outcome::Refused(alert) => {
                let refused = Err(Some(alert));
                return (guarded != refused || open != refused)
                    .then(|| format!("{name}: {guarded:?} and {open:?}, not {alert:?}"));
            }
            Web => std::str::from_utf8(WEB).ok(),
            Other(id) => Some(id),
            Nameless => None,
        };
        let status = guarded.as_ref().map(|(status, _)| *status);
        let wanted = if expected == Web { 200 } else { 403 };
        let told = |answer: &Result<(u16, String), _>| match answer {
            Ok((200, head)) => without_other_uris(claims(head)) == proved(holder, id),
            _ => false,
        };
        let is_told = told(&open) && (expected != Web || told(&guarded));
        (status != Ok(wanted) || !is_told)
            .then(|| format!("{name}: {guarded:?} and {open:?}, not {wanted} and {id:?}"))
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

/// What a head says of who calls.
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

/// The claims without URIs that are not SPIFFE IDs: any caller may have those.
fn without_other_uris(claims: BTreeSet<String>) -> BTreeSet<String> {
    let without = |claim: String| match claim.split_once(";URI=") {
        Some((before, uri)) if !uri.to_ascii_lowercase().starts_with("spiffe:") => {
            before.to_owned()
        }
        _ => claim,
    };
    claims.into_iter().map(without).collect()
}

/// What a service must be told of a client of this id.
fn proved(holder: &PemIdentity, id: Option<&str>) -> BTreeSet<String> {
    let leaf = CertificateDer::from_pem_slice(holder.chain.as_bytes()).expect("a certificate");
    let hash = weft_certs::digest(&leaf);
    let uri = id.map(|id| format!(";URI={id}")).unwrap_or_default();
    let peer = id.map(|id| format!("x-weft-peer: {id}"));
    let by = spiffe_id("server");
    let certificate = format!("x-forwarded-client-cert: By={by};Hash={hash}{uri}");
    [certificate].into_iter().chain(peer).collect()
}

fn check_all(world: &World, rows: &[(&str, PemIdentity, Outcome)]) {
    let faults: Vec<String> = rows
        .iter()
        .filter_map(|(name, holder, wanted)| world.fault(name, holder, *wanted))
        .collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), rows.len(), faults.join("\n"));
}

/// A name of so many bytes.
fn long(bytes: usize) -> Vec<u8> {
    let mut name = b"spiffe://mesh.local/".to_vec();
    name.resize(bytes, b'a');
    name
}

/// What follows `spiffe://mesh.local/ns/default/sa/` in names that are no ids.
const NO_PATHS: &[&str] = &[
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

/// Names that claim to be ids and are none, or none that our root may vouch for.
const NO_IDS: &[&str] = &[
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
    // Of another domain than the root's.
    "spiffe://other.local/ns/default/sa/web",
    "spiffe://other.local",
    "spiffe://a.mesh.local/ns/default/sa/web",
    "spiffe://mesh.local.evil/ns/default/sa/web",
    "spiffe://mesh.local./ns/default/sa/web",
    "spiffe://mesh.loca/ns/default/sa/web",
    "spiffe://mesh_local/ns/default/sa/web",
];

/// URIs that do not even claim to be ids.
const NO_CLAIMS: &[&str] = &[
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
fn one_uri_is_an_id_or_it_is_not() {
    let world = World::start();
    const BELOW: &str = "spiffe://mesh.local/ns/default/sa/";
    let mut uris: Vec<(Vec<u8>, Outcome)> =
        vec![(WEB.to_vec(), Web), (long(2049), REFUSED), (long(12_000), REFUSED)];
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
    uris.extend(NO_PATHS.iter().map(|after| (format!("{BELOW}{after}").into_bytes(), REFUSED)));
    uris.extend(NO_IDS.iter().map(|uri| ((*uri).into(), REFUSED)));
    uris.extend(NO_CLAIMS.iter().map(|uri| ((*uri).into(), Nameless)));
    let shown = |uri: &[u8]| String::from_utf8_lossy(uri).chars().take(80).collect::<String>();
    let names: Vec<String> = uris.iter().map(|(uri, _)| shown(uri)).collect();
    let rows = names.iter().zip(&uris);
    let rows = rows.map(|(name, (uri, wanted))| {
        (name.as_str(), world.below(&[(URI, uri.as_slice())]), *wanted)
    });
    check_all(&world, &rows.collect::<Vec<_>>());
}

#[test]
fn the_longest_id_is_an_id() {
    let world = World::start();
    let id: &'static str = String::from_utf8(long(2048)).expect("it is ASCII").leak();
    check_all(&world, &[("2048 bytes", world.below(&[(URI, id.as_bytes())]), Other(id))]);
}

#[test]
fn an_id_stands_alone_among_uris_and_nothing_else_is_one() {
    let world = World::start();
    let [_, below] = &world.ours;
    let admin: &[u8] = b"spiffe://mesh.local/ns/default/sa/admin";
    let web = Some("spiffe://mesh.local/ns/default/sa/web");
    let of = |names: &[(u8, &[u8])]| world.below(names);
    let called = |names: &[(u8, &[u8])], name| signed(below, &[below], names, name);
    check_all(
        &world,
        &[
            ("web and admin", of(&[(URI, WEB), (URI, admin)]), REFUSED),
            ("admin and web", of(&[(URI, admin), (URI, WEB)]), REFUSED),
            ("web twice", of(&[(URI, WEB), (URI, WEB)]), REFUSED),
            ("https and web", of(&[(URI, b"https://mesh.local"), (URI, WEB)]), REFUSED),
            ("web and https", of(&[(URI, WEB), (URI, b"https://mesh.local")]), REFUSED),
            ("web and urn", of(&[(URI, WEB), (URI, b"urn:a")]), REFUSED),
            ("web and nothing", of(&[(URI, WEB), (URI, b"")]), REFUSED),
            ("two of https", of(&[(URI, b"https://a"), (URI, b"https://b")]), Nameless),
            ("web and a host", of(&[(DNS, b"admin.mesh.local"), (URI, WEB)]), Web),
            ("web and a mail address", of(&[(URI, WEB), (EMAIL, b"admin@mesh.local")]), Web),
            ("web and an address", of(&[(URI, WEB), (0x87, &[127, 0, 0, 1])]), Web),
            ("an id as a host", of(&[(DNS, WEB)]), Nameless),
            ("an id as a mail address", of(&[(EMAIL, WEB)]), Nameless),
            ("an id of a number", of(&[(0x88, WEB)]), Nameless),
            ("an id as the common name", called(&[], web), Nameless),
            ("web as the common name of admin", called(&[(URI, admin)], web), ADMIN),
            ("admin as the common name of web", called(&[(URI, WEB)], Some("admin")), Web),
            ("no name at all", called(&[], None), Nameless),
        ],
    );
}

const ADMIN: Outcome = Other("spiffe://mesh.local/ns/default/sa/admin");

#[test]
fn a_name_that_cannot_be_read_is_a_name() {
    let world = World::start();
    let of = |names: &[(u8, &[u8])]| world.below(names);
    let [_, below] = &world.ours;
    let mut params = leaf_params(None, 99);
    let half = [der(URI, WEB), vec![URI, 5, b'a']].concat();
    let half = CustomExtension::from_oid_content(&[2, 5, 29, 17], der(0x30, &half));
    params.custom_extensions.push(half);
    check_all(
        &world,
        &[
            ("web and half a name", leaf(&params, below, &[below]), REFUSED),
            ("web and bytes", of(&[(URI, WEB), (URI, b"spiffe://mesh.local/\xff")]), REFUSED),
            ("bytes and web", of(&[(URI, b"spiffe://mesh.local/\xff"), (URI, WEB)]), REFUSED),
            ("web and one byte", of(&[(URI, WEB), (URI, b"\xff")]), REFUSED),
            ("an id with a byte behind", of(&[(URI, &[WEB, b"\xff"].concat())]), REFUSED),
        ],
    );
}

#[test]
fn an_authority_vouches_for_its_own_domain_only() {
    let world = World::start();
    let World { ours: [ours, _], other, any, .. } = &world;
    let by = |ca: &CraftedCa, id: &[u8]| signed(ca, &[], &[(URI, id)], None);
    let foreign = b"spiffe://other.local/ns/default/sa/web";
    let told = Other("spiffe://other.local/ns/default/sa/web");
    let stranger = root(authority("ours", Some("mesh.local")));
    let unknown = Outcome::Refused(AlertDescription::CertificateUnknown);
    check_all(
        &world,
        &[
            ("web by our root", by(ours, WEB), Web),
            ("web by the other's root", by(other, WEB), REFUSED),
            ("the other's web by its root", by(other, foreign), told),
            ("the other's web by our root", by(ours, foreign), REFUSED),
            ("the other's domain by our root", by(ours, b"spiffe://other.local"), REFUSED),
            ("web by a root of no domain", by(any, WEB), Web),
            ("the other's web by a root of no domain", by(any, foreign), told),
            ("web by a stranger of our root's name", by(&stranger, WEB), unknown),
        ],
    );
}

#[test]
fn what_is_no_workloads_certificate_is_nobodys() {
    let world = World::start();
    let [_, below] = &world.ours;
    let like = |change: fn(&mut CertificateParams)| {
        let mut params = leaf_params(None, 99);
        params.custom_extensions.push(names(&[(URI, WEB)]));
        change(&mut params);
        leaf(&params, below, &[below])
    };
    let authority = |params: &mut CertificateParams| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    };
    let for_something_else = Outcome::Refused(AlertDescription::UnsupportedCertificate);
    check_all(
        &world,
        &[
            ("as it must be", like(|_| {}), Web),
            ("no authority, and it says so", like(|p| p.is_ca = IsCa::ExplicitNoCa), Web),
            ("no purpose named", like(|p| p.extended_key_usages.clear()), Web),
            ("an authority", like(authority), MALFORMED),
            (
                "a key for certificates",
                like(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
                MALFORMED,
            ),
            (
                "a key for agreements only",
                like(|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]),
                MALFORMED,
            ),
            (
                "for servers only",
                like(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
                for_something_else,
            ),
            (
                "for code",
                like(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
                for_something_else,
            ),
        ],
    );
}
