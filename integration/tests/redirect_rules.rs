//! Redirect rules, as the kernel and its tools list them.

use std::path::PathBuf;
use std::process::Output;

use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::bootstrap::bootstrap;
use weft_integration::curl::Curl;
use weft_integration::port;
use weft_integration::process::{Process, nft, run, tool, weft};
use weft_integration::wait::eventually;

/// The redirects of a sidecar, with every option.
const WORKLOAD: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16,fd96::/64 \
    --exclude-inbound-ports 22,7000 --exclude-outbound-ports 25 --uid 0 \
    --exclude-destinations 169.254.169.254,fe80::/10,10.1.0.0/17,192.0.0.0/3,2001:db8::/33 \
    --exclude-interfaces docker0,a-name-of-15.ch --exclude-users 0 --udp 15099 --strict --keep-source";
/// The redirects of an agent.
const NODE: &str = "--forwarded 15001 --udp 15099 --services 10.96.0.0/12,fd96::/64,192.0.2.1";

fn redirect(command: &str, backend: &str, redirects: &str) -> Output {
    let mut weft = weft();
    weft.args(["redirect", command, "--backend", backend]).args(redirects.split_whitespace());
    weft.output().expect("weft can be started")
}

#[track_caller]
fn apply(backend: &str, redirects: &str) {
    let output = redirect("apply", backend, redirects);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The differences that `weft redirect verify` prints; empty without differences.
fn differences(backend: &str, redirects: &str) -> String {
    let output = redirect("diff", backend, redirects);
    let complaint = String::from_utf8_lossy(&output.stderr);
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.success(), listed.is_empty(), "{listed}\n{complaint}");
    listed
}

/// The table `weft` as nft lists it, and its generation.
fn weft_table() -> (String, u64) {
    let listing = nft("-s list table inet weft");
    let (before, rest) =
        listing.split_once("generation=").expect("the table's comment has the generation");
    let (number, rest) = rest.split_once(' ').expect("the comment continues after the generation");
    (format!("{before}{rest}"), number.parse().expect("the text is a number"))
}

#[test]
fn native_backend_installs_the_same_rules_as_nft() {
    for redirects in [WORKLOAD, NODE] {
        apply("nft", redirects);
        let (by_nft, generation) = weft_table();
        assert_eq!(
            differences("native", redirects),
            "",
            "rules installed by nft, read over netlink"
        );
        apply("native", redirects);
        assert_eq!(weft_table(), (by_nft, generation + 1));
        assert_eq!(differences("native", redirects), "");
        assert_eq!(differences("nft", redirects), "");
    }
}

