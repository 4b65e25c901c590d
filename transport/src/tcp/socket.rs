//! A connected stream socket, as a lane has it: of TCP, or of this host's own (`AF_UNIX`). Sends
//! and receives go through io_uring and are the same for both; set-up is not.

use super::{PEER_TIMEOUT, PROBE_AFTER, PROBE_INTERVAL};
use rustix::net::sockopt;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Send and receive buffers asked for on a local socket. The kernel's default of some 200 KiB lets
/// a sender of frames of a MiB wait for the receiver's thread several times a frame; what it grants
/// is bounded by `net.core.wmem_max`.
const LOCAL_BUFFER_BYTES: usize = 4 << 20;

/// A connected stream socket of either kind.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    local: bool,
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self { fd: stream.into(), local: false }
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self { fd: stream.into(), local: true }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Socket {
    /// Whether it is one of this host's own.
    pub(super) fn is_local(&self) -> bool {
        self.local
    }

    /// Ends both directions. An error means that the connection is gone already, which is what is
    /// wanted.
    pub(super) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Sets it up as a lane's.
    pub(super) fn prepare(&self) -> io::Result<()> {
        // io_uring would hand EAGAIN of a non-blocking socket to us instead of waiting.
        rustix::io::ioctl_fionbio(&self.fd, false)?;
        if self.local {
            // Whoever held the other end is heard of at once when it dies: there is nothing to
            // probe.
            sockopt::set_socket_send_buffer_size(&self.fd, LOCAL_BUFFER_BYTES)?;
            return Ok(());
        }
        sockopt::set_tcp_nodelay(&self.fd, true)?;
        sockopt::set_socket_keepalive(&self.fd, true)?;
        sockopt::set_tcp_keepidle(&self.fd, PROBE_AFTER)?;
        sockopt::set_tcp_keepintvl(&self.fd, PROBE_INTERVAL)?;
        let timeout_ms = u32::try_from(PEER_TIMEOUT.as_millis()).expect("seconds");
        sockopt::set_tcp_user_timeout(&self.fd, timeout_ms)?;
        Ok(())
    }
}
