//! What nobody here can measure: the checked model at the size of guests and cables of a data
//! centre. Each row is a model's output and says so, with the range that the check has shown and
//! with what lies beyond what was checked.

use super::calibrate::SCANNERS;
use super::check::word;
use super::guest::{Area, ModelledGuest};
use super::model::{Cable, Costs, Engine, Outlook, outlook};
use crate::cost::{self, CostOptions};
use crate::progress::Progress;
use crate::record::model::{Calibration, Checked};
use crate::record::show::digits;
use crate::record::{Plot, Series, Table};
use anyhow::{Context, Result};
use pageferry_engine::guest::FixedCosts;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::policy::{Limits, WhenStuck};
use serde::{Deserialize, Serialize};

/// Repetitions of a row of `cost`, and memory for it.
const COST: CostOptions = CostOptions { repeat: 5, memory_mib: 128, instructions: false };

/// How writes are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tracking {
    /// By the page tables, as of a QEMU: a sync walks all memory.
    Scan,
    /// By KVM's dirty rings, as of a machine of our own: a sync costs what was written.
    Ring,
}

impl Tracking {
    /// In words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Scan => "page tables",
            Self::Ring => "dirty rings",
        }
    }
}

/// A guest and a cable that are modelled, not measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// Memory in GiB, all of it touched.
    pub memory_gib: f64,
    /// Of it, the share that is written over and over.
    pub working_share: f64,
    /// Of these writes, the share that goes to a sixteenth of that memory.
    pub hot_share: f64,
    /// Writes in MB a second that make a page dirty.
    pub rate_mb: f64,
    /// See [`Tracking`].
    pub tracking: Tracking,
    /// vCPUs.
    pub vcpus: u32,
    /// The cable, in Gb/s.
    pub gbit: f64,
    /// Its round trip, in microseconds.
    pub round_trip_us: f64,
    /// Longest downtime that the engine is allowed, in microseconds.
    pub downtime_us_max: u64,
    /// What nobody measured here.
    pub assumed: Assumed,
}

/// Costs of hardware that this host does not have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Assumed {
    /// Registration at both ends, in microseconds a MiB.
    pub register_us_mib: f64,
    /// Saving and loading a vCPU, in microseconds.
    pub vcpu_us: f64,
    /// Device state of a vCPU, in bytes.
    pub vcpu_bytes: f64,
}

impl Default for Assumed {
    fn default() -> Self {
        // Pinning is a look at each page's table entry, some 100 ns. A vCPU is twenty ioctls of
        // some microseconds at each end, but their threads do it side by side. Its largest part are
        // the registers of XSAVE.
        Self { register_us_mib: 25.0, vcpu_us: 20.0, vcpu_bytes: 12_000.0 }
    }
}

/// Of written memory, the part that is hot.
const HOT_PART: f64 = 1.0 / 16.0;

/// State of the devices of a server's guest, in bytes: network, disk, interrupt controllers.
const DEVICE_BYTES: f64 = 400_000.0;

/// Guests and cables that are shown if nothing else is asked for.
#[must_use]
pub fn scenarios(assumed: Assumed) -> Vec<Scenario> {
    let mut all = Vec::new();
    for tracking in [Tracking::Scan, Tracking::Ring] {
        for (memory_gib, vcpus) in [(64.0, 16), (256.0, 64), (1024.0, 256)] {
            for rate_mb in [1_000.0, 10_000.0] {
                for gbit in [100.0, 400.0] {
                    all.push(Scenario {
                        memory_gib,
                        working_share: 0.25,
                        hot_share: 0.9,
                        rate_mb,
                        tracking,
                        vcpus,
                        gbit,
                        round_trip_us: 10.0,
                        downtime_us_max: 100_000,
                        assumed,
                    });
                }
            }
        }
    }
    all
}

/// What a page costs this host's processor, in microseconds, with a NIC that needs no time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PageCosts {
    /// For a work request.
    pub request_us: f64,
    /// For a look whether it is zero.
    pub zero_us: f64,
    /// From KVM's ring to the dirty set.
    pub ring_us: f64,
}

/// Measures them. None if the run was interrupted.
pub fn page_costs(progress: &Progress) -> Result<Option<PageCosts>> {
    let cost =
        cost::run(COST, progress).context("measuring what a page costs on this side of the NIC")?;
    if cost.interrupted {
        return Ok(None);
    }
    let of = |name: &str| {
        let row = cost.figures.iter().find(|figure| figure.group == name);
        row.map(|row| row.samples.median() / 1e3).with_context(|| format!("there is no row {name}"))
    };
    Ok(Some(PageCosts {
        request_us: of("scattered-later-4")?,
        zero_us: of("contiguous-first-4")?,
        ring_us: of("ring-scattered")?,
    }))
}

