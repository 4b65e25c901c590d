//! Downtime, measured: one guest moved back and forth, and what the engine, the guest and a client
//! of the guest each saw of it.
//!
//! ```text
//!            request                      pause                            resume          running
//!   total       |--------------------------------------------------------------------------->|
//!   downtime                                |------------------------------------------------>|   engine's clock
//!   guest gap                            |-------------------------------------->|               its heartbeats
//!   client gap                          |---------------------------------------->|              longest wait for an answer
//! ```
//!
//! All by one clock, that of this host. The engine's downtime ends when the source hears that the
//! guest runs, so it may end after the first sign of life. A gap also has in it what surrounds the
//! downtime: the last beat before it and, in a real guest, what it needs to get going again.

pub mod client;
pub(crate) mod linux;
mod microvm;
pub mod network;
mod payload;
pub mod service;
mod synthetic;

use crate::progress::Progress;
use crate::record::ratio::compare_groups;
use crate::record::{Migration, Record, Spec};
use crate::stats::histogram::Histogram;
use anyhow::{Context, Result, bail};
use client::Client;
use pageferry_engine::net::choice::{LinkChoice, Transport};
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::report::{Downtime, MigrationReport, Outcome};
use pageferry_engine::source::MigrateOptions;
use pageferry_microvm::config::TrackingChoice;
use pageferry_microvm::payload::Pattern;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

/// A client's question each millisecond: ten in the shortest downtimes that were seen.
const ASK_EVERY: Duration = Duration::from_millis(1);

/// For the guest's service to answer again once the guest runs.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long after a move its effects still count as its own: late work comes in a burst.
const AFTERMATH: Duration = Duration::from_millis(100);

/// So many failures in a row, and the rest will fail too.
const FAILURES_IN_A_ROW_MAX: u32 = 3;

/// The most moves of one run: each leaves the listening thread of its receiver behind.
pub const MOVES_MAX: u32 = 5000;

const TOTAL: Spec = Spec::headline("total", "ms");
const DOWNTIME: Spec = Spec::headline("downtime", "ms");
const GUEST_GAP: Spec = Spec::headline("guest gap", "ms");
const CLIENT_GAP: Spec = Spec::headline("client gap", "ms");
const PREDICTED: Spec = Spec::fact("predicted downtime", "ms");
const ROUNDS: Spec = Spec::fact("rounds", "");
const SENT: Spec = Spec::fact("sent", "MiB");
const GOODPUT: Spec = Spec::fact("goodput of the first round", "MB/s");
const LOST: Spec = Spec::fact("requests lost", "");

/// A slice of a downtime: its name, and where it is in the report.
type Slice = (Spec, fn(&Downtime) -> u64);

/// The slices of a downtime, in their order.
const SLICES: [Slice; 7] = [
    (Spec::part("pause", "ms"), |b| b.pause),
    (Spec::part("sync", "ms"), |b| b.sync),
    (Spec::part("push", "ms"), |b| b.push),
    (Spec::part("save", "ms"), |b| b.save),
    (Spec::part("load", "ms"), |b| b.load),
    (Spec::part("commit", "ms"), |b| b.commit),
    (Spec::part("resume", "ms"), |b| b.resume),
];

/// What kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// Threads that write memory, in this process: the engine's own part of a downtime.
    Synthetic,
    /// A program that checks its own memory, under this host's KVM.
    Payload,
    /// Linux in QEMU, under TCG, moved by the pageferry beside this program.
    Linux,
    /// The same Linux in pageferry's own monitor, under this host's KVM.
    Microvm,
}

/// What is moved, how often and how.
#[derive(Debug, Clone, Serialize)]
pub struct MoveOptions {
    /// See [`Guest`].
    pub guest: Guest,
    /// Moves.
    pub moves: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Memory written over and over, in MiB.
    pub working_mib: u32,
    /// Writes in MB a second; 0 is as fast as the guest can.
    pub rate_mb: u32,
    /// Where the payload guest writes. The others write any page of their working memory.
    pub pattern: Pattern,
    /// Threads that write; vCPUs of the payload guest.
    pub threads: u32,
    /// How writes of the payload guest are followed. Each has a guest of its own, moved in turns
    /// with the others.
    pub tracking: Vec<TrackingChoice>,
    /// What carries the data.
    pub transport: Transport,
    /// Where the receiver listens.
    pub address: IpAddr,
    /// Lanes.
    pub lanes: u8,
    /// Longest downtime that the engine is allowed.
    pub downtime_max: Duration,
    /// A pause that is planted into each downtime.
    pub planted_pause: Duration,
}

