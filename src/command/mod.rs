//! The subcommands, one module each.

mod admin_ports;
mod agent;
mod ca;
mod control;
mod data_plane;
mod error;
mod flow;
mod output_file;
pub(crate) mod redirect;
mod sds;
mod sidecar;
mod standard_output;
mod status;
#[cfg(test)]
mod tests;
mod values;
mod why;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use error::{CommandError, EXIT_CODES};
use error::{FAILURE_CODE, USAGE_CODE};
pub(crate) use standard_output::print_line;

#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    about = "Service mesh with an L4 agent per node and an L7 sidecar per workload",
    after_help = "Examples:\n  \
        weft demo                                run a demo mesh on this machine (no root needed)\n  \
        weft ca init --state /var/lib/weft       create a certificate authority\n  \
        weft control -c mesh.yaml --state /var/lib/weft\n  \
        weft sidecar -c envoy.yaml               run a sidecar from an Envoy bootstrap file\n  \
        weft why -c mesh.yaml web orders:80 GET /orders\n\n\
        Exit codes: 0 success, 1 failure, 2 usage or configuration error."
)]
struct Cli {
    /// Log filter for standard error: comma-separated LEVEL or TARGET=LEVEL, such as info or weft_xds=trace,info.
    /// Levels: off, error, warn, info, debug, trace.
    #[arg(long, global = true, default_value = "info", env = "WEFT_LOG", value_name = "FILTER", value_parser = values::log_filter)]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the L4 load balancer of a node
    Agent(Box<agent::AgentArgs>),
    /// Run the L7 proxy of a workload
    Sidecar(Box<sidecar::SidecarArgs>),
    /// Serve workload certificates and trust bundles to Envoy over SDS
    Sds(Box<sds::SdsArgs>),
    /// Run the control plane
    Control(control::ControlArgs),
    /// Manage the certificate authority
    Ca(ca::CaArgs),
    /// Show which endpoint a flow is sent to, and why
    Flow(flow::FlowArgs),
    /// Manage traffic-redirection rules
    Redirect(redirect::RedirectArgs),
    /// Show the status of an agent or sidecar
    Status(status::StatusArgs),
    /// Evaluate routes and authorization for a request and show the deciding policy
    Why(why::WhyArgs),
    /// Run a demo mesh on this machine
    Demo(crate::demo::DemoArgs),
    /// Run a service of the demo mesh
    #[command(hide = true)]
    DemoService(crate::demo::service::DemoServiceArgs),
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
        Err(CommandError::Usage(text)) => print_error(&text, USAGE_CODE),
        Err(CommandError::Failed(text)) => print_error(&text, FAILURE_CODE),
    }
}

fn print_error(text: &str, code: u8) -> ExitCode {
    for line in text.lines() {
        // Standard error may be closed; the exit code still reports the failure.
        drop(writeln!(std::io::stderr(), "weft: {line}"));
    }
    ExitCode::from(code)
}
