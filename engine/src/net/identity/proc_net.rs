//! The same question asked of `/proc/net/tcp` and `tcp6`, for kernels without `tcp_diag`: it lists
//! every socket of this network namespace, so it is slower, and it knows the same (proc_net_tcp in
//! the kernel's documentation).

use super::Found;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// States there: of a listener, and of a connection that neither end has closed.
const LISTEN: &str = "0A";
const ESTABLISHED: &str = "01";

/// The TCP socket that is at `at` and connected to `to`, or a listener at `at`.
pub(super) fn ask(at: SocketAddr, to: SocketAddr) -> io::Result<Option<Found>> {
    let mut text = std::fs::read_to_string("/proc/net/tcp")?;
    // Not there where IPv6 is switched off.
    text.push_str(&std::fs::read_to_string("/proc/net/tcp6").unwrap_or_default());
    Ok(find(&text, at, to))
}

fn find(text: &str, at: SocketAddr, to: SocketAddr) -> Option<Found> {
    let lines = || text.lines().filter_map(Line::parse);
    let same = |a: SocketAddr, b: SocketAddr| {
        (a.ip().to_canonical(), a.port()) == (b.ip().to_canonical(), b.port())
    };
    let connected =
        lines().find(|line| !line.found.listens && same(line.at, at) && same(line.to, to));
    let exact = || lines().find(|line| line.found.listens && same(line.at, at));
    let anywhere = |line: &Line| {
        line.found.listens && line.at.port() == at.port() && line.at.ip().is_unspecified()
    };
    connected.or_else(exact).or_else(|| lines().find(anywhere)).map(|line| line.found)
}

struct Line {
    at: SocketAddr,
    to: SocketAddr,
    found: Found,
}

impl Line {
    /// None of the line above the others, or of one that makes no sense.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, at, to, state, _, _, _, uid, _, inode, ..] = fields[..] else { return None };
        let found = Found {
            uid: uid.parse().ok()?,
            held: inode.parse::<u64>().ok()? != 0,
            listens: state == LISTEN,
            established: state == ESTABLISHED,
        };
        Some(Self { at: address(at)?, to: address(to)?, found })
    }
}

/// An address as words of the host's byte order in hexadecimal, `0100007F:1F90`.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match ip.len() {
        8 => word(0)?.into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn it_says_what_sock_diag_says() {
        for (at, through) in
            [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")]
        {
            let listener = TcpListener::bind(at).unwrap();
            let to =
                SocketAddr::new(through.parse().unwrap(), listener.local_addr().unwrap().port());
            let nowhere =
                SocketAddr::new(if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() }, 0);
            let here = TcpStream::connect(to).unwrap();
            let local = here.local_addr().unwrap();
            let both = |at, to| (ask(at, to).unwrap(), super::super::ask(at, to).unwrap());
            let (listed, found) = both(to, local);
            assert_eq!(
                (listed, found.map(|found| found.held)),
                (found, Some(false)),
                "not accepted: {at}"
            );
            let (listed, found) = both(to, nowhere);
            assert_eq!(
                (listed, found.map(|found| found.listens)),
                (found, Some(true)),
                "listens: {at}"
            );
            let _accepted = listener.accept().unwrap();
            let (listed, found) = both(to, local);
            assert_eq!(
                (listed, found.map(|found| found.held)),
                (found, Some(true)),
                "accepted: {at}"
            );
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_passed_over() {
        let text = "  sl  local_address rem_address st\nnonsense\n   0: 0100007F:1F90 xx 0A\n\
                    1: 0100007F:1F90 00000000:0000 0A 0:0 00:00000000 00000000  1000        0 42 1 0 100\n";
        let at = "127.0.0.1:8080".parse().unwrap();
        let found = find(text, at, "0.0.0.0:0".parse().unwrap()).unwrap();
        assert_eq!(found, Found { uid: 1000, held: true, listens: true, established: false });
        assert_eq!(find(text, "127.0.0.2:8080".parse().unwrap(), at), None);
    }
}
