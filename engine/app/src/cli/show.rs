//! What a client prints.

use super::units::bytes;
use crate::supervisor::api::{State, Status};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::report::MigrationReport;
use pageferry_engine::report::progress::Progress;
use pageferry_engine::report::stage::Stage;
use pageferry_engine::text;

/// Where a migration stands, in one line.
#[must_use]
pub(super) fn line(progress: &Progress) -> String {
    match progress.stage {
        Stage::Idle | Stage::Setup => "setting up".into(),
        Stage::Rounds if progress.bytes_per_second == 0 => format!("round {}", progress.round),
        Stage::Rounds => format!(
            "round {}: {}/s, guest writes {}/s, downtime would be {:.1} ms",
            progress.round,
            bytes(progress.bytes_per_second),
            bytes(progress.dirty_bytes_per_second),
            progress.predicted_downtime_us as f64 / 1e3
        ),
        Stage::Switchover => "switching over".into(),
        Stage::Committed => "waiting for the destination to run the guest".into(),
        Stage::Done => "done".into(),
    }
}

/// A completed migration for people.
#[must_use]
pub fn summary(report: &MigrationReport) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    let downtime = &report.downtime_us;
    let mut text = format!(
        "moved in {:.2} s over {} ({} lane{}), {} written, {} untouched or zero and not sent, {} control messages\n",
        report.total_us as f64 / 1e6,
        report.transport,
        report.lanes,
        if report.lanes == 1 { "" } else { "s" },
        bytes(report.bytes_written),
        bytes(report.bytes_skipped),
        report.control_messages,
    );
    if let Some(why) = &report.fell_back {
        text += &format!("  a first attempt by RDMA was given up: {}\n", text::reason(why));
    }
    if !report.lost_pages.is_empty() {
        text += &format!(
            "  the hardware of the source lost pages of the guest, which are zeros now where they had to be sent: {}\n",
            pageferry_engine::memory::lost_page::name(&report.lost_pages)
        );
    }
    for round in &report.rounds {
        text += &format!(
            "  round {:<3} {:>10} in {:>8.1} ms, {:>10} dirty after it\n",
            round.index,
            bytes(round.bytes),
            ms(round.elapsed_us),
            bytes(round.dirtied_pages * PAGE_BYTES)
        );
    }
    text += &format!(
        "downtime {:.2} ms (predicted {:.2}): pause {:.2}, sync {:.2}, push {:.2}, save {:.2}, load {:.2}, {}commit {:.2}, resume {:.2}\n",
        ms(downtime.total),
        ms(report.predicted_downtime_us),
        ms(downtime.pause),
        ms(downtime.sync),
        ms(downtime.push),
        ms(downtime.save),
        ms(downtime.load),
        if report.verified.is_some() {
            format!("verify {:.2}, ", ms(downtime.verify))
        } else {
            String::new()
        },
        ms(downtime.commit),
        ms(downtime.resume),
    );
    if report.verified == Some(true) {
        text += "verified: both sides hold the same memory\n";
    }
    text
}

pub(crate) fn describe(status: &Status) -> String {
    let pid = status.pid.map(|pid| format!(" ({} pid {pid})", status.vmm)).unwrap_or_default();
    match status.state {
        State::Starting => "starting".into(),
        State::Waiting => {
            format!("waits for a guest on {}{pid}", status.listen.as_deref().unwrap_or("?"))
        }
        State::Receiving => format!("receives a guest{pid}"),
        State::Hosting => format!("here{pid}"),
        State::Migrating => {
            format!(
                "moving: {}{pid}",
                status.progress.as_ref().map_or_else(|| "starting".into(), line)
            )
        }
        State::Moved => format!("has moved away{pid}"),
        State::Unknown => format!("STOPPED, migration in doubt{pid}: `pageferry settle`"),
    }
}

pub(crate) fn in_json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::os("printing JSON", std::io::Error::from(e)))?;
    Ok(text + "\n")
}
