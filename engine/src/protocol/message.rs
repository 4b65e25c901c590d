//! The kinds of control messages, and the checks on what a peer may put into them.
//!
//! These types are the wire format, and it stays: what comes later is a feature ([`super::features`])
//! and puts what it has to say into the `features` at a message's end, or into a variant at the end
//! of [`Message`].

use super::bounded;
use super::features::Features;
use crate::error::{Error, Result};
use crate::guest::{BLOCKS_MAX, GuestDescription};
use crate::memory::page::PageRun;
use crate::memory::staging::STAGED_PAGES_MAX;
use crate::text;
use pageferry_transport::preamble::{LANES_MAX, Token};
use pageferry_transport::{RemoteKey, RemoteRegion};
use serde::{Deserialize, Serialize};

/// An Offer names at most this many runs of touched pages; a guest with more gets its closest
/// runs joined, which allocates some pages for nothing and keeps the message below a few MiB.
pub const TOUCHED_RUNS_MAX: usize = 1 << 18;

/// Device state beyond this is refused: QEMU with large video memory stays far below.
pub const STATE_BYTES_MAX: u64 = 4 << 30;

/// A release, or another short text for people, in bytes.
const WORDS_BYTES_MAX: usize = 1 << 10;

/// The reason of an Abort in bytes; a longer one is cut by the side that sends it.
pub const REASON_BYTES_MAX: usize = 8 << 10;

/// One control message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The source opens a session. Boxed, as it is far larger than all others.
    Hello(Box<Hello>),
    /// The destination's answer to Hello.
    Welcome(Welcome),
    /// What will be written.
    Offer(Offer),
    /// Where it may be written.
    Accept(Accept),
    /// Everything is on its way behind this fence.
    Prepare(Prepare),
    /// The destination holds the whole guest and waits.
    Ready(Ready),
    /// The guest is the destination's from here on.
    Commit,
    /// It runs at the destination.
    Running(Running),
    /// The side that says it gives up. From the destination, unless it is a refusal, it is a
    /// promise that the guest does not run there and never will.
    Abort(Abort),
}

/// See [`Message::Hello`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's release, for messages to people.
    #[serde(deserialize_with = "bounded::text::<_, WORDS_BYTES_MAX>")]
    pub software: String,
    /// Lanes that the source would like.
    pub lanes: u8,
    /// What must match.
    pub guest: GuestDescription,
    /// The largest device state, in bytes.
    pub state_bytes_max: u64,
    /// Whether the source would open its lanes by RDMA.
    pub rdma: bool,
    /// What the source can.
    pub features: Features,
}

/// See [`Message::Welcome`]; counted as the second Hello of the design.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The receiver's release.
    #[serde(deserialize_with = "bounded::text::<_, WORDS_BYTES_MAX>")]
    pub software: String,
    /// Goes into the preamble of every further connection of this session.
    pub token: [u8; 16],
    /// Lanes that the source must open.
    pub lanes: u8,
    /// Whether they may be opened by RDMA.
    pub rdma: RdmaAnswer,
    /// What the destination can.
    pub features: Features,
}

/// Whether a destination takes lanes by RDMA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RdmaAnswer {
    /// At this port of the connection manager, at the address of the control connection.
    Port(u16),
    /// No, and why; for people.
    No(#[serde(deserialize_with = "bounded::text::<_, REASON_BYTES_MAX>")] String),
}

/// Which lanes a source has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lanes {
    /// Queue pairs.
    Rdma,
    /// TCP connections.
    Tcp,
}

/// See [`Message::Offer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Rising runs of pages that were ever touched, as (pages skipped since the last run, length).
    #[serde(deserialize_with = "bounded::list::<_, _, TOUCHED_RUNS_MAX>")]
    pub touched: Vec<(u64, u64)>,
    /// Whether both sides digest all memory at the end.
    pub verify: bool,
    /// The lanes that carry it.
    pub lanes: Lanes,
    /// What features put here.
    pub features: Features,
}

/// A region that the destination exposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposed {
    /// Address of its first byte.
    pub base: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Remote key.
    pub key: u32,
}

