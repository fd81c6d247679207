//! An authority below somebody else's root, which openssl keeps.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;
use weft_integration::bootstrap::{UpstreamHttp, verify_mode};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{IdentityFiles, TRUST_DOMAIN, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::{Process, run, weft};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig};
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

/// A company's root.
struct Company(TempDir);

impl Company {
    fn create() -> Self {
        let company = Self(TempDir::new().unwrap());
        let config = CONFIG.replace("FOLDER", text(company.0.path()));
        for (name, content) in [
            ("openssl.cnf", config.as_str()),
            ("index.txt", ""),
            ("crlnumber", "01\n"),
            ("serial", "1000\n"),
        ] {
            std::fs::write(company.file(name), content).unwrap();
        }
        company.key("root");
        let words =
            "req -x509 -new -key root.key -subj /CN=company -days 60 -extensions top -out root.pem";
        company.openssl(words);
        company.lists();
        company
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, words: &str) -> String {
        let mut command = Command::new("openssl");
        command.args(words.split(' ')).current_dir(self.0.path());
        let takes_config = ["req ", "ca "].iter().any(|verb| words.starts_with(verb));
        if takes_config {
            command.args(["-config", "openssl.cnf"]);
        }
        run(&mut command)
    }

    fn key(&self, name: &str) {
        let curve = "-pkeyopt ec_paramgen_curve:P-256";
        self.openssl(&format!("genpkey -algorithm EC {curve} -out {name}.key"));
    }

    /// Signs a certificate for a new key, by a section of the configuration.
    fn sign(&self, name: &str, section: &str) {
        self.sign_by("root", name, section);
    }

    /// The same by an authority below the root.
    fn sign_by(&self, signer: &str, name: &str, section: &str) {
        self.key(name);
        self.openssl(&format!("req -new -key {name}.key -subj /CN={name} -out {name}.csr"));
        let by = format!("-cert {signer}.pem -keyfile {signer}.key");
        let how = format!("-batch -notext -extensions {section} {by}");
        self.openssl(&format!("ca {how} -in {name}.csr -out {name}.pem"));
    }

    /// Writes a list of one below the root, which has revoked nobody.
    fn lists_of(&self, signer: &str) {
        let by = format!("-cert {signer}.pem -keyfile {signer}.key");
        self.openssl(&format!("ca -gencrl {by} -out {signer}.crl"));
    }

    /// Puts files one behind the other.
    fn chain(&self, name: &str, parts: &[&str]) {
        let parts: Vec<_> =
            parts.iter().map(|part| std::fs::read(self.file(part)).unwrap()).collect();
        std::fs::write(self.file(name), parts.concat()).unwrap();
    }

    /// Writes the list of what the root has revoked.
    fn lists(&self) {
        self.openssl("ca -gencrl -out root.crl");
    }
}

/// An authority of ours below it.
struct Ours(TempDir);

impl Ours {
    /// Whether one is made of these files; why not.
    fn init(company: &Company, files: [&str; 3], lists: bool) -> Result<Self, String> {
        Self::init_with(company, files, lists.then_some("root.crl"))
    }

    fn init_with(company: &Company, files: [&str; 3], lists: Option<&str>) -> Result<Self, String> {
        let ours = Self(TempDir::new().unwrap());
        let mut init = ours.ca(&["init", "--trust-domain", TRUST_DOMAIN]);
        given(&mut init, company, files);
        if let Some(lists) = lists {
            init.arg("--root-lists").arg(company.file(lists));
        }
        done(init).map(|_| ours)
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
        let said = done({
            let mut issue = self.ca(&["issue", &spiffe_id(service)]);
            issue.arg("--out").arg(&out);
            issue
        });
        let serial = said.unwrap().split_whitespace().next().unwrap().to_owned();
        IdentityFiles {
            certificate: out.with_extension("pem"),
            key: out.with_extension("key"),
            serial,
        }
    }

    /// Publishes its lists as a whole file at once.
    fn publish(&self) {
        let lists = run(&mut self.ca(&["crl"]));
        std::fs::write(self.file("new"), lists).unwrap();
        std::fs::rename(self.file("new"), self.file("revoked.pem")).unwrap();
    }

    fn sidecar(&self, company: &Company) -> SingleSidecar {
        self.publish();
        let own = self.issue("server");
        let mut wanted = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        );
        wanted.tls = Some(verify_mode(&own, &company.file("root.pem"), &self.file("revoked.pem")));
        wanted.start()
    }
}

fn given(command: &mut Command, company: &Company, [root, certificate, key]: [&str; 3]) {
    command.arg("--root").arg(company.file(root));
    command.arg("--certificate").arg(company.file(certificate));
    command.arg("--key").arg(company.file(key));
}

