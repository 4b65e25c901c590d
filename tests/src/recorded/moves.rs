//! The moves that are recorded: of a synthetic guest of 256 pages that writes four.

use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::net::Address;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::report::MigrationReport;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use std::path::Path;
use std::time::Instant;

/// The guest.
pub const GUEST: SyntheticOptions = SyntheticOptions {
    pages: 256,
    touched_pages: 4,
    threads: 1,
    pages_per_second: Some(100),
    seed: 20_261_129,
    discards: false,
};

/// It, once it has written.
///
/// # Panics
/// If it does not.
#[must_use]
pub fn start_guest() -> SyntheticSource {
    let mut guest = SyntheticSource::start(GUEST).expect("it runs");
    crate::eventually("the guest writes", crate::SOON, || {
        (guest.generations().expect("it lives") >= GUEST.touched_pages).then_some(())
    });
    guest
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// By TCP, with both digests.
    Tcp,
    /// By a local socket.
    Local,
    /// The destination has another guest.
    Refused,
    /// The rounds do not shrink, and the source gives up.
    Aborted,
    /// The answer to Commit is lost, and the source asks again.
    AskedAgain,
}

impl Move {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Tcp, Self::Local, Self::Refused, Self::Aborted, Self::AskedAgain];

    /// The name of its record.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Local => "local",
            Self::Refused => "refused",
            Self::Aborted => "aborted",
            Self::AskedAgain => "asked-again",
        }
    }

    /// Whether the guest runs at the destination in the end.
    #[must_use]
    pub fn moves(self) -> bool {
        matches!(self, Self::Tcp | Self::Local | Self::AskedAgain)
    }

    /// Where somebody can listen for it: `who` tells listeners apart.
    #[must_use]
    pub fn listen_at(self, directory: &Path, who: &str) -> Address {
        let local = || format!("unix:{}", directory.join(who).display());
        let at = if self == Self::Local { local() } else { "127.0.0.1:0".into() };
        at.parse().expect("an address")
    }

    /// Moves this guest to a destination that listens there.
    #[must_use]
    pub fn migrate(self, guest: &mut SyntheticSource, to: &Address) -> MigrationReport {
        let mut options = MigrateOptions::to(to.to_string());
        (options.lanes, options.when_stuck) = (1, WhenStuck::Abort);
        (options.verify, options.downtime_us_max) =
            (self == Self::Tcp, if self == Self::Aborted { 1 } else { 200_000 });
        migrate(guest, &options, &Monitor::default())
    }
}

/// A destination as it is today.
#[derive(Debug)]
pub struct Destination {
    /// Where it listens.
    pub address: Address,
    receiver: Receiver,
    guest: SyntheticDestination,
}

impl Destination {
    /// One that listens there.
    ///
    /// # Panics
    /// If there is no memory or no socket for it.
    #[must_use]
    pub fn of(a_move: Move, at: Address) -> Self {
        let listener = SessionListener::open(at).expect("it listens");
        let address = listener.address.clone();
        let pages = if a_move == Move::Refused { 2 * GUEST.pages } else { GUEST.pages };
        let guest = SyntheticDestination::new(pages).expect("memory");
        Self { address, receiver: Receiver::new(listener, LinkChoice::default()), guest }
    }

    /// Takes one guest, and answers who asks about it afterwards.
    ///
    /// # Panics
    /// If nobody comes.
    #[must_use]
    pub fn serve(self) -> (Served, Option<SyntheticSource>) {
        let Self { mut receiver, mut guest, .. } = self;
        let incoming = receiver.listener().next(Instant::now() + crate::SOON).expect("a source");
        let served = receiver.serve(incoming, &mut guest, &mut || Ok(()));
        receiver.answer_afterwards();
        (served, guest.into_source())
    }
}
