//! Watches a stopped guest for another monitor of the same QEMU that lets it run.
//!
//! libvirt, a script or a person may say `cont` at any moment. QEMU tells every monitor (`RESUME`),
//! and does so before the first vCPU runs. Whoever waits for the peer cannot listen to that, so a
//! thread does:
//!
//! ```text
//!   ready(post)      the thread is there, ahead of the pause
//!   post(qmp)        the monitor is its own: from here on a RESUME is acted on at once
//!   relieve()        the monitor back, without a wait for the thread
//! ```
//!
//! | post        | from            | on RESUME                                             |
//! | ---         | ---             | ---                                                   |
//! | source      | seal            | `stop`: the guest is the destination's, or in doubt   |
//! | destination | device state loaded | the copy is ended; a RESET ends it too: it is no copy any more |

use crate::qmp::Qmp;
use crate::stream::settings::Settings;
use crate::stream::{Outgoing, QMP_MAX};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::notice::say;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Pause before another try to stop a guest that QEMU did not stop.
const STOP_AGAIN_AFTER: Duration = Duration::from_millis(20);
/// Pause before another look after something was done.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(1);

/// Pause between two looks of [`keep_stopped`].
const KEEP_EVERY: Duration = Duration::from_millis(50);
/// For QEMU to greet a connection to its free monitor.
const KEEP_GREETING_MAX: Duration = Duration::from_secs(2);

/// Within this time [`keep_stopped`] has ended once somebody else has the monitor; its looks, and
/// some more.
pub const TAKEN_OVER_MAX: Duration = Duration::from_millis(2500);

/// What is watched, and so what is done.
#[derive(Debug)]
pub enum Post {
    /// A guest that was sealed: it is stopped again.
    Source,
    /// A copy that has no Commit: this process is ended.
    Destination(Arc<OwnedFd>),
}

/// The thread, and the monitor while it has it.
#[derive(Debug)]
pub struct Sentry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    post: Post,
    slot: Mutex<Slot>,
    /// Written when the slot changes.
    wake: OwnedFd,
    /// Why the copy was ended.
    struck: Arc<OnceLock<String>>,
}

#[derive(Debug)]
enum Slot {
    /// Not yet.
    Ready,
    /// The monitor, and the number of the last event that is no concern of ours.
    Posted(Box<Qmp>, u64),
    /// Not any more.
    Over,
}

impl Sentry {
    /// Starts the thread, which does nothing yet.
    pub fn ready(post: Post) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::os("making an eventfd", e))?;
        let struck = Arc::new(OnceLock::new());
        let shared = Arc::new(Shared { post, slot: Mutex::new(Slot::Ready), wake, struck });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sentry".into())
            .spawn(move || of_thread.stand())
            .map_err(|e| Error::os("starting a thread", e))?;
        Ok(Self { shared })
    }

    /// Gives it the monitor and leaves a dead one in its place. Events after number `since` count.
    pub fn post(&self, qmp: &mut Qmp, since: u64) -> Result<()> {
        let stand_in = Qmp::stand_in(qmp.path())?;
        *self.shared.slot() = Slot::Posted(Box::new(std::mem::replace(qmp, stand_in)), since);
        self.shared.wake();
        Ok(())
    }

    /// Takes the monitor back.
    pub fn relieve(self, qmp: &mut Qmp) {
        if let Slot::Posted(theirs, _) = std::mem::replace(&mut *self.shared.slot(), Slot::Over) {
            *qmp = *theirs;
        }
    }

    /// Filled with the reason when the copy was ended.
    #[must_use]
    pub fn struck(&self) -> Arc<OnceLock<String>> {
        Arc::clone(&self.shared.struck)
    }
}

