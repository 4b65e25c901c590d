//! The operator's terminal while a guest has it: raw, so that every key is the guest's, and given
//! back as it was.
//!
//! ```text
//!   Ctrl-A X        leave, as a SIGTERM would       Ctrl-A Ctrl-A   a Ctrl-A for the guest
//! ```
//!
//! What is no terminal (a file, a pipe) is read until its end, and every byte of it is the guest's.

use pageferry_engine::error::{Error, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, read, write};
use rustix::process::getpgrp;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use signal_hook::consts::{SIGCONT, SIGQUIT};
use signal_hook::iterator::{Handle, Signals};
use std::sync::Arc;
use std::time::Duration;

/// Bytes read at once.
const PIECE_BYTES: usize = 4096;
/// Between two offers of input to a guest that has no room for it, or is paused.
const OFFER_EVERY: Duration = Duration::from_millis(20);
/// Between two looks whether a terminal in whose background we are has become ours.
const FOREGROUND_EVERY: Duration = Duration::from_millis(250);
/// The longest wait for a key, after which it is begun anew.
const KEY_MAX: Duration = Duration::from_secs(60);
/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Takes input for the guest; returns how many bytes it took.
pub type Take = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// An open terminal, or another input. Given back when it is dropped.
pub struct Terminal {
    stop: Arc<OwnedFd>,
    raw: Option<(Arc<Raw>, Handle)>,
}

impl Terminal {
    /// Hands what comes from `input` to `take`, on a thread of its own. `leave` is called for a
    /// Ctrl-A X.
    pub fn open(input: OwnedFd, take: Take, leave: Box<dyn FnMut() + Send>) -> Result<Self> {
        let failed = |e| Error::os("taking the terminal", e);
        let stop =
            Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?);
        let mut terminal = Self { stop: Arc::clone(&stop), raw: None };
        let input = Arc::new(input);
        let keys = isatty(&input).then(Keys::default);
        if keys.is_some() {
            let before = tcgetattr(&input).map_err(failed)?;
            let raw = Arc::new(Raw { input: Arc::clone(&input), before });
            let signals = Signals::new([SIGCONT, SIGQUIT])
                .map_err(|e| Error::os("listening for signals", e))?;
            terminal.raw = Some((Arc::clone(&raw), signals.handle()));
            raw.impose();
            spawn("terminal-sig", move || raw.heed(signals))?;
        }
        let raw = terminal.raw.as_ref().map(|(raw, _)| Arc::clone(raw));
        let reader = Reader { input, stop, raw, keys, take, leave };
        // Nobody waits for its end: a read of what another process has just taken away lasts.
        spawn("terminal-in", move || reader.run())?;
        Ok(terminal)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = write(&self.stop, &1u64.to_ne_bytes());
        if let Some((raw, signals)) = &self.raw {
            signals.close();
            raw.give_back();
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::os("starting a thread for the terminal", e))
}

/// A terminal's settings.
struct Raw {
    input: Arc<OwnedFd>,
    before: Termios,
}

impl Raw {
    /// Every key as it is typed. Output is left as it was: our own messages end their lines with a
    /// line feed alone.
    fn impose(&self) {
        if !is_ours(&self.input) {
            // Changing it from the background would stop this process, and the guest with it.
            return;
        }
        let mut raw = self.before.clone();
        let output = raw.output_modes & OutputModes::OPOST;
        raw.make_raw();
        raw.output_modes |= output;
        self.set(&raw);
    }

    fn give_back(&self) {
        if is_ours(&self.input) {
            self.set(&self.before);
        }
    }

    fn set(&self, settings: &Termios) {
        // At once: a terminal that was stopped would have us wait for its output.
        if let Err(e) = tcsetattr(&self.input, OptionalActions::Now, settings) {
            tracing::debug!(error = %e, "the terminal's settings");
        }
    }

    /// Signals that end or continue this process behind the supervisor's back.
    fn heed(&self, mut signals: Signals) {
        for signal in signals.forever() {
            if signal == SIGCONT {
                self.impose();
            } else {
                self.give_back();
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    }
}

/// Whether this process is in the terminal's foreground, where it may read and change it.
fn is_ours(input: &OwnedFd) -> bool {
    // One that is not our session's own has no foreground for us, and does not stop us.
    tcgetpgrp(input).map_or(true, |foreground| foreground == getpgrp())
}

/// What Ctrl-A does.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// Takes our own keys out of what was typed. Returns the guest's, and whether to leave.
    fn sort(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut rest = Vec::with_capacity(typed.len());
        let mut leave = false;
        for &key in typed {
            if !std::mem::take(&mut self.escaped) {
                self.escaped = key == ESCAPE;
                if !self.escaped {
                    rest.push(key);
                }
            } else if key == ESCAPE {
                rest.push(key);
            } else {
                leave |= key.eq_ignore_ascii_case(&b'x');
            }
        }
        (rest, leave)
    }
}

struct Reader {
    input: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    raw: Option<Arc<Raw>>,
    keys: Option<Keys>,
    take: Take,
    leave: Box<dyn FnMut() + Send>,
}

impl Reader {
    /// Until the end of the input, or of the guest.
    fn run(mut self) {
        let mut piece = [0; PIECE_BYTES];
        let mut was_ours = true;
        loop {
            if let Some(raw) = &self.raw {
                let ours = is_ours(&self.input);
                if ours && !was_ours {
                    raw.impose();
                }
                was_ours = ours;
                if !ours {
                    if self.stopped(FOREGROUND_EVERY) {
                        return;
                    }
                    continue;
                }
            }
            match self.wait() {
                Some(true) => {}
                Some(false) => continue,
                None => return,
            }
            let bytes = match read(&self.input, &mut piece) {
                Ok(0) => return,
                Ok(len) => &piece[..len],
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(e) => {
                    tracing::debug!(error = %e, "the guest's input ends");
                    return;
                }
            };
            let handed_on = match &mut self.keys {
                None => self.hand_on(bytes),
                Some(keys) => {
                    let (rest, leave) = keys.sort(bytes);
                    if leave {
                        (self.leave)();
                    }
                    self.hand_on(&rest)
                }
            };
            if !handed_on {
                return;
            }
        }
    }

