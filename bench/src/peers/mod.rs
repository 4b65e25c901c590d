//! The same guest moved by pageferry and by QEMU itself, in turns: total time, downtime, the gap
//! that its heartbeats show, CPU and bytes, side by side.
//!
//! ```text
//!   turn 0    pageferry   qemu-plain   ...   microvm-ring   floor   every guest checks its memory
//!   turn 1    qemu-plain   ...   microvm-ring   floor   pageferry   ...
//! ```
//!
//! A guest of QEMU cannot become one of pageferry's own monitor, so there are several
//! ([`lineage`]): one that all ways of QEMU move on and on, and one for each kind of microvm. They
//! have the same kernel, initramfs, memory and workload, and while one is moved the others are
//! held. A way that fails is a failed row, and the others go on.

pub mod args;
mod field;
mod lineage;

use crate::progress::Progress;
use crate::record::ratio::compare_groups;
use crate::record::{Record, Spec};
use crate::stats::histogram::Histogram;
use crate::testbed::machine::{Accel, GuestOptions};
use crate::ways::{Terms, Way};
use anyhow::{Context, Result, bail};
use field::{Field, Peer};
use pageferry_microvm::config::TrackingChoice;
use pageferry_microvm::machine::open_kvm;
use serde::Serialize;
use std::net::TcpListener;

const TOTAL: Spec = Spec::headline("total", "ms");
const DOWNTIME: Spec = Spec::headline("downtime", "ms");
const GAP: Spec = Spec::headline("guest gap", "ms");
const CPU: Spec = Spec::headline("CPU", "s");
const GAP_BEGAN: Spec = Spec::fact("gap began after request", "ms");
const SENT: Spec = Spec::fact("sent", "MiB");

/// What is moved, by which ways and how often.
#[derive(Debug, Clone, Serialize)]
pub struct PeersOptions {
    /// What the guest is.
    pub guest: GuestOptions,
    /// How it is moved apart from the way.
    pub terms: Terms,
    /// The ways.
    pub ways: Vec<Way>,
    /// How the writes of a microvm are followed; a group of its own each.
    pub tracking: Vec<TrackingChoice>,
    /// Times that each way has its turn.
    pub repetitions: u32,
}

impl PeersOptions {
    /// Fails on what cannot be, before anything is started.
    pub fn check(&self) -> Result<()> {
        if self.repetitions == 0 || self.ways.is_empty() {
            bail!("--repetitions must be at least 1, and --ways at least one");
        }
        let asked = self.guest.working_mib + self.guest.touched_mib;
        if self.guest.working_mib == 0 || asked >= self.guest.memory_mib {
            bail!(
                "--working {} and --touched {} must be more than nothing and less than --memory {}: the guest's kernel needs some",
                self.guest.working_mib,
                self.guest.touched_mib,
                self.guest.memory_mib
            );
        }
        if let Some(address) = self.terms.rdma_address {
            TcpListener::bind((address, 0))
                .with_context(|| format!("--rdma-address {address} is no address of this host"))?;
        }
        match self.guest.accel {
            Accel::Tcg if self.ways.contains(&Way::Microvm) => {
                bail!("--ways microvm needs --accel kvm: pageferry's own monitor has no emulation")
            }
            Accel::Kvm => {
                open_kvm()
                    .context("--accel kvm needs this host's KVM; --accel tcg works without")?;
            }
            Accel::Tcg => {}
        }
        Ok(())
    }

    fn title(&self) -> String {
        let g = &self.guest;
        format!(
            "a Linux guest under {} of {} MiB, {} MiB of them touched, that writes {} over {} MiB; destination {}",
            match g.accel {
                Accel::Tcg => "TCG",
                Accel::Kvm => "KVM",
            },
            g.memory_mib,
            g.touched_mib + g.working_mib,
            if g.rate_mb == 0 { "as fast as it can".into() } else { format!("{} MB/s", g.rate_mb) },
            g.working_mib,
            if self.terms.preallocated { "preallocated" } else { "cold" }
        )
    }
}

