//! Connections within this host by a socket in its file system (`unix:PATH`): for moves within a
//! host, and for tunnels that end in such a socket. The kernel says who is at the other end.

use super::socket::SocketConnection;
use super::{Address, Connection, Listener};
use crate::error::{Error, Result};
use rustix::fs::{FileType, FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, sockopt,
};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long another receiver, or a tidier of temporary files, may hold the lock on a directory.
/// Receivers hold it for a few system calls.
const LOCK_MAX: Duration = Duration::from_secs(5);
const LOCK_EVERY: Duration = Duration::from_millis(5);
/// Connections that may wait to be accepted: all lanes of a session, and more than come otherwise.
const BACKLOG: i32 = 128;

/// Connects to the socket at this path.
pub(super) fn connect_to(path: &Path, within: Duration) -> Result<SocketConnection> {
    let connected = || -> io::Result<OwnedFd> {
        let socket = socket()?;
        // Bounds a connect(2) that waits because too many others wait to be accepted.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(within))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
        Ok(socket)
    };
    let socket = connected().map_err(|e| {
        let what = format!(
            "connecting to unix:{} (is `pageferry receive` listening there, or a tunnel to it?)",
            path.display()
        );
        Error::os(what, e)
    })?;
    Ok(SocketConnection::local(UnixStream::from(socket)))
}

fn socket() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(socket)
}

/// A listening socket of this user alone.
#[derive(Debug)]
pub struct LocalListening {
    listener: UnixListener,
    path: PathBuf,
    /// Which file it made there.
    file: Option<(u64, u64)>,
    address: Address,
}

impl LocalListening {
    /// Starts to listen at this path. A socket that is left there and that nobody listens at is
    /// replaced.
    ///
    /// # Errors
    /// [`Error::Refused`] if the path cannot be had.
    pub fn bind(path: &Path) -> Result<Self> {
        let refused = |e: &dyn std::fmt::Display| {
            let at = path.display();
            Error::refused(format!(
                "cannot listen on unix:{at}: {e}; choose another path with --listen"
            ))
        };
        // From bind(2) to listen(2) a socket refuses connections just as one that is left behind:
        // others look there only when it listens.
        let locked = lock_directory(path);
        let listener = match listen_at(path) {
            Err(e) if e.raw_os_error() == Some(Errno::ADDRINUSE.raw_os_error()) => {
                remove_left_behind(path, &locked).map_err(|e| refused(&e))?;
                listen_at(path).map_err(|e| refused(&e))?
            }
            listening => listening.map_err(|e| refused(&e))?,
        };
        let file = which(path);
        Ok(Self { listener, path: path.into(), file, address: Address::Unix(path.into()) })
    }
}

impl Drop for LocalListening {
    fn drop(&mut self) {
        // Somebody may have removed it, and another may listen at its path now.
        if self.file.is_some() && which(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at a path.
fn which(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Locks the directory of this path against other receivers that look for what is left behind
/// there. Nothing stays behind of such a lock, as a file would.
fn lock_directory(path: &Path) -> io::Result<File> {
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let locked = File::open(directory)?;
    let deadline = Instant::now() + LOCK_MAX;
    loop {
        match flock(&locked, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(locked),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_EVERY);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let socket = socket()?;
    // The file gets the mode that the socket has, less the umask: it is this user's from its first
    // moment on.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket at this path if its listener is gone; nothing else. Only who has locked the
/// directory knows that it is not another receiver's that listens in the next moment.
fn remove_left_behind(path: &Path, locked: &io::Result<File>) -> io::Result<()> {
    let found = rustix::fs::lstat(path)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(io::Error::other("there is a file that is no socket"));
    }
    let probe = socket()?;
    rustix::io::ioctl_fionbio(&probe, true)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => match locked {
            Ok(_) => std::fs::remove_file(path),
            Err(e) => Err(io::Error::other(format!(
                "a socket is there that nobody seems to listen at, but its directory cannot be locked ({e}): remove the \
                 socket if it is left over"
            ))),
        },
        Err(Errno::NOENT) => Ok(()),
        _ => Err(io::Error::other("another process listens there")),
    }
}

impl Listener for LocalListening {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)> {
        let (stream, _) = self.listener.accept()?;
        Ok((Box::new(SocketConnection::local(stream)), self.address.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn path(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("pageferry-local-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    fn refused(path: &Path, text: &str) -> bool {
        matches!(LocalListening::bind(path), Err(Error::Refused(why)) if why.contains(text))
    }

    #[test]
    fn the_socket_is_its_users_alone_and_goes_with_its_listener() {
        let path = path("mode");
        let listening = LocalListening::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let connected = connect_to(&path, Duration::from_secs(1)).unwrap();
        connected.check_peer().unwrap();
        listening.accept().unwrap().0.check_peer().unwrap();
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_left_behind_is_replaced_and_what_is_in_use_is_not() {
        let path = path("left");
        drop(UnixListener::bind(&path).unwrap());
        let listening = LocalListening::bind(&path).unwrap();
        assert!(refused(&path, "another process listens"));
        drop(listening);
        std::fs::write(&path, "not a socket").unwrap();
        assert!(refused(&path, "no socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "not a socket");
        std::fs::remove_file(&path).unwrap();
        assert!(refused(Path::new("/nowhere/at/all"), "cannot listen"));
    }

    /// Each finds what is left behind, or a socket of another that does not listen yet: none takes
    /// that away.
    #[test]
    fn of_many_that_want_the_same_path_at_once_one_has_it() {
        const AT_ONCE: usize = 8;
        let path = path("race");
        for round in 0..100 {
            drop(UnixListener::bind(&path).unwrap());
            let (start, all) = (Barrier::new(AT_ONCE), Barrier::new(AT_ONCE));
            let have_it: Vec<_> = std::thread::scope(|scope| {
                let one = || {
                    start.wait();
                    let listening = LocalListening::bind(&path);
                    all.wait();
                    listening.ok()
                };
                let trying: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(one)).collect();
                trying.into_iter().filter_map(|one| one.join().unwrap()).collect()
            });
            assert_eq!(have_it.len(), 1, "in round {round}");
            connect_to(&path, Duration::from_secs(1)).unwrap();
            drop(have_it);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_listener_removes_no_other_ones_socket() {
        let path = path("other");
        let first = LocalListening::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = LocalListening::bind(&path).unwrap();
        drop(first);
        connect_to(&path, Duration::from_secs(1)).unwrap();
        drop(second);
        assert!(!path.exists());
    }
}
