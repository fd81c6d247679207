//! Revocation lists that a sidecar fetches, from nginx.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::{UpstreamHttp, cluster, verify_mode};
use weft_integration::curl::Curl;
use weft_integration::nginx::Nginx;
use weft_integration::process::run;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig};
use weft_integration::tls_client::{TlsClient, client_config};
use weft_integration::wait::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority, the server that offers its list, and a sidecar that fetches it from there.
struct Offered {
    signer: TestAuthority,
    nginx: Nginx,
    alone: SingleSidecar,
}

impl Offered {
    /// Nothing is offered yet.
    fn start(mode: &str) -> Self {
        Self::start_with_second_listener(mode, None)
    }

    /// With another root, and its list in a file.
    fn start_with_second_listener(mode: &str, beside: Option<(&TestAuthority, &[u8])>) -> Self {
        let (signer, nginx) = (TestAuthority::create(), Nginx::start());
        let own = signer.write_files("server", &signer.sign("server", DAY));
        let mut tls = verify_mode(&own, &signer.root(), &signer.crl_file());
        let point =
            json!({"uri": "http://lists.test/mesh.crl", "cluster": "lists", "refresh_seconds": 1});
        let settings = json!({"mode": mode, "distribution_points": [point]});
        let kind = "type.googleapis.com/google.protobuf.Struct";
        let context = &mut tls["typed_config"]["common_tls_context"]["validation_context"];
        match beside {
            None => drop(context.as_object_mut().unwrap().remove("crl")),
            Some((other, list)) => {
                let roots = [signer.roots(), other.roots()].concat();
                std::fs::write(signer.file("roots.pem"), roots).unwrap();
                std::fs::write(signer.file("beside.pem"), list).unwrap();
                context["trusted_ca"] = json!({"filename": signer.file("roots.pem")});
                context["crl"] = json!({"filename": signer.file("beside.pem")});
            }
        }
        context["custom_validator_config"] = json!({
            "name": "weft.revocation",
            "typed_config": {"@type": kind, "value": settings},
        });
        let mut wanted = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        );
        wanted.clusters.push(cluster("lists", &[nginx.port], UpstreamHttp::Http1, None));
        wanted.tls = Some(tls);
        let alone = match mode {
            "strict" => wanted.start_unready("is not there yet"),
            _ => wanted.start(),
        };
        Self { signer, nginx, alone }
    }

    /// Has a list offered that revokes those.
    fn offer(&self, revoked: &[&PemIdentity]) {
        let serials: Vec<&str> = revoked.iter().map(|holder| holder.serial.as_str()).collect();
        self.signer.revoke(&serials);
        self.nginx.serve("mesh.crl", &std::fs::read(self.signer.crl_file()).unwrap());
    }

    /// Has the server say that its list is from then.
    fn date(&self, date: &str) {
        run(Command::new("touch").args(["-d", date]).arg(self.nginx.file("mesh.crl")));
    }

    fn call(&self, holder: &PemIdentity) -> TlsClient {
        TlsClient::connect(
            self.alone.port,
            &client_config(&self.signer, holder, "server", "http/1.1"),
        )
    }

    fn is_accepted(&self, holder: &PemIdentity) -> bool {
        self.call(holder).ask("/") == Some(200)
    }

    fn waits_for(&self, holder: &PemIdentity, let_in: bool) {
        let awaited = format!("{} is let in: {let_in}", holder.serial);
        eventually(awaited, || (self.is_accepted(holder) == let_in).then_some(()));
    }

    fn tells(&self, problem: &str) {
        eventually(format!("it is told that {problem}"), || {
            let dump = Curl::get(self.alone.sidecar.admin, "/config_dump").run().text();
            let dump: Value = serde_json::from_str(&dump).unwrap();
            dump["problems"].to_string().contains(problem).then_some(())
        });
    }
}

#[test]
fn a_list_is_asked_for_again_and_again_and_what_it_says_holds_at_once() {
    let offered = Offered::start("strict");
    let [leaver, other] = ["web", "other"].map(|name| offered.signer.sign(name, DAY));
    assert!(!offered.is_accepted(&other), "nobody is, before there is a list");
    offered.tells("it answered 404 Not Found");
    offered.offer(&[]);
    offered.waits_for(&other, true);
    let [mut ended, mut kept] = [&leaver, &other].map(|holder| offered.call(holder));
    assert_eq!([ended.ask("/"), kept.ask("/")], [Some(200); 2]);
    offered.nginx.process.line_with("GET /mesh.crl 200");
    offered.nginx.process.line_with("GET /mesh.crl 304");
    offered.offer(&[&leaver]);
    assert!(ended.ends_within(Duration::from_secs(5)), "its list came");
    assert_eq!(kept.ask("/"), Some(200));
    assert!(!offered.is_accepted(&leaver) && offered.is_accepted(&other));
    assert_eq!(offered.alone.metric("weft_sidecar_revoked_certificates"), 1);
    offered.nginx.process.line_with("GET /mesh.crl 200");
    offered.nginx.process.line_with("GET /mesh.crl 304");
}

#[test]
fn the_last_list_stays_whatever_becomes_of_its_server() {
    let offered = Offered::start("strict");
    let [leaver, other] = ["web", "other"].map(|name| offered.signer.sign(name, DAY));
    offered.offer(&[&leaver]);
    offered.waits_for(&other, true);
    let check = |problem: &str| {
        offered.tells(problem);
        assert!(!offered.is_accepted(&leaver) && offered.is_accepted(&other), "{problem}");
    };
    std::fs::remove_file(offered.nginx.file("mesh.crl")).unwrap();
    check("it answered 404 Not Found; the last list stays in force");
    offered.nginx.serve("mesh.crl", b"<html>Please sign in</html>");
    check("what came is no list");
    offered.nginx.serve("mesh.crl", b"");
    check("what came is no list");
    let foreign = TestAuthority::create();
    foreign.revoke(&["01"]);
    offered.nginx.serve("mesh.crl", &std::fs::read(foreign.crl_file()).unwrap());
    check("the last good one stays in force");
    offered.offer(&[&leaver, &other]);
    offered.waits_for(&other, false);
}

#[test]
fn a_page_that_comes_in_place_of_a_list_takes_nothing_from_the_lists_beside_it() {
    // One that is newer than the list it stands for: by its date alone the list would not be sent again.
    const OLD: &str = "Thu, 26 Nov 2020 10:00:00 GMT";
    let other_authority = TestAuthority::create();
    let beside = std::fs::read(other_authority.crl_file()).unwrap();
    let offered = Offered::start_with_second_listener("soft", Some((&other_authority, &beside)));
    let leaver = offered.signer.sign("web", DAY);
    offered.offer(&[&leaver]);
    offered.date(OLD);
    offered.waits_for(&leaver, false);
    offered.nginx.serve("mesh.crl", b"<html>maintenance</html>");
    offered.tells("what came is no list");
    assert!(!offered.is_accepted(&leaver), "what was known of it is known");
    offered.offer(&[]);
    offered.date(OLD);
    offered.waits_for(&leaver, true);
}

#[test]
fn whom_no_list_names_is_let_in_before_there_is_one_where_the_policy_says_so() {
    let offered = Offered::start("soft");
    let [leaver, other] = ["web", "other"].map(|name| offered.signer.sign(name, DAY));
    offered.waits_for(&leaver, true);
    offered.tells("until it comes nobody is refused by it");
    offered.offer(&[&leaver]);
    offered.waits_for(&leaver, false);
    assert!(offered.is_accepted(&other));
}