/// Moves guests by each way in turns, until `progress` hears of an interruption.
pub fn run(options: &PeersOptions, progress: &Progress) -> Result<Record> {
    options.check()?;
    let mut record = Record::begin("peers", options.title(), options)?;
    record.notes = notes(options);
    let mut field = Field::new(options)?;
    progress.expect(u64::from(options.repetitions) * field.peers.len() as u64);
    field.boot(&mut record, progress);
    for turn in 0..options.repetitions {
        if record.interrupted || !field.is_any_left() {
            break;
        }
        field.turn(turn, &mut record, progress);
    }
    record.notes.extend(field.left_out());
    let peers = &field.peers;
    distributions(&mut record, peers)?;
    record.ratios = ratios(&record, peers);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

fn distributions(record: &mut Record, peers: &[Peer]) -> Result<()> {
    for spec in [TOTAL, DOWNTIME, GAP] {
        for peer in peers {
            if let Some(figure) = record.figure(&peer.group, spec.name) {
                let kept = Histogram::of_ms(&figure.samples.0)?.keep(&peer.group, spec.name);
                record.distributions.push(kept);
            }
        }
    }
    Ok(())
}

/// Of pageferry's ways to each of QEMU's and to the best of them; and of the microvms to one
/// another.
fn ratios(record: &Record, peers: &[Peer]) -> Vec<crate::record::ratio::Ratio> {
    let named = |wanted: &dyn Fn(&Peer) -> bool| -> Vec<&str> {
        peers.iter().filter(|peer| wanted(peer)).map(|peer| peer.group.as_str()).collect()
    };
    let ours = named(&|peer| peer.way.is_ours());
    let theirs = named(&|peer| !peer.way.is_ours() && peer.way != Way::Floor);
    let mut ratios = compare_groups(record, &ours, &theirs, Some("the best of QEMU's"));
    ratios.extend(compare_groups(record, &ours, &named(&|peer| peer.way == Way::Floor), None));
    let microvms = named(&|peer| peer.way == Way::Microvm);
    if let [first, others @ ..] = microvms.as_slice() {
        ratios.extend(compare_groups(record, &[first], others, None));
    }
    ratios
}

fn notes(options: &PeersOptions) -> Vec<String> {
    let mut notes = vec![
        "Total: from the request until the guest runs at the destination and, after post-copy, has all its memory there. \
         Downtime: from QEMU's STOP event at the source to its RESUME event at the destination. CPU: of both monitors and \
         of pageferry's supervisors, without the threads that run the guest. All by this host's clock; every way has its \
         turn in each repetition, and another one is the first each time."
            .to_owned(),
        "The floor is what QEMU's own stop, save, load and cont take between two QEMUs that have the same memory, so that \
         none is moved."
            .into(),
        "The best of QEMU's ways is chosen for each figure by itself, after the fact: no single way has all of them. In a \
         resampled interval it is chosen anew each time."
            .into(),
    ];
    notes.push(match options.guest.accel {
        Accel::Tcg => "Guest gap: the longest time between two heartbeats of the guest, one a millisecond over a serial port of \
                       their own, as the host sees them arrive. Under TCG the guest's code is translated anew where it \
                       arrives, which is part of the gap and of no downtime."
            .into(),
        Accel::Kvm => format!(
            "Guest gap: the longest time between two heartbeats of the guest, one each {:?} on its console, as the host sees \
             them arrive: the same in QEMU and in a microvm. It is up to one beat too long.",
            options.guest.beat
        ),
    });
    if options.ways.contains(&Way::Microvm) {
        notes.push(
            "A microvm is pageferry's own monitor, with a guest of its own: the same kernel, initramfs, memory and workload, \
             and other virtual devices. Its downtime is the engine's, from before the vCPU is told to stop until the source \
             hears that it runs: longer than between two events of QEMU by some half a round trip. While one guest is moved \
             the others are held."
                .into(),
        );
    }
    notes
}
