//! Who is at the other end of a connection within this host. Loopback is reached by every user of
//! the host, so an address alone says nothing: whoever connects there could fill a receiver with a
//! guest of its own, and whoever listens there first would be given a guest.
//!
//! A peer is trusted if it is root or the user of this process. For TCP over loopback the kernel is
//! asked whose the peer's socket is (`sock_diag(7)`), for a local socket it says so itself
//! (`SO_PEERCRED`, unix(7)). Nothing is known of a peer on another host.

mod proc_net;

use crate::error::{Error, Result};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt,
};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

/// The kernel answers within the system call; this only bounds what cannot happen.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// The kernel's default for `kernel.overflowuid`.
const OVERFLOW_UID: u32 = 65534;

/// Whom this process trusts.
#[derive(Debug, Clone, Copy)]
struct Trust {
    own: u32,
    /// The number under which this process is shown users that its user namespace has no number
    /// for; none where it has one for all (user_namespaces(7)).
    unmapped: Option<u32>,
}

impl Trust {
    fn of_this_process() -> Self {
        let own = rustix::process::geteuid().as_raw();
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let unmapped = (!maps_all(&read("/proc/self/uid_map")))
            .then(|| read("/proc/sys/kernel/overflowuid").trim().parse().unwrap_or(OVERFLOW_UID));
        Self { own, unmapped }
    }

    fn check(self, uid: u32) -> Result<()> {
        let Self { own, unmapped } = self;
        if unmapped == Some(uid) {
            return Err(Error::refused(format!(
                "the other end of this connection within the host is user {uid}'s, which stands here for every user \
                 outside of this user namespace, so nobody knows whose it is: run both ends, and a tunnel between \
                 them, in the same user namespace, or connect to the host's own address with --insecure"
            )));
        }
        if uid == 0 || uid == own {
            return Ok(());
        }
        Err(Error::refused(format!(
            "the other end of this connection within the host is user {uid}'s, and only user {own} and root are \
             trusted: run both ends, and a tunnel between them, as the same user or as root"
        )))
    }
}

/// Whether a user namespace with this map has a number for every user of the host.
fn maps_all(map: &str) -> bool {
    let fields: Vec<_> = map.split_ascii_whitespace().collect();
    // Without user namespaces there is no such file.
    fields.is_empty() || fields == ["0", "0", "4294967295"]
}

/// Fails unless a peer of this user is trusted.
pub(super) fn check(uid: u32) -> Result<()> {
    Trust::of_this_process().check(uid)
}

/// Fails unless who is at the other end of this local socket is trusted: who connected it, or who
/// listens.
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
    owner(local, peer, |at, to| match ask(at, to) {
        Ok(Some(found)) => Ok(Some(found)),
        // Without `tcp_diag` the kernel knows no socket at all, not even ours. The list is long
        // where many come and go, so it is asked only then.
        Ok(None) if matches!(ask(local, peer), Ok(Some(_))) => Ok(None),
        Ok(None) | Err(_) => proc_net::ask(at, to),
    })
}

/// The same by what `ask` knows of a socket that is at one address and connected to another.
fn owner(
    local: SocketAddr,
    peer: SocketAddr,
    ask: impl Fn(SocketAddr, SocketAddr) -> io::Result<Option<Found>>,
) -> Result<u32> {
    let what = || format!("asking the kernel whose the other end of the connection to {peer} is");
    let ask = |at, to| ask(at, to).map_err(|e| Error::os(what(), e));
    let gone = || Error::os(what(), io::Error::from(ErrorKind::NotConnected));
    let Some(found) = ask(peer, local)? else {
        // One that has closed the connection has closed ours, too, if it was here.
        let stands = matches!(ask(local, peer)?, Some(ours) if ours.established);
        return Err(if stands { elsewhere(peer) } else { gone() });
    };
    if found.held {
        return Ok(found.uid);
    }
    // Nobody has accepted it yet, and until then it is whose listener it came to; if that is gone,
    // so is this.
    let nowhere = SocketAddr::new(if peer.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() }, 0);
    match ask(peer, nowhere)? {
        Some(listener) if listener.held && listener.listens => Ok(listener.uid),
        _ => Err(gone()),
    }
}

/// The connection stands, and nobody whom this process may know of has its other end.
fn elsewhere(peer: SocketAddr) -> Error {
    Error::refused(format!(
        "the other end of the connection to {peer} is in another network namespace, or behind a port that is forwarded \
         (a container's, or by a rule of the host's firewall), so nobody knows whose it is: use a local socket at both \
         ends (unix:PATH), or listen on and connect to the host's own address with --insecure"
    ))
}

/// A socket, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    uid: u32,
    /// Whether a process has it. Of one that nobody has, the kernel may say that it is root's.
    held: bool,
    listens: bool,
    /// Neither end has closed it.
    established: bool,
}

/// Of `linux/netlink.h`, `linux/sock_diag.h` and `linux/inet_diag.h`.
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_ESTABLISHED: u8 = 1;
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
    let mut put =
        |offset: usize, field: &[u8]| bytes[offset..][..field.len()].copy_from_slice(field);
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
            established: answer[STATE_AT] == TCP_ESTABLISHED,
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
        for (at, through) in
            [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")]
        {
            let listener = TcpListener::bind(at).unwrap();
            let to =
                SocketAddr::new(through.parse().unwrap(), listener.local_addr().unwrap().port());
            let Some(_theirs) = as_stranger(move || TcpStream::connect(to).unwrap()) else {
                return;
            };
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

    /// As where a rule of the firewall leads a connection elsewhere: it stands here, and has no
    /// other end.
    #[test]
    fn a_peer_in_another_network_namespace_is_refused_with_a_way_out() {
        let [local, peer] =
            ["127.0.0.1:7600", "127.0.0.1:50000"].map(|at| at.parse::<SocketAddr>().unwrap());
        let only_ours = |established| {
            move |at: SocketAddr, _| {
                let ours = Found { uid: 1000, held: true, listens: false, established };
                Ok((at == local).then_some(ours))
            }
        };
        let refusal = owner(local, peer, only_ours(true)).unwrap_err();
        assert!(
            matches!(&refusal, Error::Refused(why) if why.contains("network namespace") && why.contains("unix:PATH")),
            "{refusal:?}"
        );
        // One that was here, and has gone.
        assert!(matches!(owner(local, peer, only_ours(false)), Err(Error::Os { .. })));
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(here.local_addr().unwrap()).unwrap();
        let own = ask(ends(&connected).0, ends(&connected).1).unwrap().expect("our own end");
        assert!(own.established && !own.listens, "{own:?}");
    }

    #[test]
    fn a_user_that_this_namespace_does_not_know_is_nobody() {
        let refused = |trust: Trust, uid| match trust.check(uid) {
            Err(Error::Refused(why)) => why.contains("user namespace"),
            _ => false,
        };
        let inside = |own| Trust { own, unmapped: Some(OVERFLOW_UID) };
        assert!(refused(inside(1000), OVERFLOW_UID));
        // Not even to one who has no number itself.
        assert!(refused(inside(OVERFLOW_UID), OVERFLOW_UID));
        inside(1000).check(1000).unwrap();
        inside(1000).check(0).unwrap();
        Trust { own: OVERFLOW_UID, unmapped: None }.check(OVERFLOW_UID).unwrap();
    }

    #[test]
    fn a_namespace_that_knows_all_users_is_told_from_others() {
        assert!(maps_all("         0          0 4294967295\n") && maps_all(""));
        assert!(!maps_all("0 1000 1\n") && !maps_all("0 1000 1\n1 100000 65536\n"));
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
