//! The Linux guest of docs/guest.md: it writes memory, checks every value that it reads back, and
//! says so on its serial console. Two QEMUs may run it in turn; each has a console of its own.

use crate::stage::Stage;
use crate::words::Words;
use crate::{SOON, eventually};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// For the guest to boot, or to check all of its memory, under software emulation on a busy
/// machine.
pub const BOOT_MAX: Duration = Duration::from_secs(300);

/// How the guest is to be.
#[derive(Debug, Clone, Copy)]
pub struct Linux {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Memory that it writes over and over, in MiB.
    pub written_mib: u32,
    /// Memory that it fills once and then checks, in MiB.
    pub touched_mib: u32,
    /// MB a second that it writes.
    pub rate: u32,
}

impl Linux {
    /// The QEMU command for a guest of this name, with a console at `NAME.console` in the stage.
    ///
    /// # Panics
    /// If the guest's images are missing.
    #[must_use]
    pub fn qemu(&self, stage: &Stage, name: &str) -> String {
        self.qemu_with(stage, name, "", "")
    }

    /// The same with more parameters for the guest, and more options for QEMU.
    ///
    /// # Panics
    /// If the guest's images are missing.
    #[must_use]
    pub fn qemu_with(&self, stage: &Stage, name: &str, parameters: &str, options: &str) -> String {
        let images = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.cache/guest");
        let (kernel, initrd) = (images.join("vmlinuz"), images.join("initramfs.gz"));
        assert!(
            kernel.is_file() && initrd.is_file(),
            "{} lacks the guest: run scripts/guest-image",
            images.display()
        );
        let chardev = format!(
            "socket,id=console,path={},server=on,wait=off",
            console_path(stage, name).display()
        );
        // The stage splits at spaces, and the kernel's command line has some: tabs do as well.
        let append = format!(
            "console=ttyS0\tquiet\tpanic=-1\ttsc=reliable\tpf.mib={}\tpf.touch={}\tpf.rate={}\t{}",
            self.written_mib,
            self.touched_mib,
            self.rate,
            parameters.replace(' ', "\t")
        ) + if crate::in_the_lab() { "\tpf.ports=0" } else { "" };
        format!(
            "qemu-system-x86_64 -accel {} -machine q35 -m {} -nodefaults -display none -chardev {chardev} \
             -serial chardev:console -kernel {} -initrd {} -append {append} {options}",
            // In the lab machine, which is emulated itself, only KVM boots a Linux within minutes.
            if crate::in_the_lab() { "kvm -cpu host" } else { "tcg" },
            self.memory_mib,
            kernel.display(),
            initrd.display()
        )
    }

    /// The arguments of `pageferry microvm` for a guest with two vCPUs; one to be waited for if
    /// there is an address.
    ///
    /// # Panics
    /// If the guest's images are missing.
    #[must_use]
    pub fn microvm(&self, listen: Option<&str>) -> Vec<String> {
        let mut words =
            vec!["--memory".into(), format!("{}M", self.memory_mib), "--cpus".into(), "2".into()];
        if let Some(listen) = listen {
            words.extend(["--listen".into(), listen.into(), "--insecure".into()]);
            return words;
        }
        let (kernel, initrd) = images();
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable pf.mib={} pf.touch={} pf.rate={} pf.threads=2 pf.ports=0",
            self.written_mib, self.touched_mib, self.rate
        );
        words.extend(["--kernel".into(), kernel.display().to_string()]);
        words.extend(["--initrd".into(), initrd.display().to_string(), "--append".into(), append]);
        words
    }
}

/// The guest's kernel and initramfs.
fn images() -> (PathBuf, PathBuf) {
    let images = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.cache/guest");
    let (kernel, initrd) = (images.join("vmlinuz"), images.join("initramfs.gz"));
    assert!(
        kernel.is_file() && initrd.is_file(),
        "{} lacks the guest: run scripts/guest-image",
        images.display()
    );
    (kernel, initrd)
}

pub(crate) fn console_path(stage: &Stage, name: &str) -> PathBuf {
    stage.path(&format!("{name}.console"))
}

/// The console of one QEMU.
pub struct Console {
    words: Words,
    writer: Box<dyn Write>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("words", &self.words).finish_non_exhaustive()
    }
}

impl Console {
    /// Connects to it.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn open(stage: &Stage, name: &str) -> Self {
        let path = console_path(stage, name);
        let writer =
            eventually(&format!("the console of {name}"), SOON, || UnixStream::connect(&path).ok());
        Self::of(Words::of(writer.try_clone().expect("a second handle")), Box::new(writer))
    }

    /// One whose two directions are there.
    #[must_use]
    pub fn of(words: Words, writer: Box<dyn Write>) -> Self {
        Self { words, writer }
    }

    /// Waits for the next line with this text.
    ///
    /// # Panics
    /// At the deadline; and if the guest has found damage.
    #[must_use]
    pub fn wait(&self, mark: usize, text: &str, wait: Duration) -> (String, usize) {
        let found = self.words.wait_after(mark, text, wait);
        let damage =
            self.words.lines().into_iter().find(|l| l.contains("CORRUPT") || l.contains("FAILED"));
        assert_eq!(damage, None, "the guest found damage");
        found
    }

    /// Waits until the guest is up and writes.
    pub fn wait_ready(&self) {
        let _ = self.wait(0, "WORKLOAD READY", BOOT_MAX);
    }

    /// Waits for the guest's next status line, in which it must have written more than `before`
    /// pages and found no error. Returns what it has written so far.
    ///
    /// # Panics
    /// If it has not.
    pub fn progress_since(&self, before: u64) -> u64 {
        let (line, _) = self.wait(self.words.mark(), "WORKLOAD t=", SOON);
        let written = number(&line, "writes=");
        assert!(written > before, "the guest does not write: {line}");
        assert_eq!(number(&line, "errors="), 0, "{line}");
        written
    }

    /// Pages that the guest has read from its disk and written to it, as its next status line has
    /// them.
    ///
    /// # Panics
    /// If it has no disk, or has found an error.
    #[must_use]
    pub fn disk_pages(&self) -> (u64, u64) {
        let (line, _) = self.wait(self.words.mark(), "disk_read=", SOON);
        assert_eq!(number(&line, "errors="), 0, "{line}");
        (number(&line, "disk_read="), number(&line, "disk_written="))
    }

    /// Where the next word will be: for [`Self::wait`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.words.mark()
    }

    /// Types a line.
    ///
    /// # Panics
    /// If the line cannot be typed.
    pub fn type_line(&mut self, line: &str) {
        self.type_keys(&format!("{line}\n"));
    }

    /// Types these keys alone.
    ///
    /// # Panics
    /// If they cannot be typed.
    pub fn type_keys(&mut self, keys: &str) {
        self.writer.write_all(keys.as_bytes()).expect("the console takes them");
    }

    /// Has the guest check all of its memory now.
    ///
    /// # Panics
    /// If anything is lost.
    pub fn verdict(&mut self) {
        let mark = self.words.mark();
        self.type_line("verdict");
        let (line, _) = self.wait(mark, "WORKLOAD VERDICT", BOOT_MAX);
        assert!(line.contains("VERDICT intact") && number(&line, "errors=") == 0, "{line}");
    }
}

/// The number behind `key` in a line of the guest.
fn number(line: &str, key: &str) -> u64 {
    let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
    word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no {key} in {line:?}"))
}
