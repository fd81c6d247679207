//! Private keys stay confidential: no output, log, page or error message of weft contains any part
//! of a key.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use nix::sys::signal::Signal;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use weft_certs::RootSigner;
use weft_control::store::Store;
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{MeshPki, TRUST_DOMAIN, spiffe_id, text};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::{Process, weft};
use weft_integration::single_sidecar::{SingleSidecarConfig, UpstreamHttp as Single};
use weft_integration::tls_client::{TlsClient, client_config};
use weft_integration::tls_contexts::{TestTls, verify_mode};
use weft_integration::wait::eventually;

const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// The offset of the secret scalar in a PKCS #8 P-256 key.
const SECRET: std::ops::Range<usize> = 36..68;

/// Fragments that would reveal a key.
struct KeyFragments {
    name: String,
    texts: Vec<String>,
    bytes: Vec<Vec<u8>>,
}

impl KeyFragments {
    fn of(name: &str, key: &str) -> Self {
        let der = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).expect("the key is PKCS #8");
        let der = der.secret_pkcs8_der().to_vec();
        let secret = der.get(SECRET).expect("the key is P-256").to_vec();
        // The fragment before it is the octet string that contains it.
        assert_eq!(der.get(34..36), Some(&[0x04, 0x20][..]), "{name}");
        // The first line begins the same in all P-256 keys.
        let secret_line = key
            .lines()
            .nth(1)
            .and_then(|line| line.get(48..60))
            .expect("the key has a second line");
        let mut texts = vec![secret_line.to_owned()];
        let (first, last) = secret.split_at(secret.len() / 2);
        for part in [first, last] {
            let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
            texts.extend([hex.to_uppercase(), hex]);
            let numbers: Vec<String> = part.iter().map(u8::to_string).collect();
            texts.extend([numbers.join(", "), numbers.join(","), numbers.join(" ")]);
            let hex: Vec<String> = part.iter().map(|byte| format!("{byte:02x}")).collect();
            texts.extend([hex.join(":"), hex.join(" "), format!("\\x{}", hex.join("\\x"))]);
            // Base64 of a fragment depends on its offset modulo 3.
            for skipped in 0..3 {
                let whole = part.get(skipped..skipped + 12).expect("the fragment has 16 bytes");
                texts.extend([STANDARD.encode(whole), URL_SAFE.encode(whole)]);
            }
        }
        let bytes = [first, last].map(<[u8]>::to_vec).to_vec();
        Self { name: name.to_owned(), texts, bytes }
    }

    /// The fragments that occur in `written`.
    fn found(&self, written: &[u8]) -> Vec<String> {
        let holds = |part: &[u8]| written.windows(part.len()).any(|window| window == part);
        let texts = self.texts.iter().filter(|text| holds(text.as_bytes())).cloned();
        let bytes =
            self.bytes.iter().filter(|bytes| holds(bytes)).map(|bytes| format!("{bytes:?}"));
        texts.chain(bytes).map(|trace| format!("{}: {trace}", self.name)).collect()
    }
}

/// All output, with its source.
#[derive(Default)]
struct CapturedOutput(Vec<(String, Vec<u8>)>);

impl CapturedOutput {
    fn add(&mut self, place: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.push((place.into(), bytes.into()));
    }

    /// Runs a command and captures its output; returns its exit code.
    fn run(&mut self, place: &str, command: &mut Command) -> Option<i32> {
        let output = command.output().expect("the command can be started");
        self.add(format!("{place}, output"), output.stdout);
        self.add(format!("{place}, errors"), output.stderr);
        output.status.code()
    }

    fn page(&mut self, admin: u16, path: &str) {
        let answer = Curl::get(admin, path).run();
        assert_ne!(answer.status, 0, "{path}");
        self.add(format!("{admin}{path}"), answer.body);
    }

    fn text(&self, place: &str) -> String {
        let found = self.0.iter().find(|(name, _)| name == place);
        String::from_utf8_lossy(&found.expect("the output was captured").1).into_owned()
    }

    fn check(&self, keys: &[KeyFragments]) {
        let mut found = Vec::new();
        for (place, bytes) in &self.0 {
            found.extend(
                keys.iter().flat_map(|key| key.found(bytes)).map(|what| format!("{place}: {what}")),
            );
        }
        assert!(found.is_empty(), "private keys in the output:\n{}", found.join("\n"));
    }
}

/// A role whose standard output and error go to files.
struct LoggedRole {
    process: Process,
    files: [PathBuf; 2],
}

impl LoggedRole {
    fn start(name: &str, folder: &MeshPki, command: &mut Command) -> Self {
        let files = ["output", "errors"].map(|kind| folder.path(&format!("{name}.{kind}")));
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" >\"$OUTPUT\" 2>\"$ERRORS\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        let [output, errors] = &files;
        shell.env("OUTPUT", output).env("ERRORS", errors);
        Self { process: Process::start(name, &mut shell), files }
    }

