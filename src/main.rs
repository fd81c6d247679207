//! The `weft` command. It only dispatches: each role is a module of [`weft::command`].

use std::process::ExitCode;

fn main() -> ExitCode {
    weft::command::main()
}
