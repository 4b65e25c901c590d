//! The command line: what each command takes, and its way into the library.

pub mod choices;
pub mod client;
pub mod demo;
mod display;
pub mod doctor;
mod guardian;
pub mod microvm;
mod migrate;
mod qemu;
mod show;
pub mod units;

use crate::cli::migrate::{MigrateArgs, migrate_options};
use crate::cli::qemu::{AttachArgs, ReceiveArgs, RunArgs, attach, receive_guest};
use crate::output;
use crate::supervisor::claim::{Claim, RuntimeDir};
use crate::supervisor::{Inbox, Shared, api, say};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use guardian::GuardianArgs;
use pageferry_engine::error::{Error, Result};
use std::path::PathBuf;

/// Moves running virtual machines between hosts.
///
/// A guest is started under `pageferry run` (or attached with `attach`), a place is made for it
/// with `pageferry receive` on the other host, and `pageferry migrate` moves it while it runs.
///
/// Exit status: 0 done; 1 the migration was aborted and the guest runs on at the source; 2 bad
/// usage or refused, nothing was touched; 3 the outcome is not known here: the guest is stopped at
/// the source, or its supervisor died.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a guest that can be moved, and stay in front of it.
    Run(RunArgs),
    /// Take up a QEMU that already runs.
    Attach(AttachArgs),
    /// Wait for a guest, with a QEMU command that matches the source's.
    Receive(ReceiveArgs),
    /// Start a guest in pageferry's own monitor, which needs no QEMU, or wait for one.
    Microvm(microvm::MicrovmArgs),
    /// Move a guest of this host to a waiting receiver.
    Migrate(MigrateArgs),
    /// Show the guests of this host.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show one guest.
    Status {
        /// Its name.
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End the migration of a guest that is under way; the guest runs on here.
    Cancel {
        /// Its name.
        name: String,
    },
    /// Decide what becomes of a guest whose migration ended in doubt (exit status 3).
    Settle {
        /// Its name.
        name: String,
        #[command(flatten)]
        choice: SettleChoice,
    },
    /// Show what this host can do, one line a finding, with the fix.
    Doctor(doctor::DoctorArgs),
    /// Move a small Linux guest on this host and check every page of it.
    Demo(demo::DemoArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write man pages into a directory.
    Man {
        /// The directory; made if it is not there.
        directory: PathBuf,
    },
    /// Waits for the death of a supervisor; started by it.
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SettleChoice {
    /// Let the guest run here. Only if it certainly does not run at the destination.
    #[arg(long)]
    run: bool,
    /// End the guest here: it runs at the destination.
    #[arg(long)]
    end: bool,
}

/// Runs the command; returns the exit status.
pub fn main() -> u8 {
    output::say_panics();
    let status = run_command();
    output::flush();
    status
}

fn run_command() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return show_usage(&e),
    };
    output::show_events();
    match dispatch(cli.command) {
        Ok(status) => status,
        Err(error) => {
            say(&error.chain());
            match error {
                Error::Refused(_) | Error::Busy(_) => 2,
                Error::Unknown(_) => 3,
                _ => 1,
            }
        }
    }
}

/// Help, the version or what is wrong with the arguments, as the parser words and colours it.
fn show_usage(error: &clap::Error) -> u8 {
    // To stderr, or to stdout, whose reader may have gone.
    if let Err(e) = error.print()
        && e.kind() != std::io::ErrorKind::BrokenPipe
    {
        say(&format!("the usage could not be printed: {e}"));
        return u8::try_from(error.exit_code()).unwrap_or(2).max(1);
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

fn dispatch(command: Command) -> Result<u8> {
    match command {
        Command::Run(args) => qemu::run(&args),
        Command::Attach(args) => attach(args),
        Command::Receive(args) => receive_guest(&args),
        Command::Microvm(args) => microvm::main(&args),
        Command::Migrate(args) => client::migrate(&args.name, migrate_options(&args)?, args.json),
        Command::List { json } => client::list(json),
        Command::Status { name, json } => client::status(&name, json),
        Command::Cancel { name } => client::simple(&name, &api::Request::Cancel),
        Command::Settle { name, choice } => {
            client::simple(&name, &api::Request::Settle { run: choice.run })
        }
        Command::Doctor(args) => doctor::main(&args),
        Command::Demo(args) => demo::main(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pageferry", &mut script);
            output::print(&String::from_utf8_lossy(&script)).map(|()| 0)
        }
        Command::Man { directory } => {
            std::fs::create_dir_all(&directory)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &directory))
                .map_err(|e| {
                    Error::refused(format!(
                        "cannot write man pages into {}: {e}",
                        directory.display()
                    ))
                })?;
            Ok(0)
        }
        Command::Guardian(args) => guardian::main(args),
    }
}

/// What every supervisor begins with: its name, its socket, its signals.
fn supervise(name: &str) -> Result<(Claim, Shared, Inbox)> {
    let claim = RuntimeDir::open()?.claim(name)?;
    let shared = Shared::new(name);
    let inbox = Inbox::open(api::serve(&claim.path("sock"), shared.clone())?)?;
    Ok((claim, shared, inbox))
}

/// A guest of this name that lost its supervisor must not lose its record too.
fn refuse_left_behind(runtime: &RuntimeDir, name: &str) -> Result<()> {
    match runtime.record(name).filter(crate::supervisor::record::Record::alive) {
        Some(record) => Err(Error::refused(format!(
            "a guest named {name} runs without a supervisor (QEMU pid {}): attach it with `pageferry attach {name}`, or choose another name",
            record.pid
        ))),
        None => Ok(()),
    }
}