#[test]
fn any_change_of_the_table_is_detected() {
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
        let handle =
            marked.and_then(|line| line.rsplit(' ').next()).expect("the rule has a handle");
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
fn apply_replaces_earlier_weft_rules_and_keeps_foreign_rules() {
    nft("add table inet theirs");
    nft("add chain inet theirs arriving");
    for backend in ["native", "nft", "native", "iptables", "nft", "iptables", "native"] {
        for redirects in [WORKLOAD, NODE] {
            apply(backend, redirects);
            apply(backend, redirects);
            assert_eq!(differences(backend, redirects), "", "{backend}");
            let rules = nft("list ruleset");
            let (ours, others) = if backend == "iptables" {
                (rules.matches("chain WEFT_").count(), "table inet weft")
            } else {
                (rules.matches("table inet weft").count(), "chain WEFT_")
            };
            assert!(ours > 0, "{backend}: {rules}");
            assert!(!rules.contains(others), "{backend} left rules of another backend: {rules}");
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
fn repeated_apply_installs_one_policy_route_for_marked_packets() {
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
fn apply_without_cap_net_admin_names_the_missing_capability() {
    let mut command = tool("setpriv");
    command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
    let path = weft().get_program().to_owned();
    command.arg(path).args(["redirect", "apply"]).args(NODE.split_whitespace());
    let output = command.output().expect("setpriv can be started");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("NET_ADMIN"), "{complaint}");
}

/// A redirect file and a guard that enforces it, with two namespaces, `one` and `two`.
struct RedirectGuard {
    guard: Process,
    file: PathBuf,
    _folder: TempDir,
}

impl RedirectGuard {
    fn start() -> Self {
        for name in ["one", "two"] {
            make_namespace(name);
        }
        let folder = TempDir::new().expect("a temporary folder can be created");
        let file = folder.path().join("redirects.yaml");
        let setup = |guard| Self { guard, file: file.clone(), _folder: folder };
        std::fs::write(&file, REDIRECTS_FILE).expect("the folder is writable");
        let guard = Process::start("guard", weft().args(["redirect", "guard"]).arg(&file));
        let setup = setup(guard);
        for name in ["one", "two"] {
            setup.is_in_force(name);
        }
        setup
    }

    fn is_in_force(&self, name: &str) {
        let redirects = if name == "one" { WORKLOAD_IN_FILE } else { NODE };
        let redirects = format!("--netns /run/netns/{name} {redirects}");
        eventually(format!("{:?} has installed the rules in {name}", self.guard), || {
            redirect("verify", "native", &redirects).status.success().then_some(())
        });
    }
}

const WORKLOAD_IN_FILE: &str = "--inbound 15006 --outbound 15001 --services 10.96.0.0/16";
const REDIRECTS_FILE: &str = "redirects:
- {netns: /run/netns/one, inbound: 15006, outbound: 15001, services: [10.96.0.0/16]}
- {netns: /run/netns/two, forwarded: 15001, udp: 15099,
   services: [10.96.0.0/12, 'fd96::/64', 192.0.2.1]}
";

fn make_namespace(name: &str) {
    run(tool("ip").args(["netns", "add", name]));
    run(tool("ip").args(["-n", name, "link", "set", "lo", "up"]));
}

/// Runs a command in a namespace. `ip netns exec` is not used: it mounts /sys, which some hosts do
/// not allow.
fn damage(name: &str, command: &str) {
    let mut nsenter = tool("nsenter");
    nsenter.arg(format!("--net=/run/netns/{name}")).args(command.split_whitespace());
    run(&mut nsenter);
}

#[test]
fn guard_repairs_changed_rules_in_every_namespace() {
    let setup = RedirectGuard::start();
    for (name, command) in [
        ("one", "nft delete table inet weft"),
        ("one", "nft flush chain inet weft leaving"),
        ("two", "nft flush ruleset"),
        ("two", "nft insert rule inet weft arriving_udp accept"),
        ("two", "ip rule del fwmark 0x111/0xfff"),
        ("two", "ip -6 route flush table 100"),
    ] {
        damage(name, command);
        setup.is_in_force(name);
    }
    let reported = setup.guard.errors();
    assert!(
        reported.contains("had drifted: repaired") && !reported.contains("ERROR"),
        "{reported}"
    );
}

#[test]
fn guard_follows_added_and_removed_namespaces() {
    let setup = RedirectGuard::start();
    let open_files = || {
        let folder = format!("/proc/{}/fd", setup.guard.id());
        std::fs::read_dir(folder).expect("the guard runs").count()
    };
    let before = open_files();
    run(tool("ip").args(["netns", "delete", "two"]));
    eventually("files of the removed namespace are closed", || {
        (open_files() < before).then_some(())
    });
    for _ in 0..8 {
        make_namespace("two");
        setup.is_in_force("two");
        run(tool("ip").args(["netns", "delete", "two"]));
    }
    make_namespace("two");
    setup.is_in_force("two");
    // A comparison opens sockets for a moment.
    eventually("the number of open files is back at its start", || {
        (open_files() <= before).then_some(())
    });
}

#[test]
fn guard_follows_its_file_and_keeps_the_last_good_one() {
    let setup = RedirectGuard::start();
    std::fs::write(
        &setup.file,
        format!("{REDIRECTS_FILE}- {{netns: /run/netns/two, inbund: 1}}\n"),
    )
    .expect("the file can be written");
    eventually("the error is logged", || setup.guard.errors().contains("inbund").then_some(()));
    setup.is_in_force("one");
    setup.is_in_force("two");

    let one = REDIRECTS_FILE.lines().take(2).collect::<Vec<_>>().join("\n");
    std::fs::write(&setup.file, one.replace("15006", "15007")).expect("the file can be written");
    eventually("the rules of the removed redirect are removed", || {
        let verified = redirect("verify", "native", &format!("--netns /run/netns/two {NODE}"));
        String::from_utf8_lossy(&verified.stderr).contains("no rules of weft").then_some(())
    });
    let changed = WORKLOAD_IN_FILE.replace("15006", "15007");
    eventually("the changed redirect is installed", || {
        let redirects = format!("--netns /run/netns/one {changed}");
        redirect("verify", "native", &redirects).status.success().then_some(())
    });
}

#[test]
fn agent_enforces_and_reports_its_redirects() {
    let setup = RedirectGuard::start();
    drop(setup.guard);
    let admin = port::free();
    let config = setup.file.with_extension("json");
    std::fs::write(&config, bootstrap(admin, &[], &[]).to_string())
        .expect("the file can be written");
    let mut agent = weft();
    let file = setup.file;
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
    let reported = |name: &str| -> Value {
        let dump = Curl::get(admin, "/config_dump").run().body;
        let dump: Value = serde_json::from_slice(&dump).expect("the dump is JSON");
        let reported = dump.get("redirects").and_then(|all| all.get(format!("/run/netns/{name}")));
        reported.expect("the dump lists each namespace").clone()
    };
    assert_eq!(reported("two"), json!({"standing": "in force", "dropped": null, "dns": null}));

    // Two datagrams that bypass a strict sidecar.
    std::fs::write(
        &file,
        REDIRECTS_FILE.replace("outbound: 15001,", "outbound: 15001, strict: true,"),
    )
    .expect("the file can be written");
    eventually("the strict rules are installed", || {
        redirect("verify", "native", &format!("--netns /run/netns/one {WORKLOAD_IN_FILE} --strict"))
            .status
            .success()
            .then_some(())
    });
    run(tool("ip").args(["-n", "one", "route", "add", "10.9.0.0/16", "dev", "lo"]));
    let mut send = tool("nsenter");
    send.args(["--net=/run/netns/one", "bash", "-c"]);
    run(send.arg("for _ in 1 2; do echo hello 2>/dev/null > /dev/udp/10.9.9.9/9; done; true"));
    eventually("dropped packets are counted", || {
        metrics().contains("\nweft_agent_redirect_dropped_packets_total 2\n").then_some(())
    });
    assert_eq!(reported("one"), json!({"standing": "in force", "dropped": 2, "dns": null}));
}