/// See [`Message::Accept`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accept {
    /// One region a memory slot, in the slots' order.
    #[serde(deserialize_with = "bounded::list::<_, _, BLOCKS_MAX>")]
    pub slots: Vec<Exposed>,
    /// Where the device state goes.
    pub state: Exposed,
    /// Where pages go whose memory is not registered when the guest is paused.
    pub staging: Exposed,
    /// What features put here.
    pub features: Features,
}

/// See [`Message::Prepare`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// The last fence.
    pub fence: u32,
    /// Length of the device state in bytes.
    pub state_bytes: u64,
    /// Whether the vCPUs ran before the pause.
    pub was_running: bool,
    /// Pages that are in the staging region, with their slots there.
    #[serde(deserialize_with = "bounded::list::<_, _, STAGED_PAGES_MAX>")]
    pub staged: Vec<(u64, u32)>,
    /// Digest of all memory, where it was asked for.
    pub digest: Option<u128>,
    /// What features put here.
    pub features: Features,
}

/// See [`Message::Ready`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// How long loading the device state took, in microseconds.
    pub load_us: u64,
    /// How long the destination waited for the last fence, in microseconds.
    pub fence_us: u64,
    /// How long the digest took, in microseconds.
    pub verify_us: u64,
    /// What features put here.
    pub features: Features,
}

/// See [`Message::Running`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// How long it took to let the vCPUs run, in microseconds.
    pub resume_us: u64,
    /// How long it had been running when this was sent, in microseconds.
    pub running_us: u64,
    /// What features put here.
    pub features: Features,
}

/// See [`Message::Abort`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Abort {
    /// For people; goes into the other side's report.
    #[serde(deserialize_with = "bounded::text::<_, REASON_BYTES_MAX>")]
    pub reason: String,
    /// What kind of reason it is.
    pub cause: Cause,
}

/// Why a side gives up, as far as the other side must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A refusal before anything was touched.
    Refused,
    /// The same, and only because another session is under way.
    Busy,
    /// The lanes broke: another kind of lane may serve.
    Lanes,
    /// Anything else.
    Failed,
}

impl Message {
    /// Cuts and escapes what the peer wrote for people. What is compared (the guest's description)
    /// stays as it is.
    pub(super) fn escape_words(&mut self) {
        match self {
            Self::Hello(hello) => hello.software = text::name(&hello.software),
            Self::Welcome(welcome) => {
                welcome.software = text::name(&welcome.software);
                if let RdmaAnswer::No(why) = &mut welcome.rdma {
                    *why = text::reason(why);
                }
            }
            Self::Abort(abort) => abort.reason = text::reason(&abort.reason),
            _ => {}
        }
    }

    /// Its name, for errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Welcome(_) => "Welcome",
            Self::Offer(_) => "Offer",
            Self::Accept(_) => "Accept",
            Self::Prepare(_) => "Prepare",
            Self::Ready(_) => "Ready",
            Self::Commit => "Commit",
            Self::Running(_) => "Running",
            Self::Abort(_) => "Abort",
        }
    }
}

impl Offer {
    /// Packs rising runs. Where there are too many, the smallest gaps are closed.
    #[must_use]
    pub fn pack(runs: &[PageRun], verify: bool, lanes: Lanes) -> Self {
        let gap_closed = closed_gap(runs);
        let mut touched: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        for run in runs {
            let gap = run.first.0 - at;
            match touched.last_mut() {
                Some(last) if gap <= gap_closed => last.1 += gap + run.count,
                _ => touched.push((gap, run.count)),
            }
            at = run.end();
        }
        Self { touched, verify, lanes, features: Features::default() }
    }

    /// The runs, checked against a memory of `pages` pages.
    pub fn runs(&self, pages: u64) -> Result<Vec<PageRun>> {
        let wrong =
            || Error::Protocol(format!("an Offer of pages beyond the {pages} of this guest"));
        let mut runs = Vec::with_capacity(self.touched.len());
        let mut at = 0u64;
        for &(gap, count) in &self.touched {
            let first = at.checked_add(gap).ok_or_else(wrong)?;
            let end = first
                .checked_add(count)
                .filter(|end| *end <= pages && count > 0)
                .ok_or_else(wrong)?;
            runs.push(PageRun::between(first, end));
            at = end;
        }
        Ok(runs)
    }
}