/// One move as the engine tells it.
pub(crate) struct Move {
    pub(crate) report: MigrationReport,
}

/// A guest that can be moved again and again. Another kind of guest is another implementation.
pub(crate) trait Harness {
    /// Where the guest answers datagrams, if it does.
    fn service(&self) -> Option<SocketAddr>;

    /// What the reader must know of this guest, in one line.
    fn remark(&self) -> Option<String> {
        None
    }

    /// Moves the guest once. An error means that there is no guest any more; a move that failed and
    /// left it at the source is one whose report says so.
    fn move_once(&mut self) -> Result<Move>;

    /// The longest time between two heartbeats since the last move began, in milliseconds; NaN if
    /// it has none.
    fn guest_gap_ms(&self) -> f64;

    /// Has the guest check all of its memory.
    fn check(&mut self) -> Result<()>;

    /// Has the guest be paused while another is measured, or go on.
    fn hold(&mut self, held: bool) -> Result<()> {
        bail!("this guest cannot {}", if held { "be held" } else { "go on" })
    }
}

impl MoveOptions {
    /// Fails on what cannot be.
    pub fn check(&self) -> Result<()> {
        if self.working_mib == 0 || self.working_mib > self.memory_mib {
            bail!("--working {} must be 1 to --memory {}", self.working_mib, self.memory_mib);
        }
        if self.moves == 0 || self.moves > MOVES_MAX {
            bail!("--moves {} must be 1 to {MOVES_MAX}", self.moves);
        }
        if self.transport == Transport::Rdma && self.address.is_loopback() {
            bail!(
                "--transport rdma needs --address with that of an RDMA port; {} has none",
                self.address
            );
        }
        if self.pattern != Pattern::Random && self.guest != Guest::Payload {
            bail!("--pattern needs --guest payload");
        }
        if self.tracking.is_empty() || self.tracking.len() > 1 && self.guest != Guest::Payload {
            bail!("more than one --tracking needs --guest payload");
        }
        TcpListener::bind((self.address, 0))
            .with_context(|| format!("--address {} is no address of this host", self.address))?;
        Ok(())
    }

    fn migrate_options(&self, to: String) -> MigrateOptions {
        let mut options = MigrateOptions::to(to);
        options.lanes = self.lanes;
        options.link = LinkChoice { transport: self.transport, ..LinkChoice::default() };
        options.downtime_us_max = u64::try_from(self.downtime_max.as_micros()).unwrap_or(u64::MAX);
        // A guest that writes faster than the link carries is to be measured, not to be refused.
        options.when_stuck = WhenStuck::Switchover;
        options.insecure = !self.address.is_loopback();
        options
    }
}

/// One guest and what was collected of it beside the record.
struct Party {
    /// Its name in the record, until a move tells what it really went by.
    group: String,
    /// What tells it from the other guests of the run: nothing, or how its writes are followed.
    kind: String,
    harness: Box<dyn Harness>,
    waits: Histogram,
    failures_in_a_row: u32,
    /// Whether it has no more moves.
    is_over: bool,
}

/// The guests of a run. More than one are held, but for that whose move it is.
fn parties(options: &MoveOptions) -> Result<Vec<Party>> {
    let mut parties: Vec<Party> = Vec::new();
    for tracking in &options.tracking {
        let several = options.tracking.len() > 1;
        let kind = match tracking {
            _ if !several => "",
            TrackingChoice::Auto => ", auto",
            TrackingChoice::Ring => ", ring",
            TrackingChoice::Log => ", log",
        };
        let mut harness: Box<dyn Harness> = match options.guest {
            Guest::Synthetic => Box::new(synthetic::Synthetic::start(options.clone())?),
            Guest::Payload => Box::new(payload::Payload::start(options.clone(), *tracking)?),
            Guest::Linux => Box::new(linux::Linux::start(options)?),
            Guest::Microvm => Box::new(microvm::LinuxMicrovm::start(options, *tracking)?),
        };
        if several {
            harness.hold(true)?;
        }
        parties.push(Party {
            group: group(options) + kind,
            kind: kind.into(),
            harness,
            waits: Histogram::new()?,
            failures_in_a_row: 0,
            is_over: false,
        });
    }
    Ok(parties)
}

