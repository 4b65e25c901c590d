//! Whether a frame is sent with zero-copy: pure code, decided by what the kernel reports.
//!
//! Zero-copy pins pages instead of copying them, which pays only if nobody on the way copies after
//! all: loopback and veth do, and then it costs more than a plain send. The kernel says so with
//! every notification (`IORING_SEND_ZC_REPORT_USAGE`, Linux 6.2). So a lane tries a few frames and
//! believes the answer. Guest memory may change while the NIC still reads it; a page that changed
//! is dirty and will be sent again, so nothing is lost.

/// How the zero-copy send is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroCopy {
    /// Try it on each lane, and keep it where the kernel reports that nothing was copied.
    #[default]
    Auto,
    /// For every large frame, where the kernel has it.
    Always,
    /// Plain sends only.
    Never,
}

/// Smaller frames are copied: below about this size, pinning pages and the second completion cost
/// more than the copy (the kernel's msg_zerocopy document names 10 KiB; this leaves a margin).
const PAYLOAD_BYTES_MIN: u64 = 32 << 10;

/// Frames of each lane that must go well before it is believed. One at a time, so that a single
/// frame pays where it does not.
const TRIALS: u32 = 4;

/// What one lane knows about zero-copy.
#[derive(Debug)]
pub(super) struct Choice {
    state: State,
    fixed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// `asked`: a trial is on its way and the kernel has not answered.
    Trying {
        asked: bool,
        good: u32,
    },
    On,
    Off,
}

impl Choice {
    pub(super) fn new(mode: ZeroCopy, supported: bool) -> Self {
        let state = match mode {
            _ if !supported => State::Off,
            ZeroCopy::Never => State::Off,
            ZeroCopy::Always => State::On,
            ZeroCopy::Auto => State::Trying { asked: false, good: 0 },
        };
        Self { state, fixed: mode != ZeroCopy::Auto }
    }

    /// Whether to send this frame with zero-copy.
    pub(super) fn for_frame(&mut self, payload_bytes: u64) -> bool {
        if payload_bytes < PAYLOAD_BYTES_MIN {
            return false;
        }
        match &mut self.state {
            State::On => true,
            State::Off => false,
            State::Trying { asked, .. } => !std::mem::replace(asked, true),
        }
    }

    /// The kernel's report on one zero-copy send.
    pub(super) fn reported(&mut self, copied: bool) {
        if self.fixed {
            return;
        }
        self.state = match self.state {
            _ if copied => State::Off,
            State::Trying { good, .. } if good + 1 == TRIALS => State::On,
            State::Trying { good, .. } => State::Trying { asked: false, good: good + 1 },
            known => known,
        };
    }

    /// The kernel would not do it at all: no such operation, or no room to pin pages
    /// (`RLIMIT_MEMLOCK`). Final, whatever was asked for. False if it was off already: then the
    /// refused send was a plain one.
    pub(super) fn refused(&mut self) -> bool {
        std::mem::replace(&mut self.state, State::Off) != State::Off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: u64 = 1 << 20;

    #[test]
    fn one_copied_frame_ends_it() {
        let mut choice = Choice::new(ZeroCopy::Auto, true);
        assert!(choice.for_frame(LARGE));
        choice.reported(false);
        assert!(choice.for_frame(LARGE));
        choice.reported(true);
        assert!(!choice.for_frame(LARGE));
        choice.reported(false);
        assert!(!choice.for_frame(LARGE));
    }

    #[test]
    fn one_frame_is_tried_at_a_time_until_it_is_believed() {
        let mut choice = Choice::new(ZeroCopy::Auto, true);
        for _ in 0..TRIALS {
            let tried = (0..100).filter(|_| choice.for_frame(LARGE)).count();
            assert_eq!(tried, 1);
            choice.reported(false);
        }
        assert!((0..100).all(|_| choice.for_frame(LARGE)));
        assert!(!choice.for_frame(4096));
        choice.reported(true);
        assert!(!choice.for_frame(LARGE), "the way may change under a connection");
    }

    #[test]
    fn a_fixed_choice_listens_only_to_a_refusal() {
        let mut choice = Choice::new(ZeroCopy::Always, true);
        choice.reported(true);
        assert!(choice.for_frame(LARGE));
        assert!(choice.refused());
        assert!(!choice.for_frame(LARGE));
        assert!(!choice.refused());
        assert!(!Choice::new(ZeroCopy::Always, false).for_frame(LARGE));
        assert!(!Choice::new(ZeroCopy::Never, true).for_frame(LARGE));
    }
}
