//! `sweep`: dirty rate against bandwidth. Where rounds still shrink, where a switchover must be
//! forced, and what both cost: by real moves over shaped cables ([`crate::shaped`]), beside them
//! the model, and the model alone where no machine at hand reaches ([`crate::simulate`]).

mod command;
mod qemu;

pub use command::SweepArgs;

use crate::progress::Progress;
use crate::record::model::{Calibration, Checked};
use crate::record::show::digits;
use crate::record::{Cell, CellEnding, Map, Migration, Record, Spec};
use crate::shaped::{self, Rate, Shaped};
use crate::simulate::calibrate;
use crate::simulate::check::model_of;
use crate::simulate::model::{Ending, Outlook};
use crate::simulate::real::{Moved, Setting, move_once};
use crate::simulate::scale::{self, Assumed, PageCosts, Scenario, Tracking};
use crate::stats::median_of;
use anyhow::{Context, Result, bail};
use pageferry_engine::report::Outcome;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Cables, in Gb/s.
pub const GBIT: [f64; 4] = [1.0, 2.0, 5.0, 10.0];
/// Dirty rates, in MB/s: around what these cables carry.
pub const RATES_MB: [u32; 6] = [20, 50, 100, 200, 400, 800];
/// The same of a quick run.
pub const RATES_MB_QUICK: [u32; 4] = [20, 100, 200, 800];

/// Moves for each place of the map: a run that is not quick, and one that is.
pub const MOVES: [u32; 2] = [3, 1];
/// And for the calibration of the model.
const CALIBRATION_MOVES: [u32; 2] = [4, 2];

/// The model's range: cables in Gb/s, and dirty rates in MB/s from the top.
const MODEL_GBIT: [f64; 7] = [10.0, 25.0, 40.0, 100.0, 200.0, 300.0, 400.0];
const MODEL_RATES_MB: [f64; 7] = [100_000.0, 50_000.0, 20_000.0, 10_000.0, 5_000.0, 1_000.0, 200.0];

/// The downtime that is allowed there. By page tables two syncs of a TiB alone take a good part of
/// it.
const LARGE_DOWNTIME_US_MAX: u64 = 1_000_000;

const TOTAL: Spec = Spec::headline("total", "ms");
const DOWNTIME: Spec = Spec::headline("downtime", "ms");
const ROUNDS: Spec = Spec::fact("rounds", "");
const MODEL_TOTAL: Spec = Spec::fact("total by the model", "ms");
const MODEL_DOWNTIME: Spec = Spec::fact("downtime by the model", "ms");

/// What is swept.
#[derive(Debug, Clone, Serialize)]
pub struct SweepOptions {
    /// Cables, in Gb/s.
    pub gbit: Vec<f64>,
    /// Dirty rates, in MB/s.
    pub rates_mb: Vec<u32>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Memory written over and over, in MiB.
    pub working_mib: u32,
    /// Longest downtime that the engine is allowed, in microseconds.
    pub downtime_us_max: u64,
    /// Moves at each place.
    pub moves: u32,
    /// Within two minutes.
    pub quick: bool,
    /// Whether QEMU's own ways are swept, too.
    pub qemu: bool,
    /// A record of `simulate` whose calibration and check are taken for the model.
    pub from: Option<PathBuf>,
}

impl SweepOptions {
    /// Fails on what cannot be.
    pub fn prepare(&self) -> Result<()> {
        if let Some(gbit) = self.gbit.iter().find(|g| !(0.1..=100.0).contains(*g)) {
            bail!("--gbit {gbit} must be 0.1 to 100");
        }
        if let Some(rate) = self.rates_mb.iter().find(|rate| !(1..=10_000).contains(*rate)) {
            bail!("--rates {rate} must be 1 to 10000 MB/s");
        }
        if self.gbit.is_empty() || self.rates_mb.is_empty() {
            bail!("--gbit and --rates need one value each at least");
        }
        if self.working_mib == 0 || self.working_mib > self.memory_mib {
            bail!("--working {} must be 1 to --memory {}", self.working_mib, self.memory_mib);
        }
        if self.qemu {
            qemu::check()?;
        }
        shaped::sweep().context("sweep moves guests between two network namespaces")
    }

    fn setting(&self, rate_mb: u32) -> Setting {
        Setting {
            memory_mib: self.memory_mib,
            working_mib: self.working_mib,
            rate_mb,
            downtime_us_max: self.downtime_us_max,
        }
    }
}

impl SweepOptions {
    /// Dirty rates with the busiest guest on top, as a chart has it.
    fn rates(&self) -> Vec<u32> {
        let mut rates = self.rates_mb.clone();
        rates.sort_unstable_by(|a, b| b.cmp(a));
        rates
    }

