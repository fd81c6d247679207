//! A service of the demo.

use clap::Args;

use crate::command::Failure;

/// What a service is asked.
#[derive(Debug, Args)]
pub struct Arguments {}

/// Runs a service.
///
/// # Errors
/// When it cannot listen.
pub fn run(_: &Arguments) -> Result<(), Failure> {
    Ok(())
}
