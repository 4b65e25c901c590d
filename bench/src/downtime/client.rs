//! A client of the guest's service: asks on a fixed schedule, answered or not, and knows what
//! everybody would have waited who asked at those moments.
//!
//! # Coordinated omission
//!
//! A client that waits for each answer before it asks again asks once during a downtime, and
//! reports one slow answer where a thousand users had one each. This one sends a datagram at each
//! tick of the host's clock, whatever came back. What counts is the time from the tick, not from
//! the sending, so a client that was late itself hides nothing.
//!
//! A datagram that is lost has no answer. Its user would have asked again, as TCP and every name
//! resolver do; here each later tick is such a second try. So a request's wait ends with its own
//! answer or with that to any later request, whatever came first:
//!
//! ```text
//!   ticks     0    1    2    3    4    5    6
//!   answers   |                   |    |    |       1, 2 and 3 are lost
//!   waits     0    3    2    1    0    0    0       in ticks
//! ```

use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a receiver waits before it looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The most requests between two looks: an hour at a thousand a second.
const WINDOW_MAX: usize = 3_600_000;

/// Asks until it is dropped.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    every: Duration,
    threads: Vec<JoinHandle<()>>,
}

/// What users waited within one window.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waits {
    /// The wait of each request, in microseconds, in the order of the ticks.
    pub waits_us: Vec<u64>,
    /// How many of them had no answer of their own.
    pub lost: u64,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    start: Instant,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The number that is sent next.
    next: u64,
    /// The first number of the window.
    first: u64,
    /// When answers came, since `start`.
    answers: HashMap<u64, Duration>,
    failure: Option<String>,
}

impl Client {
    /// Sends a datagram to `to` every `every`.
    pub fn start(to: SocketAddr, every: Duration) -> Result<Self> {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
            .and_then(|socket| socket.connect(to).map(|()| socket))
            .with_context(|| format!("a socket to ask {to} from"))?;
        socket
            .set_read_timeout(Some(LOOK_EVERY))
            .context("a time limit for the client's socket")?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            start: Instant::now(),
            state: Mutex::default(),
            answered: Condvar::new(),
        });
        let receiver = socket.try_clone().context("a second handle of the client's socket")?;
        let (asking, hearing) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            std::thread::spawn(move || asking.ask(&socket, every)),
            std::thread::spawn(move || hearing.hear(&receiver)),
        ];
        Ok(Self { shared, every, threads })
    }

    /// Forgets what was, and begins a window with the next request.
    pub fn begin(&self) {
        let mut state = self.shared.lock();
        state.first = state.next;
        state.answers.clear();
    }

    /// Waits until a request is answered that was sent after this call, and ends the window there.
    pub fn end(&self, wait: Duration) -> Result<Waits> {
        let deadline = Instant::now() + wait;
        let mut state = self.shared.lock();
        let from = state.next;
        while !state.answers.keys().any(|number| *number >= from) {
            if let Some(why) = &state.failure {
                bail!("{why}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest answered no request for {wait:?} after it was moved");
            }
            let woken = self.shared.answered.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.waits(self.every))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, socket: &UdpSocket, every: Duration) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.lock().next;
            let due = self.start + every * u32::try_from(number).unwrap_or(u32::MAX);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // Counted as sent before it is: an answer must not overtake that. What could not be
            // sent (nobody listens, no route for a moment) was asked for all the same, and is lost.
            self.lock().next = number + 1;
            let _ = socket.send(&number.to_le_bytes());
        }
    }

    fn hear(&self, socket: &UdpSocket) {
        let mut bytes = [0; 8];
        while !self.stop.load(Ordering::Relaxed) {
            if !matches!(socket.recv(&mut bytes), Ok(8)) {
                continue;
            }
            let (number, now) = (u64::from_le_bytes(bytes), self.start.elapsed());
            let mut state = self.lock();
            if number < state.first || number >= state.next {
                continue;
            }
            if state.answers.len() < WINDOW_MAX {
                state.answers.entry(number).or_insert(now);
            } else {
                state.failure = Some("a window of more requests than are kept".into());
            }
            drop(state);
            self.answered.notify_all();
        }
    }
}

impl State {
    /// From the window's first request to the last that has an answer.
    fn waits(&self, every: Duration) -> Waits {
        let Some(last) = self.answers.keys().max() else { return Waits::default() };
        let mut waits = Waits::default();
        let mut earliest = Duration::MAX;
        for number in (self.first..=*last).rev() {
            match self.answers.get(&number) {
                Some(at) => earliest = earliest.min(*at),
                None => waits.lost += 1,
            }
            let due = every * u32::try_from(number).unwrap_or(u32::MAX);
            waits.waits_us.push(earliest.saturating_sub(due).as_micros() as u64);
        }
        waits.waits_us.reverse();
        waits
    }
}

impl Waits {
    /// The longest wait, in milliseconds: what the client lost by the move.
    #[must_use]
    pub fn longest_ms(&self) -> f64 {
        self.waits_us.iter().max().map_or(f64::NAN, |us| *us as f64 / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_lost_request_waits_until_a_later_one_is_answered() {
        let answers = [(1, 1), (5, 5), (6, 7)].map(|(number, ms)| (number, MS * ms));
        let state = State { next: 9, first: 1, answers: answers.into(), failure: None };
        let waits = state.waits(MS);
        assert_eq!(waits.waits_us, [0, 3000, 2000, 1000, 0, 1000]);
        assert_eq!(waits.lost, 3);
        assert_eq!(waits.longest_ms(), 3.0);
    }

    #[test]
    fn a_queue_that_is_answered_late_counts_from_each_request_s_own_moment() {
        let answers = (0..10).map(|number| (number, MS * 10)).collect();
        let state = State { next: 10, first: 0, answers, failure: None };
        let waits = state.waits(MS);
        assert_eq!(waits.waits_us, (1..=10).rev().map(|ms| ms * 1000).collect::<Vec<_>>());
        assert_eq!(waits.lost, 0);
    }

    #[test]
    fn a_service_that_answers_nothing_is_said_to() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = Client::start(silent.local_addr().unwrap(), MS).unwrap();
        client.begin();
        let error = client.end(MS * 30).unwrap_err().to_string();
        assert!(error.contains("answered no request"), "{error}");
    }
}
