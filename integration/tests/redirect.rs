//! The rules that hand traffic over, as the kernel and its tools see them.

use std::path::PathBuf;
use std::process::Output;

use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::bootstrap::bootstrap;
use weft_integration::curl::Curl;
use weft_integration::port;
use weft_integration::process::{Process, nft, run, tool, weft};
use weft_integration::wait::eventually;

/// What a sidecar needs, with everything that can be left out.
const WORKLOAD: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16,fd96::/64 \
    --exclude-inbound-ports 22,7000 --exclude-outbound-ports 25 --uid 0 \
    --exclude-destinations 169.254.169.254,fe80::/10,10.1.0.0/17,192.0.0.0/3,2001:db8::/33 \
    --exclude-interfaces docker0,a-name-of-15.ch --exclude-users 0 --udp 15099 --strict --keep-source";
/// What an agent needs.
const NODE: &str = "--forwarded 15001 --udp 15099 --services 10.96.0.0/12,fd96::/64,192.0.2.1";

fn redirect(command: &str, backend: &str, wish: &str) -> Output {
    let mut weft = weft();
    weft.args(["redirect", command, "--backend", backend]).args(wish.split_whitespace());
    weft.output().expect("weft can be started")
}

#[track_caller]
fn apply(backend: &str, wish: &str) {
    let output = redirect("apply", backend, wish);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What differs, by the backend's own judgement; empty when nothing does.
fn differences(backend: &str, wish: &str) -> String {
    let output = redirect("diff", backend, wish);
    let complaint = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.success(), said.is_empty(), "{said}\n{complaint}");
    said
}

/// Our table as nft lists it, and its generation.
fn our_table() -> (String, u64) {
    let listing = nft("-s list table inet weft");
    let (before, rest) = listing.split_once("generation=").expect("its comment tells it");
    let (number, rest) = rest.split_once(' ').expect("more follows");
    (format!("{before}{rest}"), number.parse().expect("a number"))
}

#[test]
fn the_kernel_is_told_the_very_rules_that_nft_would_tell_it() {
    for wish in [WORKLOAD, NODE] {
        apply("nft", wish);
        let (by_nft, generation) = our_table();
        assert_eq!(differences("native", wish), "", "what nft told, read by ourselves");
        apply("native", wish);
        assert_eq!(our_table(), (by_nft, generation + 1));
        assert_eq!(differences("native", wish), "");
        assert_eq!(differences("nft", wish), "");
    }
}

#[test]
fn whatever_changes_in_our_table_is_noticed() {
    let changes = [
        "flush chain inet weft leaving",
        "delete chain inet weft arriving",
        "add chain inet weft strange",
        "insert rule inet weft leaving accept",
        "add rule inet weft leaving tcp dport 80 return",
        "replace rule inet weft leaving handle HANDLE meta mark and 0xfff == 0x53a counter return",
    ];
    for change in changes {
        apply("native", WORKLOAD);
        let listing = nft("-a list chain inet weft leaving");
        let marked = listing.lines().find(|line| line.contains("0x00000539"));
        let handle = marked.and_then(|line| line.rsplit(' ').next()).expect("it has a number");
        nft(&change.replace("HANDLE", handle));
        assert_ne!(differences("native", WORKLOAD), "", "after {change}");
        assert!(!redirect("verify", "native", WORKLOAD).status.success());
    }
    apply("native", WORKLOAD);
    nft("delete table inet weft");
    let absent = redirect("verify", "native", WORKLOAD);
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("no rules of weft are installed"));
}

#[test]
fn a_wish_replaces_the_one_before_and_nothing_of_others() {
    nft("add table inet theirs");
    nft("add chain inet theirs arriving");
    for backend in ["native", "nft", "native", "iptables", "nft", "iptables", "native"] {
        for wish in [WORKLOAD, NODE] {
            apply(backend, wish);
            apply(backend, wish);
            assert_eq!(differences(backend, wish), "", "{backend}");
            let rules = nft("list ruleset");
            let (ours, others) = if backend == "iptables" {
                (rules.matches("chain WEFT_").count(), "table inet weft")
            } else {
                (rules.matches("table inet weft").count(), "chain WEFT_")
            };
            assert!(ours > 0, "{backend}: {rules}");
            assert!(!rules.contains(others), "{backend} left what another had installed: {rules}");
        }
    }
    run(weft().args(["redirect", "remove"]));
    let left = nft("list ruleset");
    assert!(left.contains("table inet theirs") && !left.to_lowercase().contains("weft"), "{left}");
    for family in ["-4", "-6"] {
        let rules = run(tool("ip").args([family, "rule"]));
        assert!(!rules.contains("fwmark"), "{rules}");
    }
    run(weft().args(["redirect", "remove"]));
}

