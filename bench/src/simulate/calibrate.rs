//! The costs of this host, from migrations over a cable that is not shaped: none of what is
//! measured here is checked against afterwards, and none of what is checked is used here.

use super::model::{Cable, Costs, Line, Synced, downtime_us, round_us};
use super::real::{Moved, Setting, move_once};
use super::traced::Harvested;
use crate::progress::Progress;
use crate::record::model::Calibration;
use crate::record::{Migration, Record};
use crate::shaped::{Rate, Shaped};
use crate::stats::{least_squares, median_of};
use anyhow::{Context, Result, bail};
use pageferry_engine::report::Outcome;

/// A limit that no downtime keeps: the engine goes on until rounds do not shrink any more, so there
/// are many small ones.
const NEVER_US: u64 = 1;

/// Guests of different sizes, of which different shares are written: what a page of memory costs, a
/// touched one and a dirty one can only be told apart so. None of them is among those of the check.
const SETTINGS: [Setting; 4] = [
    Setting { memory_mib: 96, working_mib: 32, rate_mb: 30, downtime_us_max: NEVER_US },
    Setting { memory_mib: 768, working_mib: 96, rate_mb: 120, downtime_us_max: NEVER_US },
    Setting { memory_mib: 320, working_mib: 192, rate_mb: 60, downtime_us_max: NEVER_US },
    Setting { memory_mib: 640, working_mib: 384, rate_mb: 150, downtime_us_max: NEVER_US },
];

/// A round of fewer bytes measures latency, not bandwidth.
const BANDWIDTH_SAMPLE_BYTES_MIN: u64 = 1 << 20;

/// Threads that the engine scans page tables with on a host that has as many cores; walking is
/// bound by the latency of memory, so they are taken to share it evenly.
pub const SCANNERS: u32 = 8;

/// Before and after the save.
const SYNCS_IN_DOWNTIME: usize = 2;

/// Migrations that calibrate makes with so many moves of each guest.
#[must_use]
pub fn steps(moves: u32) -> u64 {
    u64::from(moves) * SETTINGS.len() as u64
}

/// Measures them. None if the run was interrupted. The moves are kept in `record`.
pub fn calibrate(
    moves: u32,
    record: &mut Record,
    progress: &Progress,
) -> Result<Option<Calibration>> {
    let mut moved: Vec<(Setting, Moved)> = Vec::new();
    for setting in SETTINGS {
        let shaped = Shaped::up(Rate(None))?;
        let mut guest = setting.start()?;
        for turn in 0..moves {
            if progress.is_interrupted() {
                return Ok(None);
            }
            let (next, one) = move_once(&setting, guest, &shaped).context("calibrating")?;
            if one.report.outcome != Outcome::Completed {
                bail!(
                    "a move without a shaped cable failed: {}",
                    one.report.reason.unwrap_or_default()
                );
            }
            guest = next;
            let group = format!("unshaped, {setting}");
            record.migrations.push(Migration { group, turn, report: one.report.clone() });
            moved.push((setting, one));
            progress.step();
        }
        guest.check().context("the guest's memory is not what it wrote")?;
    }
    Ok(Some(fit(&moved)))
}

/// Median of what each move says, where it says something.
fn median(moved: &[(Setting, Moved)], of: impl Fn(&Setting, &Moved) -> Option<f64>) -> f64 {
    let mut samples: Vec<f64> =
        moved.iter().filter_map(|(setting, one)| of(setting, one)).collect();
    if samples.is_empty() { 0.0 } else { median_of(&mut samples) }
}

fn us(from: std::time::Instant, to: std::time::Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e6
}

/// What one move says of a line: one and the amount, and what it cost.
type Row = dyn Fn(&Setting, &Moved) -> Option<([f64; 2], f64)>;