    /// Stops the role and captures its output.
    fn end(mut self, written: &mut CapturedOutput) {
        self.process.signal(Signal::SIGTERM);
        self.process.ended();
        for file in &self.files {
            let bytes = std::fs::read(file).expect("the output was captured");
            written.add(file.display().to_string(), bytes);
        }
    }
}

fn wait_ready(admin: u16) {
    eventually(format!("{admin} is ready"), || {
        (Curl::get(admin, "/ready").run().status == 200).then_some(())
    });
}

fn look_at_all(admin: u16, written: &mut CapturedOutput) {
    for page in
        ["/", "/live", "/ready", "/metrics", "/config_dump", "/logging", "/flow", "/nothing"]
    {
        written.page(admin, page);
    }
    let admin = format!("127.0.0.1:{admin}");
    for form in [&["--json"][..], &[]] {
        written.run(
            &format!("status {admin} {form:?}"),
            weft().args(["status", "--admin", &admin]).args(form),
        );
    }
}

/// A sidecar configuration with a key file, inline keys, a key that does not match its certificate
/// and a truncated key.
struct KeyedSidecarConfig {
    signer: TestAuthority,
    keys: Vec<KeyFragments>,
    config: Value,
    listens: [u16; 2],
    admin: u16,
    _origin: OriginServer,
}

impl KeyedSidecarConfig {
    fn new() -> Self {
        let signer = TestAuthority::create();
        let origin = OriginServer::start();
        let named = ["server", "second", "client", "other", "half"];
        let [server, second, client, other, half] = named.map(|name| signer.sign(name, DAY));
        let keys = named
            .iter()
            .zip([&server, &second, &client, &other, &half])
            .map(|(name, identity)| KeyFragments::of(name, &identity.key))
            .collect();
        let tls = TestTls::listener(&signer.write_files("server", &server), &signer.root())
            .crls(&signer.crl_file());
        let inline =
            |identity: &PemIdentity| tls.clone().inline_certificate(&identity.chain, &identity.key);
        let client_files = signer.write_files("client", &client);
        let upstream = TestTls::cluster(&client_files, &signer.root(), "server")
            .inline_certificate(&client.chain, &client.key);
        let mismatched = PemIdentity { key: other.key, ..second.clone() };
        let cut = half.key.len() - 40;
        let cut = PemIdentity { key: half.key.chars().take(cut).collect(), ..half };
        let serve = |name, port, tls: TestTls| {
            listener(name, port, http(&route_to("service", 15), &[]), Some(tls.socket()))
        };
        let listens = [port::free(), port::free()];
        let [first, next] = listens;
        let listeners = [
            serve("file", first, tls.clone()),
            serve("in-place", next, inline(&second)),
            serve("mismatched", port::free(), inline(&mismatched)),
            serve("cut-off", port::free(), inline(&cut)),
        ];
        let clusters = [
            cluster("service", &[origin.port], UpstreamHttp::Http1, None),
            cluster("secured", &[origin.port], UpstreamHttp::Http1, Some(upstream.socket())),
        ];
        let admin = port::free();
        let config = bootstrap(admin, &listeners, &clusters);
        Self { signer, keys, config, listens, admin, _origin: origin }
    }
}

#[test]
fn key_search_finds_every_encoding_of_a_key() {
    let identity = TestAuthority::create().sign("web", DAY);
    let traces = KeyFragments::of("web", &identity.key);
    let der =
        PrivatePkcs8KeyDer::from_pem_slice(identity.key.as_bytes()).expect("the key is PKCS #8");
    let der = der.secret_pkcs8_der();
    let hex: String = der.iter().map(|byte| format!("{byte:02x}")).collect();
    let escaped: String = der.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let check = |written: &[u8], is_found: bool| {
        let found = !traces.found(written).is_empty();
        assert_eq!(found, is_found, "{}", String::from_utf8_lossy(written));
    };
    check(identity.key.as_bytes(), true);
    check(identity.key.replace('\n', "\\n").as_bytes(), true);
    check(der, true);
    check(format!("key {hex} of").as_bytes(), true);
    check(hex.to_uppercase().as_bytes(), true);
    check(escaped.as_bytes(), true);
    check(format!("{der:?}").as_bytes(), true);
    check(format!("{:?}", identity.key).as_bytes(), true);
    check(STANDARD.encode(der).as_bytes(), true);
    check(STANDARD.encode([b"a", der].concat()).as_bytes(), true);
    check(STANDARD.encode([b"ab", der].concat()).as_bytes(), true);
    check(identity.chain.as_bytes(), false);
    check(TestAuthority::create().sign("web", DAY).key.as_bytes(), false);
}

