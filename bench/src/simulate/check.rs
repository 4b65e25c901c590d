//! The model beside reality: the same guests over the same cables, once as arithmetic and several
//! times for real.

use super::model::{Cable, Ending, Outlook, outlook};
use super::real::{Moved, Setting, move_once};
use crate::progress::Progress;
use crate::record::model::{Calibration, DOWNTIME_SHARE_MAX, Point, TOTAL_SHARE_MAX};
use crate::record::show::digits;
use crate::record::{Migration, Record, Spec, Table};
use crate::shaped::{Rate, Shaped};
use crate::stats::median_of;
use anyhow::Result;
use pageferry_engine::guest::SourceGuest;
use pageferry_engine::report::Outcome;

/// The rates of cables, in Gb/s.
pub const GBIT: [f64; 4] = [1.0, 2.0, 5.0, 10.0];

const LIMIT_US: u64 = 30_000;

/// The guests: quiet and busy ones, small and large ones, and one that no slow cable keeps up with.
pub const SETTINGS: [Setting; 6] = [
    Setting { memory_mib: 256, working_mib: 64, rate_mb: 20, downtime_us_max: LIMIT_US },
    Setting { memory_mib: 256, working_mib: 64, rate_mb: 80, downtime_us_max: LIMIT_US },
    Setting { memory_mib: 256, working_mib: 128, rate_mb: 200, downtime_us_max: LIMIT_US },
    Setting { memory_mib: 1024, working_mib: 256, rate_mb: 40, downtime_us_max: LIMIT_US },
    Setting { memory_mib: 512, working_mib: 256, rate_mb: 100, downtime_us_max: LIMIT_US },
    Setting { memory_mib: 64, working_mib: 16, rate_mb: 50, downtime_us_max: LIMIT_US },
];

const TOTAL: Spec = Spec::headline("total", "ms");
const DOWNTIME: Spec = Spec::headline("downtime", "ms");
const MODEL_TOTAL: Spec = Spec::fact("total by the model", "ms");
const MODEL_DOWNTIME: Spec = Spec::fact("downtime by the model", "ms");
const LAST_PAGES: Spec = Spec::fact("pages dirty at the pause", "");
const ROUNDS: Spec = Spec::fact("rounds", "");

/// What the model says of one point. It is told the setting and the host's costs, and nothing of
/// the moves.
#[must_use]
pub fn model_of(setting: &Setting, rate: Rate, calibration: &Calibration) -> Option<Outlook> {
    let state_bytes = calibration.state_bytes.of(setting.pages().1 as f64);
    let cable = Cable { bytes_per_second: rate.payload_bytes_per_second(), round_trip_us: 0.0 };
    // Only asked what it expects of itself.
    let facts = setting.idle().ok()?.facts().ok()?;
    Some(outlook(
        &setting.modelled(state_bytes),
        &cable,
        &calibration.costs,
        &setting.engine(&facts),
    ))
}

/// Moves every guest so often over every cable. What was measured until an interruption is kept.
pub fn check(
    rates: &[f64],
    settings: &[Setting],
    moves: u32,
    calibration: &Calibration,
    record: &mut Record,
    progress: &Progress,
) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for setting in settings {
        for gbit in rates {
            let rate = Rate::gbit(*gbit);
            let group = format!("{rate}, {setting}");
            let real = match real(setting, rate, moves, progress) {
                Ok(real) => real,
                Err(e) => {
                    record.fail(&group, 0, format!("{e:#}"));
                    continue;
                }
            };
            let model = model_of(setting, rate, calibration);
            points.extend(keep(&group, *gbit, setting, real, model, record));
            if progress.is_interrupted() {
                record.interrupted = true;
                return Ok(points);
            }
        }
    }
    Ok(points)
}

fn real(setting: &Setting, rate: Rate, moves: u32, progress: &Progress) -> Result<Vec<Moved>> {
    let shaped = Shaped::up(rate)?;
    let mut guest = setting.start()?;
    let mut real = Vec::new();
    for _ in 0..moves {
        if progress.is_interrupted() {
            break;
        }
        let (next, moved) = move_once(setting, guest, &shaped)?;
        guest = next;
        real.push(moved);
        progress.step();
    }
    guest.check()?;
    Ok(real)
}

