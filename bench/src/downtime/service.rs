//! What a guest made of threads offers to a client: answers to datagrams and a heartbeat, as long
//! as it runs.
//!
//! The service belongs to the guest, so it is paused with it: from [`Gate::close`], when the guest
//! is paused at the source, until [`Gate::open`], when it runs at the destination. Datagrams that
//! come meanwhile wait in the socket, as they would at a switch that holds them back: none is lost.

use anyhow::{Context, Result};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A beat of the guest's heart.
const BEAT: Duration = Duration::from_millis(1);

/// How long a thread waits before it looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether the guest runs.
#[derive(Debug, Default)]
pub struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    ended: AtomicBool,
}

impl Gate {
    /// The guest is paused.
    pub fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// The guest runs.
    pub fn open(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.opened.notify_all();
    }

    /// Returns when the guest runs; false when the service shall end.
    fn pass(&self) -> bool {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        while *closed && !self.ended.load(Ordering::Relaxed) {
            closed = self
                .opened
                .wait_timeout(closed, LOOK_EVERY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        !self.ended.load(Ordering::Relaxed)
    }
}

/// The threads of the service. Dropping it ends them.
#[derive(Debug)]
pub struct Service {
    /// Where it answers.
    pub address: SocketAddr,
    gate: Arc<Gate>,
    longest: Arc<Mutex<(Instant, Duration)>>,
    threads: Vec<JoinHandle<()>>,
}

impl Service {
    /// A service that runs while the gate is open.
    pub fn start(gate: &Arc<Gate>) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("a socket for the guest's service")?;
        socket
            .set_read_timeout(Some(LOOK_EVERY))
            .context("a time limit for the service's socket")?;
        let address = socket.local_addr().context("the service's address")?;
        let longest = Arc::new(Mutex::new((Instant::now(), Duration::ZERO)));
        let (answering, beating, beats) =
            (Arc::clone(gate), Arc::clone(gate), Arc::clone(&longest));
        let threads = vec![
            std::thread::spawn(move || answer(&socket, &answering)),
            std::thread::spawn(move || beat(&beats, &beating)),
        ];
        Ok(Self { address, gate: Arc::clone(gate), longest, threads })
    }

    /// Forgets the gaps so far.
    pub fn reset_gap(&self) {
        self.longest.lock().unwrap_or_else(PoisonError::into_inner).1 = Duration::ZERO;
    }

    /// The longest time between two heartbeats, in milliseconds.
    #[must_use]
    pub fn gap_ms(&self) -> f64 {
        self.longest.lock().unwrap_or_else(PoisonError::into_inner).1.as_secs_f64() * 1e3
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.gate.ended.store(true, Ordering::Relaxed);
        self.gate.opened.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer(socket: &UdpSocket, gate: &Gate) {
    let mut bytes = [0; 64];
    while !gate.ended.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            if !gate.pass() {
                return;
            }
            // A client that has gone needs no answer.
            let _ = socket.send_to(&bytes[..length], from);
        }
    }
}

fn beat(longest: &Mutex<(Instant, Duration)>, gate: &Gate) {
    while gate.pass() {
        let mut beats = longest.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let gap = now.duration_since(beats.0);
        *beats = (now, beats.1.max(gap));
        drop(beats);
        std::thread::sleep(BEAT);
    }
}
