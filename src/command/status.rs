//! `weft status`: the state of an agent or sidecar.

use std::net::SocketAddr;

use clap::Args;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{CommandError, print_line};
use crate::client::{self, HttpResponse};

#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 ready, 1 not ready, 2 usage error.\n\nExamples:\n  \
    weft status\n  \
    weft status --admin 127.0.0.1:15000 --json")]
pub(super) struct StatusArgs {
    /// Admin address of the agent or sidecar
    #[arg(long, default_value = "127.0.0.1:15000", value_name = "ADDRESS")]
    admin: SocketAddr,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &StatusArgs) -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CommandError::Failed(error.to_string()))?;
    let ask = |path| {
        let answer = runtime.block_on(client::get(arguments.admin, None, path, None));
        answer.map_err(|error| CommandError::Failed(format!("{}: {error}", arguments.admin)))
    };
    let ready = ask("/ready")?;
    let dump = ask("/config_dump")?;
    let dump: Value = serde_json::from_str(&dump.body)
        .map_err(|error| CommandError::Failed(format!("{}: {error}", arguments.admin)))?;
    let status = status(&ready, &dump);
    if arguments.json {
        print_line(&format!("{status:#}"));
    } else {
        lines(&status).iter().for_each(|line| print_line(line));
    }
    if ready.status == 200 { Ok(()) } else { Err(CommandError::Failed("not ready".into())) }
}

/// The status fields of a config dump.
fn status(ready: &HttpResponse, dump: &Value) -> Value {
    let waits_for = (ready.status != 200).then(|| ready.body.trim_end().to_owned());
    let mut status = Map::new();
    status.insert("ready".into(), (ready.status == 200).into());
    status.insert("waits_for".into(), waits_for.into());
    for field in [
        "source",
        "problems",
        "dns_failures",
        "revocation",
        "redirects",
        "kernel_table",
        "services",
    ] {
        if let Some(value) = dump.get(field) {
            status.insert(field.into(), value.clone());
        }
    }
    status.into()
}

/// The status as lines of text.
fn lines(status: &Value) -> Vec<String> {
    let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str);
    let mut lines = vec![match text("/waits_for") {
        None => "ready        yes".to_owned(),
        Some(reason) => format!("ready        no: {reason}"),
    }];
    let is = |pointer: &str| status.pointer(pointer).and_then(Value::as_bool).unwrap_or(false);
    lines.push(match text("/source/last_error") {
        _ if !is("/source/control_plane") => {
            "control      none: static configuration from a file".to_owned()
        }
        _ if is("/source/connected") => "control      connected".to_owned(),
        Some(error) => format!("control      not connected: {error}"),
        None => "control      not connected yet; see the log".to_owned(),
    });
    if let Some(table) = status.get("kernel_table").filter(|table| !table.is_null()) {
        let number = |field: &str| table.get(field).and_then(Value::as_u64).unwrap_or_default();
        lines.push(format!("connections  {} of {}", number("entries"), number("limit")));
    }
    for problem in list(status.get("problems")).filter_map(Value::as_str) {
        lines.push(format!("problem      {problem}"));
    }
    let missing = status.pointer("/source/waiting_for");
    for name in list(missing).filter_map(Value::as_str) {
        lines.push(format!("missing      {name}"));
    }
    let unresolved = status.get("dns_failures").and_then(Value::as_object);
    for (host, reason) in unresolved.into_iter().flatten() {
        lines.push(format!("dns          {host}: {}", reason.as_str().unwrap_or_default()));
    }
    let rejected = status.pointer("/source/rejected").and_then(Value::as_object);
    for (name, reason) in rejected.into_iter().flatten() {
        lines.push(format!("rejected     {name}: {}", reason.as_str().unwrap_or_default()));
    }
    let stores = status.get("revocation").and_then(Value::as_object);
    for (name, store) in stores.into_iter().flatten() {
        lines.extend(revocation(name, store));
    }
    let redirects = status.get("redirects").and_then(Value::as_object);
    for (place, redirect) in redirects.into_iter().flatten() {
        let standing = redirect.get("standing").and_then(Value::as_str).unwrap_or_default();
        let dropped = redirect.get("dropped").and_then(Value::as_u64);
        let dropped = dropped.map(|packets| format!(", {packets} packets dropped"));
        let dns = redirect.get("dns").and_then(Value::as_bool);
        let dns = dns.map(|is| {
            if is { ", with DNS" } else { ", without DNS: the DNS server does not answer" }
        });
        let details = [dropped.unwrap_or_default().as_str(), dns.unwrap_or_default()].concat();
        lines.push(format!("redirects    {place}: {standing}{details}"));
    }
    let services: Vec<[String; 5]> = list(status.get("services")).map(service).collect();
    if !services.is_empty() {
        lines.push(String::new());
        lines.extend(table(["SERVICE", "PATH", "OPEN", "FLOWS", "WHY"], &services));
    }
    lines
}

