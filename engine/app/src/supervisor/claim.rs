//! The runtime directory: who is who on this host.
//!
//! ```text
//!   NAME.lock   held (flock) by the supervisor while it lives
//!   NAME.sock   where it takes orders
//!   NAME.qmp    the QMP socket of a QEMU that `run` or `receive` started
//!   NAME.json   the guest's process and QMP socket, for `attach` after a supervisor's death, and what is to be
//!               asked about a guest in doubt
//!   NAME.ahead  the same record as it will be once a migration's Commit is sent (see `doubt.rs`)
//! ```

use crate::supervisor::record::{RUNTIME_DIR_VARIABLE, Record, cannot_write};
use pageferry_engine::error::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A name must leave room in a socket's path and be harmless in a shell.
const NAME_BYTES_MAX: usize = 48;
/// What a socket's path may have: unix(7), `sun_path`, without its last zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory.
#[derive(Debug, Clone)]
pub struct RuntimeDir(PathBuf);

/// A name held by this process.
#[derive(Debug)]
pub struct Claim {
    name: String,
    dir: RuntimeDir,
    /// Holds the flock.
    _lock: File,
    /// Until the guest is known to be gone: without its record and its QMP socket nobody could ever
    /// reach it again.
    keep_record: bool,
}

impl RuntimeDir {
    /// `$PAGEFERRY_RUNTIME_DIR`, `/run/pageferry` for root, `$XDG_RUNTIME_DIR/pageferry` for
    /// others; made if it is not there.
    pub fn open() -> Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let path = if let Some(path) = std::env::var_os(RUNTIME_DIR_VARIABLE) {
            if path.is_empty() {
                return Err(Error::refused(format!(
                    "{RUNTIME_DIR_VARIABLE} is set and empty: set it to a directory that is yours alone, or unset it"
                )));
            }
            PathBuf::from(path)
        } else if root {
            PathBuf::from("/run/pageferry")
        } else if let Some(path) = std::env::var_os("XDG_RUNTIME_DIR") {
            PathBuf::from(path).join("pageferry")
        } else {
            return Err(Error::refused(format!(
                "no runtime directory: set {RUNTIME_DIR_VARIABLE} to a directory that only you can write"
            )));
        };
        Self::at(&path)
    }

    /// This directory; made if it is not there.
    pub fn at(path: &Path) -> Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| {
            Error::refused(format!(
                "cannot make the runtime directory {}: {e}; set {RUNTIME_DIR_VARIABLE}",
                path.display()
            ))
        })?;
        let metadata = std::fs::metadata(path)
            .map_err(|e| Error::os(format!("looking at {}", path.display()), e))?;
        if !metadata.is_dir() {
            return Err(Error::refused(format!(
                "{} is no directory: set {RUNTIME_DIR_VARIABLE} to one that is yours alone",
                path.display()
            )));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(Error::refused(format!(
                "the runtime directory {0} is not yours alone (owner {1}, mode {2:o}), and whoever reaches its sockets has your guests: \
                 chmod 700 {0}, or set {RUNTIME_DIR_VARIABLE} to another",
                path.display(),
                metadata.uid(),
                metadata.mode() & 0o7777
            )));
        }
        Ok(Self(path.into()))
    }

    /// A file of a name.
    #[must_use]
    pub fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.0.join(format!("{name}.{extension}"))
    }

    /// Takes a name for this process.
    pub fn claim(&self, name: &str) -> Result<Claim> {
        check_name(name)?;
        self.check_length(name)?;
        let path = self.path(name, "lock");
        let lock =
            pageferry_engine::host::private::open(&path).map_err(|e| cannot_write(&path, &e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::refused(format!(
                    "a guest named {name} is supervised already (`pageferry status {name}`); choose another name"
                )));
            }
            Err(e) => return Err(Error::os(format!("locking {}", path.display()), e)),
        }
        Ok(Claim { name: name.into(), dir: self.clone(), _lock: lock, keep_record: true })
    }

    /// Fails if a socket of this name could not be made here, or not be reached.
    fn check_length(&self, name: &str) -> Result<()> {
        let bytes = self.path(name, "sock").as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(Error::refused(format!(
                "the runtime directory {} is too long: with {name} a socket's path in it has {bytes} bytes, and {SOCKET_PATH_BYTES_MAX} are possible; \
                 set {RUNTIME_DIR_VARIABLE} to a shorter one",
                self.0.display()
            )));
        }
        Ok(())
    }

    /// What is known of a guest whose supervisor may be gone.
    #[must_use]
    pub fn record(&self, name: &str) -> Option<Record> {
        let text = std::fs::read(self.path(name, "json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// All names that have a supervisor or a record, in order.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.0)
            .map_err(|e| Error::os(format!("listing {}", self.0.display()), e))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let known = matches!(path.extension()?.to_str()?, "sock" | "json");
                known.then(|| path.file_stem()?.to_str().map(str::to_owned))?
            })
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }
}