fn done(mut command: Command) -> Result<String, String> {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn is_let_in(alone: &SingleSidecar, client: &IdentityFiles) -> bool {
    let words = ["--insecure", "--cert", text(&client.certificate), "--key", text(&client.key)];
    let url = format!("https://127.0.0.1:{}/", alone.port);
    Curl::to(url).with(&words).run().status == 200
}

#[test]
fn what_it_signs_counts_below_the_companys_root_until_either_revokes_it() {
    let company = Company::create();
    company.sign("mesh", "authority");
    let files = ["root.pem", "mesh.pem", "mesh.key"];
    let ours = Ours::init(&company, files, true).unwrap();
    let alone = ours.sidecar(&company);
    let [leaver, other] = ["web", "orders"].map(|service| ours.issue(service));
    assert!(is_let_in(&alone, &leaver) && is_let_in(&alone, &other));
    run(ours.ca(&["revoke"]).arg(&leaver.serial));
    ours.publish();
    eventually("it is revoked", || (!is_let_in(&alone, &leaver)).then_some(()));
    assert!(is_let_in(&alone, &other));

    // Another below the same root follows it; the root's key is not here to sign one.
    let refused = done(ours.ca(&["rotate", "intermediate"])).unwrap_err();
    assert!(refused.contains("the root's key is kept elsewhere"), "{refused}");
    company.sign("mesh2", "authority");
    let mut rotate = ours.ca(&["rotate"]);
    given(&mut rotate, &company, ["root.pem", "mesh2.pem", "mesh2.key"]);
    let told = done(rotate).unwrap();
    assert!(told.contains("next     trusted already"), "{told}");
    ours.publish();
    done(ours.ca(&["rotate", "next"])).unwrap();
    let by_next = ours.issue("billing");
    let issuer = |identity: &IdentityFiles| {
        let words = ["x509", "-noout", "-issuer", "-in", text(&identity.certificate)];
        run(Command::new("openssl").args(words))
    };
    assert!(issuer(&by_next).contains("mesh2") && !issuer(&other).contains("mesh2"));
    eventually("the next one's list is in force", || is_let_in(&alone, &by_next).then_some(()));
    assert!(is_let_in(&alone, &other), "what the former signed is good");

    // The company revokes the first: its new list says so.
    company.openssl("ca -revoke mesh.pem");
    company.lists();
    run(ours.ca(&["root-lists"]).arg(company.file("root.crl")));
    ours.publish();
    eventually("the first is revoked", || (!is_let_in(&alone, &other)).then_some(()));
    assert!(is_let_in(&alone, &by_next));
    company.openssl("ca -revoke mesh2.pem");
    company.lists();
    let mut both = ours.ca(&["root-lists"]);
    both.arg(company.file("root.crl"));
    let refused = done(both).unwrap_err();
    assert!(refused.contains("nobody would take what it signs: ClientCertCrlHit"), "{refused}");
}

#[test]
fn one_may_stand_between_and_the_lists_of_the_root_outlast_a_succession() {
    let company = Company::create();
    company.sign("division", "between");
    company.sign_by("division", "mesh", "authority");
    company.chain("mesh-chain.pem", &["mesh.pem", "division.pem"]);
    company.lists_of("division");
    company.chain("all.crl", &["root.crl", "division.crl"]);
    let ours =
        Ours::init_with(&company, ["root.pem", "mesh-chain.pem", "mesh.key"], Some("all.crl"));
    let ours = ours.unwrap();
    let alone = ours.sidecar(&company);
    assert!(is_let_in(&alone, &ours.issue("web")));

    // The root as others write it, and nothing of its lists.
    company.sign_by("division", "mesh2", "authority");
    company.chain("mesh2-chain.pem", &["mesh2.pem", "division.pem"]);
    let told = company.openssl("x509 -text -in root.pem").replace('\n', "\r\n");
    std::fs::write(company.file("told.pem"), told).unwrap();
    let lists = || run(&mut ours.ca(&["crl"])).matches("BEGIN X509 CRL").count();
    assert_eq!(lists(), 3);
    let mut rotate = ours.ca(&["rotate"]);
    given(&mut rotate, &company, ["told.pem", "mesh2-chain.pem", "mesh2.key"]);
    done(rotate).unwrap();
    assert_eq!(lists(), 4, "those of the root and of the division are there");
    done(ours.ca(&["rotate", "next"])).unwrap();
    ours.publish();
    let by_next = ours.issue("orders");
    eventually("the next one's list is in force", || is_let_in(&alone, &by_next).then_some(()));

    std::fs::write(company.file("empty.crl"), "").unwrap();
    let mut none = ours.ca(&["root-lists"]);
    none.arg(company.file("empty.crl"));
    let refused = done(none).unwrap_err();
    assert!(refused.contains("there is no revocation list in it"), "{refused}");
    assert_eq!(lists(), 4, "nothing was changed");
    let mut status = ours.ca(&["rotate", "status"]);
    given(&mut status, &company, ["root.pem", "mesh-chain.pem", "mesh.key"]);
    assert!(done(status).unwrap_err().contains("cannot be used with"));
}

#[test]
fn lists_of_a_root_that_does_not_sign_yet_can_be_replaced() {
    let company = Company::create();
    company.sign("mesh", "authority");
    let ours = Ours(TempDir::new().unwrap());
    run(&mut ours.ca(&["init", "--trust-domain", TRUST_DOMAIN]));
    let lists = |ours: &Ours| {
        let mut replace = ours.ca(&["root-lists"]);
        replace.arg(company.file("root.crl"));
        done(replace)
    };
    assert!(lists(&ours).unwrap_err().contains("the root's key is ours"));
    let mut rotate = ours.ca(&["rotate"]);
    given(&mut rotate, &company, ["root.pem", "mesh.pem", "mesh.key"]);
    rotate.arg("--root-lists").arg(company.file("root.crl"));
    done(rotate).unwrap();
    company.lists();
    let newest = std::fs::read_to_string(company.file("root.crl")).unwrap();
    let published = || run(&mut ours.ca(&["crl"]));
    assert!(!published().contains(newest.trim()));
    lists(&ours).unwrap();
    assert!(published().contains(newest.trim()), "of the next one");
    done(ours.ca(&["rotate", "next"])).unwrap();
    company.lists();
    lists(&ours).unwrap();
    assert_eq!(published().matches("BEGIN X509 CRL").count(), 4, "and beside a former one of ours");
}

#[test]
fn without_lists_of_the_root_a_mesh_may_do_with_those_of_leaves() {
    let company = Company::create();
    company.sign("mesh", "authority");
    let ours = Ours::init(&company, ["root.pem", "mesh.pem", "mesh.key"], false).unwrap();
    std::fs::write(ours.file("token"), run(&mut ours.ca(&["token", &spiffe_id("web")]))).unwrap();
    let mesh = json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": ["10.96.0.0/16"],
        "services": [{"name": "web", "meshed": true, "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
            "endpoints": [{"address": "10.0.0.1"}]}],
        "security": {"revocation": {"depth": "leaf"}},
    });
    std::fs::write(ours.file("mesh.yaml"), mesh.to_string()).unwrap();
    let [listen, admin, sds_admin] = std::array::from_fn(|_| port::free());
    let mut control = weft();
    control.args(["control", "--config"]).arg(ours.file("mesh.yaml"));
    control.arg("--state").arg(ours.file("state"));
    control.args(["--listen", &format!("127.0.0.1:{listen}")]);
    control.args(["--admin", &format!("127.0.0.1:{admin}")]);
    let _control = Process::start("control", &mut control);
    let mut sds = weft();
    sds.args(["sds", "--control", &format!("127.0.0.1:{listen}"), "--service", "web"]);
    sds.args(["--trust-domain", TRUST_DOMAIN, "--trust"]).arg(company.file("root.pem"));
    sds.arg("--join-token-file").arg(ours.file("token")).arg("--socket").arg(ours.file("sds"));
    sds.args(["--admin", &format!("127.0.0.1:{sds_admin}")]);
    let _sds = Process::start("sds", &mut sds);
    eventually("it has a certificate and its configuration", || {
        let page = Curl::get(sds_admin, "/metrics").run().text();
        page.contains("weft_sds_secrets 3").then_some(())
    });
}