/// The largest gap to close so that no more than [`TOUCHED_RUNS_MAX`] runs are left.
fn closed_gap(runs: &[PageRun]) -> u64 {
    if runs.len() <= TOUCHED_RUNS_MAX {
        return 0;
    }
    let mut gaps: Vec<u64> = runs.windows(2).map(|w| w[1].first.0 - w[0].end()).collect();
    gaps.sort_unstable();
    gaps[runs.len() - TOUCHED_RUNS_MAX - 1]
}

impl From<RemoteRegion> for Exposed {
    fn from(region: RemoteRegion) -> Self {
        Self { base: region.base, bytes: region.len, key: region.key.0 }
    }
}

impl From<Exposed> for RemoteRegion {
    fn from(region: Exposed) -> Self {
        Self { base: region.base, len: region.bytes, key: RemoteKey(region.key) }
    }
}

impl Hello {
    /// Fails on numbers that no honest source would send.
    pub fn check(&self) -> Result<()> {
        if self.lanes == 0 || usize::from(self.lanes) > LANES_MAX {
            return Err(Error::Protocol(format!(
                "a Hello that asks for {} lanes (1 to {LANES_MAX} are possible)",
                self.lanes
            )));
        }
        if self.state_bytes_max > STATE_BYTES_MAX {
            return Err(Error::Protocol(format!(
                "a Hello that announces {} bytes of device state",
                self.state_bytes_max
            )));
        }
        Ok(())
    }
}

impl Welcome {
    /// The token, and the lanes if they are what was asked for or fewer.
    pub fn check(&self, lanes_asked: u8) -> Result<Token> {
        if self.lanes == 0 || self.lanes > lanes_asked {
            return Err(Error::Protocol(format!(
                "a Welcome to {} lanes where {lanes_asked} were asked for",
                self.lanes
            )));
        }
        Ok(Token(self.token))
    }
}

impl Accept {
    /// The regions, checked against the memory that is to go there.
    pub fn check(&self, slot_bytes: &[u64], state_bytes_max: u64) -> Result<()> {
        let sized = |region: &Exposed, bytes: u64| {
            region.bytes == bytes && region.base.checked_add(bytes).is_some()
        };
        let slots = self.slots.len() == slot_bytes.len()
            && self.slots.iter().zip(slot_bytes).all(|(r, b)| sized(r, *b));
        if slots
            && sized(&self.state, state_bytes_max)
            && sized(&self.staging, crate::memory::staging::STAGING_BYTES as u64)
        {
            Ok(())
        } else {
            Err(Error::Protocol(
                "an Accept whose regions are not those of the offered memory".into(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs() -> impl Strategy<Value = Vec<PageRun>> {
        prop::collection::vec((1u64..50, 1u64..50), 0..100).prop_map(|pairs| {
            let mut at = 0;
            pairs
                .into_iter()
                .map(|(gap, count)| {
                    let run = PageRun::between(at + gap, at + gap + count);
                    at = run.end();
                    run
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn touched_runs_survive_the_wire(runs in runs()) {
            let pages = runs.last().map_or(1, PageRun::end);
            prop_assert_eq!(Offer::pack(&runs, false, Lanes::Tcp).runs(pages).unwrap(), runs.clone());
            if !runs.is_empty() {
                prop_assert!(Offer::pack(&runs, false, Lanes::Tcp).runs(pages - 1).is_err());
            }
        }

        #[test]
        fn a_hostile_offer_is_refused_without_panic(touched: Vec<(u64, u64)>, pages: u64) {
            let features = Features::default();
            let _ = Offer { touched, verify: false, lanes: Lanes::Tcp, features }.runs(pages);
        }
    }

    #[test]
    fn too_many_runs_are_joined_and_still_cover_every_page() {
        let runs: Vec<_> = (0..TOUCHED_RUNS_MAX as u64 * 2)
            .map(|i| PageRun::between(i * 10 + i % 5, i * 10 + i % 5 + 1))
            .collect();
        let offer = Offer::pack(&runs, false, Lanes::Tcp);
        assert!(offer.touched.len() <= TOUCHED_RUNS_MAX, "{} runs", offer.touched.len());
        let mut wide = offer.runs(u64::MAX).unwrap().into_iter().peekable();
        for run in runs {
            while wide.peek().is_some_and(|w| w.end() <= run.first.0) {
                wide.next();
            }
            let cover = wide.peek().expect("covered");
            assert!(cover.first <= run.first && run.end() <= cover.end());
        }
    }
}
