//! `weft redirect probe`: tests the effect of redirect rules with real connections, because rules
//! of other software may run first.

use serde_json::Value;
use tempfile::TempDir;
use weft_integration::bootstrap::bootstrap;
use weft_integration::curl::Curl;
use weft_integration::port;
use weft_integration::process::{Process, ip, nft, run, tool, weft};
use weft_integration::wait::eventually;

const REDIRECTS: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16,fd96::/64";

/// Runs a probe; returns whether it succeeded, and its output.
fn probe(redirects: &str) -> (bool, String) {
    let mut command = weft();
    let output = command.args(["redirect", "probe"]).args(redirects.split(' ')).output();
    let output = output.expect("weft can be started");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
}

fn apply(backend: &str) {
    run(weft().args(["redirect", "apply", "--backend", backend]).args(REDIRECTS.split(' ')));
}

fn is_verified(backend: &str) -> bool {
    let mut command = weft();
    command.args(["redirect", "verify", "--backend", backend]).args(REDIRECTS.split(' '));
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn probe_detects_foreign_rules_that_run_before_weft_rules() {
    let (succeeded, output) = probe(REDIRECTS);
    assert!(succeeded && output.contains("probe skipped: no route"), "{output}");
    for address in ["10.5.0.1/32", "fd05::1/128"] {
        ip(&format!("addr add {address} dev lo"));
    }
    ip("route add 10.96.0.0/16 dev lo");
    ip("-6 route add fd96::/64 dev lo");
    let (succeeded, output) = probe(REDIRECTS);
    assert!(!succeeded && output.contains("10.96.255.255:15098"), "without rules: {output}");
    for backend in ["native", "nft", "iptables"] {
        apply(backend);
        let (succeeded, output) = probe(REDIRECTS);
        let all =
            "connections are redirected: 10.96.255.255:15098, [fd96::ffff:ffff:ffff:ffff]:15098";
        assert!(succeeded && output.contains(all), "{backend}: {output}");
    }

    run(tool("iptables").args([
        "-t",
        "nat",
        "-I",
        "OUTPUT",
        "1",
        "-d",
        "10.96.0.0/16",
        "-j",
        "ACCEPT",
    ]));
    assert!(is_verified("iptables"), "weft's own rules are unchanged");
    let (succeeded, output) = probe(REDIRECTS);
    assert!(!succeeded && output.contains("sent unchanged"), "{output}");
    apply("native");
    let (succeeded, output) = probe(REDIRECTS);
    assert!(succeeded, "foreign rules have priority -100, weft's -101: {output}");

    nft("add table inet theirs");
    nft("add chain inet theirs first { type nat hook output priority -150; }");
    nft("add rule inet theirs first ip6 daddr fd96::/64 dnat ip6 to fd01::9");
    ip("addr add fd01::9/128 dev lo");
    assert!(is_verified("native"));
    let (succeeded, output) = probe(REDIRECTS);
    assert!(
        !succeeded && output.contains("another program's rule sent it to [fd01::9]:15098"),
        "{output}"
    );
    nft("flush chain inet theirs first");
    nft("add rule inet theirs first ip daddr 10.96.0.0/16 drop");
    let (succeeded, output) = probe(REDIRECTS);
    assert!(!succeeded && output.contains("it was dropped"), "{output}");
    nft("delete table inet theirs");
    assert!(probe(REDIRECTS).0);
}

#[test]
fn probe_reports_what_it_cannot_test() {
    for (redirects, why) in [
        ("--inbound 15006", "only outbound"),
        ("--outbound 15001 --exclude-outbound-ports 15098", "port 15098 is excluded"),
        ("--outbound 15001 --exclude-users 0", "user 0"),
        ("--outbound 15001 --uid 0", "user 0"),
    ] {
        let (succeeded, output) = probe(redirects);
        assert!(
            succeeded && output.contains("probe skipped") && output.contains(why),
            "{redirects}: {output}"
        );
    }
}

#[test]
fn agent_is_not_ready_while_traffic_bypasses_its_rules() {
    ip("netns add web");
    ip("-n web link set lo up");
    ip("-n web addr add 10.5.0.1/32 dev lo");
    ip("-n web route add 10.96.0.0/16 dev lo");
    let folder = TempDir::new().expect("a temporary folder can be created");
    let [file, config] = ["redirects.yaml", "agent.json"].map(|name| folder.path().join(name));
    let redirects =
        "redirects:\n- {netns: /run/netns/web, outbound: 15001, services: [10.96.0.0/16]}\n";
    std::fs::write(&file, redirects).expect("the folder is writable");
    let admin = port::free();
    std::fs::write(&config, bootstrap(admin, &[], &[]).to_string())
        .expect("the folder is writable");
    let mut agent = weft();
    agent.args(["agent", "--workers", "1", "-c"]).arg(&config).arg("--redirects").arg(&file);
    let agent = Process::start("agent", &mut agent);
    let ready = || Curl::get(admin, "/ready").run();
    let is_ready = || eventually("the agent is ready", || (ready().status == 200).then_some(()));
    is_ready();

    let in_namespace = |words: &str| {
        let mut nsenter = tool("nsenter");
        run(nsenter.arg("--net=/run/netns/web").args(words.split(' ')));
    };
    in_namespace("nft add table inet theirs");
    in_namespace("nft add chain inet theirs first { type nat hook output priority -150; }");
    in_namespace("nft add rule inet theirs first ip daddr 10.96.0.0/16 dnat ip to 127.0.0.1");
    eventually("the agent is not ready", || (ready().status == 503).then_some(()));
    let output = ready().text();
    assert!(
        output.contains("/run/netns/web") && output.contains("another program's rule sent it to"),
        "{output}"
    );
    let dump: Value = serde_json::from_slice(&Curl::get(admin, "/config_dump").run().body)
        .expect("the dump is JSON");
    let standing = dump.pointer("/redirects/~1run~1netns~1web/standing").and_then(Value::as_str);
    assert!(standing.is_some_and(|text| text.starts_with("failed: ")), "{dump}");
    let page = Curl::get(admin, "/metrics").run().text();
    assert!(!page.contains("weft_agent_redirect_probe_failures_total 0"), "{page}");
    in_namespace("nft delete table inet theirs");
    is_ready();
    let errors = agent.errors();
    assert!(errors.contains("connections are redirected again"), "{errors}");
}
