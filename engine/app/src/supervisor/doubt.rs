//! The question about a guest in doubt, kept with the guest's record for the supervisor after this
//! one.
//!
//! ```text
//!   write_ahead   NAME.ahead   the record with the question, where nobody looks for it
//!   reveal        NAME.json    the same, renamed: the guest is sealed, and Commit goes next
//!   forget        NAME.json    the record without a question
//! ```
//!
//! Process, start time and question are one file, so that a question is never taken for another
//! guest's, and so that each supervisor that takes the guest up, of whatever version, either asks
//! it or writes it away.

use crate::supervisor::claim::Claim;
use crate::supervisor::record::{Doubt, Record, cannot_write};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::inquiry::{Keeper, Question};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// The files of one name.
#[derive(Debug, Clone)]
pub struct Files {
    json: PathBuf,
    ahead: PathBuf,
}

impl Files {
    /// Those of this claim.
    #[must_use]
    pub fn of(claim: &Claim) -> Self {
        Self { json: claim.path("json"), ahead: claim.path("ahead") }
    }

    /// After `Ok` no question is found under this name.
    ///
    /// # Errors
    /// If one still may be. They say what to do.
    pub fn forget(&self) -> Result<()> {
        self.remove_ahead()?;
        match self.record()? {
            Some(record) if record.doubt.is_some() => {
                Record { doubt: None, ..record }.write(&self.json)
            }
            _ => Ok(()),
        }
    }

    /// The question that is found under this name.
    #[must_use]
    pub fn question(&self) -> Option<Question> {
        self.record().ok()??.doubt.map(|doubt| doubt.question)
    }

    /// The record, if there is one. In what is none nobody finds a question.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn record(&self) -> Result<Option<Record>> {
        match std::fs::read(&self.json) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::os(format!("reading {}", self.json.display()), e)),
        }
    }

    fn remove_ahead(&self) -> Result<()> {
        match std::fs::remove_file(&self.ahead) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(cannot_write(&self.ahead, &e)),
            _ => Ok(()),
        }
    }
}

/// Keeps the question of a migration with the record of its guest.
#[derive(Debug)]
pub struct RecordKeeper {
    files: Files,
    record: Record,
    settings: Option<serde_json::Value>,
    /// Whether what lies ahead is this attempt's.
    is_ahead: AtomicBool,
}

impl RecordKeeper {
    /// For the guest of this record.
    #[must_use]
    pub fn new(files: Files, record: Record, settings: Option<serde_json::Value>) -> Self {
        Self { files, record, settings, is_ahead: AtomicBool::new(false) }
    }
}

impl Keeper for RecordKeeper {
    fn forget(&self) -> Result<()> {
        self.is_ahead.store(false, Ordering::Relaxed);
        self.files.forget()
    }

