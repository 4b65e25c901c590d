//! Dirty pages of a machine of our own by KVM's log: a bit a page of each slot.
//!
//! ```text
//!   start():    logging on; where the log begins with all bits set (INITIALLY_SET), it is cleared piece by piece, which
//!               protects the pages: no long stall of the vCPUs
//!   a write:    KVM lifts the protection of that page and sets its bit
//!   sync():  kick all vCPUs -> KVM_GET_DIRTY_LOG -> KVM_CLEAR_DIRTY_LOG of what it told, which protects again
//!   drop:       logging off
//! ```
//!
//! Without manual protection (before Linux 5.0) the get clears and protects by itself.

use super::kvm::{KickVcpus, KvmSlot, KvmSlots};
use super::{DirtySource, Synced};
use crate::dirty::kvm::abi;
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::watch::Watch;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::Arc;

/// Pages that one call clears, 256 MiB: KVM holds the machine's page tables for so long, and
/// flushes translations once a call.
const CHUNK_PAGES: u64 = 64 * 1024;
const _: () = assert!(CHUNK_PAGES.is_multiple_of(64), "KVM takes whole words");

/// Who clears the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clearing {
    /// We do, what we have read.
    Manual {
        /// The log begins with all bits set, and nothing protected.
        initially_set: bool,
    },
    /// Reading it clears it.
    ByReading,
}

/// Follows the writes of a machine by KVM's log. See the [module](self).
pub struct LogSource {
    slots: Arc<KvmSlots>,
    kick: Arc<dyn KickVcpus>,
    clearing: Clearing,
    /// What is read of one slot.
    words: Vec<u64>,
}

impl LogSource {
    /// Starts to follow writes. Every page counts as not written until it is written again.
    ///
    /// # Errors
    /// If the machine has rings: it cannot have a log besides. Whatever was started until then is
    /// ended again.
    pub fn start(slots: Arc<KvmSlots>, kick: Arc<dyn KickVcpus>) -> Result<Self> {
        Self::watched(slots, kick, &mut || Ok(()))
    }

    /// The same, which ends when the watch fails. Asked ahead of each call that protects pages;
    /// that KVM switches the log of a slot on is one call.
    pub fn watched(
        slots: Arc<KvmSlots>,
        kick: Arc<dyn KickVcpus>,
        watch: &mut Watch<'_>,
    ) -> Result<Self> {
        refuse_rings(&slots)?;
        let clearing = manual(slots.vm())?;
        Self::with(slots, kick, clearing, watch)
    }

    fn with(
        slots: Arc<KvmSlots>,
        kick: Arc<dyn KickVcpus>,
        clearing: Clearing,
        watch: &mut Watch<'_>,
    ) -> Result<Self> {
        let longest =
            slots.slots().iter().map(|slot| abi::log_words(slot.pages())).max().unwrap_or(0);
        let mut source = Self { slots, kick, clearing, words: vec![u64::MAX; longest] };
        source.slots.set_logging(true)?;
        if clearing == (Clearing::Manual { initially_set: true }) {
            for slot in source.slots.slots() {
                source.words.fill(u64::MAX);
                clear(source.slots.vm(), slot, &source.words, watch)?;
            }
        }
        Ok(source)
    }
}

/// Before anything is changed: with bits that begin set, rings would not be filled any more.
fn refuse_rings(slots: &KvmSlots) -> Result<()> {
    let Some(slot) = slots.slots().first() else { return Ok(()) };
    match abi::get_dirty_log(
        slots.vm(),
        slot.slot,
        slot.pages(),
        &mut vec![0; abi::log_words(slot.pages())],
    ) {
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Err(Error::refused(
            "the machine was made with KVM's dirty rings, and so has no dirty log",
        )),
        // There is no log yet.
        _ => Ok(()),
    }
}

/// Asks for clearing by hand, as far as the kernel has it.
fn manual(vm: &VmFd) -> Result<Clearing> {
    let has = u32::try_from(vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()))
        .unwrap_or(0);
    if has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return Ok(Clearing::ByReading);
    }
    let initially_set = has & KVM_DIRTY_LOG_INITIALLY_SET != 0;
    let flags = has & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let arg = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [flags.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&arg).map_err(|e| {
        Error::os("asking KVM for a dirty log that is cleared by hand", io::Error::from(e))
    })?;
    Ok(Clearing::Manual { initially_set })
}

/// Clears what is set in `words`, and protects those pages, chunk by chunk.
fn clear(vm: &VmFd, slot: &KvmSlot, words: &[u64], watch: &mut Watch<'_>) -> Result<()> {
    let pages = slot.pages();
    let words = &words[..abi::log_words(pages)];
    for (index, chunk) in words.chunks(CHUNK_PAGES as usize / 64).enumerate() {
        if chunk.iter().all(|word| *word == 0) {
            continue;
        }
        watch()?;
        let first = index as u64 * CHUNK_PAGES;
        let count = CHUNK_PAGES.min(pages - first);
        abi::clear_dirty_log(vm, slot.slot, first, count as u32, chunk).map_err(|e| {
            Error::os(format!("clearing the dirty log of KVM's slot {}", slot.slot), e)
        })?;
    }
    Ok(())
}

impl DirtySource for LogSource {
    fn sync(&mut self, into: &mut DirtyBitmap) -> Result<Synced> {
        self.kick.kick_all()?;
        let mut sync = Synced::default();
        for slot in self.slots.slots() {
            let words = &mut self.words[..abi::log_words(slot.pages())];
            abi::get_dirty_log(self.slots.vm(), slot.slot, slot.pages(), words).map_err(|e| {
                Error::os(format!("reading the dirty log of KVM's slot {}", slot.slot), e)
            })?;
            // The last word reaches beyond the slot.
            if let (Some(last), used @ 1..) = (words.last_mut(), slot.pages() % 64) {
                *last &= (1 << used) - 1;
            }
            if self.clearing != Clearing::ByReading {
                clear(self.slots.vm(), slot, words, &mut || Ok(()))?;
            }
            for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                into.insert_mask(slot.first_page + index as u64 * 64, *word);
                sync.pages += u64::from(word.count_ones());
            }
        }
        Ok(sync)
    }
}

impl Drop for LogSource {
    fn drop(&mut self) {
        if let Err(e) = self.slots.set_logging(false) {
            tracing::warn!(error = %e.chain(), "the tracking of dirty pages did not end as it should");
        }
    }
}

impl std::fmt::Debug for LogSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogSource").field("slots", &self.slots).finish_non_exhaustive()
    }
}
