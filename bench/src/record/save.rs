//! Where records go: two files of one name for each run, the record and its page.

use super::Record;
use crate::report;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Fails, before anything is measured, if `directory` is not one or cannot be made one.
pub fn prepare(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| {
        format!("{} cannot take the results; give another --out", directory.display())
    })?;
    let probe = directory.join(format!(".pageferry-bench-{}", std::process::id()));
    fs::write(&probe, []).with_context(|| {
        format!("{} cannot be written; give another --out", directory.display())
    })?;
    let _ = fs::remove_file(probe);
    Ok(())
}

/// Writes it. An earlier run's are never overwritten.
pub fn save(record: &Record, directory: &Path) -> Result<PathBuf> {
    let stamp: String = record.begun().chars().filter(char::is_ascii_alphanumeric).collect();
    for count in 0..u32::MAX {
        let again = if count == 0 { String::new() } else { format!("-{count}") };
        let json = directory.join(format!("{}-{stamp}{again}.json", record.command));
        if json.exists() {
            continue;
        }
        write(&json, &serde_json::to_vec(record).context("encoding the record")?)?;
        write(&json.with_extension("html"), report::page(record)?.as_bytes())?;
        return Ok(json);
    }
    bail!("{} is full of records", directory.display())
}

/// As a whole or not at all: a run that is killed while it writes leaves no half of a record.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, bytes)
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_records_of_one_second_are_both_kept() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record::begin("downtime", "a test".into(), &1).unwrap();
        let paths = [0, 1].map(|_| save(&record, directory.path()).unwrap());
        assert_ne!(paths[0], paths[1]);
        for path in paths {
            assert_eq!(Record::read(&path).unwrap(), record);
            assert!(path.with_extension("html").exists());
        }
    }

    #[test]
    fn a_place_that_takes_no_files_is_named_before_the_run() {
        let error = format!("{:#}", prepare(Path::new("/proc/nowhere")).unwrap_err());
        assert!(error.contains("/proc/nowhere") && error.contains("--out"), "{error}");
    }
}