#[test]
fn sidecar_output_contains_no_key_of_its_configuration() {
    let pki = MeshPki::create();
    let configured = KeyedSidecarConfig::new();
    let KeyedSidecarConfig { signer, keys, config, listens, admin, .. } = &configured;
    let file = pki.path("sidecar.json");
    std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
    let mut written = CapturedOutput::default();
    let mut check = weft();
    check.args(["--log", "trace", "sidecar", "--check-config", "--config", text(&file)]);
    written.run("check-config", &mut check);

    let mut command = weft();
    command.args(["--log", "trace", "sidecar", "--workers", "1", "--config", text(&file)]);
    let sidecar = LoggedRole::start("sidecar", &pki, &mut command);
    // Two of its listeners cannot be served, so the sidecar is not ready.
    for port in listens {
        eventually("the port accepts connections", || {
            std::net::TcpStream::connect(("127.0.0.1", *port)).ok()
        });
    }
    let client = signer.sign("web", DAY);
    for (port, service) in listens.iter().zip(["server", "second"]) {
        let config = client_config(signer, &client, service, "http/1.1");
        assert_eq!(TlsClient::connect(*port, &config).ask("/"), Some(200), "{service}");
    }
    look_at_all(*admin, &mut written);
    // A key file that does not match its certificate, and a truncated one.
    for (content, reported) in [
        (signer.sign("late", DAY).key, "does not belong"),
        ("-----BEGIN PRIVATE KEY-----\nMIGH".to_owned(), "private key cannot be read"),
    ] {
        let whole = signer.file("server.new");
        std::fs::write(&whole, &content).expect("the folder is writable");
        std::fs::rename(whole, signer.file("server.key")).expect("a file can be renamed");
        eventually(format!("the error is logged: {reported}"), || {
            let dump = Curl::get(*admin, "/config_dump").run().text();
            let is_reported =
                |line: &str| line.contains("listener file") && line.contains(reported);
            dump.lines().any(is_reported).then_some(())
        });
        look_at_all(*admin, &mut written);
    }
    sidecar.end(&mut written);
    let dump = written.text(&format!("{admin}/config_dump"));
    for reported in ["mismatched", "cut-off"] {
        assert!(dump.contains(reported), "{dump}");
    }
    written.check(keys);
}

/// The output of `weft` for an invalid file that contains a key.
fn check_output(files: &[(&str, String)], pki: &MeshPki) -> CapturedOutput {
    let mut written = CapturedOutput::default();
    for (number, (name, content)) in files.iter().enumerate() {
        let file = pki.path(&format!("mistake-{number}.yaml"));
        std::fs::write(&file, content).expect("the folder is writable");
        let mut check = weft();
        check.args(["--log", "trace", "sidecar", "--check-config", "--config", text(&file)]);
        assert_eq!(written.run(name, &mut check), Some(2), "{name} is invalid");
    }
    written
}

#[test]
fn error_message_contains_no_key_from_a_wrong_field() {
    let pki = MeshPki::create();
    let configured = KeyedSidecarConfig::new();
    let key = &configured.signer.sign("misplaced", DAY).key;
    let wrong = |source: Value| {
        let mut config = configured.config.clone();
        let place = config.pointer_mut(
            "/static_resources/listeners/1/filter_chains/0/transport_socket/typed_config\
             /common_tls_context/tls_certificates/0/private_key",
        );
        *place.expect("the certificate has a key") = source;
        config.to_string()
    };
    let files = [
        ("a string instead of a data source", wrong(json!(key))),
        ("an unknown field", wrong(json!({"inline_text": key}))),
        ("a string instead of bytes", wrong(json!({"inline_bytes": key}))),
        ("two data sources", wrong(json!({"inline_string": key, "filename": "key.pem"}))),
        ("a list", wrong(json!([key]))),
        ("an object instead of a string", wrong(json!({"inline_string": {"text": key}}))),
        ("the key as name of an environment variable", wrong(json!({"environment_variable": key}))),
    ];
    check_output(&files, &pki).check(&[KeyFragments::of("misplaced", key)]);
}

/// A bootstrap file with a certificate whose key is given as lines of YAML.
fn with_key_lines(lines: &str) -> String {
    let head = r#"static_resources:
  listeners:
  - name: web
    address: {socket_address: {address: 127.0.0.1, port_value: 1}}
    filter_chains:
    - filters: []
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_certificates:
            - certificate_chain: {filename: web.pem}
"#;
    format!("{head}{lines}")
}

