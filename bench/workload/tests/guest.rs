//! The real guest under QEMU: damage planted in its memory from outside is found, and only that.
//!
//! Needs QEMU and `scripts/guest-image`: `cargo test -p pageferry-workload -- --ignored`.

use pageferry_workload::content::Origin;
use pageferry_workload::pages::PAGE_BYTES;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Of the guest's memory.
const MEMORY_BYTES: u64 = 256 << 20;
/// Of the workload: 8 MiB written, 16 MiB still.
const PAGES: u32 = 24 << 8;
/// Far more than a boot takes under TCG on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

struct Guest {
    qemu: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Guest {
    fn boot() -> Self {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest");
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-m", "256M", "-machine", "q35,memory-backend=ram"])
            .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(images.join("vmlinuz"))
            .arg("-initrd")
            .arg(images.join("initramfs.gz"))
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 tsc=reliable pf.mib=8 pf.touch=16 pf.rate=4",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        let (console, output) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                    break;
                }
            }
        });
        Self { qemu, console, lines, seen: Vec::new() }
    }

    /// The next line that holds `word`; those before it are kept in `seen`.
    fn wait_for(&mut self, word: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .unwrap_or_else(|e| panic!("no line with {word:?}: {e}; so far {:#?}", self.seen));
            if line.contains(word) {
                return line;
            }
            self.seen.push(line);
        }
    }

    fn verdict(&mut self) -> String {
        self.console.write_all(b"verdict\n").unwrap();
        self.wait_for("WORKLOAD VERDICT")
    }

    /// The file behind the guest's memory.
    fn memory(&self) -> File {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.qemu.id())).unwrap();
        let memory = fds
            .map(|fd| fd.unwrap().path())
            .find(|fd| {
                std::fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().contains("memfd:"))
            })
            .expect("QEMU has a memfd");
        OpenOptions::new().read(true).write(true).open(memory).unwrap()
    }
}

/// Where each page of the workload lies in the guest's memory: its first word says which it is.
fn find_pages(memory: &File) -> HashMap<u32, u64> {
    let (mut found, mut word) = (HashMap::new(), [0; 8]);
    for offset in (0..MEMORY_BYTES).step_by(PAGE_BYTES) {
        memory.read_exact_at(&mut word, offset).unwrap();
        let origin = Origin::of_word(u64::from_le_bytes(word), 0);
        if origin.page < PAGES && (1..10_000).contains(&origin.generation) {
            found.insert(origin.page, offset);
        }
    }
    found
}

#[test]
#[ignore = "needs QEMU and scripts/guest-image"]
fn damage_to_guest_memory_is_found_and_nothing_else() {
    let mut guest = Guest::boot();
    guest.wait_for("WORKLOAD READY");
    let intact = guest.verdict();
    assert!(intact.contains(&format!("VERDICT intact pages={PAGES} errors=0")), "{intact}");

    let memory = guest.memory();
    let pages = find_pages(&memory);
    assert_eq!(pages.len(), PAGES as usize);
    let read = |page: u32| {
        let mut bytes = vec![0; PAGE_BYTES];
        memory.read_exact_at(&mut bytes, pages[&page]).unwrap();
        bytes
    };
    // Pages 0 to 2047 are written again and again: keep an old copy of one until it has changed.
    let old: Vec<Vec<u8>> = (0..64).map(read).collect();
    let deadline = Instant::now() + PATIENCE;
    let stale = loop {
        if let Some(page) = (0..64).find(|page| read(*page) != old[*page as usize]) {
            break page;
        }
        assert!(Instant::now() < deadline, "the workload does not write");
        guest.wait_for("WORKLOAD t=");
    };
    memory.write_all_at(&old[stale as usize], pages[&stale]).unwrap();
    let mut flipped = read(3000);
    flipped[8 * 77] ^= 4;
    memory.write_all_at(&flipped, pages[&3000]).unwrap();
    memory.write_all_at(&[0; PAGE_BYTES], pages[&4000]).unwrap();
    memory.write_all_at(&read(5001), pages[&5000]).unwrap();

    let verdict = guest.verdict();
    assert!(verdict.contains(&format!("VERDICT corrupt pages={PAGES} errors=4")), "{verdict}");
    for wanted in [
        format!("CORRUPT page={stale} "),
        "CORRUPT page=3000 generation=1 word=77 ".into(),
        "CORRUPT page=4000 ".into(),
        "CORRUPT page=5000 ".into(),
    ] {
        assert!(
            guest.seen.iter().any(|line| line.contains(&wanted)),
            "{wanted}: {:#?}",
            guest.seen
        );
    }
    guest.console.write_all(b"quit\n").unwrap();
    guest.wait_for("WORKLOAD BYE");
    assert!(guest.qemu.wait().unwrap().success());
}
