//! A whole mesh on one machine: `weft demo`.
//!
//! [`namespace`] gives the demo a network of its own, without root; [`hosts`] makes machines in it;
//! [`roles`] starts the real roles of weft there as processes, [`stage`] holds them together; [`story`]
//! tells what a mesh does and checks every word of it, [`layer4`] what a node does. Nothing is left when it ends: the namespaces take it all along.

mod files;
mod flows;
pub mod hosts;
mod layer4;
mod load;
mod namespace;
mod roles;
pub mod service;
mod stage;
mod story;

use std::io::{IsTerminal as _, Write as _};

use clap::Args;

use crate::command::Failure;
use crate::command::redirect::Tool;

/// What the demo is asked.
#[derive(Debug, Args)]
#[command(
    after_help = "Needs no root: it makes a user and network namespace of its own. Needs the command ip.\n\nExamples:\n  weft demo\n  weft demo --keep     leave it running, with commands to try"
)]
pub struct Arguments {
    /// Leave the mesh running, with the commands to try.
    #[arg(long)]
    keep: bool,
    /// After the story, send so many requests a second through the agent and both sidecars.
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    load: Option<u32>,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// What installs the redirects.
    #[arg(long, value_enum, default_value_t = Tool::Auto)]
    backend: Tool,
    /// Which way flows go at the agent.
    #[arg(long, default_value = "auto", value_parser = ["auto", "proxy"])]
    path: String,
    /// The process inside the namespaces.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Runs the demo.
///
/// # Errors
/// The first step that failed.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    if !arguments.inside {
        return namespace::enter().map_err(Failure::Failed);
    }
    namespace::settle().map_err(Failure::Failed)?;
    let load = arguments.load.map(|rate| load::Load { rate, seconds: arguments.seconds });
    let backend = arguments.backend.choice().resolve();
    let backend = backend.map_err(|error| Failure::Failed(error.to_string()))?;
    story::tell(arguments.keep, load, backend, &arguments.path).map_err(Failure::Failed)
}

/// Writes a line of the story.
fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that has gone away wants no more lines.
    drop(writeln!(out, "{text}").and_then(|()| out.flush()));
}

/// Marks a step as done.
fn mark(done: bool, text: &str) {
    let colour = std::io::stdout().is_terminal();
    let (word, code) = if done { ("ok", 32) } else { ("FAILED", 31) };
    if colour {
        line(&format!("  \u{1b}[{code}m{word:6}\u{1b}[0m {text}"));
    } else {
        line(&format!("  {word:6} {text}"));
    }
}
