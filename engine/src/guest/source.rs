//! A guest that can be moved away.

use crate::dirty::DirtySource;
use crate::error::Result;
use crate::guest::{Facts, Liveness, Vouched, always_alive};
use crate::memory::GuestMemory;
use crate::memory::lost_page::LostPage;
use crate::watch::Watch;
use std::sync::Arc;

/// A guest that can be moved away.
///
/// Methods without a default are what every guest needs. The others stand in the order in which
/// they are called; each says for which guests its default is right.
pub trait SourceGuest: Send {
    /// Fails, with the fix, if something stands against moving it: a guest in doubt, a device whose
    /// writes nothing sees. Touches nothing.
    fn preflight(&mut self) -> Result<()>;

    /// What the engine must know of it. Asked after [`Self::preflight`], once more when its writes
    /// are followed, and once more after [`Self::arm`].
    fn facts(&mut self) -> Result<Facts>;

    /// Its memory, mapped readable in this process; what it is now, right after
    /// [`Self::preflight`].
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Whether its vCPUs run. A guest that its operator paused is moved paused.
    fn is_running(&mut self) -> Result<bool>;

    /// Starts to follow writes. Everything already in memory counts as not written. What takes long
    /// asks the watch now and then, and ends with its error, with nothing followed any more.
    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>>;

    /// Stops the vCPUs, if they run. When it returns, the guest writes no more memory by itself;
    /// saving may still write some.
    fn pause(&mut self) -> Result<()>;

    /// Hands the device state to `sink`, piece by piece, while it is being made; an empty piece
    /// every now and then where there is none, so that `sink` can end the wait.
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// The last act before Commit is sent: from here on nothing on this host, whatever dies, may
    /// let the guest run again by itself.
    fn seal(&mut self) -> Result<()>;

    /// Takes back everything since `drain_io` and `arm`; the guest runs again if it ran before.
    /// Must work from any state, may be called again (after an error it tries anew), and lifts the
    /// seal: it is called only when the guest can never run at the destination. Called first while
    /// its writes are still followed, so that it runs at once, and again when they are not any
    /// more.
    fn resume(&mut self) -> Result<()>;

    /// A check, usable from anywhere, that the process that runs the guest still lives.
    ///
    /// The default never fails: for a guest that lives in this process, and ends with it.
    fn liveness(&self) -> Liveness {
        always_alive()
    }

    /// Takes note of what the operator vouches for. Called before [`Self::preflight`].
    ///
    /// The default does nothing: for a guest that refuses nothing that can be vouched for.
    fn vouch(&mut self, vouched: &Vouched) {
        let _ = vouched;
    }

    /// Returns when no device transfer that was under way at the call is any more. Called between a
    /// sync and the first byte that is read of its pages: a transfer by DMA into pinned pages
    /// (direct disk I/O) is reported as a write when it begins, not when it ends.
    ///
    /// The default is right for every guest, and costs it a pause in each round: [`Self::pause`]
    /// ends all transfers, [`Self::resume`] has the guest go on. A guest without such transfers
    /// returns at once.
    fn drain_io(&mut self) -> Result<()> {
        if self.is_running()? {
            self.pause()?;
            self.resume()?;
        }
        Ok(())
    }

    /// Does what can be done ahead of the downtime, with the guest still running. From here on no
    /// memory is plugged in or out.
    ///
    /// The default does nothing: for a guest of which nothing is plugged while it moves.
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    /// Starts to save the device state, which goes on by itself until [`Self::save`] takes it:
    /// remaining dirty pages are pushed meanwhile.
    ///
    /// The default does nothing: [`Self::save`] does it all.
    fn begin_save(&mut self) -> Result<()> {
        Ok(())
    }

    /// Fails if what [`Self::memory`] maps is not the memory that the guest has now: memory was
    /// plugged in or out, or replaced. Asked before a digest of it is taken.
    ///
    /// The default never fails: for memory that stays the same.
    fn check_memory(&mut self) -> Result<()> {
        Ok(())
    }

    /// Notes the addresses by which the guest knows these pages, where that can be told.
    ///
    /// The default notes nothing: the pages are named by block and offset.
    fn name_guest_physical(&mut self, pages: &mut [LostPage]) {
        let _ = pages;
    }

    /// The guest runs at the destination. Keep its tracking until the guest is ended here: lifting
    /// the protection of its memory keeps a core busy (some 24 ms a GiB) for nothing, at a moment
    /// when, on one host, the guest needs that core for its first steps.
    ///
    /// The default ends the tracking at once: that is right, and slower.
    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        drop(tracking);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was called of it.
    #[derive(Default)]
    struct Noting {
        runs: bool,
        calls: Vec<&'static str>,
    }

    impl SourceGuest for Noting {
        fn preflight(&mut self) -> Result<()> {
            unreachable!("not asked")
        }
        fn facts(&mut self) -> Result<Facts> {
            unreachable!("not asked")
        }
        fn memory(&self) -> &Arc<GuestMemory> {
            unreachable!("not asked")
        }
        fn is_running(&mut self) -> Result<bool> {
            Ok(self.runs)
        }
        fn start_tracking(&mut self, _: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
            unreachable!("not asked")
        }
        fn pause(&mut self) -> Result<()> {
            self.calls.push("pause");
            Ok(())
        }
        fn save(&mut self, _: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
            unreachable!("not asked")
        }
        fn seal(&mut self) -> Result<()> {
            unreachable!("not asked")
        }
        fn resume(&mut self) -> Result<()> {
            self.calls.push("resume");
            Ok(())
        }
    }

    #[test]
    fn the_default_drain_pauses_a_guest_that_runs_and_leaves_a_paused_one_alone() {
        let mut guest = Noting { runs: true, ..Noting::default() };
        guest.drain_io().unwrap();
        assert_eq!(guest.calls, ["pause", "resume"]);
        let mut guest = Noting::default();
        guest.drain_io().unwrap();
        assert!(guest.calls.is_empty());
    }
}