    /// A map of all places, still empty.
    fn map(&self, title: &str, caption: String) -> Map {
        Map {
            title: title.into(),
            caption,
            x: "cable, Gb/s".into(),
            columns: self.gbit.iter().map(f64::to_string).collect(),
            y: "MB/s written".into(),
            rows: self.rates().iter().map(u32::to_string).collect(),
            cells: Vec::new(),
        }
    }
}

/// Sweeps. What was measured until an interruption is kept.
pub fn run(options: &SweepOptions, progress: &Progress) -> Result<Record> {
    let title = format!(
        "where a guest of {} MiB that writes over {} MiB stops converging, by dirty rate and bandwidth",
        options.memory_mib, options.working_mib
    );
    let mut record = Record::begin("sweep", title, options)?;
    let places = options.gbit.len() as u64 * options.rates_mb.len() as u64;
    let calibration_moves = CALIBRATION_MOVES[usize::from(options.quick)];
    let calibration_steps =
        if options.from.is_some() { 0 } else { calibrate::steps(calibration_moves) };
    let qemu_steps = if options.qemu { places * qemu::Way::ALL.len() as u64 } else { 0 };
    progress.expect(calibration_steps + places * u64::from(options.moves) + qemu_steps);
    let checked = match &options.from {
        Some(path) => Record::read(path)?
            .model
            .with_context(|| format!("{} is no record of simulate", path.display()))?,
        None => match calibrate::calibrate(calibration_moves, &mut record, progress)? {
            Some(calibration) => Checked::new(calibration, &[]),
            None => {
                record.interrupted = true;
                return Ok(record);
            }
        },
    };
    let (real, model) = maps(options, &checked.calibration, &mut record, progress)?;
    record.maps.extend([real, model]);
    if options.qemu && !record.interrupted {
        let by_qemu = qemu_maps(options, &mut record, progress);
        record.maps.extend(by_qemu);
    }
    if !record.interrupted {
        match scale::page_costs(progress)? {
            Some(page_costs) => {
                record.maps.extend(
                    [Tracking::Scan, Tracking::Ring].map(|by| large(by, &checked, page_costs)),
                );
            }
            None => record.interrupted = true,
        }
    }
    record.model = Some(checked);
    notes(&mut record, options);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

/// Real moves and the model, over the same places.
fn maps(
    options: &SweepOptions,
    calibration: &Calibration,
    record: &mut Record,
    progress: &Progress,
) -> Result<(Map, Map)> {
    let limit = digits(options.downtime_us_max as f64 / 1e3);
    let rates = options.rates();
    let mut real = options.map(
        "pageferry, measured",
        format!(
            "Total time and downtime, medians of {} real moves over a shaped cable. Converged: the downtime was predicted to be \
             within {limit} ms. Forced: rounds did not shrink any more, and the guest was switched over as --when-stuck switchover \
             asks; without it these guests would have stayed at the source.",
            options.moves
        ),
    );
    let mut model = options.map(
        "The model of the same moves",
        "Output of the model for these guests and cables. It knows this host's costs from moves without shaping, and nothing of \
         the moves above."
            .into(),
    );
    for (row, rate_mb) in rates.iter().enumerate() {
        let setting = options.setting(*rate_mb);
        for (column, gbit) in options.gbit.iter().enumerate() {
            if progress.is_interrupted() {
                record.interrupted = true;
                return Ok((real, model));
            }
            let (at, rate) = ((column, row), Rate::gbit(*gbit));
            let group = format!("{rate}, {rate_mb} MB/s");
            real.cells.push(match moved(&setting, rate, options.moves, progress) {
                Ok(moved) => real_cell(&group, at, &setting, moved, record),
                Err(e) => {
                    record.fail(&group, 0, format!("{e:#}"));
                    Cell { at, ending: CellEnding::Failed, lines: Vec::new() }
                }
            });
            if let Some(outlook) = model_of(&setting, rate, calibration) {
                record.sample(&group, MODEL_TOTAL, 0, outlook.total_us / 1e3);
                record.sample(&group, MODEL_DOWNTIME, 0, outlook.downtime_us / 1e3);
                model.cells.push(model_cell(at, &outlook));
            }
        }
    }
    Ok((real, model))
}

/// QEMU's own ways over the same cables. One guest boots for each dirty rate, and goes from end to
/// end.
fn qemu_maps(options: &SweepOptions, record: &mut Record, progress: &Progress) -> Vec<Map> {
    let caption = format!(
        "QEMU's own migration of a Linux guest of {} MiB that writes at this rate over {} MiB, with a downtime-limit of {} ms and no bound on \
         bandwidth; one move at each place. It is another guest than the one above, under TCG, so compare where it stops converging and \
         not its times. Refused: cancelled after {} s without convergence.",
        options.memory_mib,
        options.working_mib,
        digits(options.downtime_us_max as f64 / 1e3),
        qemu::PATIENCE.as_secs()
    );
    let mut maps = qemu::Way::ALL
        .map(|way| options.map(&format!("{}, measured", way.name()), caption.clone()));
    for (row, rate_mb) in options.rates().into_iter().enumerate() {
        if let Err(e) = qemu_row(options, row, rate_mb, &mut maps, record, progress) {
            record.fail(&format!("QEMU, {rate_mb} MB/s"), 0, format!("{e:#}"));
        }
    }
    maps.into()
}

fn qemu_row(
    options: &SweepOptions,
    row: usize,
    rate_mb: u32,
    maps: &mut [Map],
    record: &mut Record,
    progress: &Progress,
) -> Result<()> {
    if progress.is_interrupted() {
        record.interrupted = true;
        return Ok(());
    }
    let shaped = Shaped::up(Rate(None))?;
    let size = qemu::GuestSize {
        memory_mib: options.memory_mib,
        working_mib: options.working_mib,
        rate_mb,
    };
    let mut guest = qemu::Traveller::boot(&shaped, size)?;
    for (column, gbit) in options.gbit.iter().enumerate() {
        shaped.reshape(Rate::gbit(*gbit))?;
        for (way, map) in qemu::Way::ALL.into_iter().zip(&mut *maps) {
            if progress.is_interrupted() {
                record.interrupted = true;
                return Ok(());
            }
            let group = format!("{}, {}, {rate_mb} MB/s", way.name(), Rate::gbit(*gbit));
            let at = (column, row);
            let took = guest.travel(way, Duration::from_micros(options.downtime_us_max));
            map.cells.push(match &took {
                Ok(Some(took)) => {
                    record.sample(&group, TOTAL, 0, took.total_ms);
                    record.sample(&group, DOWNTIME, 0, took.downtime_ms);
                    let lines = lines(took.total_ms * 1e3, took.downtime_ms * 1e3);
                    Cell { at, ending: CellEnding::Converged, lines }
                }
                Ok(None) => {
                    let lines = vec![format!("> {} s", qemu::PATIENCE.as_secs())];
                    Cell { at, ending: CellEnding::Refused, lines }
                }
                Err(_) => Cell { at, ending: CellEnding::Failed, lines: Vec::new() },
            });
            took.with_context(|| group)?;
            progress.step();
        }
    }
    guest.verdict().context("after all moves")
}

fn moved(setting: &Setting, rate: Rate, moves: u32, progress: &Progress) -> Result<Vec<Moved>> {
    let shaped = Shaped::up(rate)?;
    let mut guest = setting.start()?;
    let mut all = Vec::new();
    for _ in 0..moves {
        if progress.is_interrupted() && !all.is_empty() {
            break;
        }
        let (next, moved) = move_once(setting, guest, &shaped)?;
        guest = next;
        all.push(moved);
        progress.step();
    }
    guest.check().context("the guest's memory is not what it wrote")?;
    Ok(all)
}

fn real_cell(
    group: &str,
    at: (usize, usize),
    setting: &Setting,
    moved: Vec<Moved>,
    record: &mut Record,
) -> Cell {
    let (mut totals, mut downtimes) = (Vec::new(), Vec::new());
    let mut forced = 0;
    for (turn, Moved { report, .. }) in (0..).zip(moved) {
        if report.outcome == Outcome::Completed {
            let (total, downtime) =
                (report.total_us as f64 / 1e3, report.downtime_us.total as f64 / 1e3);
            record.sample(group, TOTAL, turn, total);
            record.sample(group, DOWNTIME, turn, downtime);
            record.sample(group, ROUNDS, turn, report.rounds.len() as f64);
            totals.push(total);
            downtimes.push(downtime);
            forced += usize::from(report.predicted_downtime_us > setting.downtime_us_max);
        } else {
            record.fail(
                group,
                turn,
                report.reason.clone().unwrap_or_else(|| "no reason was given".into()),
            );
        }
        record.migrations.push(Migration { group: group.into(), turn, report });
    }
    if totals.is_empty() {
        return Cell { at, ending: CellEnding::Failed, lines: Vec::new() };
    }
    // At the border some moves converge and some do not: more than half say what it is.
    let ending = if 2 * forced > totals.len() { CellEnding::Forced } else { CellEnding::Converged };
    Cell { at, ending, lines: lines(median_of(&mut totals) * 1e3, median_of(&mut downtimes) * 1e3) }
}

fn model_cell(at: (usize, usize), outlook: &Outlook) -> Cell {
    let ending = match outlook.ending {
        Ending::Converged => CellEnding::Converged,
        Ending::Forced => CellEnding::Forced,
        Ending::Refused => CellEnding::Refused,
    };
    Cell { at, ending, lines: lines(outlook.total_us, outlook.downtime_us) }
}

fn lines(total_us: f64, downtime_us: f64) -> Vec<String> {
    let time = |us: f64| {
        if us < 1e6 {
            format!("{} ms", digits(us / 1e3))
        } else {
            format!("{} s", digits(us / 1e6))
        }
    };
    vec![time(total_us), format!("({})", time(downtime_us))]
}

/// The model alone, at a size that nobody here can measure.
fn large(tracking: Tracking, checked: &Checked, page_costs: PageCosts) -> Map {
    let base = Scenario {
        memory_gib: 1024.0,
        working_share: 0.25,
        hot_share: 0.9,
        rate_mb: 0.0,
        tracking,
        vcpus: 256,
        gbit: 0.0,
        round_trip_us: 10.0,
        downtime_us_max: LARGE_DOWNTIME_US_MAX,
        assumed: Assumed::default(),
    };
    let mut cells = Vec::new();
    for (row, rate_mb) in MODEL_RATES_MB.into_iter().enumerate() {
        for (column, gbit) in MODEL_GBIT.into_iter().enumerate() {
            let outlook =
                Scenario { rate_mb, gbit, ..base }.outlook(&checked.calibration, page_costs);
            cells.push(model_cell((column, row), &outlook));
        }
    }
    let by = tracking.words();
    let range = match (checked.total_errors, checked.downtime_errors) {
        (Some(total), Some(downtime)) => format!(
            "Where it was checked it was off by {:+.0} to {:+.0} % of the total and {:+.0} to {:+.0} % of the downtime.",
            total.0 * 100.0,
            total.1 * 100.0,
            downtime.0 * 100.0,
            downtime.1 * 100.0
        ),
        _ => "It was not checked in this run: the two maps above show how it does at small size; simulate --check, and \
              sweep --from its record, give a range."
            .into(),
    };
    Map {
        title: format!("MODEL, not measured: 1 TiB and 256 vCPUs by RDMA, tracked by {by}"),
        caption: format!(
            "Output of a model: total time and, in brackets, downtime; the limit is 1 s. A quarter of the memory is written, nine in \
             ten writes go to a sixteenth of that. {range} Registration and vCPU state are assumed."
        ),
        x: "cable, Gb/s".into(),
        columns: MODEL_GBIT.iter().map(f64::to_string).collect(),
        y: "MB/s written".into(),
        rows: MODEL_RATES_MB.iter().map(f64::to_string).collect(),
        cells,
    }
}

fn notes(record: &mut Record, options: &SweepOptions) {
    let notes = [
        "Rounds shrink as long as the cable carries pages faster than the guest makes new ones dirty. A guest that writes the \
         same pages again and again makes fewer of them dirty than it writes, so it may converge above the cable's rate."
            .to_owned(),
        format!(
            "Each place is the synthetic guest, moved by the engine between two network namespaces over a veth pair that tbf \
             holds to the rate, {} times. A cable of 1 Gb/s carries some 120 MB/s of memory. Source, destination and guest share this \
             host's cores.",
            options.moves
        ),
    ];
    record.notes.extend(notes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_swept_is_refused_by_the_name_of_its_option() {
        let good = SweepOptions {
            gbit: vec![1.0],
            rates_mb: vec![10],
            memory_mib: 64,
            working_mib: 16,
            downtime_us_max: 1,
            moves: 1,
            quick: true,
            qemu: false,
            from: None,
        };
        let bad = [
            ("--gbit", SweepOptions { gbit: vec![1e6], ..good.clone() }),
            ("--gbit", SweepOptions { gbit: Vec::new(), ..good.clone() }),
            ("--rates", SweepOptions { rates_mb: vec![0], ..good.clone() }),
            ("--working", SweepOptions { working_mib: 65, ..good.clone() }),
        ];
        for (option, options) in bad {
            assert!(options.prepare().unwrap_err().to_string().contains(option));
        }
    }

    #[test]
    fn times_are_told_in_the_unit_that_fits() {
        assert_eq!(lines(1_500_000.0, 12_340.0), ["1.50 s", "(12.3 ms)"]);
    }
}
