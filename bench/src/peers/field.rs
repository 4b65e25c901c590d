//! All that take part in a run, and their turns.

use super::lineage::{Lineage, MicrovmLineage, QemuLineage};
use super::{CPU, DOWNTIME, GAP, GAP_BEGAN, PeersOptions, SENT, TOTAL};
use crate::progress::Progress;
use crate::record::{Migration, Record};
use crate::testbed::machine::Accel;
use crate::ways::{Moved, Way};
use anyhow::{Context, Result, bail};
use pageferry_microvm::config::TrackingChoice;

/// So many failures of a way in a row, and it is left out of the turns that follow.
const FAILURES_IN_A_ROW_MAX: u32 = 2;

/// Attempts to boot a guest. Nothing is measured meanwhile, and KVM inside an emulator loses one
/// now and then.
const BOOTS_MAX: u32 = 2;

/// A way as it has its turns.
pub(super) struct Peer {
    /// Its name in the record.
    pub(super) group: String,
    pub(super) way: Way,
    /// The guest that it moves, by its place.
    lineage: usize,
    failures_in_a_row: u32,
}

/// The ways, and the guests that they move.
pub(super) struct Field {
    pub(super) peers: Vec<Peer>,
    lineages: Vec<Box<dyn Lineage>>,
    accel: Accel,
}

impl Peer {
    fn is_out(&self) -> bool {
        self.failures_in_a_row >= FAILURES_IN_A_ROW_MAX
    }
}

impl Field {
    pub(super) fn new(options: &PeersOptions) -> Result<Self> {
        let mut lineages: Vec<Box<dyn Lineage>> = Vec::new();
        let mut peers = Vec::new();
        if options.ways.iter().any(|way| *way != Way::Microvm) {
            lineages.push(Box::new(QemuLineage::new(options)?));
        }
        for way in &options.ways {
            let peer =
                |group: String, lineage| Peer { group, way: *way, lineage, failures_in_a_row: 0 };
            if *way != Way::Microvm {
                peers.push(peer(way.name(), 0));
                continue;
            }
            for tracking in &options.tracking {
                let group = match tracking {
                    TrackingChoice::Auto => way.name(),
                    TrackingChoice::Ring => format!("{}-ring", way.name()),
                    TrackingChoice::Log => format!("{}-log", way.name()),
                };
                peers.push(peer(group, lineages.len()));
                lineages.push(Box::new(MicrovmLineage::new(options, *tracking)?));
            }
        }
        Ok(Self { peers, lineages, accel: options.guest.accel })
    }

    /// Whether a way is left that has turns.
    pub(super) fn is_any_left(&self) -> bool {
        self.peers.iter().any(|peer| !peer.is_out())
    }

    /// What the reader must know of those that are not.
    pub(super) fn left_out(&self) -> Option<String> {
        let out: Vec<&str> =
            self.peers.iter().filter(|p| p.is_out()).map(|p| p.group.as_str()).collect();
        (!out.is_empty()).then(|| {
            format!("After {FAILURES_IN_A_ROW_MAX} failures in a row, or without a guest, there were no more turns of: {}.", out.join(", "))
        })
    }

    /// Boots one guest after the other, and holds each when it is there. The ways of one that does
    /// not boot have failed for good: to try again and again would take minutes each time.
    pub(super) fn boot(&mut self, record: &mut Record, progress: &Progress) {
        for index in 0..self.lineages.len() {
            progress.say("booting");
            let mut booted = self.boot_one(index, progress);
            for attempt in 1..BOOTS_MAX {
                let Err(e) = &booted else { break };
                if progress.is_interrupted() {
                    break;
                }
                record
                    .notes
                    .push(format!("Boot {attempt} of a guest failed and was repeated: {e:#}."));
                booted = self.boot_one(index, progress);
            }
            let Err(e) = booted.and_then(|()| self.hold(index, true)) else { continue };
            self.lineages[index].forget();
            if progress.is_interrupted() {
                record.interrupted = true;
                return;
            }
            let fix = if self.accel == Accel::Kvm { "; --accel tcg does without KVM" } else { "" };
            for peer in self.peers.iter_mut().filter(|peer| peer.lineage == index) {
                record.fail(&peer.group, 0, format!("the guest does not boot: {e:#}{fix}"));
                peer.failures_in_a_row = FAILURES_IN_A_ROW_MAX;
            }
        }
    }

