//! `pageferry doctor`: what this host can do, one line a finding, with the fix.

mod kvm;
mod rdma;

use super::units;
use crate::output::print;
use crate::supervisor::claim::RuntimeDir;
use pageferry_engine::error::Result;
use pageferry_engine::text::escape;
use std::fs;
use std::process::Command;

/// Oldest QEMU that tells where its memory lies.
const QEMU_MAJOR_MIN: u32 = 8;

/// `pageferry doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Look with a guest of this much memory in mind (64G): does it fit, may RDMA lock that much.
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    memory: Option<u64>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Good,
    Note,
    Bad,
}

#[derive(Debug)]
struct Finding {
    grade: Grade,
    topic: &'static str,
    text: String,
}

/// Prints every finding; 0 if a guest can be moved from and to this host, 1 if not.
pub fn main(args: &DoctorArgs) -> Result<u8> {
    let mut findings = vec![
        kernel(),
        tracking(),
        io_uring(),
        tracing_permission(),
        qemu(),
        memory(available_bytes(), args.memory),
        huge_pages(),
        runtime(),
    ];
    findings.extend(kvm::findings());
    findings.extend(rdma::findings(args.memory));
    let mut text = String::new();
    for Finding { grade, topic, text: finding } in &findings {
        let mark = match grade {
            Grade::Good => "ok  ",
            Grade::Note => "note",
            Grade::Bad => "BAD ",
        };
        text += &format!("{mark}  {topic:<18} {}\n", escape(finding));
    }
    print(&text)?;
    Ok(u8::from(findings.iter().any(|f| f.grade == Grade::Bad)))
}

fn good(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { grade: Grade::Good, topic, text: text.into() }
}

fn note(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { grade: Grade::Note, topic, text: text.into() }
}

fn bad(topic: &'static str, text: impl Into<String>) -> Finding {
    Finding { grade: Grade::Bad, topic, text: text.into() }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn kernel() -> Finding {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into());
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 7) {
        good("kernel", release)
    } else {
        bad(
            "kernel",
            format!(
                "{release}: a source needs Linux 6.7 or newer (userfaultfd WP_ASYNC, PAGEMAP_SCAN)"
            ),
        )
    }
}

fn tracking() -> Finding {
    match pageferry_engine::dirty::pagemap::probe() {
        Ok(()) => good("dirty tracking", "userfaultfd write-protect and PAGEMAP_SCAN work"),
        Err(e) => bad("dirty tracking", e.chain()),
    }
}

fn io_uring() -> Finding {
    match pageferry_transport::tcp::probe() {
        Ok(()) => good("io_uring", "works"),
        Err(e) => bad("io_uring", pageferry_engine::Error::from(e).chain()),
    }
}

fn tracing_permission() -> Finding {
    const TOPIC: &str = "ptrace";
    if rustix::process::geteuid().is_root() {
        return good(TOPIC, "root may attach any QEMU");
    }
    match read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None | Some("0") => good(TOPIC, "you may attach QEMUs of your own"),
        Some("1") => note(
            TOPIC,
            "`run` works; `attach` needs root, CAP_SYS_PTRACE, or sysctl kernel.yama.ptrace_scope=0",
        ),
        Some(scope) => bad(
            TOPIC,
            format!("kernel.yama.ptrace_scope is {scope}: set it to 1 or less, or run as root"),
        ),
    }
}

fn qemu() -> Finding {
    const TOPIC: &str = "QEMU";
    let Ok(output) = Command::new("qemu-system-x86_64").arg("--version").output() else {
        return note(
            TOPIC,
            "qemu-system-x86_64 is not in PATH; install it, or name yours in `pageferry run NAME -- /path/to/qemu ...`",
        );
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        text.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or("unknown");
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok()).unwrap_or(0);
    if major >= QEMU_MAJOR_MIN {
        good(TOPIC, version)
    } else {
        bad(
            TOPIC,
            format!(
                "{version}: {QEMU_MAJOR_MIN}.0 or newer is needed (it tells where guest memory lies)"
            ),
        )
    }
}

fn available_bytes() -> Option<u64> {
    let text = read("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// `guest` is what a guest that is asked about has.
fn memory(available: Option<u64>, guest: Option<u64>) -> Finding {
    const TOPIC: &str = "memory";
    match (available, guest) {
        (None, _) => note(TOPIC, "/proc/meminfo does not tell what is available"),
        (Some(available), Some(guest)) if guest > available => note(
            TOPIC,
            format!(
                "{} available, and a guest of {} that is received takes all of its memory in the end: free some, or send it elsewhere",
                units::bytes(available),
                units::bytes(guest)
            ),
        ),
        (Some(available), _) => good(
            TOPIC,
            format!("{} available for a guest that is received", units::bytes(available)),
        ),
    }
}

fn huge_pages() -> Finding {
    const TOPIC: &str = "huge pages";
    let free = read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .unwrap_or_else(|| "0".into());
    let shmem = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let transparent = !shmem.contains("[never]") && !shmem.contains("[deny]") && !shmem.is_empty();
    if transparent {
        good(TOPIC, format!("{free} of 2 MiB free; transparent ones for shared memory are on"))
    } else {
        note(
            TOPIC,
            format!(
                "{free} of 2 MiB free; transparent ones for shared memory are off, so a destination takes longer to fill: echo advise > \
                 /sys/kernel/mm/transparent_hugepage/shmem_enabled"
            ),
        )
    }
}

fn runtime() -> Finding {
    match RuntimeDir::open() {
        Ok(_) => good("runtime directory", "is there and yours"),
        Err(e) => bad("runtime directory", e.chain()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_does_not_fit_is_told_with_both_sizes() {
        assert_eq!(memory(Some(8 << 30), None).grade, Grade::Good);
        assert_eq!(memory(Some(8 << 30), Some(8 << 30)).grade, Grade::Good);
        let finding = memory(Some(8 << 30), Some(9 << 30));
        assert_eq!(finding.grade, Grade::Note);
        assert!(
            finding.text.contains("8.00 GiB") && finding.text.contains("9.00 GiB"),
            "{}",
            finding.text
        );
    }
}