impl Claim {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A file of this name.
    #[must_use]
    pub fn path(&self, extension: &str) -> PathBuf {
        self.dir.path(&self.name, extension)
    }

    /// Writes down where the guest is.
    pub fn remember(&self, record: &Record) -> Result<()> {
        record.write(&self.path("json"))
    }

    /// Leaves the record behind when the claim ends, as is the default.
    pub fn keep_guest(&mut self) {
        self.keep_record = true;
    }

    /// Takes the record away with the claim: the guest is gone, or never was.
    pub fn forget_guest(&mut self) {
        self.keep_record = false;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut extensions = vec!["sock", "ahead"];
        // In a panic nobody knows whether the guest is gone, and a record of one that is harms
        // nobody.
        if !self.keep_record && !std::thread::panicking() {
            extensions.extend(["json", "qmp"]);
        }
        for extension in extensions {
            let _ = std::fs::remove_file(self.path(extension));
        }
    }
}

/// Letters, digits, dot, dash and underscore.
pub fn check_name(name: &str) -> Result<()> {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || !name.chars().all(harmless)
        || name.starts_with(['.', '-'])
    {
        return Err(Error::refused(format!(
            "{name:?} cannot be a guest's name: use up to {NAME_BYTES_MAX} letters, digits, dots, dashes and underscores"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_name_is_held_by_one_and_free_again_after() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir(dir.path().into());
        let held = runtime.claim("vm").unwrap();
        assert!(
            matches!(runtime.claim("vm"), Err(Error::Refused(text)) if text.contains("supervised already"))
        );
        drop(held);
        runtime.claim("vm").unwrap();
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, good) in
            [(0o700, true), (0o755, false), (0o710, false), (0o701, false), (0o1777, false)]
        {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            match RuntimeDir::at(dir.path()) {
                Ok(_) => assert!(good, "{mode:o}"),
                Err(Error::Refused(text)) => {
                    assert!(
                        !good && text.contains("chmod 700") && text.contains(&format!("{mode:o}")),
                        "{text}"
                    );
                }
                Err(e) => panic!("{e:?}"),
            }
        }
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(
            matches!(RuntimeDir::at(&file), Err(Error::Refused(text)) if text.contains("directory"))
        );
    }

    #[test]
    fn a_directory_in_which_no_socket_can_be_reached_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_BYTES_MAX - dir.path().as_os_str().len() - 1 - "/vm.sock".len();
        let fits = RuntimeDir::at(&dir.path().join("x".repeat(room))).unwrap();
        fits.claim("vm").unwrap();
        let refused = fits.claim("vm2").unwrap_err();
        assert!(
            matches!(&refused, Error::Refused(text) if text.contains("is too long")),
            "{refused}"
        );
    }

    #[test]
    fn a_record_is_the_old_one_or_the_new_one_and_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let claim = RuntimeDir(dir.path().into()).claim("vm").unwrap();
        let record = Record { pid: 1, started: 2, qmp: "/a".into(), doubt: None };
        claim.remember(&record).unwrap();
        let longer = Record { qmp: "/a/longer".into(), ..record.clone() };
        claim.remember(&longer).unwrap();
        claim.remember(&record).unwrap();
        assert_eq!(claim.dir.record("vm"), Some(record.clone()));
        for file in ["vm.json", "vm.lock"] {
            let mode = std::fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        // In the way of the new one: the old one stays.
        std::fs::create_dir(dir.path().join("vm.json.new")).unwrap();
        assert!(claim.remember(&longer).is_err());
        assert_eq!(claim.dir.record("vm"), Some(record));
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in ["", "..", "a/b", "-x", ".hidden", "a b", &"x".repeat(49)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("db-1.prod_x").is_ok());
    }
}
