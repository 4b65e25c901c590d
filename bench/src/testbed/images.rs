//! The test guest's kernel and initramfs (docs/guest.md), and the program that moves it, from
//! wherever the bench is called.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What makes the guest, in the repository.
const MAKER: &str = "scripts/guest-image";

/// What a guest boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// The guest of the repository that this program was built in, else of the one around the current
/// directory. Where it is missing it is made, which may take minutes.
pub fn guest() -> Result<Images> {
    let here = std::env::current_dir().ok();
    let places = [this_program()?].into_iter().chain(here);
    match places.filter_map(|place| repository_around(&place)).next() {
        Some(repository) => guest_in(&repository),
        None => bail!(
            "the test guest is not found: neither {} nor the current directory is in pageferry's repository",
            this_program()?.display()
        ),
    }
}

/// `pageferry`, beside this program.
pub fn pageferry() -> Result<PathBuf> {
    made(&this_program()?.with_file_name("pageferry"), "cargo build --release -p pageferry")
}

/// The absolute path of what must be there.
pub fn made(path: &Path, fix: &str) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("{} is not there: {fix}", path.display()))
}

fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("the path of this program")
}

/// The closest directory above that has the guest's maker.
fn repository_around(place: &Path) -> Option<PathBuf> {
    let is_one = |d: &&Path| d.join("Cargo.toml").is_file() && d.join(MAKER).is_file();
    place.ancestors().find(is_one).map(Into::into)
}

fn guest_in(repository: &Path) -> Result<Images> {
    let images = repository.join(".cache/guest");
    let found = Images { kernel: images.join("vmlinuz"), initrd: images.join("initramfs.gz") };
    if !(found.kernel.is_file() && found.initrd.is_file()) {
        let maker = repository.join(MAKER);
        eprintln!("the test guest is not there yet: {} makes it", maker.display());
        let made = Command::new(&maker).stdin(Stdio::null()).stdout(Stdio::null()).status();
        let status = made.with_context(|| format!("starting {}", maker.display()))?;
        if !status.success() {
            bail!("{} ended ({status}): there is no guest to move", maker.display());
        }
    }
    let fix = format!("{MAKER} makes it");
    Ok(Images { kernel: made(&found.kernel, &fix)?, initrd: made(&found.initrd, &fix)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A repository whose maker does this.
    fn repository(makes: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("Cargo.toml"), "").unwrap();
        std::fs::create_dir(directory.path().join("scripts")).unwrap();
        let maker = directory.path().join(MAKER);
        let script = format!("#!/bin/sh\ncd \"$(dirname \"$0\")/..\"\necho >>made\n{makes}\n");
        std::fs::write(&maker, script).unwrap();
        std::fs::set_permissions(&maker, std::fs::Permissions::from_mode(0o700)).unwrap();
        directory
    }

    #[test]
    fn a_guest_that_is_missing_is_made_once() {
        let directory =
            repository("mkdir -p .cache/guest; cd .cache/guest; touch vmlinuz initramfs.gz");
        let images = guest_in(directory.path()).unwrap();
        assert!(images.kernel.is_absolute() && images.kernel.ends_with(".cache/guest/vmlinuz"));
        assert_eq!(guest_in(directory.path()).unwrap(), images);
        let times = std::fs::read_to_string(directory.path().join("made")).unwrap();
        assert_eq!(times.lines().count(), 1, "it is there the second time");
    }

    #[test]
    fn a_guest_that_cannot_be_made_is_an_error_that_names_its_maker() {
        for (makes, why) in [("exit 3", "exit status: 3"), ("true", "is not there")] {
            let directory = repository(makes);
            let error = format!("{:#}", guest_in(directory.path()).unwrap_err());
            assert!(error.contains(MAKER) && error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_repository_is_found_from_below_and_from_nowhere_else() {
        let directory = repository("");
        let below = directory.path().join("target/release/pageferry-bench");
        assert_eq!(repository_around(&below).as_deref(), Some(directory.path()));
        std::fs::remove_file(directory.path().join("Cargo.toml")).unwrap();
        assert_eq!(repository_around(&below), None);
    }
}