impl Scenario {
    fn guest(&self) -> ModelledGuest {
        let pages = self.memory_gib * f64::from(1 << 30) / PAGE_BYTES as f64;
        let working = pages * self.working_share;
        let writes = self.rate_mb * 1e6 / PAGE_BYTES as f64;
        ModelledGuest {
            pages,
            touched_pages: pages,
            zero_pages: 0.0,
            areas: vec![
                Area { pages: working * HOT_PART, writes_per_second: writes * self.hot_share },
                Area {
                    pages: working * (1.0 - HOT_PART),
                    writes_per_second: writes * (1.0 - self.hot_share),
                },
            ],
            vcpus: self.vcpus,
            state_bytes: DEVICE_BYTES + f64::from(self.vcpus) * self.assumed.vcpu_bytes,
        }
    }

    /// By RDMA: the NICs carry the bytes, so the hosts' own rate of copying does not bound them;
    /// each request costs the engine's thread, and pages must be registered.
    fn costs(&self, host: &Calibration, page: PageCosts) -> Costs {
        let mut costs = host.costs;
        // A host of that size has cores that its guests leave alone: a sync finds them free between
        // rounds, too.
        costs.sync = costs.last_sync;
        for sync in [&mut costs.sync, &mut costs.last_sync] {
            match self.tracking {
                Tracking::Scan => {
                    sync.memory_us.each *= f64::from(host.scanners) / f64::from(SCANNERS);
                }
                Tracking::Ring => (sync.memory_us.each, sync.dirty_us) = (0.0, page.ring_us),
            }
        }
        costs.round_us.each = page.request_us;
        costs.zero_us = page.zero_us;
        costs.register_us = self.assumed.register_us_mib * PAGE_BYTES as f64 / f64::from(1 << 20);
        costs.vcpu_us = self.assumed.vcpu_us;
        (costs.first_bytes_per_second, costs.bytes_per_second) = (f64::INFINITY, f64::INFINITY);
        costs
    }

    /// Moves it.
    #[must_use]
    pub fn outlook(&self, host: &Calibration, page_costs: PageCosts) -> Outlook {
        let (guest, costs) = (self.guest(), self.costs(host, page_costs));
        let vcpus = f64::from(self.vcpus);
        let half_us = (costs.vcpu_us * vcpus / 2.0) as u64;
        let whole = |us: f64| us as u64;
        let engine = Engine {
            limits: Limits {
                downtime_us_max: self.downtime_us_max,
                when_stuck: WhenStuck::Switchover,
                rounds_max: 100,
            },
            fixed: FixedCosts {
                pause_us: whole(costs.pause_us.of(vcpus)),
                sync_us: 0,
                save_us: whole(costs.save_us.of(guest.state_bytes)) + half_us,
                load_us: whole(costs.load_us.of(guest.state_bytes)) + half_us,
                resume_us: whole(costs.resume_us.of(vcpus)),
            },
            state_bytes: guest.state_bytes as u64,
        };
        // RoCE's and Ethernet's headers around 4 KiB of payload.
        const PAYLOAD_SHARE: f64 = 0.97;
        let cable = Cable {
            bytes_per_second: self.gbit * 1e9 / 8.0 * PAYLOAD_SHARE,
            round_trip_us: self.round_trip_us,
        };
        outlook(&guest, &cable, &costs, &engine)
    }
}

/// The rows, each with its range.
#[must_use]
pub fn table(scenarios: &[Scenario], checked: &Checked, page_costs: PageCosts) -> Table {
    let head = [
        "guest",
        "tracked by",
        "writes MB/s",
        "cable",
        "ends",
        "rounds",
        "total s",
        "downtime ms",
        "model's output",
    ];
    let row = |s: &Scenario| {
        let outlook = s.outlook(&checked.calibration, page_costs);
        vec![
            format!("{} GiB, {} vCPUs", s.memory_gib, s.vcpus),
            s.tracking.words().into(),
            digits(s.rate_mb),
            format!("{} Gb/s", s.gbit),
            word(outlook.ending).into(),
            outlook.rounds.len().to_string(),
            ranged(outlook.total_us / 1e6, checked.total_errors),
            ranged(outlook.downtime_us / 1e3, checked.downtime_errors),
            "MODEL, not measured".into(),
        ]
    };
    Table {
        title: "The model at the size of a data centre".into(),
        caption: scenarios.first().map(|s| caption(checked, s, page_costs)).unwrap_or_default(),
        head: head.map(Into::into).into(),
        rows: scenarios.iter().map(row).collect(),
    }
}

