//! A calibrated model as a record keeps it, with how far it was off.

use crate::simulate::model::{Costs, Line};
use crate::simulate::real::Setting;
use serde::{Deserialize, Serialize};

/// How far off the model may be, of total and of downtime.
pub const TOTAL_SHARE_MAX: f64 = 0.10;
/// See [`TOTAL_SHARE_MAX`].
pub const DOWNTIME_SHARE_MAX: f64 = 0.20;

/// A calibrated model and how far it was off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// This host.
    pub calibration: Calibration,
    /// The lowest and the highest share by which the model's total was off; none if it was not
    /// checked.
    pub total_errors: Option<(f64, f64)>,
    /// The same of the downtime.
    pub downtime_errors: Option<(f64, f64)>,
    /// Points of the check.
    pub points: usize,
    /// Lowest and highest rate of a cable among them, in Gb/s.
    pub gbit: (f64, f64),
    /// Largest guest among them, in MiB.
    pub memory_mib_max: u32,
}

impl Checked {
    /// Of these points.
    #[must_use]
    pub fn new(calibration: Calibration, points: &[Point]) -> Self {
        let range = |of: fn(&Point) -> f64| {
            let errors = points.iter().map(of).filter(|error| error.is_finite());
            errors.fold(None, |range: Option<(f64, f64)>, error| {
                let (low, high) = range.unwrap_or((error, error));
                Some((low.min(error), high.max(error)))
            })
        };
        Self {
            calibration,
            total_errors: range(|p| p.errors().0),
            downtime_errors: range(|p| p.errors().1),
            points: points.len(),
            gbit: points
                .iter()
                .fold((points.first().map_or(0.0, |p| p.gbit), 0.0), |(low, high), p| {
                    (low.min(p.gbit), high.max(p.gbit))
                }),
            memory_mib_max: points.iter().map(|p| p.setting.memory_mib).max().unwrap_or(0),
        }
    }
}

/// What the host costs, and what of the modelled guests must be known besides.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The host.
    pub costs: Costs,
    /// Device state of the synthetic guest, for each page that it writes.
    pub state_bytes: Line,
    /// Threads that scanned page tables.
    pub scanners: u32,
}

/// One guest over one cable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The cable, in Gb/s.
    pub gbit: f64,
    /// The guest.
    pub setting: Setting,
    /// Medians of the real moves, in milliseconds: total and downtime.
    pub real_ms: (f64, f64),
    /// The model's.
    pub model_ms: (f64, f64),
    /// Rounds: the median of the real ones, and the model's.
    pub rounds: (f64, u32),
}

impl Point {
    /// How far the model is off, as a share of reality: total and downtime.
    #[must_use]
    pub fn errors(&self) -> (f64, f64) {
        (self.model_ms.0 / self.real_ms.0 - 1.0, self.model_ms.1 / self.real_ms.1 - 1.0)
    }

    /// Whether that is near enough: of total and of downtime.
    #[must_use]
    pub fn is_inside(&self) -> (bool, bool) {
        let (total, downtime) = self.errors();
        (total.abs() <= TOTAL_SHARE_MAX, downtime.abs() <= DOWNTIME_SHARE_MAX)
    }
}
