//! What the network hears when a guest has moved. Switches know behind which port an address is
//! from the frames that they have seen; until they see one from the new place, everything for the
//! guest goes to the old one. A guest that only listens sends none. So QEMU announces each network
//! card of a guest that has come (RARP), and the destination must see to it that this is heard when
//! the guest runs there, and not before: until Commit it may still go on at the source.

use pageferry_tests::SOON;
use pageferry_tests::stage::Stage;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x70, 0x66, 0x01];
/// EtherType of RARP.
const RARP: [u8; 2] = [0x80, 0x35];
/// QEMU repeats its announcement 50 ms after the first and at growing intervals, five times within
/// a second. A stopped guest's must not come in all of this time.
const ANNOUNCED_WITHIN: Duration = Duration::from_millis(1500);

/// A wire: what the card sends comes to a socket of ours, a datagram a frame.
struct Wire(UdpSocket);

impl Wire {
    fn new() -> Self {
        Self(UdpSocket::bind("127.0.0.1:0").unwrap())
    }

    fn card(&self) -> String {
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        // QEMU wants an address of its own as well; nobody sends to it, so any port will do.
        format!(
            "-netdev socket,id=wire,udp={},localaddr=127.0.0.1:0 -device virtio-net-pci,netdev=wire,mac={mac},romfile=",
            self.0.local_addr().unwrap()
        )
    }

    /// Whether an announcement of the card comes within this time.
    fn announces(&self, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        let mut frame = [0; 2048];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.0.set_read_timeout(Some(left)).unwrap();
            if let Ok(length @ 14..) = self.0.recv(&mut frame)
                && frame[6..12] == MAC
                && frame[12..14] == RARP
            {
                assert!(length >= 42, "an announcement that was cut");
                return true;
            }
        }
    }
}

/// No kernel: what is heard is QEMU's announcement, since nobody in the guest drives its card.
fn qemu(wire: &Wire) -> String {
    format!("{} {}", pageferry_tests::stage::BARE, wire.card())
}

#[test]
fn the_network_hears_of_the_guest_when_it_runs_at_the_destination_and_not_before() {
    let stage = Stage::new();
    let (here, there) = (Wire::new(), Wire::new());
    let mut source = stage.run("src", &qemu(&here), "");
    let destination = stage.receive("dst", &qemu(&there), "loaded");
    let moving = stage.migrate("src", destination.address(), &[]);
    destination.wait_held("loaded");
    assert!(!there.announces(ANNOUNCED_WITHIN), "announced while it may still go on at the source");
    stage.release();
    assert!(there.announces(SOON), "a guest that has come was not announced");
    assert_eq!(moving.end(SOON).status, Some(0));
    assert_eq!(source.end(), Some(0));
}

#[test]
fn a_guest_that_goes_on_at_the_source_was_never_announced_elsewhere() {
    let stage = Stage::new();
    let (here, there) = (Wire::new(), Wire::new());
    let source = stage.run("src", &qemu(&here), "");
    let mut destination = stage.receive("dst", &qemu(&there), "loaded");
    let moving = stage.migrate("src", destination.address(), &[]);
    destination.wait_held("loaded");
    destination.kill();
    assert_eq!(moving.end(SOON).status, Some(1));
    source.wait_guest_runs();
    assert!(!there.announces(ANNOUNCED_WITHIN), "announced at a place where it never ran");
}