/// Moves the guest as often as asked for, or until `progress` hears of an interruption.
pub fn run(options: &MoveOptions, progress: &Progress) -> Result<Record> {
    options.check()?;
    let mut parties = parties(options)?;
    let title = format!(
        "{} moves of a {} MiB guest that writes {} over {} MiB",
        options.moves,
        options.memory_mib,
        if options.rate_mb == 0 {
            "as fast as it can".into()
        } else {
            format!("{} MB/s", options.rate_mb)
        },
        options.working_mib
    );
    let mut record = Record::begin("downtime", title, options)?;
    notes(&mut record, options, parties[0].harness.service().is_some());
    if let Some(remark) = parties[0].harness.remark() {
        eprintln!("pageferry-bench: {remark}");
        record.notes.push(remark);
    }
    let client = match parties[0].harness.service() {
        Some(service) => Some(Client::start(service, ASK_EVERY)?),
        None => None,
    };
    let count = parties.len();
    progress.expect(u64::from(options.moves) * count as u64);
    'moves: for turn in 0..options.moves {
        for place in 0..count {
            if progress.is_interrupted() {
                record.interrupted = true;
                break 'moves;
            }
            let party = &mut parties[(place + turn as usize) % count];
            if !party.is_over {
                party.turn(client.as_ref(), &mut record, turn, count > 1);
            }
            progress.step();
        }
        if parties.iter().all(|party| party.is_over) {
            break;
        }
    }
    drop(client);
    for party in &mut parties {
        let ready = if count > 1 { party.harness.hold(false) } else { Ok(()) };
        if let Err(e) = ready.and_then(|()| party.harness.check()) {
            let why = format!("the guest's memory is not what it wrote: {e:#}");
            record.fail(&party.group, options.moves, why);
        }
    }
    distributions(&mut record, &parties)?;
    let groups: Vec<&str> = parties.iter().map(|party| party.group.as_str()).collect();
    if let [first, others @ ..] = groups.as_slice() {
        record.ratios = compare_groups(&record, &[first], others, None);
    }
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

fn group(options: &MoveOptions) -> String {
    match options.transport {
        Transport::Rdma => "pageferry rdma".into(),
        Transport::Tcp | Transport::Auto => "pageferry tcp".into(),
    }
}

impl Party {
    /// One move, and what is to be said of it.
    fn turn(&mut self, client: Option<&Client>, record: &mut Record, turn: u32, hold: bool) {
        let ready = if hold { self.harness.hold(false) } else { Ok(()) };
        match ready.and_then(|()| one(self, client, record, turn)) {
            Ok(true) => self.failures_in_a_row = 0,
            Ok(false) => self.failures_in_a_row += 1,
            Err(e) => {
                record.fail(&self.group, turn, format!("{e:#}; no guest is left to move"));
                self.is_over = true;
                return;
            }
        }
        if self.failures_in_a_row == FAILURES_IN_A_ROW_MAX {
            record.notes.push(format!("Given up after {FAILURES_IN_A_ROW_MAX} failures in a row."));
            self.is_over = true;
        }
        if hold && let Err(e) = self.harness.hold(true) {
            record.fail(&self.group, turn, format!("{e:#}; no guest is left to move"));
            self.is_over = true;
        }
    }
}

/// One move, measured. False if the guest stayed where it was.
fn one(party: &mut Party, client: Option<&Client>, record: &mut Record, turn: u32) -> Result<bool> {
    if let Some(client) = client {
        client.begin();
    }
    let Move { report } = party.harness.move_once()?;
    std::thread::sleep(AFTERMATH);
    // What it took by is in the report; which was asked for need not be what it was.
    let group = match report.transport.as_str() {
        // It failed before there was a link.
        "" => party.group.clone(),
        taken => format!("pageferry {taken}{}", party.kind),
    };
    if report.outcome != Outcome::Completed {
        let why = report.reason.clone().unwrap_or_else(|| "no reason was given".into());
        record.fail(&group, turn, why);
        record.migrations.push(Migration { group, turn, report });
        return Ok(false);
    }
    engine_figures(record, &group, turn, &report);
    record.sample(&group, GUEST_GAP, turn, party.harness.guest_gap_ms());
    if let Some(client) = client {
        match client.end(ANSWER_MAX) {
            Ok(waits) => {
                record.sample(&group, CLIENT_GAP, turn, waits.longest_ms());
                record.sample(&group, LOST, turn, waits.lost as f64);
                waits.waits_us.iter().for_each(|us| party.waits.record_us(*us));
            }
            Err(e) => record.fail(&group, turn, format!("{e:#}")),
        }
    }
    party.group.clone_from(&group);
    record.migrations.push(Migration { group, turn, report });
    Ok(true)
}

