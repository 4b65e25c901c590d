//! The simulated world: its time, its threads and its processes.
//!
//! Threads are those of the system, but only one of them runs at any moment; it hands over where it
//! waits, and at each [`World::step`]. Who is next is drawn. A thread of a process that was killed
//! runs once more, to unwind: whatever it does on the way has no effect, as [`World::is_dead`]
//! tells everybody who acts for it.

use super::chance::Chance;
use pageferry_engine::clock;
use std::any::Any;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// What a thread of a killed process unwinds with.
struct Killed;

/// A process: what is killed and stopped as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(pub usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Would go on.
    Ready,
    /// Waits for this deadline, and for a change if `listens`.
    Waits {
        deadline: Option<Instant>,
        listens: bool,
    },
    Gone,
}

struct Thread {
    process: Process,
    doing: Doing,
    wake: Arc<Condvar>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Fate {
    dead: bool,
    /// Stopped, as by SIGSTOP.
    stopped_until: Option<Instant>,
}

struct State {
    now: Instant,
    chance: Chance,
    threads: Vec<Thread>,
    running: usize,
    fates: Vec<Fate>,
    over: bool,
    failures: Vec<String>,
    trace: DefaultHasher,
    told: Vec<String>,
    tells: bool,
    /// What is to happen when a step of this name is reached.
    awaited: Vec<(String, Box<dyn FnOnce() + Send>)>,
    /// What must be gone when the world is.
    mortal: Vec<(&'static str, Weak<dyn Any + Send + Sync>)>,
}

/// See the [module](self).
pub struct World {
    begun: Instant,
    state: Mutex<State>,
}

/// One thread's place in it.
struct Place {
    world: Arc<World>,
    id: usize,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl World {
    /// Runs `body` as the first thread of a new world, and then ends everything else in it. Returns
    /// what the body returned, what has gone wrong in other threads, and a digest of all that has
    /// happened.
    ///
    /// # Panics
    /// As the body does.
    pub fn run<T>(
        seed: u64,
        tells: bool,
        body: impl FnOnce(&Arc<Self>) -> T,
    ) -> (T, Vec<String>, u64) {
        let begun = Instant::now();
        let world = Arc::new(Self {
            begun,
            state: Mutex::new(State {
                now: begun,
                chance: Chance::new(seed, 1),
                threads: vec![Thread {
                    process: Process(0),
                    doing: Doing::Ready,
                    wake: Arc::new(Condvar::new()),
                }],
                running: 0,
                fates: vec![Fate::default()],
                over: false,
                failures: Vec::new(),
                trace: DefaultHasher::new(),
                told: Vec::new(),
                tells,
                awaited: Vec::new(),
                mortal: Vec::new(),
            }),
        });
        let place = Arc::new(Place { world: Arc::clone(&world), id: 0 });
        let answer = clock::within(place, || catch_unwind(AssertUnwindSafe(|| body(&world))));
        world.end_all();
        let mut state = world.state();
        if tells {
            state.told.iter().for_each(|line| println!("{line}"));
        }
        let (mut failures, trace) = (state.failures.clone(), state.trace.finish());
        // What was awaited in vain holds the whole stage, and so this world.
        let (awaited, mortal) =
            (std::mem::take(&mut state.awaited), std::mem::take(&mut state.mortal));
        drop(state);
        drop((awaited, world));
        let left = mortal.iter().filter(|(_, thing)| thing.strong_count() > 0);
        failures.extend(left.map(|(name, _)| format!("{name} outlives the world")));
        match answer {
            Ok(answer) => (answer, failures, trace),
            Err(panic) => resume_unwind(panic),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process.
    #[must_use]
    pub fn process(&self) -> Process {
        let mut state = self.state();
        state.fates.push(Fate::default());
        Process(state.fates.len() - 1)
    }

    /// Starts a thread of a process.
    ///
    /// # Panics
    /// If the system has no thread.
    pub fn start(self: &Arc<Self>, process: Process, body: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        let id = state.threads.len();
        let wake = Arc::new(Condvar::new());
        state.threads.push(Thread { process, doing: Doing::Ready, wake: Arc::clone(&wake) });
        drop(state);
        let world = Arc::clone(self);
        let started = std::thread::Builder::new().stack_size(1 << 20).spawn(move || {
            let ended = catch_unwind(AssertUnwindSafe(|| {
                world.await_turn(id, &wake);
                let place = Arc::new(Place { world: Arc::clone(&world), id });
                clock::within(place, body);
            }));
            world.gone(id, ended.err());
        });
        started.expect("a thread");
    }

    /// Whether this process was killed.
    #[must_use]
    pub fn is_dead(&self, process: Process) -> bool {
        let state = self.state();
        state.over || state.fates[process.0].dead
    }

    /// Kills a process: none of its threads does anything any more.
    pub fn kill(&self, process: Process) {
        self.tell(&format!("{process:?} is killed"));
        let mut state = self.state();
        state.fates[process.0] = Fate { dead: true, stopped_until: None };
        state.wake_all(|thread| thread.process == process);
    }

    /// Stops a process for so long.
    pub fn stop(&self, process: Process, time: Duration) {
        self.tell(&format!("{process:?} is stopped for {time:?}"));
        let mut state = self.state();
        let until = state.now + time;
        state.fates[process.0].stopped_until = Some(until);
    }

    /// Has this fail the run if it outlives the world: with ten thousand of them a process is short
    /// of what they hold.
    pub fn must_go<T: Any + Send + Sync>(&self, name: &'static str, thing: &Arc<T>) {
        let thing: Weak<dyn Any + Send + Sync> = Arc::<T>::downgrade(thing);
        self.state().mortal.push((name, thing));
    }

    /// Has this happen when the step of this name is reached next.
    pub fn on(&self, step: &str, then: impl FnOnce() + Send + 'static) {
        self.state().awaited.push((step.into(), Box::new(then)));
    }

    /// A moment that others may come between. What was to happen at it happens.
    pub fn step(&self, name: &str) {
        if std::thread::panicking() {
            return;
        }
        self.tell(name);
        let due: Vec<_> = {
            let mut state = self.state();
            let (due, awaited) =
                std::mem::take(&mut state.awaited).into_iter().partition(|(step, _)| step == name);
            state.awaited = awaited;
            due
        };
        due.into_iter().for_each(|(_, then)| then());
        let me = self.state().running;
        self.hand_over(me, Doing::Ready);
    }

    /// Notes what happens.
    pub fn tell(&self, what: &str) {
        let mut state = self.state();
        let (at, who) = (state.now - self.begun, state.running);
        (at, who, what).hash(&mut state.trace);
        if state.tells {
            let process = state.threads[who].process.0;
            let line = format!("{:>12.6} [{process}.{who}] {what}", at.as_secs_f64());
            state.told.push(line);
        }
    }

    /// Notes that something must never have happened.
    pub fn fail(&self, what: String) {
        self.tell(&what);
        self.state().failures.push(what);
    }

    /// Has others run, until it is this thread's turn again.
    fn hand_over(&self, id: usize, doing: Doing) {
        if std::thread::panicking() {
            return;
        }
        let mut state = self.state();
        state.threads[id].doing = doing;
        let wake = Arc::clone(&state.threads[id].wake);
        state.choose(self.begun);
        if state.running != id {
            state.threads[state.running].wake.notify_one();
        }
        drop(state);
        self.await_turn(id, &wake);
    }

    /// Waits for this thread's turn; unwinds if its process is dead then.
    fn await_turn(&self, id: usize, wake: &Condvar) {
        let mut state = self.state();
        while state.running != id {
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let process = state.threads[id].process;
        if id != 0 && (state.over || state.fates[process.0].dead) {
            drop(state);
            resume_unwind(Box::new(Killed));
        }
    }

    fn gone(&self, id: usize, panic: Option<Box<dyn Any + Send>>) {
        let mut state = self.state();
        if let Some(panic) = panic.filter(|panic| !panic.is::<Killed>()) {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            state.failures.push(format!("a panic: {}", text.unwrap_or_default()));
        }
        state.threads[id].doing = Doing::Gone;
        // Whoever waits for something of this thread's looks again.
        state.wake_all(|_| true);
        state.choose(self.begun);
        state.threads[state.running].wake.notify_one();
    }

    /// Ends every thread but the first.
    fn end_all(&self) {
        loop {
            let mut state = self.state();
            state.over = true;
            state.wake_all(|_| true);
            if state.threads[1..].iter().all(|thread| thread.doing == Doing::Gone) {
                return;
            }
            let wake = Arc::clone(&state.threads[0].wake);
            state.threads[0].doing = Doing::Ready;
            state.choose(self.begun);
            state.threads[state.running].wake.notify_one();
            while state.running != 0 {
                state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl State {
    fn wake_all(&mut self, which: impl Fn(&Thread) -> bool) {
        for thread in &mut self.threads {
            if thread.doing != Doing::Gone && which(thread) {
                thread.doing = Doing::Ready;
            }
        }
    }

    /// Until when this thread is stopped.
    fn stopped(&self, thread: &Thread) -> Option<Instant> {
        let fate = self.fates[thread.process.0];
        fate.stopped_until.filter(|until| !self.over && *until > self.now)
    }

    /// Draws who runs next; if nobody would, time goes on to the earliest deadline.
    fn choose(&mut self, begun: Instant) {
        loop {
            let is_ready =
                |thread: &Thread| thread.doing == Doing::Ready && self.stopped(thread).is_none();
            let ready = self.threads.iter().filter(|thread| is_ready(thread)).count();
            if ready > 0 {
                let mut before = self.chance.clone().below(ready as u64);
                let chosen = self.threads.iter().position(|thread| {
                    let skipped = is_ready(thread) && before > 0;
                    before -= u64::from(skipped);
                    is_ready(thread) && !skipped
                });
                self.chance.below(ready as u64);
                self.running = chosen.expect("one of those that were counted");
                return;
            }
            let next = self.threads.iter().filter_map(|thread| match thread.doing {
                Doing::Gone => None,
                Doing::Ready => self.stopped(thread),
                Doing::Waits { deadline, .. } => deadline.max(deadline.and(self.stopped(thread))),
            });
            let next = next.min().unwrap_or_else(|| {
                panic!("all wait for each other, {:?} after the beginning", self.now - begun)
            });
            self.now = self.now.max(next);
            let now = self.now;
            for thread in &mut self.threads {
                if matches!(thread.doing, Doing::Waits { deadline: Some(deadline), .. } if deadline <= now)
                {
                    thread.doing = Doing::Ready;
                }
            }
        }
    }
}

impl clock::World for Place {
    fn now(&self) -> Instant {
        self.world.state().now
    }

    fn sleep_until(&self, deadline: Instant) {
        loop {
            self.world
                .hand_over(self.id, Doing::Waits { deadline: Some(deadline), listens: false });
            if self.now() >= deadline || std::thread::panicking() {
                return;
            }
        }
    }

    fn block(&self, deadline: Option<Instant>) {
        if std::thread::panicking() {
            // Nobody waits on his way out.
            let mut state = self.world.state();
            state.now = state.now.max(deadline.unwrap_or(state.now));
            return;
        }
        self.world.hand_over(self.id, Doing::Waits { deadline, listens: true });
    }

    fn changed(&self) {
        self.world
            .state()
            .wake_all(|thread| matches!(thread.doing, Doing::Waits { listens: true, .. }));
    }

    fn tell(&self, line: &str) {
        self.world.tell(line);
    }

    fn spawn(&self, _name: &str, body: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
        let process = self.world.state().threads[self.id].process;
        self.world.start(process, body);
        Ok(())
    }
}
