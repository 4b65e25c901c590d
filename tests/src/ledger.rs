//! The smallest guest that knows whether its memory is whole: tests/guest/ledger.c, built on the
//! spot. It boots in less than a second, so that a test can have many; it speaks as the Linux guest
//! does. Its first words may come before anybody listens: wait for its progress.

use crate::stage::Stage;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The QEMU command for a guest of this name, with a console at `NAME.console` in the stage.
#[must_use]
pub fn qemu(stage: &Stage, name: &str) -> String {
    qemu_under(stage, name, "tcg")
}

/// The same under this accelerator, with what stands behind it.
#[must_use]
pub fn qemu_under(stage: &Stage, name: &str, accel: &str) -> String {
    format!(
        "qemu-system-x86_64 -accel {accel} -machine q35 -m 32 -nodefaults -display none -chardev \
         socket,id=console,path={},server=on,wait=off -serial chardev:console -kernel {}",
        stage.console_path(name).display(),
        program(stage).display()
    )
}

/// Its program, built once a stage.
fn program(stage: &Stage) -> PathBuf {
    let program = stage.path("ledger.guest");
    if !program.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/ledger.c");
        let built = Command::new("cc")
            .args(["-m32", "-O1", "-ffreestanding", "-fno-pic", "-fno-stack-protector"])
            .args([
                "-fno-asynchronous-unwind-tables",
                "-fno-toplevel-reorder",
                "-nostdlib",
                "-static",
            ])
            // Multiboot wants its header near the start of the file.
            .args(["-Wl,-Ttext=0x100000,-n,--build-id=none,--no-warn-rwx-segments", "-o"])
            .args([&program, &source])
            .status()
            .expect("a C compiler: run scripts/setup");
        assert!(built.success(), "the guest does not build");
    }
    program
}
