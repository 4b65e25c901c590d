//! What the user asks of a migration.

use crate::guest::Vouched;
use crate::memory::lost_page::Poisoned;
use crate::net::choice::LinkChoice;
use crate::policy::WhenStuck;
use crate::protocol::features::{Need, VERIFY};
use serde::{Deserialize, Serialize};

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateOptions {
    /// `HOST:PORT` of a waiting `pageferry receive`.
    pub to: String,
    /// Lanes to ask for.
    pub lanes: u8,
    /// What may carry the data.
    pub link: LinkChoice,
    /// Longest downtime, in microseconds.
    pub downtime_us_max: u64,
    /// Bound on the rate while the guest runs, in bytes a second.
    pub bytes_per_second_max: Option<u64>,
    /// What to do if rounds do not shrink.
    pub when_stuck: WhenStuck,
    /// Most rounds.
    pub rounds_max: u32,
    /// Digest all memory on both sides before the guest runs.
    pub verify: bool,
    /// What becomes of the guest if the hardware lost some of its pages.
    #[serde(default)]
    pub poisoned: Poisoned,
    /// Allow an address off loopback.
    pub insecure: bool,
    /// What the operator vouches for.
    #[serde(default)]
    pub vouched: Vouched,
}

impl MigrateOptions {
    /// The defaults, to this address.
    #[must_use]
    pub fn to(address: impl Into<String>) -> Self {
        Self {
            to: address.into(),
            lanes: default_lanes(),
            link: LinkChoice::default(),
            downtime_us_max: 10_000,
            bytes_per_second_max: None,
            when_stuck: WhenStuck::Abort,
            rounds_max: 100,
            verify: false,
            poisoned: Poisoned::Refuse,
            insecure: false,
            vouched: Vouched::default(),
        }
    }

    /// What the destination must know for it.
    pub(crate) fn needs(&self) -> Vec<Need> {
        let verify = self.verify.then_some(Need { feature: VERIFY, option: "--verify" });
        verify.into_iter().collect()
    }
}

/// By TCP a lane is a thread at each end: half of the cores, but two at least, where there are two,
/// and four at most. Two lanes were somewhat faster than one on two cores, in few and noisy runs;
/// no larger machine was measured. On one core a second lane is a thread more to wake at each end.
#[must_use]
pub fn default_lanes() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).max(cores.min(2)).min(4) as u8
}
