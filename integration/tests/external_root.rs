//! A weft certificate authority that is an intermediate of an external root CA, kept by `openssl`.

#![expect(clippy::unwrap_used, reason = "a test fails at an unexpected error")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;
use weft_integration::bootstrap::UpstreamHttp;
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{IdentityFiles, TRUST_DOMAIN, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::{Process, run, weft};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig};
use weft_integration::tls_contexts::verify_mode;
use weft_integration::wait::eventually;

const CONFIG: &str = r"
[ca]
default_ca = root
[root]
database = FOLDER/index.txt
crlnumber = FOLDER/crlnumber
serial = FOLDER/serial
new_certs_dir = FOLDER
certificate = FOLDER/root.pem
private_key = FOLDER/root.key
default_md = sha256
default_days = 30
default_crl_days = 30
unique_subject = no
policy = any
crl_extensions = list
[any]
commonName = supplied
[list]
authorityKeyIdentifier = keyid
[authority]
basicConstraints = critical, CA:true, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[between]
basicConstraints = critical, CA:true, pathlen:1
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[leaf]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
[top]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[req]
distinguished_name = name
[name]
";

/// An external root CA, with its intermediates, kept by `openssl ca`.
struct ExternalRoot(TempDir);

impl ExternalRoot {
    fn create() -> Self {
        let external = Self(TempDir::new().unwrap());
        let config = CONFIG.replace("FOLDER", text(external.0.path()));
        for (name, content) in [
            ("openssl.cnf", config.as_str()),
            ("index.txt", ""),
            ("crlnumber", "01\n"),
            ("serial", "1000\n"),
        ] {
            std::fs::write(external.file(name), content).unwrap();
        }
        external.key("root");
        let words = "req -x509 -new -key root.key -subj /CN=external -days 60 -extensions top -out root.pem";
        external.openssl(words);
        external.sign_crl();
        external
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, words: &str) -> String {
        let mut command = Command::new("openssl");
        command.args(words.split(' ')).current_dir(self.0.path());
        let needs_config = ["req ", "ca "].iter().any(|command| words.starts_with(command));
        if needs_config {
            command.args(["-config", "openssl.cnf"]);
        }
        run(&mut command)
    }

    fn key(&self, name: &str) {
        let curve = "-pkeyopt ec_paramgen_curve:P-256";
        self.openssl(&format!("genpkey -algorithm EC {curve} -out {name}.key"));
    }

    /// Creates a key and has the root sign a certificate for it, with the extensions of a section of the configuration.
    fn sign(&self, name: &str, section: &str) {
        self.sign_by("root", name, section);
    }

    /// As `sign`, with the signature of this intermediate.
    fn sign_by(&self, signer: &str, name: &str, section: &str) {
        self.key(name);
        self.openssl(&format!("req -new -key {name}.key -subj /CN={name} -out {name}.csr"));
        let signer_options = format!("-cert {signer}.pem -keyfile {signer}.key");
        let options = format!("-batch -notext -extensions {section} {signer_options}");
        self.openssl(&format!("ca {options} -in {name}.csr -out {name}.pem"));
    }

    /// Writes the CRL of an intermediate, which revokes no certificate.
    fn sign_crl_of(&self, signer: &str) {
        let signer_options = format!("-cert {signer}.pem -keyfile {signer}.key");
        self.openssl(&format!("ca -gencrl {signer_options} -out {signer}.crl"));
    }

    /// Writes a file that is the concatenation of others.
    fn concatenate(&self, name: &str, parts: &[&str]) {
        let parts: Vec<_> =
            parts.iter().map(|part| std::fs::read(self.file(part)).unwrap()).collect();
        std::fs::write(self.file(name), parts.concat()).unwrap();
    }

    /// Writes the CRL of the root.
    fn sign_crl(&self) {
        self.openssl("ca -gencrl -out root.crl");
    }
}

/// A weft certificate authority below the external root.
struct MeshCa(TempDir);

impl MeshCa {
    /// Runs `weft ca init` with these files of the root and, if `crl`, with its CRL.
    ///
    /// # Errors
    ///
    /// The standard error of the command when it fails.
    fn init(external: &ExternalRoot, files: [&str; 3], crl: bool) -> Result<Self, String> {
        Self::init_with(external, files, crl.then_some("root.crl"))
    }

