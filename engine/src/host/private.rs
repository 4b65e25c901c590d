//! Files and sockets that are their owner's alone, whatever the umask: who reaches the socket of a
//! supervisor or of a QEMU's monitor has the guest.

use std::fs::{File, Permissions};
use std::io::{Result, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Reading and writing for the owner, nothing for others.
const OWNER_ONLY: u32 = 0o600;

/// A socket at this path, which must not exist. Lies in a directory of mode 0700, so that nobody
/// comes in before its mode is set.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(OWNER_ONLY))?;
    Ok(listener)
}

/// Opens a file for writing, as it is; made if it is not there.
pub fn open(path: &Path) -> Result<File> {
    let file =
        File::options().create(true).truncate(false).write(true).mode(OWNER_ONLY).open(path)?;
    // One that an earlier version left, or that lies behind an access list.
    file.set_permissions(Permissions::from_mode(OWNER_ONLY))?;
    Ok(file)
}

/// Has this file hold these bytes. Whoever reads it finds the old ones or the new ones, also after
/// a full disk.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = Path::new(&new);
    let written = open(new).and_then(|mut file| {
        file.set_len(0)?;
        file.write_all(bytes)
    });
    written.and_then(|()| std::fs::rename(new, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(new);
    })
}
