//! Redirects are tried, and not only read: others' rules may go before ours.

use serde_json::Value;
use tempfile::TempDir;
use weft_integration::bootstrap::bootstrap;
use weft_integration::curl::Curl;
use weft_integration::port;
use weft_integration::process::{Process, ip, nft, run, tool, weft};
use weft_integration::wait::eventually;

const WISH: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16,fd96::/64";

/// Whether a probe says that all is well, and what it says.
fn probe(wish: &str) -> (bool, String) {
    let mut command = weft();
    let output = command.args(["redirect", "probe"]).args(wish.split(' ')).output();
    let output = output.expect("weft can be started");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

fn apply(backend: &str) {
    run(weft().args(["redirect", "apply", "--backend", backend]).args(WISH.split(' ')));
}

fn is_as_wanted(backend: &str) -> bool {
    let mut command = weft();
    command.args(["redirect", "verify", "--backend", backend]).args(WISH.split(' '));
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn what_goes_before_our_rules_is_seen_by_its_effect() {
    let (well, told) = probe(WISH);
    assert!(well && told.contains("probe skipped: no route"), "{told}");
    for address in ["10.5.0.1/32", "fd05::1/128"] {
        ip(&format!("addr add {address} dev lo"));
    }
    ip("route add 10.96.0.0/16 dev lo");
    ip("-6 route add fd96::/64 dev lo");
    let (well, told) = probe(WISH);
    assert!(!well && told.contains("10.96.255.255:15098"), "without rules: {told}");
    for backend in ["native", "nft", "iptables"] {
        apply(backend);
        let (well, told) = probe(WISH);
        let all =
            "connections are redirected: 10.96.255.255:15098, [fd96::ffff:ffff:ffff:ffff]:15098";
        assert!(well && told.contains(all), "{backend}: {told}");
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
    assert!(is_as_wanted("iptables"), "our own rules are as they were");
    let (well, told) = probe(WISH);
    assert!(!well && told.contains("sent unchanged"), "{told}");
    apply("native");
    let (well, told) = probe(WISH);
    assert!(well, "theirs are at -100, ours at -101: {told}");

    nft("add table inet theirs");
    nft("add chain inet theirs first { type nat hook output priority -150; }");
    nft("add rule inet theirs first ip6 daddr fd96::/64 dnat ip6 to fd01::9");
    ip("addr add fd01::9/128 dev lo");
    assert!(is_as_wanted("native"));
    let (well, told) = probe(WISH);
    assert!(!well && told.contains("another program's rule sent it to [fd01::9]:15098"), "{told}");
    nft("flush chain inet theirs first");
    nft("add rule inet theirs first ip daddr 10.96.0.0/16 drop");
    let (well, told) = probe(WISH);
    assert!(!well && told.contains("it was dropped"), "{told}");
    nft("delete table inet theirs");
    assert!(probe(WISH).0);
}

#[test]
fn what_cannot_be_tried_is_said() {
    for (wish, why) in [
        ("--inbound 15006", "only outbound"),
        ("--outbound 15001 --exclude-outbound-ports 15098", "port 15098 is excluded"),
        ("--outbound 15001 --exclude-users 0", "user 0"),
        ("--outbound 15001 --uid 0", "user 0"),
    ] {
        let (well, told) = probe(wish);
        assert!(well && told.contains("probe skipped") && told.contains(why), "{wish}: {told}");
    }
}

#[test]
fn an_agent_is_not_ready_while_traffic_passes_its_rules() {
    ip("netns add web");
    ip("-n web link set lo up");
    ip("-n web addr add 10.5.0.1/32 dev lo");
    ip("-n web route add 10.96.0.0/16 dev lo");
    let folder = TempDir::new().expect("a temporary folder can be made");
    let [file, config] = ["redirects.yaml", "agent.json"].map(|name| folder.path().join(name));
    let wish = "redirects:\n- {netns: /run/netns/web, outbound: 15001, services: [10.96.0.0/16]}\n";
    std::fs::write(&file, wish).expect("the folder takes files");
    let admin = port::free();
    std::fs::write(&config, bootstrap(admin, &[], &[]).to_string()).expect("it takes files");
    let mut agent = weft();
    agent.args(["agent", "--workers", "1", "-c"]).arg(&config).arg("--redirects").arg(&file);
    let agent = Process::start("agent", &mut agent);
    let ready = || Curl::get(admin, "/ready").run();
    let is_ready = || eventually("it is ready", || (ready().status == 200).then_some(()));
    is_ready();

    let there = |words: &str| {
        let mut nsenter = tool("nsenter");
        run(nsenter.arg("--net=/run/netns/web").args(words.split(' ')));
    };
    there("nft add table inet theirs");
    there("nft add chain inet theirs first { type nat hook output priority -150; }");
    there("nft add rule inet theirs first ip daddr 10.96.0.0/16 dnat ip to 127.0.0.1");
    eventually("it is not ready", || (ready().status == 503).then_some(()));
    let told = ready().text();
    assert!(
        told.contains("/run/netns/web") && told.contains("another program's rule sent it to"),
        "{told}"
    );
    let dump: Value =
        serde_json::from_slice(&Curl::get(admin, "/config_dump").run().body).expect("it is JSON");
    let standing = dump.pointer("/redirects/~1run~1netns~1web/standing").and_then(Value::as_str);
    assert!(standing.is_some_and(|text| text.starts_with("failed: ")), "{dump}");
    let page = Curl::get(admin, "/metrics").run().text();
    assert!(!page.contains("weft_agent_redirect_probe_failures_total 0"), "{page}");
    there("nft delete table inet theirs");
    is_ready();
    let errors = agent.errors();
    assert!(errors.contains("connections are redirected again"), "{errors}");
}
