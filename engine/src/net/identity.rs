//! Who is at the other end of a connection within this host. Loopback is reached by every user of the host,
//! so an address alone says nothing: whoever connects there could fill a receiver with a guest of its own,
//! and whoever listens there first would be given a guest.
//!
//! A peer is trusted if it is root or the user of this process. For TCP over loopback the kernel is asked
//! whose the peer's socket is (`sock_diag(7)`), for a local socket it says so itself (`SO_PEERCRED`,
//! unix(7)). Nothing is known of a peer on another host.

mod proc_net;

use crate::error::{Error, Result};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

/// The kernel answers within the system call; this only bounds what cannot happen.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// Fails unless a peer of this user is trusted.
pub(super) fn check(uid: u32) -> Result<()> {
    let own = rustix::process::geteuid().as_raw();
    if uid == 0 || uid == own {
        return Ok(());
    }
    Err(Error::refused(format!(
        "the other end of this connection within the host is user {uid}'s, and only user {own} and root are \
         trusted: run both ends, and a tunnel between them, as the same user or as root"
    )))
}

/// Fails unless who is at the other end of this local socket is trusted: who connected it, or who listens.
pub(super) fn check_local(socket: impl AsFd) -> Result<()> {
    let peer = sockopt::socket_peercred(socket)
        .map_err(|e| Error::os("asking who is at the other end of a local socket", e))?;
    check(peer.uid.as_raw())
}

/// Fails if this connection stays within the host and its other end is not trusted.
pub(super) fn check_tcp(local: SocketAddr, peer: SocketAddr) -> Result<()> {
    if !peer.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    check(owner_of_peer(local, peer)?)
}

/// Whose the socket is that is connected to ours.
fn owner_of_peer(local: SocketAddr, peer: SocketAddr) -> Result<u32> {
    let what = || format!("asking the kernel whose the other end of the connection to {peer} is");
    let ask = |at, to| match ask(at, to) {
        Ok(Some(found)) => Ok(Some(found)),
        // Without `tcp_diag` the kernel knows no socket at all, not even ours. The list is long where many
        // come and go, so it is asked only then.
        Ok(None) if matches!(ask(local, peer), Ok(Some(_))) => Ok(None),
        Ok(None) | Err(_) => proc_net::ask(at, to).map_err(|e| Error::os(what(), e)),
    };
    let gone = || Error::os(what(), io::Error::from(ErrorKind::NotConnected));
    let found = ask(peer, local)?.ok_or_else(gone)?;
    if found.held {
        return Ok(found.uid);
    }
    // Nobody has accepted it yet, and until then it is whose listener it came to; if that is gone, so is this.
    let nowhere = SocketAddr::new(if peer.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() }, 0);
    match ask(peer, nowhere)? {
        Some(listener) if listener.held && listener.listens => Ok(listener.uid),
        _ => Err(gone()),
    }
}

/// A socket, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    uid: u32,
    /// Whether a process has it. Of one that nobody has, the kernel may say that it is root's.
    held: bool,
    listens: bool,
}

/// Of `linux/netlink.h`, `linux/sock_diag.h` and `linux/inet_diag.h`.
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u8 = 10;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// Where `struct inet_diag_msg` has what is read here.
const STATE_AT: usize = HEADER_BYTES + 1;
const UID_AT: usize = HEADER_BYTES + 64;
const INODE_AT: usize = HEADER_BYTES + 68;
const ANSWER_BYTES: usize = HEADER_BYTES + 72;

/// The TCP socket that is at `at` and connected to `to`, or a listener at `at`.
fn ask(at: SocketAddr, to: SocketAddr) -> io::Result<Option<Found>> {
    let diag = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    sockopt::set_socket_timeout(&diag, sockopt::Timeout::Recv, Some(ANSWER_MAX))?;
    send(&diag, &request(at, to), SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (received, _) = recv(&diag, &mut answer, RecvFlags::empty())?;
    read_answer(&answer[..received])
}

fn request(at: SocketAddr, to: SocketAddr) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..][..field.len()].copy_from_slice(field);
    put(0, &(REQUEST_BYTES as u32).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST.to_ne_bytes());
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states, then the socket's id.
    let (at_ip, to_ip) = (at.ip().to_canonical(), to.ip().to_canonical());
    put(HEADER_BYTES, &[if at_ip.is_ipv4() { AF_INET } else { AF_INET6 }, IPPROTO_TCP]);
    put(HEADER_BYTES + 4, &u32::MAX.to_ne_bytes());
    let id = HEADER_BYTES + 8;
    put(id, &at.port().to_be_bytes());
    put(id + 2, &to.port().to_be_bytes());
    for (offset, ip) in [(id + 4, at_ip), (id + 20, to_ip)] {
        match ip {
            IpAddr::V4(ip) => put(offset, &ip.octets()),
            IpAddr::V6(ip) => put(offset, &ip.octets()),
        }
    }
    // No cookie: that of any socket will do (INET_DIAG_NOCOOKIE).
    put(id + 40, &[0xff; 8]);
    bytes
}

