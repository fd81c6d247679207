//! `weft demo`: a mesh on one machine.
//!
//! [`namespace`] creates user, network, mount and PID namespaces without root. [`hosts`] creates a network namespace per
//! host, and [`roles`] starts the processes of weft in them; [`demo_mesh`] is the running mesh. [`steps`] and [`layer4`]
//! run the steps and check their results. When the first process ends, the kernel removes the namespaces with everything
//! in them.

mod demo_mesh;
mod files;
mod flows;
pub mod hosts;
mod layer4;
mod load;
mod namespace;
mod output;
mod roles;
pub mod service;
mod steps;
mod wait;

use clap::Args;

use crate::command::CommandError;
use crate::command::redirect::BackendArg;

/// The options of `weft demo`.
#[derive(Debug, Args)]
#[command(
    after_help = "Runs in new user and network namespaces and needs no root. Requires the ip command (iproute2).\n\nExamples:\n  weft demo\n  weft demo --keep     keep the mesh running and print commands to try"
)]
pub struct DemoArgs {
    /// Keep the mesh running after the last step and print commands to try
    #[arg(long)]
    keep: bool,
    /// After the last step, run a load test at this rate (requests per second) through the agent and both sidecars
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    load: Option<u32>,
    /// Duration of the load test, in seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Backend that installs the redirects
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,
    /// Path of flows at the agent
    #[arg(long, default_value = "auto", value_parser = ["auto", "proxy"])]
    path: String,
    /// Set for the process inside the namespaces
    #[arg(long, hide = true)]
    inside: bool,
}

/// Runs the demo.
///
/// # Errors
/// The first step that failed.
pub fn run(arguments: &DemoArgs) -> Result<(), CommandError> {
    if !arguments.inside {
        return namespace::enter().map_err(CommandError::Failed);
    }
    namespace::settle().map_err(CommandError::Failed)?;
    let load = arguments.load.map(|rate| load::LoadTest { rate, seconds: arguments.seconds });
    let backend = arguments.backend.choice().resolve();
    let backend = backend.map_err(|error| CommandError::Failed(error.to_string()))?;
    steps::run(arguments.keep, load, backend, &arguments.path).map_err(CommandError::Failed)
}
