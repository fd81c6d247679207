//! `weft flow`.

use std::net::SocketAddr;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use super::{CommandError, print_line, values};
use crate::client;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft flow explain tcp 10.0.0.1:4000 10.96.0.3:7000\n  \
    weft flow explain udp [fd90::2]:4000 [fd96::3]:7001 --json")]
pub(super) struct FlowArgs {
    #[command(subcommand)]
    command: FlowCommand,
}

#[derive(Debug, Subcommand)]
enum FlowCommand {
    /// Ask an agent which endpoint a new flow would be sent to
    Explain {
        /// Transport protocol of the flow
        #[arg(value_enum)]
        transport: TransportArg,
        /// Address and port of the client
        #[arg(value_name = "ADDRESS:PORT", value_parser = values::flow_address)]
        client: SocketAddr,
        /// Original destination address and port
        #[arg(value_name = "ADDRESS:PORT", value_parser = values::flow_address)]
        destination: SocketAddr,
        /// Sequence number of the SYN, for services that include it in the flow hash
        #[arg(long, value_name = "NUMBER")]
        sequence: Option<u32>,
        /// Admin address of the agent
        #[arg(long, default_value = "127.0.0.1:15000", value_name = "ADDRESS")]
        admin: SocketAddr,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TransportArg {
    Tcp,
    Udp,
}

pub(super) fn run(arguments: &FlowArgs) -> Result<(), CommandError> {
    let FlowCommand::Explain { transport, client, destination, sequence, admin, json } =
        &arguments.command;
    if client.is_ipv4() != destination.is_ipv4() {
        let pair = format!("{client} and {destination}");
        return Err(CommandError::Usage(format!(
            "client and destination {pair}: must be of one address family, IPv4 or IPv6"
        )));
    }
    let transport = match transport {
        TransportArg::Tcp => "tcp",
        TransportArg::Udp => "udp",
    };
    let sequence = sequence.map(|number| format!("&sequence={number}")).unwrap_or_default();
    let flow = format!("transport={transport}&client={client}&destination={destination}");
    let path = format!("/flow?{flow}{sequence}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CommandError::Failed(error.to_string()))?;
    let answer = runtime.block_on(client::get(*admin, None, &path, None));
    let answer = answer.map_err(|error| {
        CommandError::Failed(format!("cannot query the agent at {admin}: {error}"))
    })?;
    if answer.status != 200 {
        return Err(CommandError::Failed(answer.body.trim_end().to_owned()));
    }
    if *json {
        print_line(answer.body.trim_end());
        return Ok(());
    }
    let explanation: Value = serde_json::from_str(&answer.body).map_err(|error| {
        CommandError::Failed(format!("invalid response of the agent at {admin}: {error}"))
    })?;
    for line in lines(&explanation) {
        print_line(&line);
    }
    Ok(())
}

/// The explanation as lines of text.
fn lines(explanation: &Value) -> Vec<String> {
    let text = |field: &str| explanation.get(field).and_then(Value::as_str).unwrap_or("none");
    let number = |pointer: &str| explanation.pointer(pointer).and_then(Value::as_u64);
    let endpoints = explanation.get("endpoints").and_then(Value::as_array);
    let mut endpoints = endpoints.into_iter().flatten().filter_map(Value::as_str);
    let first = endpoints.next().unwrap_or("none");
    let others: Vec<&str> = endpoints.collect();
    let group = match (text("security_group"), text("admitting_range")) {
        ("admitted", range) => format!("admits the client (range {range})"),
        ("not_allowed", _) => {
            "does not admit the client: no range of allow_from contains it".into()
        }
        _ => "none: every client is admitted".into(),
    };
    let mut lines = vec![
        format!("listener  {}", text("listener")),
        format!("group     {group}"),
        format!("cluster   {}", text("cluster")),
    ];
    if let (Some(hash), Some(slot), Some(slots)) =
        (number("/hash"), number("/slot/0"), number("/slot/1"))
    {
        lines.push(format!("hash      {hash:#010x}"));
        lines.push(format!("slot      {slot} of {slots}"));
    }
    if text("security_group") == "not_allowed" {
        lines.push("endpoint  none: the security group does not admit the client".to_owned());
    } else {
        lines.push(format!("endpoint  {first}, by {}", text("choice").replace('_', " ")));
    }
    if let Some(path) = explanation.get("path").and_then(Value::as_str) {
        lines.push(format!("path      {path}: {}", text("why")));
    }
    if !others.is_empty() {
        lines.push(format!("then      {}", others.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed(group: &str, range: Option<&str>, endpoints: &[&str]) -> String {
        let explanation = json!({
            "listener": "echo", "security_group": group, "admitting_range": range, "cluster": "echo",
            "hash": 1, "slot": [1, 11], "endpoints": endpoints, "choice": "flow_hash",
        });
        lines(&explanation).join("\n")
    }

    #[test]
    fn security_group_is_printed_with_its_decision_and_range() {
        let at = "10.1.0.1:7000";
        let open = printed("none", None, &[at]);
        assert!(open.contains("group     none: every client is admitted"), "{open}");
        let admitted = printed("admitted", Some("10.0.0.0/8"), &[at]);
        assert!(admitted.contains("group     admits the client (range 10.0.0.0/8)"), "{admitted}");
        assert!(admitted.contains("endpoint  10.1.0.1:7000, by flow hash"), "{admitted}");
        let refused = printed("not_allowed", None, &[]);
        assert!(refused.contains("group     does not admit the client"), "{refused}");
        assert!(refused.contains("endpoint  none: the security group"), "{refused}");
        assert!(!refused.contains("by flow hash"), "{refused}");
    }
}
