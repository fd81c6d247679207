//! CRLs that a sidecar downloads from distribution points, served by nginx.

#![expect(clippy::unwrap_used, reason = "a test fails at an unexpected error")]
#![expect(clippy::indexing_slicing, reason = "a test fails at an unexpected value")]

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::{UpstreamHttp, cluster};
use weft_integration::curl::Curl;
use weft_integration::nginx::Nginx;
use weft_integration::process::run;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig};
use weft_integration::tls_client::{TlsClient, client_config};
use weft_integration::tls_contexts::TestTls;
use weft_integration::wait::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A CA, the server that publishes its CRL, and a sidecar that downloads the CRL from that server.
struct Publication {
    signer: TestAuthority,
    nginx: Nginx,
    sidecar: SingleSidecar,
}

impl Publication {
    /// Starts with no CRL published.
    fn start(mode: &str) -> Self {
        Self::start_with(mode, None)
    }

    /// Starts with no CRL published, and trusts another root too, whose CRL is in a file.
    fn start_with(mode: &str, other: Option<(&TestAuthority, &[u8])>) -> Self {
        let signer = TestAuthority::create();
        let nginx = Nginx::start();
        let own = signer.write_files("server", &signer.sign("server", DAY));
        let point =
            json!({"uri": "http://lists.test/mesh.crl", "cluster": "lists", "refresh_seconds": 1});
        let settings = json!({"mode": mode, "distribution_points": [point]});
        let tls = match other {
            None => TestTls::listener(&own, &signer.root()),
            Some((other, crl)) => {
                let roots = [signer.roots(), other.roots()].concat();
                std::fs::write(signer.file("roots.pem"), roots).unwrap();
                std::fs::write(signer.file("other.pem"), crl).unwrap();
                TestTls::listener(&own, &signer.file("roots.pem")).crls(&signer.file("other.pem"))
            }
        };
        let mut config = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        );
        config.clusters.push(cluster("lists", &[nginx.port], UpstreamHttp::Http1, None));
        config.tls = Some(tls.revocation_policy(&settings).socket());
        let sidecar = match mode {
            "strict" => config.start_unready("not fetched yet"),
            _ => config.start(),
        };
        Self { signer, nginx, sidecar }
    }

    /// Publishes a CRL that revokes these certificates.
    fn publish(&self, revoked: &[&PemIdentity]) {
        let serials: Vec<&str> = revoked.iter().map(|holder| holder.serial.as_str()).collect();
        self.signer.revoke(&serials);
        self.nginx.serve("mesh.crl", &std::fs::read(self.signer.crl_file()).unwrap());
    }

    /// Sets the modification time of the published CRL, which the server sends as `last-modified`.
    fn set_last_modified(&self, date: &str) {
        run(Command::new("touch").args(["-d", date]).arg(self.nginx.file("mesh.crl")));
    }

    fn call(&self, holder: &PemIdentity) -> TlsClient {
        TlsClient::connect(
            self.sidecar.port,
            &client_config(&self.signer, holder, "server", "http/1.1"),
        )
    }

    fn is_admitted(&self, holder: &PemIdentity) -> bool {
        self.call(holder).ask("/") == Some(200)
    }

    fn wait_admitted(&self, holder: &PemIdentity, admitted: bool) {
        let awaited = format!("{} is admitted: {admitted}", holder.serial);
        eventually(awaited, || (self.is_admitted(holder) == admitted).then_some(()));
    }

    fn wait_for_problem(&self, problem: &str) {
        eventually(format!("the configuration dump reports: {problem}"), || {
            let dump = Curl::get(self.sidecar.sidecar.admin, "/config_dump").run().text();
            let dump: Value = serde_json::from_str(&dump).unwrap();
            dump["problems"].to_string().contains(problem).then_some(())
        });
    }
}

