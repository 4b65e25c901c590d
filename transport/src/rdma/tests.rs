//! The RDMA link against the contract and against bad luck, on a real device: in the lab machine
//! (`scripts/lab`), or on any host whose device has the address in `PAGEFERRY_RDMA_ADDRESS`.
//!
//! ```text
//!   scripts/lab -- target/debug/deps/pageferry_transport-... --ignored --test-threads 1 lab_
//! ```

use super::*;
use crate::contract::{Pair, soon};
use crate::preamble::Token;
use std::net::{IpAddr, SocketAddr};

const TOKEN: Token = Token([7; 16]);

/// Where the lab machine's RDMA devices are, the two ends of one cable.
fn here() -> IpAddr {
    std::env::var("PAGEFERRY_RDMA_ADDRESS").map_or_else(
        |_| "10.77.0.1".parse().unwrap(),
        |address| address.parse().expect("an address in PAGEFERRY_RDMA_ADDRESS"),
    )
}

/// Whether there is a device to test with. Says so where `scripts/test` repeats it if not.
fn can_run(name: &str) -> bool {
    if std::env::var_os("PAGEFERRY_LAB").is_some() || std::env::var_os("PAGEFERRY_RDMA_ADDRESS").is_some() {
        return true;
    }
    let why = "it needs an RDMA device: scripts/lab";
    eprintln!("NOT RUN: {name}: {why}");
    if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
        use std::io::Write;
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(file, "NOT RUN: {name}: {why}").unwrap();
    }
    false
}

fn ends(lanes: usize, options: &RdmaOptions) -> (RdmaInitiator, RdmaTarget) {
    let lanes = u8::try_from(lanes).unwrap();
    let listener = RdmaListener::bind(here(), TOKEN, lanes, options).unwrap();
    let to = SocketAddr::new(here(), listener.port());
    let initiator = RdmaInitiator::connect(to, None, TOKEN, lanes, options, soon()).unwrap();
    (initiator, listener.into_target(soon()).unwrap())
}

fn pair_with(lanes: usize, options: &RdmaOptions) -> Pair {
    let (initiator, target) = ends(lanes, options);
    Pair { initiator: Box::new(initiator), target: Box::new(target) }
}

mod lab_contract {
    use crate::contract::Pair;

    fn make(lanes: usize) -> Pair {
        super::pair_with(lanes, &super::RdmaOptions::default())
    }

    crate::contract::contract_tests!(ignore = "needs an RDMA device", if super::can_run, make);
}

mod lab_contract_in_small_pieces {
    use super::RdmaOptions;
    use crate::contract::Pair;

    /// One stripe a registration, and a window that a few writes fill.
    fn make(lanes: usize) -> Pair {
        let options = RdmaOptions {
            chunk_bytes: 1,
            window_bytes: 1 << 20,
            window_requests: 16,
            ..RdmaOptions::default()
        };
        super::pair_with(lanes, &options)
    }

    crate::contract::contract_tests!(ignore = "needs an RDMA device", if super::can_run, make);
}
