//! The subcommands, one module each.

mod admin_ports;
mod agent;
mod ca;
mod control;
mod data_plane;
mod flow;
mod output_file;
pub(crate) mod redirect;
mod sds;
mod sidecar;
mod status;
#[cfg(test)]
mod tests;
mod values;
mod why;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Why a command did not do what it was asked, and the exit code that says so.
#[derive(Debug)]
pub enum Failure {
    /// What was asked or configured is wrong: exit code 2.
    Usage(String),
    /// It could not be done: exit code 1.
    Failed(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    about = "A service mesh in two tiers: an L4 agent on each node, an L7 sidecar beside each service",
    after_help = "Examples:\n  \
        weft demo                                a whole mesh on this machine, no root needed\n  \
        weft ca init --state /var/lib/weft       make an authority\n  \
        weft control -c mesh.yaml --state /var/lib/weft\n  \
        weft sidecar -c envoy.yaml               run an Envoy bootstrap file\n  \
        weft why -c mesh.yaml web orders:80 GET /orders\n\n\
        Exit codes: 0 done, 1 it could not be done, 2 what was asked or configured is wrong."
)]
struct Cli {
    /// What is logged to standard error: LEVEL or TARGET=LEVEL, separated by commas, such as info, debug or
    /// weft_xds=trace,info. Levels: off, error, warn, info, debug, trace.
    #[arg(long, global = true, default_value = "info", env = "WEFT_LOG", value_name = "FILTER", value_parser = values::log_filter)]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The node's L4 load balancer.
    Agent(Box<agent::Arguments>),
    /// The service's L7 load balancer.
    Sidecar(Box<sidecar::Arguments>),
    /// A workload's certificate and what it trusts, for a proxy of another kind.
    Sds(Box<sds::Arguments>),
    /// The control plane.
    Control(control::Arguments),
    /// The certificate authority.
    Ca(ca::Arguments),
    /// Where flows go, and why.
    Flow(flow::Arguments),
    /// The rules that hand traffic over.
    Redirect(redirect::Arguments),
    /// How it stands with an agent or a sidecar: readiness, problems, redirects, which way flows go.
    Status(status::Arguments),
    /// Evaluate routes and authorization for a request and show the deciding policy.
    Why(why::Arguments),
    /// A whole mesh on this machine.
    Demo(crate::demo::Arguments),
    /// A service of the demo.
    #[command(hide = true)]
    DemoService(crate::demo::service::Arguments),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Agent(arguments) => agent::run(&arguments, &cli.log),
        Command::Sidecar(arguments) => sidecar::run(&arguments, &cli.log),
        Command::Sds(arguments) => sds::run(&arguments, &cli.log),
        Command::Control(arguments) => control::run(arguments, &cli.log),
        Command::Ca(arguments) => ca::run(arguments),
        Command::Flow(arguments) => flow::run(&arguments),
        Command::Redirect(arguments) => redirect::run(arguments, &cli.log),
        Command::Status(arguments) => status::run(&arguments),
        Command::Why(arguments) => why::run(&arguments),
        Command::Demo(arguments) => crate::demo::run(&arguments),
        Command::DemoService(arguments) => crate::demo::service::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => complain(&text, 2),
        Err(Failure::Failed(text)) => complain(&text, 1),
    }
}

fn complain(text: &str, code: u8) -> ExitCode {
    for line in text.lines() {
        // Standard error may be closed; the exit code still tells.
        drop(writeln!(std::io::stderr(), "weft: {line}"));
    }
    ExitCode::from(code)
}

/// Writes a line to standard output.
pub(crate) fn say(text: &str) {
    // A reader that has gone away wants no more lines.
    drop(writeln!(std::io::stdout(), "{text}"));
}
