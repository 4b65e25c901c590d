//! The Linux guest of docs/guest.md: it writes memory, checks every value that it reads back, and
//! says so on its serial console.

use crate::stage::Stage;
use std::path::PathBuf;

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
            stage.console_path(name).display()
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
