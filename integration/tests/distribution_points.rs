//! Revocation lists that a sidecar fetches, from nginx.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::alone::{Alone, Wanted};
use weft_integration::authority::{Holder, Signer};
use weft_integration::backend::Backend;
use weft_integration::bootstrap::{Speaks, cluster, verify_mode};
use weft_integration::curl::Curl;
use weft_integration::nginx::Nginx;
use weft_integration::process::run;
use weft_integration::tls_caller::{TlsCaller, caller};
use weft_integration::wait::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority, the server that offers its list, and a sidecar that fetches it from there.
struct Offered {
    signer: Signer,
    nginx: Nginx,
    alone: Alone,
}

impl Offered {
    /// Nothing is offered yet.
    fn start(mode: &str) -> Self {
        Self::start_beside(mode, None)
    }

    /// With another root, and its list in a file.
    fn start_beside(mode: &str, beside: Option<(&Signer, &[u8])>) -> Self {
        let (signer, nginx) = (Signer::create(), Nginx::start());
        let own = signer.files_of("server", &signer.sign("server", DAY));
        let mut tls = verify_mode(&own, &signer.root(), &signer.revocations());
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
        let mut wanted = Wanted::before(Backend::telling_heads().port, Speaks::Http1);
        wanted.clusters.push(cluster("lists", &[nginx.port], Speaks::Http1, None));
        wanted.tls = Some(tls);
        let alone = match mode {
            "strict" => wanted.start_unready("is not there yet"),
            _ => wanted.start(),
        };
        Self { signer, nginx, alone }
    }

    /// Has a list offered that revokes those.
    fn offer(&self, revoked: &[&Holder]) {
        let serials: Vec<&str> = revoked.iter().map(|holder| holder.serial.as_str()).collect();
        self.signer.revoke(&serials);
        self.nginx.serve("mesh.crl", &std::fs::read(self.signer.revocations()).unwrap());
    }

    /// Has the server say that its list is from then.
    fn date(&self, date: &str) {
        run(Command::new("touch").args(["-d", date]).arg(self.nginx.file("mesh.crl")));
    }

    fn call(&self, holder: &Holder) -> TlsCaller {
        TlsCaller::connect(self.alone.port, &caller(&self.signer, holder, "server", "http/1.1"))
    }

    fn is_let_in(&self, holder: &Holder) -> bool {
        self.call(holder).ask("/") == Some(200)
    }

    fn waits_for(&self, holder: &Holder, let_in: bool) {
        let awaited = format!("{} is let in: {let_in}", holder.serial);
        eventually(awaited, || (self.is_let_in(holder) == let_in).then_some(()));
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
    assert!(!offered.is_let_in(&other), "nobody is, before there is a list");
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
    assert!(!offered.is_let_in(&leaver) && offered.is_let_in(&other));
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
        assert!(!offered.is_let_in(&leaver) && offered.is_let_in(&other), "{problem}");
    };
    std::fs::remove_file(offered.nginx.file("mesh.crl")).unwrap();
    check("it answered 404 Not Found; the last list stays in force");
    offered.nginx.serve("mesh.crl", b"<html>Please sign in</html>");
    check("what came is no list");
    offered.nginx.serve("mesh.crl", b"");
    check("what came is no list");
    let foreign = Signer::create();
    foreign.revoke(&["01"]);
    offered.nginx.serve("mesh.crl", &std::fs::read(foreign.revocations()).unwrap());
    check("the last good one stays in force");
    offered.offer(&[&leaver, &other]);
    offered.waits_for(&other, false);
}

#[test]
fn a_page_that_comes_in_place_of_a_list_takes_nothing_from_the_lists_beside_it() {
    // One that is newer than the list it stands for: by its date alone the list would not be sent again.
    const OLD: &str = "Thu, 26 Nov 2020 10:00:00 GMT";
    let other_authority = Signer::create();
    let beside = std::fs::read(other_authority.revocations()).unwrap();
    let offered = Offered::start_beside("soft", Some((&other_authority, &beside)));
    let leaver = offered.signer.sign("web", DAY);
    offered.offer(&[&leaver]);
    offered.date(OLD);
    offered.waits_for(&leaver, false);
    offered.nginx.serve("mesh.crl", b"<html>maintenance</html>");
    offered.tells("what came is no list");
    assert!(!offered.is_let_in(&leaver), "what was known of it is known");
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
    assert!(offered.is_let_in(&other));
}
