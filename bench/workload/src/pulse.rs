//! The pulse: the one thread that must run on time, to notice when it did not.
//!
//! Every tick (500 us) it reads the guest's clock, sends a heartbeat byte when one is due, and
//! reads the CMOS clock. It writes COM2's and the CMOS ports directly: one byte a beat needs no
//! driver, no interrupt and no buffer in the guest's kernel, so the byte leaves QEMU the moment it
//! is written.
//!
//! Where that is not possible, beats can go to the console, through the kernel's driver, which
//! takes some accesses to ports a byte. There they lie between the bytes of lines, and are told
//! from them by their highest bit.

use crate::heartbeat::SHARED_BEAT;
use crate::stopped::{Seen, StopMeter};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Where lines of the guest go.
const CONSOLE: &str = "/dev/console";
/// One heartbeat byte in this time.
const BEAT: Duration = Duration::from_millis(1);
/// The CMOS clock is read without a pause from this long before a change of its second is expected
/// (a busy host often wakes the thread a millisecond late) ...
const CLOSE_BEFORE: Duration = Duration::from_micros(2000);
/// ... until this long after, should it not come.
const CLOSE_AFTER: Duration = Duration::from_micros(500);
/// Above every thread of the workload and the kernel's ordinary ones.
const PRIORITY: i32 = 50;

/// What the pulse found, in microseconds, since the start or the last [`Gaps::reset`].
#[derive(Debug, Default)]
pub struct Gaps {
    /// Longest time between two ticks by the guest's clock, which is paused while it is stopped.
    pub run_max: AtomicU64,
    /// Longest stop, by the CMOS clock.
    pub stopped_max: AtomicU64,
    /// All stops together, by the CMOS clock.
    pub stopped_total: AtomicU64,
    /// Longest gap the guest noticed: a stop and the longest time between ticks around it, or the
    /// latter alone.
    pub max: AtomicU64,
    resets: AtomicU64,
}

impl Gaps {
    /// Forgets everything.
    pub fn reset(&self) {
        self.resets.fetch_add(1, Relaxed);
        for figure in [&self.run_max, &self.stopped_max, &self.stopped_total, &self.max] {
            figure.store(0, Relaxed);
        }
    }
}

/// The thread's own state.
pub struct Pulse {
    gaps: Arc<Gaps>,
    ports: Option<Ports>,
    tick: Duration,
    last: Duration,
    next_beat: Duration,
    beat: u8,
    /// Beats on the console, where they are wanted.
    console: Option<ConsoleBeats>,
    meter: StopMeter,
    /// Longest time between ticks since the last exact change of the CMOS second, microseconds.
    window_max: u64,
    resets_seen: u64,
}

impl Pulse {
    /// A pulse with this period. With `use_ports`, and the right to use them, it beats on COM2 and
    /// reads the CMOS clock: meant for the guest only.
    #[must_use]
    pub fn new(
        gaps: Arc<Gaps>,
        tick: Duration,
        use_ports: bool,
        console: Option<ConsoleBeats>,
    ) -> Self {
        let now = monotonic();
        Self {
            console,
            gaps,
            ports: if use_ports { Ports::open() } else { None },
            tick,
            last: now,
            next_beat: now,
            beat: 0,
            meter: StopMeter::default(),
            window_max: 0,
            resets_seen: 0,
        }
    }

    /// Ticks for ever.
    pub fn run(mut self) -> ! {
        let parameter = libc::sched_param { sched_priority: PRIORITY };
        // SAFETY: a valid parameter block for the calling thread. Refused without the right to it,
        // and then the gaps are merely less exact.
        unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter) };
        let mut next = monotonic() + self.tick;
        loop {
            sleep_until(next);
            self.step();
            let change = self.meter.expected_change().unwrap_or(Duration::ZERO);
            if self.last >= change.saturating_sub(CLOSE_BEFORE) {
                while self.last < change + CLOSE_AFTER && !self.step() {}
            }
            next = (next + self.tick).max(self.last);
            let close =
                self.meter.expected_change().unwrap_or(Duration::ZERO).saturating_sub(CLOSE_BEFORE);
            if self.last < close {
                next = next.min(close);
            }
        }
    }

    /// One look at all clocks. True when the CMOS second has just changed.
    fn step(&mut self) -> bool {
        let now = monotonic();
        let resets = self.gaps.resets.load(Relaxed);
        if resets != self.resets_seen {
            (self.resets_seen, self.window_max) = (resets, 0);
        } else {
            let gap = (now - self.last).as_micros() as u64;
            self.window_max = self.window_max.max(gap);
            self.gaps.run_max.fetch_max(gap, Relaxed);
            self.gaps.max.fetch_max(gap, Relaxed);
        }
        self.last = now;
        if let Some(console) = &mut self.console {
            console.beat_when_due(now);
        }
        let Some(ports) = &self.ports else { return false };
        if now >= self.next_beat {
            self.next_beat = (self.next_beat + BEAT).max(now);
            ports.beat(self.beat);
            self.beat = self.beat.wrapping_add(1);
        }
        let asked = monotonic();
        let Some(second) = ports.second_of_hour() else { return false };
        let seen = self.meter.observe(asked, monotonic(), second);
        if let Seen::Exact(stopped) = seen {
            let length = stopped.as_micros() as u64;
            if length > 0 {
                self.gaps.stopped_max.fetch_max(length, Relaxed);
                self.gaps.stopped_total.fetch_add(length, Relaxed);
                self.gaps.max.fetch_max(length + self.window_max, Relaxed);
            }
            self.window_max = 0;
        }
        seen != Seen::Same
    }
}

