//! The entry point of the `weft` command; see [`weft::command`].

use std::process::ExitCode;

fn main() -> ExitCode {
    weft::command::main()
}