#[test]
fn marked_packets_have_one_rule_and_one_route_however_often_they_are_asked_for() {
    for _ in 0..3 {
        apply("native", NODE);
    }
    for (family, route) in [("-4", "local default dev lo"), ("-6", "local default dev lo")] {
        let rules = run(tool("ip").args([family, "rule"]));
        assert_eq!(rules.matches("fwmark 0x111/0xfff lookup 100").count(), 1, "{rules}");
        let routes = run(tool("ip").args([family, "route", "show", "table", "100"]));
        assert_eq!(routes.matches(route).count(), 1, "{routes}");
    }
}

#[test]
fn without_the_right_to_it_the_missing_capability_is_named() {
    let mut command = tool("setpriv");
    command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
    let path = weft().get_program().to_owned();
    command.arg(path).args(["redirect", "apply"]).args(NODE.split_whitespace());
    let output = command.output().expect("setpriv can be started");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("NET_ADMIN"), "{complaint}");
}

/// A file of wishes and a guard that keeps them; two namespaces, `one` and `two`.
struct Guarded {
    guard: Process,
    file: PathBuf,
    _folder: TempDir,
}

impl Guarded {
    fn start() -> Self {
        for name in ["one", "two"] {
            make_namespace(name);
        }
        let folder = TempDir::new().expect("a temporary folder can be made");
        let file = folder.path().join("redirects.yaml");
        let guarded = |guard| Self { guard, file: file.clone(), _folder: folder };
        std::fs::write(&file, WISHES).expect("the folder takes files");
        let guard = Process::start("guard", weft().args(["redirect", "guard"]).arg(&file));
        let guarded = guarded(guard);
        for name in ["one", "two"] {
            guarded.is_in_force(name);
        }
        guarded
    }

    fn is_in_force(&self, name: &str) {
        let wish = if name == "one" { WORKLOAD_OF_FILE } else { NODE };
        let wish = format!("--netns /run/netns/{name} {wish}");
        eventually(format!("{:?} has what is wanted in {name}", self.guard), || {
            redirect("verify", "native", &wish).status.success().then_some(())
        });
    }
}

const WORKLOAD_OF_FILE: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16";
const WISHES: &str = "redirects:
- {netns: /run/netns/one, inbound: 15006, outbound: 15001, services: [10.96.0.0/16]}
- {netns: /run/netns/two, forwarded: 15001, udp: 15099,
   services: [10.96.0.0/12, 'fd96::/64', 192.0.2.1]}
";

fn make_namespace(name: &str) {
    run(tool("ip").args(["netns", "add", name]));
    run(tool("ip").args(["-n", name, "link", "set", "lo", "up"]));
}

/// Runs a command in a namespace. `ip netns exec` mounts /sys, which not every host allows.
fn damage(name: &str, command: &str) {
    let mut nsenter = tool("nsenter");
    nsenter.arg(format!("--net=/run/netns/{name}")).args(command.split_whitespace());
    run(&mut nsenter);
}

#[test]
fn a_guard_repairs_whatever_is_changed_in_any_namespace() {
    let guarded = Guarded::start();
    for (name, command) in [
        ("one", "nft delete table inet weft"),
        ("one", "nft flush chain inet weft leaving"),
        ("two", "nft flush ruleset"),
        ("two", "nft insert rule inet weft arriving_udp accept"),
        ("two", "ip rule del fwmark 0x111/0xfff"),
        ("two", "ip -6 route flush table 100"),
    ] {
        damage(name, command);
        guarded.is_in_force(name);
    }
    let told = guarded.guard.errors();
    assert!(told.contains("had drifted: repaired") && !told.contains("ERROR"), "{told}");
}