    fn init_with(
        external: &ExternalRoot,
        files: [&str; 3],
        crls: Option<&str>,
    ) -> Result<Self, String> {
        let ca = Self(TempDir::new().unwrap());
        let mut init = ca.ca(&["init", "--trust-domain", TRUST_DOMAIN]);
        add_ca_files(&mut init, external, files);
        if let Some(crls) = crls {
            init.arg("--root-lists").arg(external.file(crls));
        }
        output_of(init).map(|_| ca)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ca(&self, words: &[&str]) -> Command {
        let mut command = weft();
        command.arg("ca").args(words).arg("--state").arg(self.file("state"));
        command
    }

    fn issue(&self, service: &str) -> IdentityFiles {
        let out = self.file(service);
        let mut issue = self.ca(&["issue", &spiffe_id(service)]);
        issue.arg("--out").arg(&out);
        let output = output_of(issue).unwrap();
        let serial = output.split_whitespace().next().unwrap().to_owned();
        IdentityFiles {
            certificate: out.with_extension("pem"),
            key: out.with_extension("key"),
            serial,
        }
    }

    /// Publishes its CRLs in a file, which is replaced atomically.
    fn publish(&self) {
        let crls = run(&mut self.ca(&["crl"]));
        std::fs::write(self.file("new"), crls).unwrap();
        std::fs::rename(self.file("new"), self.file("revoked.pem")).unwrap();
    }

    fn sidecar(&self, external: &ExternalRoot) -> SingleSidecar {
        self.publish();
        let own = self.issue("server");
        let mut config = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        );
        config.tls = Some(verify_mode(&own, &external.file("root.pem"), &self.file("revoked.pem")));
        config.start()
    }
}

fn add_ca_files(
    command: &mut Command,
    external: &ExternalRoot,
    [root, certificate, key]: [&str; 3],
) {
    command.arg("--root").arg(external.file(root));
    command.arg("--certificate").arg(external.file(certificate));
    command.arg("--key").arg(external.file(key));
}

