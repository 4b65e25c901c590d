//! Commands for guests of QEMU: `run`, `attach`, `receive`.

use super::choices::LinkArgs;
use crate::cli::{refuse_left_behind, supervise};
use crate::supervisor::claim::RuntimeDir;
use crate::supervisor::hosting::Hosting;
use crate::supervisor::receiving::receive;
use crate::supervisor::say;
use crate::vmm::launch::launch;
use crate::vmm::qemu::{QemuFactory, QemuRunning};
use clap::Args;
use pageferry_engine::destination::Receiver;
use pageferry_engine::destination::lanes::check_receiver;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::net::Address;
use pageferry_engine::net::address::check_exposure;
use pageferry_qemu::command::Role;
use pageferry_qemu::memory::ownership::Ownership;
use pageferry_qemu::process::Qemu;
use pageferry_qemu::source::QemuSource;
use pageferry_transport::Access;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For a QEMU that is attached to answer.
const ATTACH_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A name for the guest on this host.
    name: String,
    /// The QEMU command, as you would type it. Where it has no shared memory backend, one is added.
    #[arg(last = true, required = true, value_name = "QEMU-COMMAND")]
    qemu: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// A name for the guest on this host. That of a guest whose supervisor has ended is enough to
    /// find it again.
    name: String,
    /// QEMU's process id.
    #[arg(long, requires = "qmp")]
    pid: Option<u32>,
    /// QEMU's QMP socket. pageferry keeps it to itself while it is attached.
    #[arg(long, value_name = "SOCKET", requires = "pid")]
    qmp: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// A name for the guest on this host.
    name: String,
    /// Where to listen, such as 10.0.0.2:7600; port 0 takes a free one and says which. Or
    /// unix:PATH, a socket for this user alone.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    #[command(flatten)]
    link: LinkArgs,
    /// Listen off loopback although the connection is neither encrypted nor authenticated yet.
    #[arg(long)]
    insecure: bool,
    /// Take a guest although what it sees of its machine differs here in this, as the refusal named
    /// it (cpu.smap, or cpu for all of them). May be given more than once.
    #[arg(long, value_name = "NAME")]
    allow_difference: Vec<String>,
    /// The QEMU command: the same machine, memory and devices as at the source.
    #[arg(last = true, required = true, value_name = "QEMU-COMMAND")]
    qemu: Vec<OsString>,
}

pub(crate) fn run(args: &RunArgs) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let (mut claim, shared, inbox) = supervise(&args.name)?;
    refuse_left_behind(&runtime, &args.name)?;
    claim.forget_guest();
    let (child, qemu) = launch(&args.qemu, Role::Source, &claim.path("qmp"))?;
    claim.keep_guest();
    let pid = qemu.pid();
    let hosting =
        Hosting::new(claim, shared, inbox, QemuRunning::new(QemuSource::new(qemu), Some(child)))?;
    say(&format!(
        "{} runs (QEMU pid {}); move it with `pageferry migrate {} --to ADDR:PORT`",
        args.name, pid, args.name
    ));
    hosting.run()
}

/// A guest that was left in doubt under one name is attached under that name, where the question
/// about it lies: it must not lie there any more when the guest is moved the next time.
fn refuse_in_doubt_elsewhere(runtime: &RuntimeDir, name: &str, pid: u32) -> Result<()> {
    let in_doubt = |other: &String| {
        other.as_str() != name && runtime.record(other).and_then(|r| r.doubt_about(pid)).is_some()
    };
    match runtime.names()?.into_iter().find(in_doubt) {
        Some(other) => Err(Error::refused(format!(
            "QEMU (pid {pid}) is the guest {other}, which was left in doubt: `pageferry attach {other}`"
        ))),
        None => Ok(()),
    }
}

pub(crate) fn attach(args: AttachArgs) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let (claim, shared, inbox) = supervise(&args.name)?;
    let record = runtime.record(&args.name);
    let found = match (args.pid, args.qmp) {
        (Some(pid), Some(qmp)) => Some((pid, qmp)),
        _ => record.as_ref().filter(|record| record.alive()).map(|r| (r.pid, r.qmp.clone())),
    };
    let Some((pid, qmp)) = found else {
        return Err(Error::refused(format!(
            "no running guest named {} is known here: give its QEMU with --pid and --qmp",
            args.name
        )));
    };
    refuse_in_doubt_elsewhere(&runtime, &args.name, pid)?;
    let mut qemu =
        Qemu::attach(pid, &qmp, Access::Read, Ownership::default(), Instant::now() + ATTACH_MAX)?;
    let state = qemu.status()?;
    let doubt = record.and_then(|record| record.doubt_about(pid));
    // In these two states QEMU is as the migration has left it, or as it was parked where a stray
    // `cont` was undone.
    let untouched = matches!(state.as_str(), "postmigrate" | "finish-migrate");
    if doubt.is_some() && !untouched {
        say(&format!(
            "{} was left in doubt by a migration, and somebody has started it since (QEMU says {state}): the destination is not \
             asked about it any more. Make sure that it does not run there",
            args.name
        ));
    }
    let doubt = doubt.filter(|_| untouched);
    match state.as_str() {
        "running" => say(&format!("attached to {} (QEMU pid {pid})", args.name)),
        _ if doubt.is_some() => say(&format!(
            "attached to {} (QEMU pid {pid}), which is stopped here in doubt: the destination was told to run it, and its answer \
             is not known",
            args.name
        )),
        "postmigrate" => say(&format!(
            "attached to {} (QEMU pid {pid}), which was stopped for a migration. Make sure that it does not run at the destination \
             before you let it run here with `pageferry settle {} --run`; if it does, `--end` it here. QEMU says the same of a \
             guest that was paused when a migration of it was aborted: that one is nowhere else",
            args.name, args.name
        )),
        state => say(&format!(
            "attached to {} (QEMU pid {pid}), which does not run: QEMU says {state}",
            args.name
        )),
    }
    let mut guest = QemuSource::new(qemu);
    if let Some(doubt) = doubt {
        let hosted = QemuRunning::in_doubt(guest, &doubt)?;
        return Hosting::in_doubt(claim, shared, inbox, hosted, &doubt)?.run();
    }
    if state == "postmigrate" {
        guest.take_up_in_doubt()?;
    }
    Hosting::new(claim, shared, inbox, QemuRunning::new(guest, None))?.run()
}

pub(crate) fn receive_guest(args: &ReceiveArgs) -> Result<u8> {
    let address = Address::resolve(&args.listen)?;
    check_exposure(&address, args.insecure)?;
    let link = args.link.choice();
    check_receiver(&link)?;
    let runtime = RuntimeDir::open()?;
    let (claim, shared, inbox) = supervise(&args.name)?;
    refuse_left_behind(&runtime, &args.name)?;
    let receiver = Receiver::new(SessionListener::open(address)?, link);
    receive(
        claim,
        shared,
        inbox,
        &mut QemuFactory::new(&args.qemu).allowing(&args.allow_difference),
        receiver,
    )
}
