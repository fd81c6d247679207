//! The header `x-forwarded-client-cert`, compared with Envoy's.

use rcgen::{CertificateParams, DistinguishedName, DnType};
use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::authority::PemIdentity;
use weft_integration::crafted_pki::{
    CraftedCa, DNS, URI, authority_params, intermediate, leaf, leaf_params, names, root,
};
use weft_integration::http1::header;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, spiffe_id};
use weft_integration::tls_client::{TlsClient, client_config_trusting};
use weft_integration::tls_contexts::TestTls;

use crate::comparison::{Service, Setup, serving};

/// Client certificates with several forms of names.
fn clients(issuer: &CraftedCa) -> Vec<(&'static str, PemIdentity)> {
    let named = |names_of: &[(u8, &[u8])]| {
        let mut params = leaf_params(None, 99);
        params.custom_extensions.push(names(names_of));
        params
    };
    let with_subject = |mut params: CertificateParams, parts: &[(DnType, &str)]| {
        let mut subject = DistinguishedName::new();
        for (kind, text) in parts {
            subject.push(kind.clone(), *text);
        }
        params.distinguished_name = subject;
        params
    };
    let web = spiffe_id("web");
    let web = web.as_bytes();
    let usual = with_subject(
        named(&[(URI, web), (DNS, b"web.example"), (DNS, b"www.example")]),
        &[
            (DnType::CountryName, "DE"),
            (DnType::OrganizationName, "Wool, Yarn + Co"),
            (DnType::CommonName, "web"),
        ],
    );
    let quoted = with_subject(named(&[(URI, web)]), &[(DnType::CommonName, "a \"quoted\" name;x")]);
    let several = named(&[(URI, b"https://a.example/x"), (URI, b"urn:b"), (DNS, b"b.example")]);
    let bare = with_subject(named(&[(DNS, b"only.example")]), &[(DnType::CommonName, "only")]);
    [("usual", usual), ("quoted", quoted), ("several URIs", several), ("no URI", bare)]
        .into_iter()
        .map(|(name, params)| (name, leaf(&params, issuer, &[issuer])))
        .collect()
}

/// The values of the header that a service receives, for each listener and client.
fn headers_received(
    setup: &Setup,
    service: &Service,
    listeners: &[(&'static str, Value)],
    clients: &[(&'static str, PemIdentity)],
    roots: &str,
) -> Vec<(String, String)> {
    let mut values = Vec::new();
    for (listener, _) in listeners {
        for (client, holder) in clients {
            let config = client_config_trusting(roots, holder, "server", "http/1.1");
            let mut caller = TlsClient::connect(setup.port(listener), &config);
            let request = "GET / HTTP/1.1\r\nhost: a.example\r\n\
                x-forwarded-client-cert: URI=spiffe://forged\r\n\r\n";
            let answer = caller.exchange(request).expect("a trusted client gets a response");
            assert_eq!(answer.0, 200, "{listener} {client}");
            let heads = service.take();
            let head = heads.last().expect("the service received a request");
            let value = header(head, "x-forwarded-client-cert").unwrap_or("absent");
            values.push((format!("{listener}: {client}"), value.to_owned()));
        }
    }
    values
}

#[test]
fn client_certificate_header_equals_that_of_envoy() {
    let keys = |keys: &[&str]| -> Value {
        keys.iter().map(|key| ((*key).to_owned(), json!(true))).collect()
    };
    let set = |mode: &str, details_to_set: &[&str]| {
        serving(json!({"forward_client_cert_details": mode,
            "set_current_client_cert_details": keys(details_to_set)}))
    };
    let listeners = [
        ("none", set("SANITIZE", &["uri", "subject"])),
        ("hash", set("SANITIZE_SET", &[])),
        ("uri", set("SANITIZE_SET", &["uri"])),
        ("names", set("SANITIZE_SET", &["dns", "uri", "subject"])),
        ("all", set("SANITIZE_SET", &["cert", "chain", "subject", "uri", "dns"])),
    ];
    let authority = root(authority_params("ours", 7));
    let issuing = intermediate(authority_params("below", 8), &authority);
    let folder = TempDir::new().expect("a temporary folder can be created");
    let write = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).expect("the folder is writable");
        file
    };
    let mut params = leaf_params(None, 98);
    params.custom_extensions.push(names(&[(URI, spiffe_id("server").as_bytes())]));
    let server = leaf(&params, &issuing, &[&issuing]);
    let own = IdentityFiles {
        certificate: write("server.pem", &server.chain),
        key: write("server.key", &server.key),
        serial: String::new(),
    };
    let trusted = write("roots.pem", &authority.pem());
    let tls = TestTls::listener(&own, &trusted).socket();
    let service = Service::start();
    let setup = Setup::secured(&service, &listeners, Some(&tls));
    let clients = clients(&issuing);
    let values = || headers_received(&setup, &service, &listeners, &clients, &authority.pem());
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    let envoy_values = values();
    envoy.kill();
    let _weft = setup.weft(&pki);
    for (envoy, weft) in envoy_values.iter().zip(values()) {
        assert_eq!(*envoy, weft);
    }
}
