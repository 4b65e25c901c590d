//! A network for the Linux guest: one switch, a bridge in a namespace of its own, which each QEMU
//! joins by a tap. A client at the bridge sees what users see of a move: while the guest is paused
//! nobody answers, and then what is sent goes on to the old port until the bridge hears a frame of
//! the guest from the new one.
//!
//! ```text
//!   client -- bridge --+-- tap -- QEMU at the source        until the guest is announced
//!                      +-- tap -- QEMU at the destination   from then on
//! ```
//!
//! All of it is this process and what it starts: the thread that makes it moves to the namespace,
//! and clients, QEMUs and supervisors that it starts follow it there. Root only.

use crate::shaped::Bridge;
use anyhow::Result;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the guest answers.
const PORT: u16 = 7007;

/// The same card wherever the guest runs, locally administered.
const MAC: &str = "52:54:00:70:66:01";

/// The bridge; gone when this is dropped.
#[derive(Debug)]
pub struct Network {
    _bridge: Bridge,
    cards: AtomicU32,
}

impl Network {
    /// Makes it, and moves the calling thread to it for good.
    pub fn up() -> Result<Self> {
        let bridge = Bridge::up()?;
        bridge.enter()?;
        Ok(Self { _bridge: bridge, cards: AtomicU32::new(0) })
    }

    /// Where the guest answers datagrams.
    #[must_use]
    pub fn service() -> SocketAddr {
        (Bridge::GUEST.0, PORT).into()
    }

    /// Words of one more QEMU's command line. Taps are used again: two QEMUs are there at a time.
    #[must_use]
    pub fn card(&self) -> [String; 4] {
        let tap = self.cards.fetch_add(1, Ordering::Relaxed) % Bridge::TAPS;
        [
            "-netdev".into(),
            format!("tap,id=net0,ifname=tap{tap},script=no,downscript=no"),
            "-device".into(),
            // Nothing is booted from it.
            format!("virtio-net-pci,netdev=net0,mac={MAC},romfile="),
        ]
    }

    /// Words for the guest's kernel.
    #[must_use]
    pub fn parameters(&self) -> String {
        let (address, prefix) = Bridge::GUEST;
        format!(" guest_address={address}/{prefix} pf.echo={PORT}")
    }
}
