//! The hidden command that a supervisor starts beside itself ([`pageferry_qemu::guardian`]).

use crate::output;
use clap::ValueEnum;
use pageferry_engine::Result;
use pageferry_qemu::guardian::{self, Side};
use std::path::PathBuf;

/// Which side it guards.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum SideArg {
    /// The guest runs here, or is paused for the switchover.
    Source,
    /// A copy is being filled here.
    Destination,
}

/// What the guardian process is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct GuardianArgs {
    /// Which side it guards.
    #[arg(long)]
    side: SideArg,
    /// The QEMU process, for whoever looks at the command line.
    #[arg(long)]
    pid: u32,
    /// Its handle, inherited.
    #[arg(long)]
    pidfd: i32,
    /// Its QMP socket.
    #[arg(long)]
    qmp: PathBuf,
    /// The shared memory, as a path under the supervisor's /proc entry.
    #[arg(long)]
    flag: PathBuf,
    /// The userfaultfd with which the guest's memory is armed, inherited.
    #[arg(long)]
    uffd: Option<i32>,
}

/// The guardian's whole life; returns the exit status.
pub fn main(args: GuardianArgs) -> Result<u8> {
    let GuardianArgs { side, pid, pidfd, qmp, flag, uffd } = args;
    let side = match side {
        SideArg::Source => Side::Source,
        SideArg::Destination => Side::Destination,
    };
    let args = guardian::GuardianArgs { side, pid, pidfd, qmp, flag, uffd };
    guardian::main(&args, || output::print("ready\n")).map(|()| 0)
}