fn keep(
    group: &str,
    gbit: f64,
    setting: &Setting,
    real: Vec<Moved>,
    model: Option<Outlook>,
    record: &mut Record,
) -> Option<Point> {
    let (mut totals, mut downtimes, mut rounds) = (Vec::new(), Vec::new(), Vec::new());
    for (turn, moved) in (0..).zip(real) {
        let last_pages = super::calibrate::last_pages(&moved);
        let report = moved.report;
        if report.outcome == Outcome::Completed {
            let (total, downtime) =
                (report.total_us as f64 / 1e3, report.downtime_us.total as f64 / 1e3);
            record.sample(group, TOTAL, turn, total);
            record.sample(group, DOWNTIME, turn, downtime);
            record.sample(group, ROUNDS, turn, report.rounds.len() as f64);
            record.sample(group, LAST_PAGES, turn, last_pages.unwrap_or(f64::NAN));
            totals.push(total);
            downtimes.push(downtime);
            rounds.push(report.rounds.len() as f64);
        } else {
            record.fail(
                group,
                turn,
                report.reason.clone().unwrap_or_else(|| "no reason was given".into()),
            );
        }
        record.migrations.push(Migration { group: group.into(), turn, report });
    }
    let model = model?;
    let (model_total, model_downtime) = (model.total_us / 1e3, model.downtime_us / 1e3);
    record.sample(group, MODEL_TOTAL, 0, model_total);
    record.sample(group, MODEL_DOWNTIME, 0, model_downtime);
    if totals.is_empty() {
        return None;
    }
    Some(Point {
        gbit,
        setting: *setting,
        real_ms: (median_of(&mut totals), median_of(&mut downtimes)),
        model_ms: (model_total, model_downtime),
        rounds: (median_of(&mut rounds), model.rounds.len() as u32),
    })
}

/// How many points are inside, of total and of downtime.
#[must_use]
pub fn inside(points: &[Point]) -> (usize, usize) {
    let count = |of: fn(&Point) -> bool| points.iter().filter(|point| of(point)).count();
    (count(|p| p.is_inside().0), count(|p| p.is_inside().1))
}

/// Every point, those outside as well.
#[must_use]
pub fn table(points: &[Point]) -> Table {
    let head = [
        "cable",
        "guest",
        "total ms",
        "model",
        "off by",
        "downtime ms",
        "model",
        "off by",
        "rounds",
        "model",
    ];
    let percent = |share: f64, inside: bool| {
        format!("{:+.0} %{}", share * 100.0, if inside { "" } else { " outside" })
    };
    let row = |p: &Point| {
        let (errors, fits) = (p.errors(), p.is_inside());
        vec![
            Rate::gbit(p.gbit).to_string(),
            p.setting.to_string(),
            digits(p.real_ms.0),
            digits(p.model_ms.0),
            percent(errors.0, fits.0),
            digits(p.real_ms.1),
            digits(p.model_ms.1),
            percent(errors.1, fits.1),
            digits(p.rounds.0),
            p.rounds.1.to_string(),
        ]
    };
    let (total, downtime) = inside(points);
    let of = points.len();
    Table {
        title: "The model beside real migrations".into(),
        caption: format!(
            "Medians of real moves, and what the model says without having seen them. Of {of} points {total} are within {:.0} % \
             of the total, {downtime} within {:.0} % of the downtime. All are here.",
            TOTAL_SHARE_MAX * 100.0,
            DOWNTIME_SHARE_MAX * 100.0
        ),
        head: head.map(Into::into).into(),
        rows: points.iter().map(row).collect(),
    }
}

/// In one word.
#[must_use]
pub fn word(ending: Ending) -> &'static str {
    match ending {
        Ending::Converged => "converges",
        Ending::Forced => "forced",
        Ending::Refused => "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(model_ms: (f64, f64)) -> Point {
        Point {
            gbit: 1.0,
            setting: SETTINGS[0],
            real_ms: (100.0, 10.0),
            model_ms,
            rounds: (3.0, 3),
        }
    }

    #[test]
    fn points_outside_are_counted_and_shown() {
        let points = [point((109.0, 8.1)), point((111.0, 10.0)), point((89.0, 12.5))];
        assert_eq!(inside(&points), (1, 2));
        let table = table(&points);
        assert_eq!(table.rows.len(), 3);
        assert!(
            table.caption.contains("3 points 1 are") && table.caption.contains("2 within 20 %")
        );
        assert!(
            table.rows[1][4].contains("+11 % outside")
                && table.rows[2][7].contains("+25 % outside")
        );
    }
}