/// The standard output of a command that succeeds.
///
/// # Errors
///
/// The standard error of a command that fails.
fn output_of(mut command: Command) -> Result<String, String> {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn is_admitted(sidecar: &SingleSidecar, client: &IdentityFiles) -> bool {
    let words = ["--insecure", "--cert", text(&client.certificate), "--key", text(&client.key)];
    let url = format!("https://127.0.0.1:{}/", sidecar.port);
    Curl::to(url).with(&words).run().status == 200
}

#[test]
fn issued_certificates_are_trusted_until_the_mesh_ca_or_the_external_root_revokes_them() {
    let external = ExternalRoot::create();
    external.sign("mesh", "authority");
    let files = ["root.pem", "mesh.pem", "mesh.key"];
    let ca = MeshCa::init(&external, files, true).unwrap();
    let sidecar = ca.sidecar(&external);
    let [revoked, other] = ["web", "orders"].map(|service| ca.issue(service));
    assert!(is_admitted(&sidecar, &revoked) && is_admitted(&sidecar, &other));
    run(ca.ca(&["revoke"]).arg(&revoked.serial));
    ca.publish();
    eventually("the certificate is revoked", || (!is_admitted(&sidecar, &revoked)).then_some(()));
    assert!(is_admitted(&sidecar, &other));

    // The next CA must be signed by the external root, whose key weft does not have.
    let refused = output_of(ca.ca(&["rotate", "intermediate"])).unwrap_err();
    assert!(refused.contains("the root key is external"), "{refused}");
    external.sign("mesh2", "authority");
    let mut rotate = ca.ca(&["rotate"]);
    add_ca_files(&mut rotate, &external, ["root.pem", "mesh2.pem", "mesh2.key"]);
    let output = output_of(rotate).unwrap();
    assert!(output.contains("next     trusted;"), "{output}");
    ca.publish();
    output_of(ca.ca(&["rotate", "next"])).unwrap();
    let by_next = ca.issue("billing");
    let issuer = |identity: &IdentityFiles| {
        let words = ["x509", "-noout", "-issuer", "-in", text(&identity.certificate)];
        run(Command::new("openssl").args(words))
    };
    assert!(issuer(&by_next).contains("mesh2") && !issuer(&other).contains("mesh2"));
    eventually("the next CA's CRL is in force", || is_admitted(&sidecar, &by_next).then_some(()));
    assert!(is_admitted(&sidecar, &other), "certificates of the former CA are still trusted");

    // The external root revokes the first CA.
    external.openssl("ca -revoke mesh.pem");
    external.sign_crl();
    run(ca.ca(&["root-lists"]).arg(external.file("root.crl")));
    ca.publish();
    eventually("the first CA is revoked", || (!is_admitted(&sidecar, &other)).then_some(()));
    assert!(is_admitted(&sidecar, &by_next));
    external.openssl("ca -revoke mesh2.pem");
    external.sign_crl();
    let mut both = ca.ca(&["root-lists"]);
    both.arg(external.file("root.crl"));
    let refused = output_of(both).unwrap_err();
    assert!(
        refused.contains("peers would reject the certificates of this CA: ClientCertCrlHit"),
        "{refused}"
    );
}

#[test]
fn ca_below_another_intermediate_keeps_root_crls_through_a_rotation() {
    let external = ExternalRoot::create();
    external.sign("division", "between");
    external.sign_by("division", "mesh", "authority");
    external.concatenate("mesh-chain.pem", &["mesh.pem", "division.pem"]);
    external.sign_crl_of("division");
    external.concatenate("all.crl", &["root.crl", "division.crl"]);
    let files = ["root.pem", "mesh-chain.pem", "mesh.key"];
    let ca = MeshCa::init_with(&external, files, Some("all.crl")).unwrap();
    let sidecar = ca.sidecar(&external);
    assert!(is_admitted(&sidecar, &ca.issue("web")));

    // The same root, with text before the PEM block and CRLF line ends, and without its CRLs.
    external.sign_by("division", "mesh2", "authority");
    external.concatenate("mesh2-chain.pem", &["mesh2.pem", "division.pem"]);
    let with_text = external.openssl("x509 -text -in root.pem").replace('\n', "\r\n");
    std::fs::write(external.file("text.pem"), with_text).unwrap();
    let published_crls = || run(&mut ca.ca(&["crl"])).matches("BEGIN X509 CRL").count();
    assert_eq!(published_crls(), 3);
    let mut rotate = ca.ca(&["rotate"]);
    add_ca_files(&mut rotate, &external, ["text.pem", "mesh2-chain.pem", "mesh2.key"]);
    output_of(rotate).unwrap();
    assert_eq!(published_crls(), 4, "the CRLs of the root and of its intermediate are kept");
    output_of(ca.ca(&["rotate", "next"])).unwrap();
    ca.publish();
    let by_next = ca.issue("orders");
    eventually("the next CA's CRL is in force", || is_admitted(&sidecar, &by_next).then_some(()));

    std::fs::write(external.file("empty.crl"), "").unwrap();
    let mut none = ca.ca(&["root-lists"]);
    none.arg(external.file("empty.crl"));
    let refused = output_of(none).unwrap_err();
    assert!(refused.contains("no CRL found"), "{refused}");
    assert_eq!(published_crls(), 4, "a refused file changes nothing");
    let mut status = ca.ca(&["rotate", "status"]);
    add_ca_files(&mut status, &external, ["root.pem", "mesh-chain.pem", "mesh.key"]);
    assert!(output_of(status).unwrap_err().contains("cannot be used with"));
}

#[test]
fn root_crls_of_a_ca_that_does_not_sign_yet_can_be_replaced() {
    let external = ExternalRoot::create();
    external.sign("mesh", "authority");
    let ca = MeshCa(TempDir::new().unwrap());
    run(&mut ca.ca(&["init", "--trust-domain", TRUST_DOMAIN]));
    let replace_root_crls = |ca: &MeshCa| {
        let mut replace = ca.ca(&["root-lists"]);
        replace.arg(external.file("root.crl"));
        output_of(replace)
    };
    assert!(replace_root_crls(&ca).unwrap_err().contains("the root's key is in the store"));
    let mut rotate = ca.ca(&["rotate"]);
    add_ca_files(&mut rotate, &external, ["root.pem", "mesh.pem", "mesh.key"]);
    rotate.arg("--root-lists").arg(external.file("root.crl"));
    output_of(rotate).unwrap();
    external.sign_crl();
    let newest = std::fs::read_to_string(external.file("root.crl")).unwrap();
    let published = || run(&mut ca.ca(&["crl"]));
    assert!(!published().contains(newest.trim()));
    replace_root_crls(&ca).unwrap();
    assert!(published().contains(newest.trim()), "the CRL of the next CA's root");
    output_of(ca.ca(&["rotate", "next"])).unwrap();
    external.sign_crl();
    replace_root_crls(&ca).unwrap();
    let crls = published().matches("BEGIN X509 CRL").count();
    assert_eq!(crls, 4, "two CRLs each of the current CA and of the former one");
}

#[test]
fn leaf_only_revocation_policy_works_without_root_crls() {
    let external = ExternalRoot::create();
    external.sign("mesh", "authority");
    let ca = MeshCa::init(&external, ["root.pem", "mesh.pem", "mesh.key"], false).unwrap();
    std::fs::write(ca.file("token"), run(&mut ca.ca(&["token", &spiffe_id("web")]))).unwrap();
    let mesh = json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": ["10.96.0.0/16"],
        "services": [{"name": "web", "meshed": true, "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
            "endpoints": [{"address": "10.0.0.1"}]}],
        "security": {"revocation": {"depth": "leaf"}},
    });
    std::fs::write(ca.file("mesh.yaml"), mesh.to_string()).unwrap();
    let [listen, admin, sds_admin] = std::array::from_fn(|_| port::free());
    let mut control = weft();
    control.args(["control", "--config"]).arg(ca.file("mesh.yaml"));
    control.arg("--state").arg(ca.file("state"));
    control.args(["--listen", &format!("127.0.0.1:{listen}")]);
    control.args(["--admin", &format!("127.0.0.1:{admin}")]);
    let _control = Process::start("control", &mut control);
    let mut sds = weft();
    sds.args(["sds", "--control", &format!("127.0.0.1:{listen}"), "--service", "web"]);
    sds.args(["--trust-domain", TRUST_DOMAIN, "--trust"]).arg(external.file("root.pem"));
    sds.arg("--join-token-file").arg(ca.file("token")).arg("--socket").arg(ca.file("sds"));
    sds.args(["--admin", &format!("127.0.0.1:{sds_admin}")]);
    let _sds = Process::start("sds", &mut sds);
    eventually("weft sds has a certificate and its configuration", || {
        let page = Curl::get(sds_admin, "/metrics").run().text();
        page.contains("weft_sds_secrets 3").then_some(())
    });
}