/// Heartbeats on the console.
pub struct ConsoleBeats {
    console: File,
    every: Duration,
    next: Duration,
    number: u8,
}

impl ConsoleBeats {
    /// One beat in this time.
    pub fn open(every: Duration) -> std::io::Result<Self> {
        // A console that takes nothing shall not hold up the pulse.
        let console = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(CONSOLE)?;
        Ok(Self { console, every, next: monotonic(), number: 0 })
    }

    fn beat_when_due(&mut self, now: Duration) {
        // One that is not taken, because a line is being written, is due at the next tick.
        if now >= self.next && self.console.write(&[SHARED_BEAT | self.number]).is_ok() {
            self.next = (self.next + self.every).max(now);
            self.number = (self.number + 1) & !SHARED_BEAT;
        }
    }
}

/// `CLOCK_MONOTONIC`.
fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes the timespec given; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn sleep_until(at: Duration) {
    let at = libc::timespec {
        tv_sec: at.as_secs() as libc::time_t,
        tv_nsec: i64::from(at.subsec_nanos()),
    };
    // SAFETY: a valid timespec, and no remainder is asked for. Waking early does no harm.
    unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &raw const at,
            std::ptr::null_mut(),
        )
    };
}

const COM2_DATA: u16 = 0x2f8;
const COM2_LINE_STATUS: u16 = 0x2fd;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
/// MC146818 registers: seconds, minutes, status B.
const CMOS_SECONDS: u8 = 0;
const CMOS_MINUTES: u8 = 2;
const CMOS_STATUS_B: u8 = 11;
/// In status B: numbers are binary, not BCD.
const CMOS_BINARY: u8 = 4;

/// The right of this thread to use the I/O ports, proven by the kernel.
struct Ports {
    has_com2: bool,
    cmos_is_binary: bool,
    /// The last second and the second of the hour: minutes are read only when the second changes.
    minute: std::cell::Cell<(u8, u32)>,
}

impl Ports {
    fn open() -> Option<Self> {
        // SAFETY: asks for permission only; the pages of the I/O bitmap are the kernel's.
        let refused = unsafe {
            libc::ioperm(COM2_DATA.into(), 8, 1) != 0 || libc::ioperm(CMOS_INDEX.into(), 2, 1) != 0
        };
        if refused {
            return None;
        }
        let mut ports = Self {
            has_com2: false,
            cmos_is_binary: false,
            minute: std::cell::Cell::new((u8::MAX, 0)),
        };
        // A bus without a device at this address reads as all ones.
        ports.has_com2 = ports.read(COM2_LINE_STATUS) != 0xff;
        ports.cmos_is_binary = ports.cmos(CMOS_STATUS_B) & CMOS_BINARY != 0;
        Some(ports)
    }

    fn beat(&self, number: u8) {
        if self.has_com2 {
            self.write(COM2_DATA, number);
        }
    }

    fn second_of_hour(&self) -> Option<u32> {
        let second = self.cmos(CMOS_SECONDS);
        let (seen, of_hour) = self.minute.get();
        if second == seen {
            return Some(of_hour);
        }
        let of_hour = self.number(self.cmos(CMOS_MINUTES))? * 60 + self.number(second)?;
        self.minute.set((second, of_hour));
        Some(of_hour)
    }

    /// A number below 60, or nothing if the register does not hold one.
    fn number(&self, raw: u8) -> Option<u32> {
        let value = if self.cmos_is_binary { raw } else { (raw >> 4) * 10 + (raw & 15) };
        (value < 60).then_some(u32::from(value))
    }

    fn cmos(&self, register: u8) -> u8 {
        self.write(CMOS_INDEX, register);
        self.read(CMOS_DATA)
    }

    #[cfg(target_arch = "x86_64")]
    fn read(&self, port: u16) -> u8 {
        let value: u8;
        // SAFETY: ioperm granted exactly the ports named above to this thread.
        unsafe {
            std::arch::asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
        };
        value
    }

    #[cfg(target_arch = "x86_64")]
    fn write(&self, port: u16, value: u8) {
        // SAFETY: as in read(); neither device touches memory.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
        };
    }
}
