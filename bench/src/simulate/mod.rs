//! `simulate`: the engine's own policy against a modelled guest, host and cable ([`model`]),
//! checked against real migrations over shaped cables ([`check`]), and only then taken further than
//! any machine at hand ([`scale`]).
//!
//! ```text
//!   calibrate: real moves, unshaped   ->  Costs of this host
//!   check:     real moves, shaped     ->  how far the model is off      (none of these points was seen by calibrate)
//!   scale:     no moves               ->  rows that say that they are a model's, with that range
//! ```

pub mod calibrate;
pub mod check;
mod command;
pub mod guest;
pub mod model;
pub mod real;
pub mod scale;
pub mod traced;

use crate::progress::Progress;
use crate::record::Record;
use crate::record::model::Checked;
use crate::shaped;
use anyhow::{Context, Result, bail};
pub use command::SimulateArgs;
use scale::Scenario;
use serde::Serialize;
use std::path::PathBuf;

/// Moves of each guest: a run that is not quick, and one that is.
pub const MOVES: [u32; 2] = [5, 2];

/// Guests of the check of a quick run; the first of all.
const SETTINGS_QUICK: usize = 3;

/// What is modelled.
#[derive(Debug, Clone, Serialize)]
pub struct SimulateOptions {
    /// Whether to check it against real migrations.
    pub check: bool,
    /// Moves of each guest, for the calibration and for each point of the check.
    pub moves: u32,
    /// Fewer points, within two minutes.
    pub quick: bool,
    /// Cables of the check, in Gb/s.
    pub gbit: Vec<f64>,
    /// A record whose calibration and check are taken instead.
    pub from: Option<PathBuf>,
    /// A guest and cable to model; the built-in ones without.
    pub scenario: Option<Scenario>,
    /// What is assumed of hardware that this host does not have.
    pub assumed: scale::Assumed,
}

impl SimulateOptions {
    /// Fails on what cannot be.
    pub fn prepare(&self) -> Result<()> {
        if self.from.is_some() && self.check {
            bail!("--from takes the check of another run: leave out one of --from and --check");
        }
        if let Some(gbit) = self.gbit.iter().find(|g| !(0.1..=100.0).contains(*g)) {
            bail!("--gbit {gbit} must be 0.1 to 100");
        }
        if let Some(s) = &self.scenario {
            let bounds = [
                ("--memory", s.memory_gib, 0.0625, 16_384.0),
                ("--rate", s.rate_mb, 0.0, 1e6),
                ("--bandwidth", s.gbit, 0.1, 1000.0),
                ("--working", s.working_share, 0.001, 1.0),
                ("--hot", s.hot_share, 0.0, 1.0),
            ];
            for (option, value, low, high) in bounds {
                if !(low..=high).contains(&value) {
                    bail!("{option} {value} must be {low} to {high}");
                }
            }
        }
        if self.from.is_none() {
            shaped::sweep().context("simulate moves guests between two network namespaces")?;
        }
        Ok(())
    }
}

/// Calibrates, checks if asked to, and models.
pub fn run(options: &SimulateOptions, progress: &Progress) -> Result<Record> {
    let title = if options.check {
        "the engine's policy against a modelled guest, beside real migrations"
    } else {
        "the engine's policy against a modelled guest"
    };
    let mut record = Record::begin("simulate", title.into(), options)?;
    let settings =
        &check::SETTINGS[..if options.quick { SETTINGS_QUICK } else { check::SETTINGS.len() }];
    let checked = match &options.from {
        Some(path) => Record::read(path)?
            .model
            .with_context(|| format!("{} is no record of simulate", path.display()))?,
        None => {
            let points = if options.check { options.gbit.len() * settings.len() } else { 0 };
            progress
                .expect(calibrate::steps(options.moves) + u64::from(options.moves) * points as u64);
            let Some(calibration) = calibrate::calibrate(options.moves, &mut record, progress)?
            else {
                record.interrupted = true;
                return Ok(record);
            };
            record.notes.push(calibrate::describe(&calibration));
            let points = if options.check {
                check::check(
                    &options.gbit,
                    settings,
                    options.moves,
                    &calibration,
                    &mut record,
                    progress,
                )?
            } else {
                Vec::new()
            };
            if !points.is_empty() {
                record.tables.push(check::table(&points));
            }
            Checked::new(calibration, &points)
        }
    };
    if !record.interrupted {
        match scale::page_costs(progress)? {
            Some(page_costs) => {
                let scenarios = match options.scenario {
                    Some(scenario) => vec![scenario],
                    None => scale::scenarios(options.assumed),
                };
                record.tables.push(scale::table(&scenarios, &checked, page_costs));
                let plots = scenarios.last().map(|s| scale::plots(s, &checked, page_costs));
                record.curves = plots.unwrap_or_default();
            }
            None => record.interrupted = true,
        }
    }
    record.model = Some(checked);
    notes(&mut record);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

fn notes(record: &mut Record) {
    let notes = [
        "The model calls the policy that the engine calls (Estimator, Policy::decide), round after round. What a round takes, \
         what the guest writes meanwhile and what a downtime is made of is arithmetic.",
        "Real migrations: the synthetic guest, moved by the engine from one network namespace to another over a veth pair, which \
         tbf holds to a rate. The model is told the rate, of which 95.6 % are payload, the guest, and the costs of this host as moves \
         without shaping show them. Nothing is fitted on a move that is checked.",
        "Where a predicted downtime is close to the limit, one round more or less is chance, and the downtime jumps with it: then \
         the rounds of reality and model differ.",
    ];
    record.notes.extend(notes.map(str::to_owned));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_modelled_is_refused_by_the_name_of_its_option() {
        let scenario = scale::scenarios(scale::Assumed::default())[0];
        let good = SimulateOptions {
            check: false,
            moves: 1,
            quick: true,
            gbit: vec![1.0],
            from: Some("nowhere.json".into()),
            scenario: Some(scenario),
            assumed: scale::Assumed::default(),
        };
        assert!(good.prepare().is_ok());
        let with = |scenario| SimulateOptions { scenario: Some(scenario), ..good.clone() };
        let bad = [
            ("--from", SimulateOptions { check: true, ..good.clone() }),
            ("--gbit", SimulateOptions { gbit: vec![0.0], ..good.clone() }),
            ("--gbit", SimulateOptions { gbit: vec![f64::NAN], ..good.clone() }),
            ("--memory", with(Scenario { memory_gib: 0.0, ..scenario })),
            ("--bandwidth", with(Scenario { gbit: f64::INFINITY, ..scenario })),
        ];
        for (option, options) in bad {
            let error = options.prepare().unwrap_err().to_string();
            assert!(error.contains(option), "{error}");
        }
    }
}