    /// Waits for input; `None` if it is over.
    fn wait(&self) -> Option<bool> {
        let mut fds =
            [PollFd::new(&self.input, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(KEY_MAX))) {
            Ok(_) if !fds[1].revents().is_empty() => None,
            Ok(_) => Some(!fds[0].revents().is_empty()),
            Err(Errno::INTR) => Some(false),
            Err(_) => None,
        }
    }

    /// Waits for the end, for so long. Returns whether it came.
    fn stopped(&self, wait: Duration) -> bool {
        let mut fds = [PollFd::new(&self.stop, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(wait))).is_ok_and(|ready| ready > 0)
    }

    /// Offers it until all is taken. Returns whether to go on.
    fn hand_on(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            bytes = &bytes[(self.take)(bytes).min(bytes.len())..];
            if bytes.is_empty() {
                return true;
            }
            if self.stopped(OFFER_EVERY) {
                return false;
            }
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, bounded, unbounded};
    use rustix::pipe::pipe;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;

    const SOON: Duration = Duration::from_secs(30);

    fn pty() -> (OwnedFd, OwnedFd) {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        (ours, theirs)
    }

    /// A terminal whose input, and wish to leave, come out of channels.
    fn open(input: &OwnedFd) -> (Terminal, Receiver<u8>, Receiver<()>) {
        let ((sender, typed), (leaver, leaving)) = (unbounded(), bounded(1));
        // Takes three bytes at a time, as a guest that is slow.
        let take = move |bytes: &[u8]| {
            let taken = bytes.len().min(3);
            bytes[..taken].iter().for_each(|byte| sender.send(*byte).unwrap());
            taken
        };
        let leave = move || leaver.send(()).unwrap();
        let input = input.try_clone().unwrap();
        (Terminal::open(input, Box::new(take), Box::new(leave)).unwrap(), typed, leaving)
    }

    fn typed(keys: &Receiver<u8>, count: usize) -> Vec<u8> {
        (0..count).map(|_| keys.recv_timeout(SOON).unwrap()).collect()
    }

    #[test]
    fn every_key_is_the_guests_but_ours() {
        let (ours, theirs) = pty();
        let (_terminal, keys, leaving) = open(&theirs);
        // Ctrl-C, Ctrl-Z, a return as it is, Ctrl-A twice, an unknown key after Ctrl-A.
        write(&ours, b"a\x03\x1a\r\x01\x01\x01qz").unwrap();
        assert_eq!(typed(&keys, 6), b"a\x03\x1a\r\x01z");
        assert!(leaving.is_empty());
        write(&ours, b"\x01x").unwrap();
        leaving.recv_timeout(SOON).unwrap();
    }

    #[test]
    fn the_terminal_is_given_back_as_it_was_even_after_a_panic() {
        let (_ours, theirs) = pty();
        let before = tcgetattr(&theirs).unwrap();
        let panicked = std::panic::catch_unwind(|| {
            let (_terminal, ..) = open(&theirs);
            let during = tcgetattr(&theirs).unwrap();
            assert!(
                !during
                    .local_modes
                    .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
            );
            assert!(during.output_modes.contains(OutputModes::OPOST));
            std::panic::resume_unwind(Box::new("as planned"));
        });
        assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"as planned"));
        let after = tcgetattr(&theirs).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(
            (after.input_modes, after.output_modes),
            (before.input_modes, before.output_modes)
        );
    }

    #[test]
    fn a_pipe_is_read_to_its_end_and_has_no_keys_of_ours() {
        let (input, sender) = pipe().unwrap();
        let (_terminal, keys, leaving) = open(&input);
        write(&sender, b"\x01x and more").unwrap();
        drop(sender);
        assert_eq!(typed(&keys, 11), b"\x01x and more");
        // The reader has ended: nothing holds the other end of the channel.
        assert_eq!(keys.recv_timeout(SOON), Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        assert!(leaving.is_empty());
    }

    #[test]
    fn a_guest_that_takes_nothing_does_not_hold_up_the_end() {
        let (input, sender) = pipe().unwrap();
        let (offered, offers) = bounded(1);
        let take = move |_: &[u8]| {
            let _ = offered.try_send(());
            0
        };
        let terminal = Terminal::open(input, Box::new(take), Box::new(|| {})).unwrap();
        write(&sender, b"x").unwrap();
        offers.recv_timeout(SOON).unwrap();
        drop(terminal);
        while offers.recv_timeout(SOON).is_ok() {}
    }

    #[test]
    fn a_key_after_ctrl_a_is_known_as_such_though_it_comes_later() {
        let mut keys = Keys::default();
        assert_eq!(keys.sort(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(keys.sort(b"Xb"), (b"b".to_vec(), true));
    }
}
