//! The metrics pages of every role: read by Prometheus' own tool, and documented in `docs/metrics.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use weft_integration::mesh::TestMesh;
use weft_integration::metrics::metric;
use weft_integration::process::promtool;
use weft_integration::wait::eventually;

/// Set, it makes the test write the documentation instead of comparing it.
const UPDATE: &str = "WEFT_UPDATE_DOCS";

/// The pages of one mesh, by role.
fn pages(mesh: &TestMesh) -> Vec<(&'static str, String)> {
    mesh.assert_traffic_flows();
    vec![
        ("sidecar", mesh.web.sidecar.admin("/metrics").text()),
        ("agent", mesh.agent.admin("/metrics").text()),
        ("control plane", mesh.control.admin("/metrics").text()),
    ]
}

fn assert_clean(role: &str, page: &str) {
    let mut check = promtool();
    check
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut check = check.spawn().expect("promtool starts; integration/setup downloads it");
    let mut stdin = check.stdin.take().expect("it is piped");
    stdin.write_all(page.as_bytes()).expect("promtool reads the page");
    drop(stdin);
    let output = check.wait_with_output().expect("promtool ends");
    let problems = [output.stdout, output.stderr].concat();
    let problems = String::from_utf8_lossy(&problems);
    assert!(output.status.success() && problems.is_empty(), "{role}: {problems}");
}

/// One metric of the documentation.
#[derive(Default)]
struct Documented {
    kind: String,
    help: String,
    labels: BTreeSet<String>,
    roles: BTreeSet<&'static str>,
}

fn documented(pages: &[(&'static str, String)]) -> BTreeMap<String, Documented> {
    let mut metrics = BTreeMap::<String, Documented>::new();
    for (role, page) in pages {
        for line in page.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' '))
            {
                let metric = metrics.entry(name.to_owned()).or_default();
                help.clone_into(&mut metric.help);
                metric.roles.insert(role);
            } else if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' '))
            {
                kind.clone_into(&mut metrics.entry(name.to_owned()).or_default().kind);
            } else if let Some((name, labels)) = line.split_once('{') {
                let family =
                    ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                let metric = metrics.get_mut(family.unwrap_or(name));
                let metric = metric.expect("HELP and TYPE come before the series");
                let keys = labels.split("\",").filter_map(|label| label.split_once("=\""));
                metric.labels.extend(keys.map(|(key, _)| key.to_owned()).filter(|key| key != "le"));
            }
        }
    }
    metrics
}

fn documentation(pages: &[(&'static str, String)]) -> String {
    let mut text = "# Metrics\n\n\
        Every role serves its metrics at `/metrics` of the admin port, and of the port that `--metrics` names:\n\
        Prometheus text format 0.0.4, or OpenMetrics 1.0 for scrapers that accept it. Counters start at 0 with the process.\n\n\
        This page is generated: `WEFT_UPDATE_DOCS=1 make integration` writes it.\n"
        .to_owned();
    let metrics = documented(pages);
    let roles = |metric: &Documented| match metric.roles.iter().copied().collect::<Vec<_>>()[..] {
        ["agent", "control plane", "sidecar"] => "All roles",
        ["agent", "sidecar"] => "Agent and sidecar",
        ["agent"] => "Agent",
        ["sidecar"] => "Sidecar",
        ["control plane"] => "Control plane",
        _ => "Some roles",
    };
    for section in ["Sidecar", "Agent", "Control plane", "Agent and sidecar", "All roles"] {
        let _ = write!(
            text,
            "\n## {section}\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n"
        );
        for (name, metric) in metrics.iter().filter(|(_, metric)| roles(metric) == section) {
            let labels: Vec<String> =
                metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let (kind, help) = (&metric.kind, &metric.help);
            let _ = writeln!(text, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
        }
    }
    text
}

#[test]
fn metrics_pages_pass_promtool_and_are_documented() {
    let mesh = TestMesh::start();
    let pages = pages(&mesh);
    for (role, page) in &pages {
        assert_clean(role, page);
    }
    let written = documentation(&pages);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &written).expect("the documentation can be written");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let new: Vec<&str> = written.lines().filter(|line| !kept.contains(line)).collect();
    assert!(
        written == kept,
        "docs/metrics.md is outdated; {UPDATE}=1 writes it. New lines: {new:#?}"
    );
}

#[test]
fn requests_are_counted_by_listener_service_cluster_peer_and_class() {
    let mesh = TestMesh::start();
    assert_eq!(mesh.ask_orders().status, 200);
    let inbound = "weft_sidecar_requests_total{peer=\"spiffe://mesh.local/ns/default/sa/web\",response_class=\"2xx\"}";
    eventually("the callee counts the request by its peer", || {
        let counted = mesh
            .orders
            .iter()
            .map(|orders| metric(&orders.sidecar.admin("/metrics").text(), inbound));
        (counted.sum::<u64>() > 0).then_some(())
    });
    let outbound = mesh.web.sidecar.admin("/metrics").text();
    let counted = metric(
        &outbound,
        "weft_sidecar_requests_total{service=\"orders|80\",cluster=\"orders|80\",peer=\"none\"}",
    );
    assert!(counted > 0, "{outbound}");
}