#[test]
fn a_guard_follows_namespaces_that_come_and_go() {
    let guarded = Guarded::start();
    let open_files = || {
        let folder = format!("/proc/{}/fd", guarded.guard.id());
        std::fs::read_dir(folder).expect("it runs").count()
    };
    let before = open_files();
    run(tool("ip").args(["netns", "delete", "two"]));
    eventually("what it had open there is closed", || (open_files() < before).then_some(()));
    for _ in 0..8 {
        make_namespace("two");
        guarded.is_in_force("two");
        run(tool("ip").args(["netns", "delete", "two"]));
    }
    make_namespace("two");
    guarded.is_in_force("two");
    // Comparing opens something for a moment.
    eventually("no more is open than at first", || (open_files() <= before).then_some(()));
}

#[test]
fn a_guard_follows_its_file_and_keeps_to_the_last_good_one() {
    let guarded = Guarded::start();
    std::fs::write(&guarded.file, format!("{WISHES}- {{netns: /run/netns/two, inbund: 1}}\n"))
        .expect("the file can be written");
    eventually("the mistake is told", || guarded.guard.errors().contains("inbund").then_some(()));
    guarded.is_in_force("one");
    guarded.is_in_force("two");

    let one = WISHES.lines().take(2).collect::<Vec<_>>().join("\n");
    std::fs::write(&guarded.file, one.replace("15006", "15007")).expect("the file can be written");
    eventually("the rules of the wish that is gone are removed", || {
        let verdict = redirect("verify", "native", &format!("--netns /run/netns/two {NODE}"));
        String::from_utf8_lossy(&verdict.stderr).contains("nothing of weft").then_some(())
    });
    let changed = WORKLOAD_OF_FILE.replace("15006", "15007");
    eventually("the changed one is in force", || {
        let wish = format!("--netns /run/netns/one {changed}");
        redirect("verify", "native", &wish).status.success().then_some(())
    });
}

#[test]
fn an_agent_keeps_its_redirects_and_tells_of_them() {
    let guarded = Guarded::start();
    drop(guarded.guard);
    let admin = port::free();
    let config = guarded.file.with_extension("json");
    std::fs::write(&config, bootstrap(admin, &[], &[]).to_string()).expect("it can be written");
    let mut agent = weft();
    let file = guarded.file;
    agent.args(["agent", "--workers", "1", "-c"]).arg(config).arg("--redirects").arg(&file);
    let agent = Process::start("agent", &mut agent);
    let metrics = || Curl::get(admin, "/metrics").run().text();
    eventually(format!("{agent:?} is ready"), || {
        (Curl::get(admin, "/ready").run().status == 200).then_some(())
    });
    assert!(metrics().contains("\nweft_agent_redirects_in_force 2\n"), "{}", metrics());
    damage("two", "nft flush ruleset");
    eventually("the repair is counted", || {
        metrics().contains("\nweft_agent_redirect_repairs_total 1\n").then_some(())
    });
    let told = |name: &str| -> Value {
        let dump = Curl::get(admin, "/config_dump").run().body;
        let dump: Value = serde_json::from_slice(&dump).expect("a dump is JSON");
        let told = dump.get("redirects").and_then(|all| all.get(format!("/run/netns/{name}")));
        told.expect("it tells of each").clone()
    };
    assert_eq!(told("two"), json!({"standing": "in force", "dropped": null, "dns": null}));

    // Two datagrams past a sidecar that is strict.
    std::fs::write(&file, WISHES.replace("outbound: 15001,", "outbound: 15001, strict: true,"))
        .expect("the file can be written");
    eventually("the strict rules are there", || {
        redirect("verify", "native", &format!("--netns /run/netns/one {WORKLOAD_OF_FILE} --strict"))
            .status
            .success()
            .then_some(())
    });
    run(tool("ip").args(["-n", "one", "route", "add", "10.9.0.0/16", "dev", "lo"]));
    let mut send = tool("nsenter");
    send.args(["--net=/run/netns/one", "bash", "-c"]);
    run(send.arg("for _ in 1 2; do echo hello 2>/dev/null > /dev/udp/10.9.9.9/9; done; true"));
    eventually("what was dropped is told", || {
        metrics().contains("\nweft_agent_redirect_dropped_packets_total 2\n").then_some(())
    });
    assert_eq!(told("one"), json!({"standing": "in force", "dropped": 2, "dns": null}));
}