impl Drop for Sentry {
    fn drop(&mut self) {
        *self.shared.slot() = Slot::Over;
        self.shared.wake();
    }
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The thread's life.
    fn stand(&self) {
        let mut socket = None;
        let mut patience = None;
        loop {
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(socket.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
            if let Err(e) = poll(&mut fds, patience.as_ref())
                && e != rustix::io::Errno::INTR
            {
                tracing::error!(error = %e, "the guest is not watched for other monitors any more");
                return;
            }
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            match &mut *self.slot() {
                Slot::Ready => {}
                Slot::Over => return,
                Slot::Posted(qmp, since) => {
                    if socket.is_none() {
                        // A second handle, to wait on without the lock.
                        socket = rustix::io::fcntl_dupfd_cloexec(qmp.socket(), 0).ok();
                    }
                    let again = match self.look(qmp, since) {
                        // What was taken in meanwhile makes the socket readable no more. In between
                        // the monitor can be had back.
                        Ok(true) => Some(LOOK_AGAIN_AFTER),
                        // Without a handle (no descriptor is left) it looks now and then.
                        Ok(false) => socket.is_none().then_some(STOP_AGAIN_AFTER),
                        Err(_) if qmp.is_broken() => return,
                        Err(e) => {
                            say(&format!(
                                "a guest that must not run could not be stopped: {}",
                                e.chain()
                            ));
                            Some(STOP_AGAIN_AFTER)
                        }
                    };
                    patience = again.and_then(|again| Timespec::try_from(again).ok());
                }
            }
        }
    }

    /// Looks for what must not be, and ends it; says whether it did.
    fn look(&self, qmp: &mut Qmp, since: &mut u64) -> Result<bool> {
        qmp.drain_events()?;
        let before = *since;
        let turns = qmp.turns();
        match &self.post {
            Post::Source if turns.resume > *since => {
                qmp.execute("stop", json!({}), Instant::now() + QMP_MAX)?;
                *since = qmp.events_heard();
                say(
                    "ANOTHER MONITOR let the guest run here after it was given to the destination. It was stopped \
                     again at once. Keep libvirt, scripts and people from `cont` while a guest is moved or in doubt",
                );
                park(qmp);
            }
            Post::Destination(pidfd) if turns.resume.max(turns.reset) > *since => {
                let what = if turns.resume > *since { "let it run" } else { "reset it" };
                let _ = self.struck.set(format!(
                    "another monitor at the destination {what} before the guest was given to it, so the copy was ended"
                ));
                match pidfd_send_signal(pidfd, Signal::KILL) {
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(e) => return Err(Error::os("ending a copy that must not run", e)),
                }
                *since = qmp.events_heard();
                say(&format!(
                    "ANOTHER MONITOR {what} before this guest was ours; the copy was ended"
                ));
            }
            _ => {}
        }
        if matches!(self.post, Post::Source) {
            // All but its last byte: what QEMU takes time for is over when it is wanted.
            qmp.type_ahead("stop", Instant::now() + QMP_MAX)?;
        }
        Ok(*since != before)
    }
}

/// Brings a guest that was stopped again back into QEMU's state `postmigrate`, by a migration to
/// nowhere: `cont` took the locks of its disk images, which the destination needs, and without that
/// state the next supervisor would take it for a guest that somebody has paused.
fn park(qmp: &mut Qmp) {
    let parked = Settings::read(qmp).and_then(|before| {
        before.impose(qmp, &["x-ignore-shared", "events"])?;
        let parked = Outgoing::start(qmp).and_then(|stream| stream.drain(qmp, &mut |_| Ok(())));
        before.restore(qmp).and(parked)
    });
    if let Err(e) = parked {
        tracing::error!(error = %e.chain(), "the guest is stopped, but holds the locks of its disks");
    }
}

/// Keeps a sealed guest stopped for a supervisor that has died: looks every now and then over a
/// connection of its own, so that a new supervisor can have the monitor in between. Ends with QEMU,
/// or once somebody else has the monitor.
pub fn keep_stopped(qmp: &Path, pidfd: &OwnedFd) -> Result<()> {
    let mut unfinished = false;
    while !crate::process::ended(pidfd, KEEP_EVERY)? {
        let deadline = Instant::now() + KEEP_GREETING_MAX;
        let mut qmp = match Qmp::connect(qmp, deadline) {
            Ok(qmp) => qmp,
            // Nobody greets: the monitor is another's, who has taken over.
            Err(Error::Refused(_)) => return Ok(()),
            Err(_) => continue,
        };
        let running =
            qmp.execute("query-status", json!({}), deadline).map(|s| s["running"] == true);
        if unfinished || running.unwrap_or(false) {
            // One that is not stopped yet, and perhaps will be by this very command, is looked at
            // again: nobody else will.
            unfinished = true;
            if qmp.execute("stop", json!({}), Instant::now() + QMP_MAX).is_err() {
                continue;
            }
            say(
                "ANOTHER MONITOR let the guest run here although it was given to the destination. It was stopped \
                 again. To decide where it runs: `pageferry attach`, then `pageferry settle`",
            );
            park(&mut qmp);
            unfinished = false;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Sender, bounded};
    use serde_json::Value;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    /// A QEMU that another monitor lets run, and lets run again while the first time is being
    /// undone.
    fn let_run_twice(stream: UnixStream, stopped: &Sender<()>) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let say = |line: &str| (&stream).write_all(format!("{line}\n").as_bytes()).unwrap();
        let resumed = r#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}"#;
        let mut times = 0;
        say(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}}}"#);
        while let Some(Ok(line)) = lines.next() {
            // What is typed ahead at the end has no end.
            let Ok(command) = serde_json::from_str::<Value>(&line) else { return };
            if times == 1 && command["execute"] == "query-migrate-parameters" {
                say(resumed);
                times += 1;
            }
            say(&format!(r#"{{"return": {{}}, "id": {}}}"#, command["id"]));
            match command["execute"].as_str() {
                Some("qmp_capabilities") => {
                    say(resumed);
                    times += 1;
                }
                Some("stop") => stopped.send(()).unwrap(),
                _ => {}
            }
        }
    }

    #[test]
    fn a_guest_that_is_let_run_again_while_it_is_parked_is_stopped_again() {
        const SOON: Duration = Duration::from_secs(10);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stopped, stops) = bounded(8);
        let qemu = std::thread::spawn(move || let_run_twice(theirs, &stopped));
        let mut qmp = Qmp::over(ours.into(), Path::new("/fake"), Instant::now() + SOON).unwrap();
        let sentry = Sentry::ready(Post::Source).unwrap();
        sentry.post(&mut qmp, 0).unwrap();
        for time in ["first", "second"] {
            stops.recv_timeout(SOON).unwrap_or_else(|e| panic!("the {time} stop: {e}"));
        }
        drop((sentry, qmp));
        qemu.join().unwrap();
    }
}
