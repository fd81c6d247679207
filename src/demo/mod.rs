//! A whole mesh on one machine.

pub mod service;

use clap::Args;

use crate::command::Failure;

/// What the demo is asked.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Leave the mesh running, with the commands to try.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo.
///
/// # Errors
/// The first step that failed.
pub fn run(_: &Arguments) -> Result<(), Failure> {
    Ok(())
}
