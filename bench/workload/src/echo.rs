//! Answers datagrams with themselves, so that a client on the network sees when the guest is away.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};

/// The longest datagram that is sent back whole.
const BYTES_MAX: usize = 2048;

/// A socket on this port of every address of the guest.
pub fn open(port: u16) -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
}

/// Answers until the program ends. What cannot be answered is lost, as on any network.
pub fn run(socket: &UdpSocket) -> ! {
    let mut bytes = [0; BYTES_MAX];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..length], from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_sent_comes_back() {
        let socket = open(0).unwrap();
        let port = socket.local_addr().unwrap().port();
        std::thread::spawn(move || run(&socket));
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        for text in ["one", "another"] {
            client.send_to(text.as_bytes(), ("127.0.0.1", port)).unwrap();
            let mut bytes = [0; 16];
            let length = client.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], text.as_bytes());
        }
    }
}
