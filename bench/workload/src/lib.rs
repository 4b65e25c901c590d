//! The program inside the test guest: it keeps writing memory, checks every value it reads back,
//! and measures the longest time in which it did not run.
//!
//! ```text
//!   main ----- console lines out, commands in
//!    |
//!    +-- worker 0..K: its own Plot: check a page, write the next generation, note it in the ledger
//!    |                              (and a slow sweep over all pages of the plot)
//!    +-- disk 0..D:   reads and writes a disk past the page cache, checks what came ([`disk`]); none by default
//!    +-- echo:        answers datagrams ([`echo`]); none by default
//!    +-- pulse: guest clock gaps, stopped time by the RTC, one heartbeat byte a millisecond on COM2, or on the console
//! ```
//!
//! # What a lost page looks like
//!
//! Every 8-byte word is a bijective function of (page, generation, index) ([`content`]), so
//! whatever is read names the page and the generation it came from. A lost, stale, swapped or torn
//! data page disagrees with its ledger entry. A lost page of the ledger disagrees with up to 1024
//! data pages. An old copy of both disagrees with the running totals, which live on yet another
//! page ([`plot`]). Only a whole old memory would be consistent, and then `writes=` on the console
//! goes backwards.
//!
//! # What a gap is
//!
//! While QEMU has the guest stopped, every clock derived from its virtual clock is paused: TSC
//! (under TCG), HPET, ACPI timer, and so `CLOCK_MONOTONIC`. The CMOS clock is the exception: by
//! default (`-rtc clock=host`) it follows the host's. See [`stopped`], [`pulse`] and [`heartbeat`]
//! for the three measures, and docs/guest.md for how to read them.

pub mod content;
pub mod disk;
pub mod echo;
pub mod heartbeat;
pub mod pacer;
pub mod pages;
pub mod params;
pub mod plot;
pub mod pulse;
pub mod stopped;
pub mod worker;