/// A model's value and, behind it, the values that reality had at the worst errors of the check.
fn ranged(value: f64, errors: Option<(f64, f64)>) -> String {
    match errors {
        Some((low, high)) => {
            format!(
                "{} [{}..{}]",
                digits(value),
                digits(value / (1.0 + high)),
                digits(value / (1.0 + low))
            )
        }
        None => format!("{} [unchecked]", digits(value)),
    }
}

/// What the rows have in common, and what they rest on.
fn caption(checked: &Checked, scenario: &Scenario, page: PageCosts) -> String {
    let range = match (checked.total_errors, checked.downtime_errors) {
        (Some(total), Some(downtime)) => format!(
            "In brackets: where reality would lie if the model were off here as far as it was in its check at worst ({:+.0} to \
             {:+.0} % of the total, {:+.0} to {:+.0} % of the downtime, {} points of {} to {} Gb/s and up to {} MiB, by TCP). Whether it is \
             off further so far beyond that nobody has measured.",
            total.0 * 100.0,
            total.1 * 100.0,
            downtime.0 * 100.0,
            downtime.1 * 100.0,
            checked.points,
            checked.gbit.0,
            checked.gbit.1,
            checked.memory_mib_max
        ),
        _ => {
            "The model was not checked in this run: simulate --check says how far it is off.".into()
        }
    };
    let assumed = scenario.assumed;
    format!(
        "Output of a model: no such machine was at hand. {:.0} % of the memory is written, and {:.0} % of the writes go to a sixteenth of \
         that; the limit is a downtime of {} ms, by RDMA. {range} Measured on this host: syncs, messages, pause, resume, {:.0} ns a work \
         request, {:.0} ns for a look at a page, {:.0} ns for a page of a dirty ring. Page tables are taken to be walked by {SCANNERS} \
         threads, which share the work evenly and find cores that no guest uses. Assumed, and measured by nobody here: registration of {} us a MiB, {} us and {} bytes of \
         state a vCPU.",
        scenario.working_share * 100.0,
        scenario.hot_share * 100.0,
        digits(scenario.downtime_us_max as f64 / 1e3),
        page.request_us * 1e3,
        page.zero_us * 1e3,
        page.ring_us * 1e3,
        assumed.register_us_mib,
        assumed.vcpu_us,
        assumed.vcpu_bytes
    )
}

/// Total and downtime of this guest over its dirty rate.
#[must_use]
pub fn plots(guest: &Scenario, checked: &Checked, page_costs: PageCosts) -> Vec<Plot> {
    let rates: Vec<f64> = (0..=32).map(|n| 100.0 * 10f64.powf(f64::from(n) / 10.0)).collect();
    let series = |of: &dyn Fn(&Outlook) -> f64| -> Vec<Series> {
        [25.0, 100.0, 200.0, 400.0]
            .map(|gbit| Series {
                name: format!("{gbit} Gb/s"),
                points: rates
                    .iter()
                    .map(|rate_mb| {
                        let scenario = Scenario { gbit, rate_mb: *rate_mb, ..*guest };
                        (*rate_mb, of(&scenario.outlook(&checked.calibration, page_costs)))
                    })
                    .collect(),
            })
            .into()
    };
    let plot = |what: &str, y: &str, series: Vec<Series>| {
        Plot {
        title: format!(
            "MODEL, not measured: {what} of a guest of {} GiB and {} vCPUs, tracked by {}",
            guest.memory_gib,
            guest.vcpus,
            guest.tracking.words()
        ),
        caption: "Output of a model, not measured; see the table above for its range and for what is assumed. A step \
                  is where rounds stop shrinking and the guest is switched over all the same."
            .into(),
        x: "MB/s written".into(),
        y: y.into(),
        x_log: true,
        y_log: true,
        series,
    }
    };
    vec![
        plot("downtime", "milliseconds", series(&|o| o.downtime_us / 1e3)),
        plot("total", "seconds", series(&|o| o.total_us / 1e6)),
    ]
}
