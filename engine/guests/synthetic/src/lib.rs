//! A guest without a machine: threads that write a memfd and keep a ledger of what they wrote. For
//! tests and benches of everything but QEMU.
//!
//! Every 8-byte word of a page is a function of the page's number, its generation and the word's
//! place, and a writer checks the whole page against its ledger before it writes the next
//! generation. So a page that was lost, torn, or put back to an older generation is found by the
//! guest itself, soon after, or by [`SyntheticSource::check`] at once. The ledger and the
//! generators' states are the device state.

mod destination;
mod memory;
mod options;
mod source;
pub mod wrapped;
mod writer;

pub use destination::SyntheticDestination;
pub use options::SyntheticOptions;
pub use source::SyntheticSource;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::WORDS;
    use crate::writer::word;
    use pageferry_engine::destination::listener::SessionListener;
    use pageferry_engine::destination::{Receiver, Served};
    use pageferry_engine::guest::SourceGuest;
    use pageferry_engine::memory::page::PAGE_BYTES;
    use pageferry_engine::net::choice::LinkChoice;
    use pageferry_engine::policy::WhenStuck;
    use pageferry_engine::report::Outcome;
    use pageferry_engine::report::progress::Monitor;
    use pageferry_engine::source::{MigrateOptions, migrate};
    use std::sync::Arc;
    use std::time::Duration;
    use std::time::Instant;

    const OPTIONS: SyntheticOptions = SyntheticOptions {
        pages: 512,
        touched_pages: 256,
        threads: 2,
        pages_per_second: None,
        seed: 7,
        discards: true,
    };

    /// Moves a guest over real TCP within this process.
    fn moved(mut source: SyntheticSource) -> SyntheticSource {
        let receiver = Receiver::new(
            SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap(),
            LinkChoice::default(),
        );
        let mut options = MigrateOptions::to(receiver.listener().address.to_string());
        (options.downtime_us_max, options.when_stuck) = (500_000, WhenStuck::Switchover);
        (options.lanes, options.verify, options.rounds_max) = (2, true, 5);
        let pages = source.memory().pages();
        let receiver = std::thread::spawn(move || {
            let (mut receiver, mut guest) = (receiver, SyntheticDestination::new(pages).unwrap());
            let incoming =
                receiver.listener().next(Instant::now() + Duration::from_secs(10)).unwrap();
            let served = receiver.serve(incoming, &mut guest, &mut || Ok(()));
            assert!(matches!(served, Served::Received(_)), "{served:?}");
            guest.into_source().unwrap()
        });
        let report = migrate(&mut source, &options, &Monitor::default());
        assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
        assert_eq!((report.control_messages, report.verified), (8, Some(true)));
        receiver.join().unwrap()
    }

    #[test]
    fn a_guest_that_writes_and_gives_pages_back_is_moved_without_loss() {
        let mut guest = SyntheticSource::start(SyntheticOptions {
            pages: 8192,
            touched_pages: 4096,
            ..OPTIONS
        })
        .unwrap();
        while guest.generations().unwrap() < 5000 {
            std::thread::yield_now();
        }
        for _ in 0..3 {
            guest = moved(guest);
            guest.check().unwrap();
        }
    }

    #[test]
    fn a_rate_can_be_changed_and_goes_with_the_guest() {
        let mut guest =
            SyntheticSource::start(SyntheticOptions { discards: false, ..OPTIONS }).unwrap();
        // Slower than a page in the whole test: what was written stays what was written.
        guest.set_rate(Some(1)).unwrap();
        let mut guest = moved(guest);
        let before = guest.generations().unwrap();
        assert!(guest.generations().unwrap() < before + 100);
        guest.set_rate(None).unwrap();
        while guest.generations().unwrap() < before + 5000 {
            std::thread::yield_now();
        }
        guest.check().unwrap();
    }

    #[test]
    fn a_guest_in_doubt_is_not_let_run_by_a_move_that_is_refused() {
        let mut guest = SyntheticSource::start(OPTIONS).unwrap();
        guest.pause().unwrap();
        guest.seal().unwrap();
        let report = migrate(&mut guest, &MigrateOptions::to("127.0.0.1:1"), &Monitor::default());
        assert!(report.refused && report.reason.unwrap().contains("in doubt"));
        assert!(guest.sealed && !guest.is_running().unwrap());
    }

    #[test]
    fn a_page_that_is_lost_or_stale_or_torn_is_found() {
        // A page that was given back is zeros by right.
        let options = SyntheticOptions { discards: false, ..OPTIONS };
        let mut guest = SyntheticSource::start(options).unwrap();
        while guest.generations().unwrap() < 2000 {
            std::thread::yield_now();
        }
        guest.check().unwrap();
        guest.halt().unwrap();
        let region = Arc::clone(&guest.memory.guest);
        let mut page = vec![0; PAGE_BYTES as usize];
        region.read(5 * PAGE_BYTES as usize, &mut page).unwrap();
        // Lost: zeros.
        region.write(5 * PAGE_BYTES as usize, &[0; 4096]).unwrap();
        assert!(guest.stopped.iter().flatten().any(|w| w.check_all(&region).is_err()));
        // Torn: the second half of the generation before.
        let generation = guest.stopped.as_ref().unwrap()[0].generations[5];
        let mut torn = page.clone();
        for index in WORDS / 2..WORDS {
            torn[index * 8..][..8]
                .copy_from_slice(&word(5, generation - 1, index as u64).to_le_bytes());
        }
        region.write(5 * PAGE_BYTES as usize, &torn).unwrap();
        assert!(guest.stopped.iter().flatten().any(|w| w.check_all(&region).is_err()));
        region.write(5 * PAGE_BYTES as usize, &page).unwrap();
        assert!(guest.stopped.iter().flatten().all(|w| w.check_all(&region).is_ok()));
    }
}
