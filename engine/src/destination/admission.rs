//! Whether a guest may come: what must be equal at both ends, before anything is touched.

use crate::error::{Error, Result};
use crate::guest::DestinationGuest;
use crate::protocol::Hello;
use crate::text;

/// Memory blocks that a refusal names.
const BLOCKS_SHOWN_MAX: usize = 8;

/// What must hold before anything is touched.
pub(crate) fn check_guest(hello: &Hello, guest: &mut dyn DestinationGuest) -> Result<()> {
    let (theirs, ours) = (&hello.guest, guest.describe());
    let differ = |what: &str,
                  theirs: &dyn std::fmt::Display,
                  ours: &dyn std::fmt::Display,
                  fix: &str| {
        let theirs = text::reason(&theirs.to_string());
        Err(Error::Refused(format!("the guest has {what} {theirs}, this receiver {ours}: {fix}")))
    };
    let fix = "start the receiver with the same options as the source";
    if theirs.monitor != ours.monitor {
        return differ(
            "the monitor",
            &theirs.monitor,
            &ours.monitor,
            "both sides must run it in the same way",
        );
    }
    if theirs.machine != ours.machine {
        return differ("machine type", &theirs.machine, &ours.machine, fix);
    }
    if theirs.vcpus != ours.vcpus {
        return differ("a vCPU count of", &theirs.vcpus, &ours.vcpus, fix);
    }
    if theirs.blocks != ours.blocks {
        let show = |blocks: &[crate::guest::BlockDescription]| {
            listed(blocks.iter().map(|b| format!("{} of {} MiB", b.name, b.bytes >> 20)))
        };
        return differ("the memory", &show(&theirs.blocks), &show(&ours.blocks), fix);
    }
    if theirs.images != ours.images {
        let show = |images: &[crate::guest::ImageDescription]| {
            listed(images.iter().map(|i| {
                format!("{} of {} MiB with the digest {:032x}", i.name, i.bytes >> 20, i.digest)
            }))
        };
        let fix = "they are not moved, so both hosts must have the same files: copy the source's";
        return differ("the read-only memory", &show(&theirs.images), &show(&ours.images), fix);
    }
    guest.admit(theirs)
}

/// Some of these, for a line that people read, and not all that a stranger says.
pub(crate) fn listed(items: impl ExactSizeIterator<Item = String>) -> String {
    let more = items.len().saturating_sub(BLOCKS_SHOWN_MAX);
    let mut shown: Vec<String> = items.take(BLOCKS_SHOWN_MAX).collect();
    if shown.is_empty() {
        return "none".into();
    }
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}