#[test]
fn crl_is_refreshed_periodically_and_enforced_at_once() {
    let publication = Publication::start("strict");
    let [revoked, other] = ["web", "other"].map(|name| publication.signer.sign(name, DAY));
    assert!(!publication.is_admitted(&other), "no client is admitted before there is a CRL");
    publication.wait_for_problem("HTTP status 404 Not Found");
    publication.publish(&[]);
    publication.wait_admitted(&other, true);
    let [mut closed, mut open] = [&revoked, &other].map(|holder| publication.call(holder));
    assert_eq!([closed.ask("/"), open.ask("/")], [Some(200); 2]);
    publication.nginx.process.line_with("GET /mesh.crl 200");
    publication.nginx.process.line_with("GET /mesh.crl 304");
    publication.publish(&[&revoked]);
    assert!(
        closed.ends_within(Duration::from_secs(5)),
        "the revoked client's connection is closed"
    );
    assert_eq!(open.ask("/"), Some(200));
    assert!(!publication.is_admitted(&revoked) && publication.is_admitted(&other));
    assert_eq!(publication.sidecar.metric("weft_sidecar_crl_revoked_certificates"), 1);
    publication.nginx.process.line_with("GET /mesh.crl 200");
    publication.nginx.process.line_with("GET /mesh.crl 304");
}

#[test]
fn last_good_crl_stays_in_force_when_its_server_fails_or_serves_garbage() {
    let publication = Publication::start("strict");
    let [revoked, other] = ["web", "other"].map(|name| publication.signer.sign(name, DAY));
    publication.publish(&[&revoked]);
    publication.wait_admitted(&other, true);
    let check = |problem: &str| {
        publication.wait_for_problem(problem);
        assert!(!publication.is_admitted(&revoked) && publication.is_admitted(&other), "{problem}");
    };
    std::fs::remove_file(publication.nginx.file("mesh.crl")).unwrap();
    check("HTTP status 404 Not Found; the last CRL stays in force");
    publication.nginx.serve("mesh.crl", b"<html>Please sign in</html>");
    check("the response is not a CRL");
    publication.nginx.serve("mesh.crl", b"");
    check("the response is not a CRL");
    let foreign = TestAuthority::create();
    foreign.revoke(&["01"]);
    publication.nginx.serve("mesh.crl", &std::fs::read(foreign.crl_file()).unwrap());
    check("the last good one stays in force");
    publication.publish(&[&revoked, &other]);
    publication.wait_admitted(&other, false);
}

#[test]
fn html_page_instead_of_a_crl_leaves_all_crls_in_force() {
    // The HTML page is newer than the CRL published after it: by the date alone, the server would answer 304 Not
    // Modified to the next download.
    const OLD: &str = "Thu, 26 Nov 2020 10:00:00 GMT";
    let other_authority = TestAuthority::create();
    let other_crl = std::fs::read(other_authority.crl_file()).unwrap();
    let publication = Publication::start_with("soft", Some((&other_authority, &other_crl)));
    let client = publication.signer.sign("web", DAY);
    publication.publish(&[&client]);
    publication.set_last_modified(OLD);
    publication.wait_admitted(&client, false);
    publication.nginx.serve("mesh.crl", b"<html>maintenance</html>");
    publication.wait_for_problem("the response is not a CRL");
    assert!(!publication.is_admitted(&client), "the downloaded CRL stays in force");
    publication.publish(&[]);
    publication.set_last_modified(OLD);
    publication.wait_admitted(&client, true);
}

#[test]
fn soft_mode_admits_clients_before_the_first_crl_and_enforces_it_once_downloaded() {
    let publication = Publication::start("soft");
    let [revoked, other] = ["web", "other"].map(|name| publication.signer.sign(name, DAY));
    publication.wait_admitted(&revoked, true);
    publication.wait_for_problem("no certificate is checked against this CRL until it is fetched");
    publication.publish(&[&revoked]);
    publication.wait_admitted(&revoked, false);
    assert!(publication.is_admitted(&other));
}