    fn write_ahead(&self, question: &Question) -> Result<()> {
        self.is_ahead.store(false, Ordering::Relaxed);
        let doubt = Doubt { question: question.clone(), settings: self.settings.clone() };
        Record { doubt: Some(doubt), ..self.record.clone() }.write(&self.files.ahead)?;
        self.is_ahead.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn reveal(&self) -> Result<()> {
        // An earlier attempt's must never be found for this one.
        if !self.is_ahead.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        std::fs::rename(&self.files.ahead, &self.files.json)
            .map_err(|e| cannot_write(&self.files.json, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::claim::RuntimeDir;
    use pageferry_transport::preamble::Token;
    use std::os::unix::fs::PermissionsExt;

    struct Scene {
        directory: tempfile::TempDir,
        runtime: RuntimeDir,
        claim: Claim,
        record: Record,
    }

    impl Scene {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700))
                .unwrap();
            let runtime = RuntimeDir::at(directory.path()).unwrap();
            let claim = runtime.claim("vm").unwrap();
            let record = Record { pid: 1, started: 2, qmp: "/a".into(), doubt: None };
            claim.remember(&record).unwrap();
            Self { directory, runtime, claim, record }
        }

        fn keeper(&self) -> RecordKeeper {
            RecordKeeper::new(Files::of(&self.claim), self.record.clone(), Some("as it was".into()))
        }

        fn found(&self) -> Option<Token> {
            let record = self.runtime.record("vm").unwrap();
            assert_eq!(
                Record { doubt: None, ..record.clone() },
                self.record,
                "the guest is still found"
            );
            record.doubt.map(|doubt| doubt.question.token)
        }

        /// Has nothing be written in the place of this file.
        fn obstruct(&self, file: &str) -> PathBuf {
            let path = self.directory.path().join(file);
            std::fs::create_dir_all(path.join("full")).unwrap();
            path
        }
    }

    fn question(token: u8) -> Question {
        Question {
            to: "127.0.0.1:1".parse().unwrap(),
            token: Token([token; 16]),
            was_running: true,
        }
    }

    #[test]
    fn a_question_is_found_from_the_seal_on_until_it_is_forgotten_and_is_its_owners_alone() {
        let scene = Scene::new();
        let keeper = scene.keeper();
        keeper.forget().unwrap();
        keeper.write_ahead(&question(1)).unwrap();
        assert_eq!(scene.found(), None, "the guest still runs");
        for file in ["vm.json", "vm.ahead"] {
            let mode =
                std::fs::metadata(scene.directory.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        assert_eq!(scene.runtime.names().unwrap(), ["vm"]);
        keeper.reveal().unwrap();
        assert_eq!(scene.found(), Some(Token([1; 16])));
        assert_eq!(
            scene.runtime.record("vm").unwrap().doubt.unwrap().settings,
            Some("as it was".into())
        );
        keeper.forget().unwrap();
        assert_eq!(scene.found(), None);
        keeper.forget().unwrap();
    }

    #[test]
    fn a_question_that_was_not_written_is_not_revealed_and_nor_is_an_earlier_one() {
        let scene = Scene::new();
        let keeper = scene.keeper();
        keeper.reveal().unwrap();
        assert_eq!(scene.found(), None, "none was written");
        keeper.write_ahead(&question(1)).unwrap();
        let obstacle = scene.obstruct("vm.ahead.new");
        assert!(keeper.write_ahead(&question(2)).is_err());
        keeper.reveal().unwrap();
        assert_eq!(scene.found(), None, "the earlier one lies there still");
        std::fs::remove_dir_all(obstacle).unwrap();
        keeper.write_ahead(&question(3)).unwrap();
        keeper.forget().unwrap();
        keeper.reveal().unwrap();
        assert_eq!(scene.found(), None, "it was forgotten");
    }

    #[test]
    fn a_question_that_cannot_be_forgotten_is_an_error() {
        let scene = Scene::new();
        let keeper = scene.keeper();
        keeper.write_ahead(&question(1)).unwrap();
        keeper.reveal().unwrap();
        let obstacle = scene.obstruct("vm.json.new");
        assert!(matches!(keeper.forget(), Err(Error::Refused(_))));
        assert_eq!(scene.found(), Some(Token([1; 16])));
        std::fs::remove_dir_all(obstacle).unwrap();
        scene.obstruct("vm.ahead");
        assert!(keeper.forget().is_err(), "what lies ahead might be revealed");
    }

    #[test]
    fn a_question_is_asked_about_no_other_process() {
        let doubt = Doubt { question: question(1), settings: None };
        let pid = std::process::id();
        let record =
            Record { doubt: Some(doubt.clone()), ..Record::of(pid, "/a".as_ref()).unwrap() };
        assert_eq!(record.clone().doubt_about(pid), Some(doubt));
        assert_eq!(record.clone().doubt_about(pid + 1), None);
        let earlier = Record { started: record.started - 1, ..record };
        assert_eq!(earlier.doubt_about(pid), None, "the number was given anew");
    }

    #[test]
    fn a_question_goes_with_the_record_of_a_guest_that_is_taken_up_anew_or_forgotten() {
        let scene = Scene::new();
        let keeper = scene.keeper();
        keeper.write_ahead(&question(1)).unwrap();
        keeper.reveal().unwrap();
        scene.claim.remember(&scene.record).unwrap();
        assert_eq!(scene.found(), None, "a supervisor that knows nothing of questions");
        keeper.write_ahead(&question(2)).unwrap();
        keeper.reveal().unwrap();
        keeper.write_ahead(&question(3)).unwrap();
        let Scene { runtime, mut claim, directory, .. } = scene;
        claim.forget_guest();
        drop(claim);
        assert_eq!(runtime.record("vm"), None);
        assert!(!directory.path().join("vm.ahead").exists());
    }
}
