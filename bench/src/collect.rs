//! A record of migrations that were made elsewhere: of the reports that `pageferry migrate --json`
//! printed. For moves between two hosts, which this program cannot make by itself.

use crate::downtime::engine_figures;
use crate::record::ratio::compare_groups;
use crate::record::{Migration, Record};
use anyhow::{Context, Result, bail};
use pageferry_engine::report::{MigrationReport, Outcome};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The largest report that is read. One with a thousand rounds has some hundred KiB.
const BYTES_MAX: u64 = 16 << 20;

/// What is collected.
#[derive(Debug, Clone, Serialize)]
pub struct CollectOptions {
    /// What was moved, in one line.
    pub title: String,
    /// Files with a report each, in turns: the first of each transport was its first turn.
    pub reports: Vec<PathBuf>,
}

/// Reads them all. A file that is none is an error, a migration that failed is a failed row.
pub fn collect(options: &CollectOptions) -> Result<Record> {
    if options.reports.is_empty() {
        bail!("give the files with the reports of `pageferry migrate --json`");
    }
    let mut record = Record::begin("collect", options.title.clone(), options)?;
    record.notes.push(
        "Made of the engine's reports alone: nobody looked at the guest or asked it. Times are those of the source host's \
         clock."
            .into(),
    );
    let mut turns: Vec<(String, u32)> = Vec::new();
    for path in &options.reports {
        let report = read(path)?;
        let group = if report.transport.is_empty() {
            "pageferry".into()
        } else {
            format!("pageferry {}", report.transport)
        };
        let turn = match turns.iter_mut().find(|(known, _)| *known == group) {
            Some((_, turn)) => {
                *turn += 1;
                *turn
            }
            None => {
                turns.push((group.clone(), 0));
                0
            }
        };
        if report.outcome == Outcome::Completed {
            engine_figures(&mut record, &group, turn, &report);
        } else {
            record.fail(
                &group,
                turn,
                report.reason.clone().unwrap_or_else(|| "no reason was given".into()),
            );
        }
        record.migrations.push(Migration { group, turn, report });
    }
    let groups: Vec<&str> = turns.iter().map(|(group, _)| group.as_str()).collect();
    if let [first, others @ ..] = groups.as_slice() {
        record.ratios = compare_groups(&record, &[first], others, None);
    }
    Ok(record)
}

fn read(path: &Path) -> Result<MigrationReport> {
    let what = || format!("reading {}", path.display());
    if std::fs::metadata(path).with_context(what)?.len() > BYTES_MAX {
        bail!("{} is larger than any report", path.display());
    }
    let text = std::fs::read(path).with_context(what)?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no report of `pageferry migrate --json`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_become_turns_of_their_transport_and_junk_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut reports = Vec::new();
        for (index, (transport, outcome, us)) in [
            ("rdma", Outcome::Completed, 4000),
            ("tcp", Outcome::Completed, 8000),
            ("rdma", Outcome::Aborted, 0),
            ("tcp", Outcome::Completed, 8000),
        ]
        .into_iter()
        .enumerate()
        {
            let mut report = MigrationReport::new(1 << 20);
            (report.transport, report.outcome, report.total_us) = (transport.into(), outcome, us);
            report.reason = (outcome == Outcome::Aborted).then(|| "the cable was pulled".into());
            let path = directory.path().join(format!("{index}.json"));
            std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
            reports.push(path);
        }
        let record =
            collect(&CollectOptions { title: "a test".into(), reports: reports.clone() }).unwrap();
        assert_eq!(record.figure("pageferry tcp", "total").unwrap().samples.0, [8.0, 8.0]);
        assert_eq!(record.figure("pageferry rdma", "total").unwrap().samples.0, [4.0]);
        assert_eq!(
            (record.failures[0].turn, record.failures[0].why.as_str()),
            (1, "the cable was pulled")
        );
        std::fs::write(&reports[0], "junk").unwrap();
        let error =
            collect(&CollectOptions { title: String::new(), reports }).unwrap_err().to_string();
        assert!(error.contains("0.json"), "{error}");
    }
}
