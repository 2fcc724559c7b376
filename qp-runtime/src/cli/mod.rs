//! The `qp` command line: one file a command.

mod bench;
mod chat;
mod check_gpu;
pub mod device;
mod doctor;
mod drafts;
mod eval;
mod generate;
mod import;
pub mod inspect;
mod interrupt;
mod model;
mod output;
pub mod plan;
mod profile;
mod quantize;
mod sensitivity;
mod serve;
mod train_codebook;
mod tune;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use qp_codegen::syntax::Diagnostics;

/// Quantize a language model and run it.
#[derive(Parser)]
#[command(name = "qp", version, about)]
struct Cli {
    /// Threads to use on the CPU [default: one a core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Bench),
    Chat(chat::ChatCommand),
    CheckGpu(check_gpu::CheckGpu),
    Doctor(doctor::Doctor),
    Eval(eval::Eval),
    Export(import::Export),
    Generate(generate::Generate),
    Import(import::Import),
    Inspect(inspect::Inspect),
    Plan(plan::Plan),
    Profile(profile::ProfileCommand),
    Quantize(quantize::Quantize),
    Sensitivity(sensitivity::Sensitivity),
    Serve(serve::Serve),
    TrainCodebook(train_codebook::TrainCodebook),
    Tune(tune::Tune),
}

/// An error of a command, as the user sees it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A command whose options take negative numbers for values, so that what is wrong with one is said of the number.
fn with_numbers(command: clap::Command) -> clap::Command {
    let takes = |a: &clap::Arg| !a.is_positional() && a.get_action().takes_values();
    let command = command.mut_args(|a| if takes(&a) { a.allow_negative_numbers(true) } else { a });
    command.mut_subcommands(with_numbers)
}

/// Runs the command line; exit code 0, or 1 after a printed error (2 is clap's, for bad usage).
pub fn main() -> ExitCode {
    let matches = with_numbers(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    if let Some(n) = cli.threads
        && let Err(e) = rayon::ThreadPoolBuilder::new().num_threads(n as usize).build_global()
    {
        output::say(&format!("error: cannot start {n} threads: {e}\n"));
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Bench(c) => c.run(),
        Command::Chat(c) => c.run(),
        Command::CheckGpu(c) => c.run(),
        Command::Doctor(c) => c.run(),
        Command::Eval(c) => c.run(),
        Command::Export(c) => c.run(),
        Command::Generate(c) => c.run(),
        Command::Import(c) => c.run(),
        Command::Inspect(c) => c.run(),
        Command::Plan(c) => c.run(),
        Command::Profile(c) => c.run(),
        Command::Quantize(c) => c.run(),
        Command::Sensitivity(c) => c.run(),
        Command::Serve(c) => c.run(),
        Command::TrainCodebook(c) => c.run(),
        Command::Tune(c) => c.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            match e.downcast_ref::<Diagnostics>() {
                // Escapes what it quotes itself.
                Some(d) => drop(write!(std::io::stderr(), "{}", d.render(std::io::stderr().is_terminal()))),
                None => output::say(&format!("error: {e}\n")),
            }
            ExitCode::FAILURE
        }
    }
}