#[test]
fn unusable_ca_files_are_refused_with_their_reason() {
    let external = ExternalRoot::create();
    external.sign("mesh", "authority");
    external.sign("leaf", "leaf");
    let check = |files: [&str; 3], reason: &str| {
        let refused = MeshCa::init(&external, files, true).err().unwrap();
        assert!(refused.contains(reason), "{files:?}: {refused}");
    };
    check(["root.pem", "mesh.pem", "root.key"], "the key does not match the certificate");
    check(["root.pem", "leaf.pem", "leaf.key"], "key usage including cRLSign");
    check(["mesh.pem", "root.pem", "root.key"], "peers would reject the certificates of this CA");
    check(["root.pem", "root.pem", "root.key"], "no certificate other than the root");
    check(["root.crl", "mesh.pem", "mesh.key"], "must be exactly one certificate");
    check(["root.pem", "mesh.pem", "mesh.pem"], "key cannot be read");
    check(["nothing.pem", "mesh.pem", "mesh.key"], "nothing.pem");
    // Without the root's CRL, `init` succeeds and only warns that a policy must not require one.
    assert!(MeshCa::init(&external, ["root.pem", "mesh.pem", "mesh.key"], false).is_ok());
    let incomplete = weft()
        .args(["ca", "init", "--state"])
        .arg(external.file("state"))
        .arg("--root")
        .arg(external.file("root.pem"))
        .output()
        .unwrap();
    assert_eq!(
        incomplete.status.code(),
        Some(2),
        "{}",
        String::from_utf8_lossy(&incomplete.stderr)
    );
    assert!(!Path::new(&external.file("state")).exists());
}