fn read_answer(answer: &[u8]) -> io::Result<Option<Found>> {
    let short = || io::Error::new(ErrorKind::InvalidData, "an answer that is too short");
    let word = |offset: usize| -> io::Result<[u8; 4]> {
        let bytes = answer.get(offset..offset + 4).ok_or_else(short)?;
        Ok(bytes.try_into().expect("four bytes"))
    };
    match u16::from_ne_bytes([word(4)?[0], word(4)?[1]]) {
        NLMSG_ERROR => match -i32::from_ne_bytes(word(HEADER_BYTES)?) {
            libc::ENOENT => Ok(None),
            errno => Err(io::Error::from_raw_os_error(errno)),
        },
        SOCK_DIAG_BY_FAMILY if answer.len() >= ANSWER_BYTES => Ok(Some(Found {
            uid: u32::from_ne_bytes(word(UID_AT)?),
            held: u32::from_ne_bytes(word(INODE_AT)?) != 0,
            listens: answer[STATE_AT] == TCP_LISTEN,
        })),
        _ => Err(short()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Somebody else: `nobody`, as most systems have it.
    const STRANGER: u32 = 65534;

    /// Does this as another user; none if this user may not become another.
    fn as_stranger<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let acting = std::thread::spawn(|| {
            let stranger = rustix::process::Uid::from_raw(STRANGER);
            // Of this thread alone: the calls are the kernel's, and not those of the C library.
            rustix::thread::set_thread_res_uid(stranger, stranger, stranger).ok()?;
            Some(act())
        });
        let acted = acting.join().unwrap();
        if acted.is_none() {
            eprintln!("NOT RUN: this user may not become another one, so no other one can be met");
        }
        acted
    }

    fn ends(stream: &TcpStream) -> (SocketAddr, SocketAddr) {
        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    }

    fn refused(checked: Result<()>) -> bool {
        matches!(checked, Err(Error::Refused(why)) if why.contains(&format!("user {STRANGER}'s")))
    }

    #[test]
    fn this_user_is_trusted_over_loopback_of_both_families() {
        for at in ["127.0.0.1:0", "127.0.0.2:0", "[::1]:0"] {
            let listener = TcpListener::bind(at).unwrap();
            let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (local, peer) = ends(&here);
            check_tcp(local, peer).unwrap();
            let (accepted, from) = listener.accept().unwrap();
            assert_eq!(ends(&accepted).1, from);
            check_tcp(ends(&accepted).0, from).unwrap();
            check_tcp(local, peer).unwrap();
        }
    }

    #[test]
    fn another_user_that_connects_is_refused() {
        for (at, through) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
            let listener = TcpListener::bind(at).unwrap();
            let to = SocketAddr::new(through.parse().unwrap(), listener.local_addr().unwrap().port());
            let Some(_theirs) = as_stranger(move || TcpStream::connect(to).unwrap()) else { return };
            let accepted = listener.accept().unwrap().0;
            let (local, peer) = ends(&accepted);
            assert!(refused(check_tcp(local, peer)), "{at}");
        }
    }

    /// Also before it has accepted anything: whoever has the port has the guest.
    #[test]
    fn another_user_that_listens_is_refused() {
        for accepts in [false, true] {
            let listening = as_stranger(|| TcpListener::bind("127.0.0.1:0").unwrap());
            let Some(listener) = listening else { return };
            let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let theirs = listener.try_clone().unwrap();
            let accepted = accepts.then(|| as_stranger(move || theirs.accept().unwrap()));
            let (local, peer) = ends(&here);
            assert!(refused(check_tcp(local, peer)), "accepted: {accepts}");
            drop((accepted, listener));
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let accepted = listener.accept().unwrap().0;
        let (local, peer) = ends(&accepted);
        assert!(check_tcp(local, peer).is_err());
    }

    #[test]
    fn a_local_socket_knows_its_user_at_both_ends() {
        let path = std::env::temp_dir().join(format!("pageferry-identity-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        check_local(UnixStream::connect(&path).unwrap()).unwrap();
        check_local(listener.accept().unwrap().0).unwrap();
        // For another user to be able to try.
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&path, everybody).unwrap();
        let theirs = path.clone();
        if let Some(_theirs) = as_stranger(move || UnixStream::connect(theirs).unwrap()) {
            assert!(refused(check_local(listener.accept().unwrap().0)));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn an_answer_of_the_kernel_that_is_cut_off_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = ask(ends(&here).0, ends(&here).1).unwrap().expect("our own end");
        assert_eq!((found.uid, found.held), (rustix::process::geteuid().as_raw(), true));
        assert!((0..ANSWER_BYTES).all(|cut| read_answer(&[0; ANSWER_BYTES][..cut]).is_err()));
    }
}
