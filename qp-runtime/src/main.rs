//! The `qp` command: quantize, run and inspect models.

use std::process::ExitCode;

fn main() -> ExitCode {
    qp_runtime::cli::main()
}