/// What the engine says of a move.
pub(crate) fn engine_figures(
    record: &mut Record,
    group: &str,
    turn: u32,
    report: &MigrationReport,
) {
    record.sample(group, TOTAL, turn, ms(report.total_us));
    record.sample(group, DOWNTIME, turn, ms(report.downtime_us.total));
    for (spec, slice) in SLICES {
        record.sample(group, spec, turn, ms(slice(&report.downtime_us)));
    }
    record.sample(group, PREDICTED, turn, ms(report.predicted_downtime_us));
    record.sample(group, ROUNDS, turn, report.rounds.len() as f64);
    record.sample(group, SENT, turn, report.bytes_written as f64 / f64::from(1 << 20));
    // Of the first round, which is all of memory: later ones are too short to say much.
    let first = report.rounds.first().filter(|round| round.elapsed_us > 0 && round.bytes > 0);
    record.sample(
        group,
        GOODPUT,
        turn,
        first.map_or(f64::NAN, |r| r.bytes as f64 / r.elapsed_us as f64),
    );
}

fn distributions(record: &mut Record, parties: &[Party]) -> Result<()> {
    let names =
        [TOTAL, DOWNTIME, GUEST_GAP, CLIENT_GAP].into_iter().chain(SLICES.map(|slice| slice.0));
    for name in names.map(|spec| spec.name) {
        for group in record.groups().into_iter().map(str::to_owned).collect::<Vec<_>>() {
            if let Some(figure) = record.figure(&group, name) {
                let kept = Histogram::of_ms(&figure.samples.0)?.keep(group, name);
                record.distributions.push(kept);
            }
        }
    }
    for party in parties.iter().filter(|party| party.waits.count() > 0) {
        record
            .distributions
            .push(party.waits.keep(party.group.clone(), "every request of the client"));
    }
    Ok(())
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

fn notes(record: &mut Record, options: &MoveOptions, has_client: bool) {
    if options.guest == Guest::Microvm {
        record.notes.push(format!(
            "The guest's heartbeats go over its console, one each {:?}: a gap holds up to one of them. Destinations have all \
             their memory before a move.",
            microvm::BEAT
        ));
    }
    if options.guest == Guest::Linux {
        record.notes.push(
            "Under TCG the Linux guest's code is translated anew where it arrives, which is part of its gap and of its client's, and of no \
             downtime. Its heartbeats go over a serial line."
                .into(),
        );
        if has_client {
            record.notes.push(
                "Its client asks over a bridge that both QEMUs join by taps: its gap has in it what the bridge takes to learn the \
                 guest's new port."
                    .into(),
            );
        }
    }
    record.notes.push(
        "Downtime: from before the vCPUs are told to stop until the source hears that they run. Guest gap: the longest \
         time between two heartbeats of the guest, one a millisecond. Client gap: the longest wait of a client that sends \
         a datagram each millisecond, answered or not, counted from the moment at which it was due: no coordinated \
         omission. All three by this host's clock."
            .into(),
    );
    record.notes.push(
        "\"Every request of the client\" has the requests of the whole move and of the 100 ms after it; so its middle is \
         what a move costs while the guest runs, and its end is the downtime. It depends on how long a move takes."
            .into(),
    );
    record.notes.push(
        "Source, destination, guest and client share this host's cores and its loopback; a network between two hosts \
         adds what it takes to learn the new place of an address."
            .into(),
    );
    if !options.planted_pause.is_zero() {
        record.notes.push(format!(
            "A pause of {:?} was planted into each downtime.",
            options.planted_pause
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_moved_is_refused_by_the_name_of_its_option() {
        let good = MoveOptions {
            guest: Guest::Synthetic,
            moves: 1,
            memory_mib: 64,
            working_mib: 16,
            rate_mb: 10,
            pattern: Pattern::Random,
            threads: 1,
            tracking: vec![TrackingChoice::Auto],
            transport: Transport::Tcp,
            address: IpAddr::from([127, 0, 0, 1]),
            lanes: 2,
            downtime_max: Duration::from_millis(30),
            planted_pause: Duration::ZERO,
        };
        assert!(good.check().is_ok());
        let bad = [
            (
                "--guest payload",
                MoveOptions { tracking: vec![TrackingChoice::Ring; 2], ..good.clone() },
            ),
            ("--working", MoveOptions { working_mib: 65, ..good.clone() }),
            ("--moves", MoveOptions { moves: 0, ..good.clone() }),
            ("192.0.2.1", MoveOptions { address: IpAddr::from([192, 0, 2, 1]), ..good.clone() }),
            ("--address", MoveOptions { transport: Transport::Rdma, ..good.clone() }),
        ];
        for (option, options) in bad {
            assert!(options.check().unwrap_err().to_string().contains(option));
        }
    }
}