/// One line per CRL of a trust store.
fn revocation(name: &str, store: &Value) -> Vec<String> {
    if store.get("checked").and_then(Value::as_bool) != Some(true) {
        return vec![format!("revocation   {name}: not checked")];
    }
    let line = |list: &Value| {
        let text = |field: &str| list.get(field).and_then(Value::as_str).unwrap_or_default();
        let number = |field: &str| list.get(field).and_then(Value::as_i64).unwrap_or_default();
        let ends = OffsetDateTime::from_unix_timestamp(number("next_update"));
        let ends = ends.ok().and_then(|ends| ends.format(&Rfc3339).ok()).unwrap_or_default();
        format!(
            "revocation   {name}: CRL {} of {} ({}), {} revoked, valid until {ends}",
            text("number"),
            text("issuer"),
            text("speaks_of"),
            number("entries"),
        )
    };
    let lists: Vec<String> = list(store.get("lists")).map(line).collect();
    if lists.is_empty() { vec![format!("revocation   {name}: no CRLs")] } else { lists }
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

fn service(service: &Value) -> [String; 5] {
    let text = |field: &str| service.get(field).and_then(Value::as_str).unwrap_or("-").to_owned();
    let number = |field: &str| {
        service.get(field).and_then(Value::as_u64).map_or_else(|| "-".into(), |n| n.to_string())
    };
    [text("listener"), text("path"), number("flows_open"), number("flows"), text("why")]
}

/// A table of text, each column as wide as its widest cell.
fn table(head: [&str; 5], rows: &[[String; 5]]) -> Vec<String> {
    let head = head.map(str::to_owned);
    let all: Vec<&[String; 5]> = [&head].into_iter().chain(rows).collect();
    let width = |column: usize| {
        all.iter().filter_map(|row| row.get(column)).map(|field| field.chars().count()).max()
    };
    let widths: Vec<usize> = (0..head.len()).filter_map(width).collect();
    let line = |row: &&[String; 5]| {
        let fields = row.iter().zip(&widths).map(|(field, width)| format!("{field:width$}"));
        fields.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn status_is_printed_as_lines_and_a_table_of_services() {
        let ready =
            HttpResponse { status: 503, body: "redirects in /a: not looked at yet\n".into() };
        let dump = json!({
            "source": {"control_plane": true, "connected": true, "rejected": {"listener x": "address: it is missing"}},
            "problems": ["cluster \"c\": endpoint 10.0.0.1:80 is left out"],
            "redirects": {"/run/netns/db": {"standing": "in force", "dropped": 2},
                          "/run/netns/web": {"standing": "in force", "dropped": null, "dns": true}},
            "kernel_table": {"entries": 7, "limit": 1000},
            "services": [
                {"listener": "echo", "path": "kernel", "flows": 12, "flows_open": 3, "why": "so"},
                {"listener": "a-longer-one", "path": "proxy", "flows": 0, "flows_open": 0, "why": "that"},
            ],
        });
        let expected = "\
ready        no: redirects in /a: not looked at yet
control      connected
connections  7 of 1000
problem      cluster \"c\": endpoint 10.0.0.1:80 is left out
rejected     listener x: address: it is missing
redirects    /run/netns/db: in force, 2 packets dropped
redirects    /run/netns/web: in force, with DNS

SERVICE       PATH    OPEN  FLOWS  WHY
echo          kernel  3     12     so
a-longer-one  proxy   0     0      that";
        assert_eq!(lines(&status(&ready, &dump)).join("\n"), expected);
    }

    #[test]
    fn control_plane_state_is_printed() {
        let ready = HttpResponse { status: 200, body: String::new() };
        for (source, expected) in [
            (
                json!({"control_plane": false, "connected": false}),
                "none: static configuration from a file",
            ),
            (json!({"control_plane": true, "connected": false}), "not connected yet; see the log"),
            (
                json!({"control_plane": true, "connected": false, "last_error": "refused"}),
                "not connected: refused",
            ),
        ] {
            let printed = lines(&status(&ready, &json!({"source": source})));
            assert_eq!(
                printed,
                ["ready        yes".to_owned(), format!("control      {expected}")]
            );
        }
    }
}
