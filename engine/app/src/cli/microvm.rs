//! `pageferry microvm`: a guest of the built-in monitor, booted here or waited for.

use super::choices::{LinkArgs, Pattern, Tracking};
use super::{supervise, units};
use crate::supervisor::claim::RuntimeDir;
use crate::supervisor::hosting::Hosting;
use crate::supervisor::receiving::receive;
use crate::supervisor::say;
use crate::vmm::console::OperatorConsole;
use crate::vmm::microvm::{MicrovmFactory, MicrovmRunning};
use pageferry_engine::destination::Receiver;
use pageferry_engine::destination::lanes::check_receiver;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::net::Address;
use pageferry_engine::net::address::check_exposure;
use pageferry_microvm::boot::linux::check_file;
use pageferry_microvm::config::MachineConfig;
use pageferry_microvm::machine::open_kvm;
use pageferry_microvm::payload::PayloadOptions;
use pageferry_microvm::source::Boot;
use std::path::PathBuf;

/// Where a kernel writes unless it is told otherwise.
const APPEND_DEFAULT: &str = "console=ttyS0";
/// Seed of a payload that is not told another: two runs do the same.
const SEED_DEFAULT: u64 = 1;

/// What `pageferry microvm` takes.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("guest").required(true).args(["kernel", "payload", "listen"]))]
pub struct MicrovmArgs {
    /// A name for the guest on this host.
    name: String,
    /// Boot this Linux kernel, a bzImage for x86-64.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk. There are no disks.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Its command line. [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,
    /// Boot a program that does nothing but write memory and check it.
    #[arg(long)]
    payload: bool,
    /// Where it writes.
    #[arg(long, value_enum, value_name = "PATTERN")]
    payload_pattern: Option<Pattern>,
    /// How fast each vCPU writes: pages a second, or with a unit, such as 400MB, bytes a second.
    /// [default: as fast as it can]
    #[arg(long, value_parser = pages_a_second, value_name = "RATE")]
    payload_rate: Option<u64>,
    /// Memory that it writes at all, such as 64M. [default: all of it]
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    payload_working_set: Option<u64>,
    /// Seed of what it writes where. [default: 1]
    #[arg(long, value_name = "NUMBER")]
    payload_seed: Option<u64>,
    /// Wait here for a guest of another `pageferry microvm`, such as 10.0.0.2:7600; port 0 takes a
    /// free one and says which.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Listen off loopback although the connection is neither encrypted nor authenticated yet.
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    link: LinkArgs,
    /// Memory, such as 512M or 4G.
    #[arg(long, default_value = "512M", value_parser = units::size, value_name = "SIZE")]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 2, value_name = "NUMBER")]
    cpus: u32,
    /// Memory of huge pages of 2 MiB, which the host must have set aside.
    #[arg(long)]
    huge_pages: bool,
    /// Take all memory from the host at the start, so that a guest that is received finds it ready.
    #[arg(long)]
    preallocate: bool,
    /// How the guest's writes are followed.
    #[arg(long, value_enum, default_value_t)]
    tracking: Tracking,
    /// Entries of each vCPU's dirty ring, a power of two.
    #[arg(long, value_name = "NUMBER")]
    ring_entries: Option<u32>,
}

/// Runs the command; returns the exit status.
pub fn main(args: &MicrovmArgs) -> Result<u8> {
    let config = MachineConfig {
        memory_bytes: args.memory,
        vcpus: args.cpus,
        huge_pages: args.huge_pages,
        preallocate: args.preallocate,
        tracking: args.tracking.into(),
        ring_entries: args.ring_entries,
    };
    check_options(args)?;
    config.check()?;
    check_host_memory(args.memory)?;
    match (&args.listen, boot(args)) {
        (Some(address), _) => wait_for(args, address, config),
        (None, Some(boot)) => run(args, &config, &boot),
        (None, None) => {
            Err(Error::refused("give --kernel, --payload or --listen: what is the guest to be?"))
        }
    }
}

/// Refuses options of another kind of guest. The parser does not: to it, what excludes each other
/// needs no more.
fn check_options(args: &MicrovmArgs) -> Result<()> {
    let of_kernel = args.initrd.is_some() || args.append.is_some();
    let of_payload = args.payload_pattern.is_some()
        || args.payload_rate.is_some()
        || args.payload_working_set.is_some()
        || args.payload_seed.is_some();
    let wrong = if of_kernel && args.kernel.is_none() {
        "--initrd and --append go with --kernel"
    } else if of_payload && !args.payload {
        "--payload-pattern, --payload-rate, --payload-working-set and --payload-seed go with --payload"
    } else if args.insecure && args.listen.is_none() {
        "--insecure goes with --listen"
    } else {
        return Ok(());
    };
    Err(Error::refused(wrong))
}

