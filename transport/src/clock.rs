//! Time, and the waits that must know of it: the kernel's, or those of a simulated world.
//!
//! Code that waits asks this module for the time, sleeps here, and starts its threads here. Outside
//! a simulation each call is the one of the standard library behind the read of one flag. Inside
//! one, the calls of the threads that belong to a world go to that [`World`]: its threads run one
//! at a time or wait in it, and when all wait, its time jumps to the earliest deadline. So a
//! deadline of a minute costs nothing, and a seed decides who runs when.
//!
//! A thread that waits elsewhere (a join, a system call that blocks) holds its world up; a thread
//! that the world does not know may not wait for one that it knows.

use crossbeam_channel::{
    Receiver, RecvError, RecvTimeoutError, SendTimeoutError, Sender, TryRecvError, TrySendError,
};
use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Set by the first simulation of this process and never taken back: until then no call looks
/// further.
static SIMULATED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static WORLD: RefCell<Option<Arc<dyn World>>> = const { RefCell::new(None) };
}

/// What a simulation puts in the place of time, for the threads that belong to it.
pub trait World: Send + Sync {
    /// The time there.
    fn now(&self) -> Instant;

    /// Returns when the deadline has come, and not before.
    fn sleep_until(&self, deadline: Instant);

    /// Returns when something has changed since the caller's last look, or at the deadline; may
    /// return early. `None` waits for a change alone.
    fn block(&self, deadline: Option<Instant>);

    /// Something has changed: who is blocked looks again.
    fn changed(&self);

    /// Takes a line that is meant for people: nobody reads a log of ten thousand runs.
    fn tell(&self, line: &str) {
        let _ = line;
    }

    /// Starts a thread that belongs to this world too.
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<()>;
}

/// Runs `body` as a part of this world: what it does here, on this thread, goes by the world's
/// time.
pub fn within<T>(world: Arc<dyn World>, body: impl FnOnce() -> T) -> T {
    /// Puts back what was there, also after a panic.
    struct Leave(Option<Arc<dyn World>>);
    impl Drop for Leave {
        fn drop(&mut self) {
            WORLD.set(self.0.take());
        }
    }
    SIMULATED.store(true, Ordering::Relaxed);
    let _leave = Leave(WORLD.replace(Some(world)));
    body()
}

#[inline]
fn world() -> Option<Arc<dyn World>> {
    if SIMULATED.load(Ordering::Relaxed) { WORLD.with_borrow(Clone::clone) } else { None }
}

/// The time.
#[inline]
#[must_use]
pub fn now() -> Instant {
    world().map_or_else(Instant::now, |world| world.now())
}

/// The time since then.
#[inline]
#[must_use]
pub fn elapsed(since: Instant) -> Duration {
    now().saturating_duration_since(since)
}

/// Sleeps for so long.
pub fn sleep(time: Duration) {
    match world() {
        None => std::thread::sleep(time),
        Some(world) => world.sleep_until(world.now() + time),
    }
}

/// Hands a line that is meant for people to the world of this thread. False if it belongs to none.
#[must_use]
pub fn tell(line: &str) -> bool {
    world().inspect(|world| world.tell(line)).is_some()
}

/// Starts a thread of this name that nobody joins.
///
/// # Errors
/// If the system has no thread for it.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    match world() {
        None => std::thread::Builder::new().name(name.into()).spawn(body).map(drop),
        Some(world) => world.spawn(name, Box::new(body)),
    }
}

/// What comes out of a channel before the deadline.
///
/// # Errors
/// Those of [`Receiver::recv_deadline`].
pub fn receive<T>(from: &Receiver<T>, deadline: Instant) -> Result<T, RecvTimeoutError> {
    let Some(world) = world() else { return from.recv_deadline(deadline) };
    loop {
        match from.try_recv() {
            Ok(item) => {
                world.changed();
                return Ok(item);
            }
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) if world.now() >= deadline => {
                return Err(RecvTimeoutError::Timeout);
            }
            Err(TryRecvError::Empty) => world.block(Some(deadline)),
        }
    }
}

/// What comes out of a channel, whenever it does.
///
/// # Errors
/// Those of [`Receiver::recv`].
pub fn receive_any_time<T>(from: &Receiver<T>) -> Result<T, RecvError> {
    let Some(world) = world() else { return from.recv() };
    loop {
        match from.try_recv() {
            Ok(item) => {
                world.changed();
                return Ok(item);
            }
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => world.block(None),
        }
    }
}

/// Puts something into a channel, within this time.
///
/// # Errors
/// Those of [`Sender::send_timeout`].
pub fn send<T>(to: &Sender<T>, mut item: T, within: Duration) -> Result<(), SendTimeoutError<T>> {
    let Some(world) = world() else { return to.send_timeout(item, within) };
    let deadline = world.now() + within;
    loop {
        item = match to.try_send(item) {
            Ok(()) => {
                world.changed();
                return Ok(());
            }
            Err(TrySendError::Disconnected(item)) => {
                return Err(SendTimeoutError::Disconnected(item));
            }
            Err(TrySendError::Full(item)) if world.now() >= deadline => {
                return Err(SendTimeoutError::Timeout(item));
            }
            Err(TrySendError::Full(item)) => item,
        };
        world.block(Some(deadline));
    }
}

/// [`Condvar::wait_timeout`], whose guard is of this mutex.
pub fn wait_timeout<'m, T>(
    condvar: &Condvar,
    mutex: &'m Mutex<T>,
    guard: MutexGuard<'m, T>,
    time: Duration,
) -> MutexGuard<'m, T> {
    let Some(world) = world() else {
        return condvar.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0;
    };
    drop(guard);
    world.block(Some(world.now() + time));
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`Condvar::notify_all`].
pub fn notify_all(condvar: &Condvar) {
    match world() {
        None => condvar.notify_all(),
        Some(world) => world.changed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;

    /// A world of one thread, in which nothing happens by itself.
    struct Alone {
        begun: Instant,
        passed: Mutex<Duration>,
    }

    impl World for Alone {
        fn now(&self) -> Instant {
            self.begun + *self.passed.lock().unwrap()
        }
        fn sleep_until(&self, deadline: Instant) {
            *self.passed.lock().unwrap() = deadline - self.begun;
        }
        fn block(&self, deadline: Option<Instant>) {
            self.sleep_until(deadline.expect("nobody would end this wait"));
        }
        fn changed(&self) {}
        fn spawn(&self, _name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
            body();
            Ok(())
        }
    }

    #[test]
    fn an_hour_of_waits_takes_no_time_in_a_world_and_ends_with_it() {
        let begun = Instant::now();
        let hour = Duration::from_secs(3600);
        within(Arc::new(Alone { begun, passed: Mutex::default() }), || {
            let (sender, receiver) = bounded(1);
            sleep(hour);
            assert_eq!(receive::<u8>(&receiver, now() + hour), Err(RecvTimeoutError::Timeout));
            send(&sender, 1, hour).unwrap();
            assert!(matches!(send(&sender, 2, hour), Err(SendTimeoutError::Timeout(2))));
            assert_eq!(receive(&receiver, now()), Ok(1));
            let (mutex, condvar) = (Mutex::new(()), Condvar::new());
            drop(wait_timeout(&condvar, &mutex, mutex.lock().unwrap(), hour));
            assert_eq!(elapsed(begun), 4 * hour);
        });
        assert!(begun.elapsed() < hour);
        assert!(elapsed(begun) < hour);
    }
}