fn fit(moved: &[(Setting, Moved)]) -> Calibration {
    let rows = |of: &Row| {
        least_squares::costs(&moved.iter().filter_map(|(s, m)| of(s, m)).collect::<Vec<_>>())
    };
    let line = |[fixed, each]: [f64; 2]| Line { fixed, each };
    let fixed = |us: f64| Line { fixed: us, each: 0.0 };

    let setup_us = line(rows(&|setting, one| {
        let (first, round) = (one.trace.syncs.first()?, one.report.rounds.first()?);
        Some((
            [1.0, setting.pages().1 as f64],
            us(one.begun, first.begun) - round.elapsed_us as f64,
        ))
    }));
    let state_bytes = line(rows(&|setting, one| {
        Some(([1.0, setting.pages().1 as f64], one.report.state_bytes as f64))
    }));
    let save_us = line(rows(&|_, one| {
        Some(([1.0, one.report.state_bytes as f64], one.report.downtime_us.save as f64))
    }));
    let load_us = line(rows(&|_, one| {
        Some(([1.0, one.report.state_bytes as f64], one.report.downtime_us.load as f64))
    }));
    let later: Vec<([f64; 2], f64)> = (moved.iter())
        .flat_map(|(_, one)| one.report.rounds.iter().skip(1))
        .map(|round| ([1.0, round.bytes as f64], round.elapsed_us as f64))
        .collect();
    let [round_fixed, byte_us] = least_squares::costs(&later);
    let first_bytes_per_second = median(moved, |_, one| {
        let round = one.report.rounds.first()?;
        let bytes = round.bytes >= BANDWIDTH_SAMPLE_BYTES_MIN;
        bytes.then(|| round.bytes as f64 * 1e6 / (round.elapsed_us as f64 - round_fixed).max(1.0))
    });
    let (sync, last_sync) = syncs(moved);
    let mut costs = Costs {
        setup_us,
        sync,
        last_sync,
        // On one host the thread that posts and those that carry share the cores: what a request
        // costs is in the rate.
        round_us: fixed(round_fixed),
        zero_us: 0.0,
        register_us: 0.0,
        first_bytes_per_second,
        bytes_per_second: if byte_us > 0.0 { 1e6 / byte_us } else { first_bytes_per_second },
        arm_us: 0.0,
        pause_us: fixed(median(moved, |_, one| Some(one.report.downtime_us.pause as f64))),
        save_us,
        load_us,
        vcpu_us: 0.0,
        messages_us: 0.0,
        resume_us: fixed(median(moved, |_, one| Some(one.report.downtime_us.resume as f64))),
    };
    // What is left is what nobody has a name for: threads that must be woken, above all.
    let cable = Cable { bytes_per_second: f64::INFINITY, round_trip_us: 0.0 };
    let rest = |of: &dyn Fn(&Setting, &Moved) -> Option<f64>| median(moved, of).max(0.0);
    costs.arm_us = rest(&|setting, one| {
        let (last, guest) = (self::last_sync(one)?, setting.modelled(0.0));
        let push = round_us(&guest, &cable, &costs, last.pages as f64);
        Some(us(last.begun + last.took, one.trace.paused?) - push)
    });
    costs.messages_us = rest(&|setting, one| {
        let (guest, pages) = (setting.modelled(one.report.state_bytes as f64), last_pages(one)?);
        Some(one.report.downtime_us.total as f64 - downtime_us(&guest, &cable, &costs, pages))
    });
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    Calibration { costs, state_bytes, scanners: cores.min(SCANNERS) }
}

/// Harvests between rounds, and those in the downtime. The latter find few pages here, too few to
/// tell what one of them costs: that is taken from the former.
fn syncs(moved: &[(Setting, Moved)]) -> (Synced, Synced) {
    let (mut between, mut last) = (Vec::new(), Vec::new());
    for (setting, one) in moved {
        let (memory, all) = (setting.pages().0 as f64, &one.trace.syncs);
        let rounds = all.len().saturating_sub(SYNCS_IN_DOWNTIME);
        let took = |synced: &Harvested| synced.took.as_secs_f64() * 1e6;
        between.extend(all[..rounds].iter().map(|h| ([1.0, memory, h.pages as f64], took(h))));
        last.extend(all[rounds..].iter().map(|h| (memory, h.pages as f64, took(h))));
    }
    let [fixed, each, dirty_us] = least_squares::costs(&between);
    let between = Synced { memory_us: Line { fixed, each }, dirty_us };
    let rows: Vec<([f64; 2], f64)> = last
        .into_iter()
        .map(|(memory, dirty, took)| ([1.0, memory], took - dirty * dirty_us))
        .collect();
    let [fixed, each] = least_squares::costs(&rows);
    (between, Synced { memory_us: Line { fixed, each }, dirty_us })
}

/// The sync of the last round, before the two in the downtime.
fn last_sync(one: &Moved) -> Option<Harvested> {
    let syncs = &one.trace.syncs;
    syncs.get(syncs.len().checked_sub(SYNCS_IN_DOWNTIME + 1)?).copied()
}

/// Pages that were dirty when the guest was paused.
pub(super) fn last_pages(one: &Moved) -> Option<f64> {
    let syncs = &one.trace.syncs;
    let downtime = syncs.get(syncs.len().checked_sub(SYNCS_IN_DOWNTIME)?..)?;
    Some(downtime.iter().map(|sync| sync.pages as f64).sum())
}

/// The bandwidth of the host that was measured, in words.
#[must_use]
pub fn describe(calibration: &Calibration) -> String {
    let costs = &calibration.costs;
    format!(
        "This host, measured without shaping: {:.2} GB/s in the first round and {:.2} GB/s later, set-up {:.1} ms and {:.0} ns a \
         touched page, a sync {:.0} us and {:.2} ns a page of memory and {:.0} ns a dirty one (in the downtime {:.0}, {:.2} and {:.0}), a round {:.0} us, pause {:.0} us, \
         save {:.0} us, load {:.0} us and {:.1} ns a byte of state, messages {:.0} us, resume {:.0} us.",
        costs.first_bytes_per_second / 1e9,
        costs.bytes_per_second / 1e9,
        costs.setup_us.fixed / 1e3,
        costs.setup_us.each * 1e3,
        costs.sync.memory_us.fixed,
        costs.sync.memory_us.each * 1e3,
        costs.sync.dirty_us * 1e3,
        costs.last_sync.memory_us.fixed,
        costs.last_sync.memory_us.each * 1e3,
        costs.last_sync.dirty_us * 1e3,
        costs.round_us.fixed,
        costs.pause_us.fixed,
        costs.save_us.fixed,
        costs.load_us.fixed,
        (costs.save_us.each + costs.load_us.each) * 1e3,
        costs.messages_us,
        costs.resume_us.fixed,
    )
}