/// What the new guest runs, if one is to be booted.
fn boot(args: &MicrovmArgs) -> Option<Boot> {
    if let Some(kernel) = &args.kernel {
        return Some(Boot::Linux {
            kernel: kernel.clone(),
            initrd: args.initrd.clone(),
            command_line: args.append.clone().unwrap_or_else(|| APPEND_DEFAULT.into()),
        });
    }
    args.payload.then(|| {
        Boot::Payload(PayloadOptions {
            pattern: args.payload_pattern.unwrap_or_default().into(),
            pages_per_second: args.payload_rate,
            working_set_pages: args.payload_working_set.map(|bytes| bytes / PAGE_BYTES),
            seed: args.payload_seed.unwrap_or(SEED_DEFAULT),
        })
    })
}

pub(crate) fn run(args: &MicrovmArgs, config: &MachineConfig, boot: &Boot) -> Result<u8> {
    if let Boot::Linux { kernel, initrd, .. } = boot {
        check_file("kernel", kernel)?;
        initrd.as_deref().map_or(Ok(()), |initrd| check_file("initial RAM disk", initrd))?;
    }
    open_kvm()?;
    let runtime = RuntimeDir::open()?;
    let (mut claim, shared, inbox) = supervise(&args.name)?;
    super::refuse_left_behind(&runtime, &args.name)?;
    claim.forget_guest();
    let hosted = MicrovmRunning::start(config, boot, &OperatorConsole::open()?)?;
    say(&format!(
        "{name} runs in this process (pid {}), its writes followed by KVM's {}; move it with `pageferry migrate {name} --to ADDR:PORT`, \
         leave it with Ctrl-A X",
        std::process::id(),
        hosted.source().machine().tracking(),
        name = args.name
    ));
    Hosting::new(claim, shared, inbox, hosted)?.run()
}

fn wait_for(args: &MicrovmArgs, address: &str, config: MachineConfig) -> Result<u8> {
    let address = Address::resolve(address)?;
    check_exposure(&address, args.insecure)?;
    let link = args.link.choice();
    check_receiver(&link)?;
    open_kvm()?;
    let runtime = RuntimeDir::open()?;
    let (claim, shared, inbox) = supervise(&args.name)?;
    super::refuse_left_behind(&runtime, &args.name)?;
    let receiver = Receiver::new(SessionListener::open(address)?, link);
    receive(
        claim,
        shared,
        inbox,
        &mut MicrovmFactory::new(config, OperatorConsole::open()?),
        receiver,
    )
}

/// Refuses more memory than this host has: it would be promised, and the guest killed for using it.
fn check_host_memory(bytes: u64) -> Result<()> {
    let total = host_memory_bytes();
    if total.is_some_and(|total| bytes > total) {
        return Err(Error::refused(format!(
            "the guest cannot have {} MiB of memory: this host has {}; give it less with --memory",
            bytes >> 20,
            total.unwrap_or(0) >> 20
        )));
    }
    Ok(())
}

/// `MemTotal` of proc(5).
fn host_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// `20000`, or a rate in bytes.
fn pages_a_second(text: &str) -> Result<u64, String> {
    let pages = match text.parse::<u64>() {
        Ok(pages) => pages,
        Err(_) => units::rate(text).map(|bytes| bytes / PAGE_BYTES)?,
    };
    if pages == 0 { Err("that is less than one page a second".into()) } else { Ok(pages) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_writes_pages_or_bytes_a_second() {
        assert_eq!(pages_a_second("20000"), Ok(20_000));
        assert_eq!(pages_a_second("400MiB"), Ok(102_400));
        for wrong in ["0", "1KB", "-1", "many"] {
            assert!(pages_a_second(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn this_hosts_memory_is_known_and_the_limit() {
        let total = host_memory_bytes().unwrap();
        check_host_memory(total).unwrap();
        let error = check_host_memory(total + 1).unwrap_err().to_string();
        assert!(error.contains("--memory"), "{error}");
    }
}