#[test]
fn error_message_contains_no_key_of_several_lines() {
    let pki = MeshPki::create();
    let key = &TestAuthority::create().sign("misplaced", DAY).key;
    let indented: String = key.lines().map(|line| format!("                  {line}\n")).collect();
    let wrong = |before: &str, key: &str| with_key_lines(&format!("{before}\n{key}"));
    let source = "              private_key:\n                ";
    let files = [
        ("no data source", wrong("              private_key: |", &indented)),
        ("an unknown field", wrong(&format!("{source}inline_text: |"), &indented)),
        ("a string instead of bytes", wrong(&format!("{source}inline_bytes: |"), &indented)),
        ("not indented", wrong(&format!("{source}inline_string: |"), key)),
        (
            "two data sources",
            wrong(&format!("{source}inline_string: |"), &indented)
                + "                filename: web.key\n",
        ),
    ];
    check_output(&files, &pki).check(&[KeyFragments::of("misplaced", key)]);
}

fn control_file(folder: &MeshPki) -> PathBuf {
    let file = json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": ["10.96.0.0/16"],
        "services": [{"name": "web", "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
            "endpoints": [{"address": "127.0.0.1"}]}],
    });
    let path = folder.path("mesh.yaml");
    std::fs::write(&path, format!("{file:#}")).expect("the folder is writable");
    path
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("the output was captured")
}

#[test]
fn control_plane_and_joined_sidecar_output_contains_no_key() {
    let pki = MeshPki::create();
    let state = pki.path("state");
    let mut written = CapturedOutput::default();
    let issued = pki.issue("client");
    pki.join_token("web", &spiffe_id("web"));
    let store = Store::open(&state).expect("the authority exists");
    let (files, _) = store.authority().expect("the store has an authority");
    drop(store);
    let RootSigner::Local { key: root_key } = &files.root else {
        panic!("the root key is in the store")
    };
    let mut keys = vec![
        KeyFragments::of("root", root_key),
        KeyFragments::of("intermediate", &files.intermediate_key),
        KeyFragments::of("client", &read(&issued.key)),
    ];
    for words in
        [&["list"][..], &["crl"], &["revoke", &issued.serial], &["token", "spiffe://mesh.local/a"]]
    {
        let mut command = weft();
        command.args(["--log", "trace", "ca"]).args(words).args(["--state", text(&state)]);
        assert_eq!(written.run(&format!("ca {words:?}"), &mut command), Some(0));
    }

    let listen = port::free();
    let admin = port::free();
    let own = port::free();
    let [listen, admin_at, own_at] = [listen, admin, own].map(|port| format!("127.0.0.1:{port}"));
    let mut command = weft();
    command.args(["--log", "trace", "control", "--config", text(&control_file(&pki))]);
    command.args(["--state", text(&state), "--listen", &listen, "--admin", &admin_at]);
    let control = LoggedRole::start("control", &pki, &mut command);
    wait_ready(admin);
    let mut command = weft();
    let kept = pki.path("web-state");
    command.args(["--log", "trace", "sidecar", "--service", "web", "--control", &listen]);
    command.args(["--trust", text(&pki.root()), "--state", text(&kept), "--admin", &own_at]);
    command.args(["--join-token-file", text(&pki.path("web.token")), "--workers", "1"]);
    let sidecar = LoggedRole::start("joined", &pki, &mut command);
    wait_ready(own);
    for port in [admin, own] {
        look_at_all(port, &mut written);
    }
    keys.push(KeyFragments::of("web", &read(&kept.join("key.pem"))));
    sidecar.end(&mut written);
    control.end(&mut written);
    let mut list = weft();
    list.args(["ca", "list", "--state", text(&state)]);
    assert_eq!(written.run("ca list after all", &mut list), Some(0));
    assert!(written.text("ca list after all, output").contains("sa/web"));
    written.check(&keys);
}

#[test]
fn world_readable_key_file_is_reported() {
    use std::os::unix::fs::PermissionsExt as _;

    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let mut wanted = SingleSidecarConfig::for_upstream(OriginServer::start().port, Single::Http1);
    wanted.tls = Some(verify_mode(&server, &signer.root(), &signer.crl_file()));
    let sidecar = wanted.start();
    let reported = || {
        let dump = Curl::get(sidecar.sidecar.admin, "/config_dump").run().text();
        let dump: Value = serde_json::from_str(&dump).expect("the dump is JSON");
        dump.get("problems").expect("the dump lists problems").to_string()
    };
    assert_eq!(reported(), "[]");
    let set = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&server.key, permissions).expect("the file belongs to the test");
    };
    set(0o644);
    eventually("the problem is reported", || {
        reported().contains("(mode 644): use mode 600").then_some(())
    });
    set(0o640);
    eventually("a group-readable key is accepted", || (reported() == "[]").then_some(()));
}