#[test]
fn what_would_make_no_authority_is_refused_with_its_reason() {
    let company = Company::create();
    company.sign("mesh", "authority");
    company.sign("leaf", "leaf");
    let check = |files: [&str; 3], reason: &str| {
        let refused = Ours::init(&company, files, true).err().unwrap();
        assert!(refused.contains(reason), "{files:?}: {refused}");
    };
    check(["root.pem", "mesh.pem", "root.key"], "the key is not that of the certificate");
    check(["root.pem", "leaf.pem", "leaf.key"], "key usage including cRLSign");
    check(["mesh.pem", "root.pem", "root.key"], "nobody would take what it signs");
    check(["root.pem", "root.pem", "root.key"], "it holds none beside the root");
    check(["root.crl", "mesh.pem", "mesh.key"], "it must be one certificate");
    check(["root.pem", "mesh.pem", "mesh.pem"], "key cannot be read");
    check(["nothing.pem", "mesh.pem", "mesh.key"], "nothing.pem");
    // Without the root's lists it is made, and is told to need a policy that asks for none.
    assert!(Ours::init(&company, ["root.pem", "mesh.pem", "mesh.key"], false).is_ok());
    let half = weft()
        .args(["ca", "init", "--state"])
        .arg(company.file("state"))
        .arg("--root")
        .arg(company.file("root.pem"))
        .output()
        .unwrap();
    assert_eq!(half.status.code(), Some(2), "{}", String::from_utf8_lossy(&half.stderr));
    assert!(!Path::new(&company.file("state")).exists());
}