    fn boot_one(&mut self, index: usize, progress: &Progress) -> Result<()> {
        let lineage = &mut self.lineages[index];
        lineage.start()?;
        lineage.wait_booted(&|| go_on(progress))
    }

    /// One turn of every way, and a look at every guest.
    pub(super) fn turn(&mut self, turn: u32, record: &mut Record, progress: &Progress) {
        for place in 0..self.peers.len() {
            // Whoever goes first finds the machine as the checks left it: each in its turn.
            let place = (place + turn as usize) % self.peers.len();
            if progress.is_interrupted() {
                record.interrupted = true;
                return;
            }
            if !self.peers[place].is_out() {
                progress.say(&self.peers[place].group);
                self.one(place, turn, record, progress);
            }
            progress.step();
        }
        self.check(turn, record);
    }

    fn one(&mut self, place: usize, turn: u32, record: &mut Record, progress: &Progress) {
        let Peer { group, way, lineage, .. } = &self.peers[place];
        let (group, way, lineage) = (group.clone(), *way, *lineage);
        match self.moved(lineage, way, progress) {
            Ok((sample, report)) => {
                self.peers[place].failures_in_a_row = 0;
                record.sample(&group, TOTAL, turn, sample.total_s * 1e3);
                record.sample(&group, DOWNTIME, turn, sample.downtime_ms);
                record.sample(&group, GAP, turn, sample.gap_ms);
                record.sample(&group, CPU, turn, sample.cpu_s);
                record.sample(&group, SENT, turn, sample.sent_mib);
                record.sample(&group, GAP_BEGAN, turn, sample.gap_began_ms);
                record.migrations.extend(report.map(|report| Migration { group, turn, report }));
            }
            Err(_) if progress.is_interrupted() && !self.lineages[lineage].is_there() => {
                record.interrupted = true;
            }
            Err(e) => {
                self.peers[place].failures_in_a_row += 1;
                record.fail(&group, turn, format!("{e:#}"));
            }
        }
    }

    /// Moves the guest, booted anew if an earlier turn lost it, and holds it again.
    fn moved(&mut self, index: usize, way: Way, progress: &Progress) -> Result<Moved> {
        let ready = if self.lineages[index].is_there() {
            self.hold(index, false)
        } else {
            self.boot_one(index, progress).context("booting another guest")
        };
        let moved = ready.and_then(|()| self.lineages[index].move_by(way));
        if moved.is_err() {
            self.lineages[index].forget_unless_well();
        }
        if self.lineages[index].is_there() && self.hold(index, true).is_err() {
            self.lineages[index].forget();
        }
        moved
    }

    /// Has every guest check its memory. One that is damaged is thrown away, and every way that had
    /// a part in it is told.
    fn check(&mut self, turn: u32, record: &mut Record) {
        for index in 0..self.lineages.len() {
            if !self.lineages[index].is_there() {
                continue;
            }
            let ready = self.hold(index, false);
            let checked = ready.and_then(|()| self.lineages[index].check());
            let Err(e) = checked.and_then(|()| self.hold(index, true)) else { continue };
            self.lineages[index].forget();
            let of_it = || self.peers.iter().filter(|peer| peer.lineage == index);
            let moved: Vec<&str> = of_it().map(|peer| peer.group.as_str()).collect();
            for peer in of_it() {
                let by = moved.join(", ");
                record.fail(
                    &peer.group,
                    turn,
                    format!(
                        "the guest's check of its memory failed after this turn: {e:#}; it was moved by {by}"
                    ),
                );
            }
        }
    }

    /// Has a guest be paused, or go on, where another one is to be measured meanwhile.
    fn hold(&mut self, index: usize, held: bool) -> Result<()> {
        if self.lineages.len() == 1 { Ok(()) } else { self.lineages[index].hold(held) }
    }
}

/// Fails if somebody wants the run to end.
fn go_on(progress: &Progress) -> Result<()> {
    if progress.is_interrupted() { bail!("it was interrupted") } else { Ok(()) }
}
