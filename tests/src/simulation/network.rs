//! Connections of the simulated world, with delays, cuts and outages. The lanes that are opened
//! over them become a loopback link, which has seeded faults of its own.

use super::chance::Chance;
use super::world::{Process, World};
use pageferry_engine::clock;
use pageferry_engine::net::{Address, Connection, Listener, Network};
use pageferry_engine::protocol::Message;
use pageferry_engine::{Error, Result};
use pageferry_transport::loopback::{self, Faults, LoopbackInitiator, LoopbackTarget};
use pageferry_transport::{
    Completion, FenceTag, Initiator, MemoryRegion, RemoteRegion, Target, TransportKind, WorkRequest,
};
use std::any::Any;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A silent network is noticed by an idle connection after this long, if it is noticed at all.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How a connection ends that is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// What was on its way is lost.
    Reset,
    /// What was on its way still comes.
    Closed,
}

/// The network between the hosts.
#[derive(Debug)]
pub struct Wire {
    world: Arc<World>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    chance: Chance,
    away_since: Option<Instant>,
    away_until: Instant,
    delay_max: Duration,
    faults: Faults,
    /// Who listens, and the connections that were not accepted yet.
    listener: Option<(Process, VecDeque<End>)>,
    connections: Vec<Arc<Mutex<Pipes>>>,
}

/// Both ways of one connection.
#[derive(Debug)]
struct Pipes {
    /// To the side that has connected, and to the one that was connected to.
    ways: [Way; 2],
    processes: [Process; 2],
    reset: bool,
    /// Whether something in between has ended it, however.
    cut: bool,
    /// The two ends of the lanes, once one side has made them.
    link: Option<(Option<LoopbackInitiator>, Option<LoopbackTarget>)>,
}

#[derive(Debug, Default)]
struct Way {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    /// When its end arrives.
    closed: Option<Instant>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct End {
    wire: Arc<Wire>,
    pipes: Arc<Mutex<Pipes>>,
    /// 0 has connected, 1 was connected to.
    side: usize,
}

/// A source's way into it.
#[derive(Debug)]
pub struct Dialling {
    /// The network.
    pub wire: Arc<Wire>,
    /// Whose connections they are.
    pub process: Process,
}

/// A destination's.
#[derive(Debug)]
pub struct Listening {
    wire: Arc<Wire>,
    address: Address,
    process: Process,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a control message, by the bytes that carry it.
fn name_of(frame: &[u8]) -> &'static str {
    match frame.get(4..).map(pageferry_engine::protocol::control::decode) {
        Some(Ok(message)) => Message::name(&message),
        _ => "bytes",
    }
}

impl Wire {
    /// One whose messages attach to this long.
    #[must_use]
    pub fn new(
        world: &Arc<World>,
        chance: Chance,
        delay_max: Duration,
        faults: Faults,
    ) -> Arc<Self> {
        let state = State {
            chance,
            away_since: None,
            away_until: clock::now(),
            delay_max,
            faults,
            listener: None,
            connections: Vec::new(),
        };
        Arc::new(Self { world: Arc::clone(world), state: Mutex::new(state) })
    }

    /// Where the destination is.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn address() -> Address {
        Address::Tcp("127.0.0.1:7600".parse().expect("an address"))
    }

    /// Carries nothing for so long: what is sent meanwhile comes afterwards, unless its connection
    /// did not live so long.
    pub fn away(&self, time: Duration) {
        self.world.tell(&format!("the network is away for {time:?}"));
        let mut state = lock(&self.state);
        let now = clock::now();
        state.away_since = Some(now);
        state.away_until = state.away_until.max(now + time);
        let until = state.away_until;
        for pipes in state.connections.clone() {
            let dies = time > KEEP_ALIVE && !state.chance.one_in(3);
            let mut pipes = lock(&pipes);
            if dies {
                pipes.reset = true;
            }
            for way in &mut pipes.ways {
                for (due, _) in &mut way.pieces {
                    *due = (*due).max(until);
                }
                way.closed = way.closed.map(|due| due.max(until));
            }
        }
        drop(state);
        clock_changed(&self.world);
    }

    /// Cuts every connection of control messages, or of lanes.
    pub fn cut(&self, how: Cut) {
        self.world.tell(&format!("connections are cut: {how:?}"));
        let state = lock(&self.state);
        let now = clock::now();
        for pipes in &state.connections {
            let mut pipes = lock(pipes);
            pipes.cut = true;
            match how {
                Cut::Reset => pipes.reset = true,
                Cut::Closed => pipes.ways.iter_mut().for_each(|way| way.close(now)),
            }
        }
        drop(state);
        clock_changed(&self.world);
    }

    /// The kernel closes what a dead process had open.
    pub fn process_died(&self, process: Process) {
        let mut state = lock(&self.state);
        let its_own = state.listener.as_ref().is_some_and(|(listener, _)| *listener == process);
        // Dropped when the lock is free: connections that nobody has accepted close as they go.
        let closed = if its_own { state.listener.take() } else { None };
        let (now, away_until) = (clock::now(), state.away_until);
        for pipes in &state.connections {
            let mut pipes = lock(pipes);
            for side in 0..2 {
                if pipes.processes[side] == process {
                    pipes.ways[1 - side].close(now.max(away_until));
                }
            }
        }
        drop(state);
        drop(closed);
        clock_changed(&self.world);
    }

    /// Lets go of connections that nobody has taken, which hold this network, and of the others.
    pub fn end(&self) {
        let (listener, connections) = {
            let mut state = lock(&self.state);
            (state.listener.take(), std::mem::take(&mut state.connections))
        };
        // They close as they go, and ask for the state.
        drop((listener, connections));
    }

    /// Listens for a process.
    #[must_use]
    pub fn listen(self: &Arc<Self>, process: Process) -> Listening {
        let before = lock(&self.state).listener.replace((process, VecDeque::new()));
        drop(before);
        Listening { wire: Arc::clone(self), address: Self::address(), process }
    }
}

/// Whoever is blocked looks again.
fn clock_changed(world: &World) {
    world.tell("a change");
    clock::notify_all(&std::sync::Condvar::new());
}

impl Way {
    fn close(&mut self, due: Instant) {
        let due = self.pieces.back().map_or(due, |(last, _)| due.max(*last));
        self.closed = Some(self.closed.map_or(due, |closed| closed.min(due)));
    }
}

impl Network for Dialling {
    fn connect(&self, to: &Address, within: Duration) -> Result<Box<dyn Connection>> {
        let failed =
            |kind: ErrorKind| Error::os(format!("connecting to {to}"), io::Error::from(kind));
        self.wire.world.step("connect");
        let deadline = clock::now() + within;
        let away_until = lock(&self.wire.state).away_until;
        if away_until > clock::now() {
            clock::sleep(away_until.min(deadline) - clock::now());
            if away_until > deadline {
                return Err(failed(ErrorKind::TimedOut));
            }
        }
        let mut state = lock(&self.wire.state);
        let Some((listener, queue)) = &mut state.listener else {
            return Err(failed(ErrorKind::ConnectionRefused));
        };
        let pipes = Arc::new(Mutex::new(Pipes {
            ways: [Way::default(), Way::default()],
            processes: [self.process, *listener],
            reset: false,
            cut: false,
            link: None,
        }));
        let end = |side| End { wire: Arc::clone(&self.wire), pipes: Arc::clone(&pipes), side };
        queue.push_back(end(1));
        state.connections.push(Arc::clone(&pipes));
        drop(state);
        clock_changed(&self.wire.world);
        Ok(Box::new(end(0)))
    }
}

impl Listener for Listening {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)> {
        loop {
            let mut state = lock(&self.wire.state);
            // Where another process has taken the address over, nobody comes any more.
            if let Some((process, queue)) = &mut state.listener
                && *process == self.process
                && let Some(end) = queue.pop_front()
            {
                return Ok((Box::new(end), self.address.clone()));
            }
            drop(state);
            wait(&self.wire.world, None);
        }
    }
}

/// Waits for a change, or for this moment.
fn wait(world: &World, until: Option<Instant>) {
    let until = until.unwrap_or_else(|| clock::now() + Duration::from_secs(3600));
    let (mutex, condvar) = (Mutex::new(()), std::sync::Condvar::new());
    let left = until.saturating_duration_since(clock::now());
    drop(clock::wait_timeout(&condvar, &mutex, lock(&mutex), left));
    let _ = world;
}

impl End {
    fn is_dead(&self) -> bool {
        self.wire.world.is_dead(lock(&self.pipes).processes[self.side])
    }

    /// Something to read now: bytes, an end, or a failure. Or when to look again.
    fn look(&self, pipes: &Pipes) -> std::result::Result<(), Option<Instant>> {
        let (way, now) = (&pipes.ways[self.side], clock::now());
        if pipes.reset {
            return Ok(());
        }
        match (way.pieces.front(), way.closed) {
            (Some((due, _)), _) if *due <= now => Ok(()),
            (None, Some(due)) if due <= now => Ok(()),
            (Some((due, _)), _) => Err(Some(*due)),
            (None, closed) => Err(closed),
        }
    }
}

impl End {
    /// One end of the loopback link whose first lane this is.
    fn link<T>(
        &self,
        lanes: usize,
        end: impl FnOnce(&mut (Option<LoopbackInitiator>, Option<LoopbackTarget>)) -> Option<T>,
    ) -> Result<T> {
        let faults = lock(&self.wire.state).faults.clone();
        let mut pipes = lock(&self.pipes);
        let link = pipes.link.get_or_insert_with(|| {
            let (initiator, target) = loopback::pair(lanes, faults);
            (Some(initiator), Some(target))
        });
        end(link).ok_or_else(|| Error::Protocol("a lane that is in use".into()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let due = clock::now().max(lock(&self.wire.state).away_until);
        lock(&self.pipes).ways[1 - self.side].close(due);
        clock_changed(&self.wire.world);
    }
}

impl Connection for End {
    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        while !self.readable(deadline)? {
            if clock::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        let mut pipes = lock(&self.pipes);
        if pipes.reset {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let Some((_, piece)) = pipes.ways[self.side].pieces.front_mut() else { return Ok(0) };
        let taken = piece.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&piece[..taken]);
        piece.drain(..taken);
        let whole = piece.is_empty();
        if whole {
            pipes.ways[self.side].pieces.pop_front();
        }
        drop(pipes);
        if whole {
            self.wire.world.step(["heard at the source", "heard at the destination"][self.side]);
        }
        Ok(taken)
    }

    fn write(&mut self, bytes: &[u8], _deadline: Instant) -> io::Result<usize> {
        let name = name_of(bytes);
        if name != "bytes" {
            self.wire.world.step(&format!("to send {name}"));
        }
        if self.is_dead() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let (mut state, now) = (lock(&self.wire.state), clock::now());
        let delay_max = state.delay_max;
        let delay = state.chance.time(Duration::from_micros(20), delay_max);
        let due = (now + delay).max(state.away_until);
        let mut pipes = lock(&self.pipes);
        if pipes.reset || pipes.ways[self.side].closed.is_some_and(|closed| closed <= now) {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let way = &mut pipes.ways[1 - self.side];
        let due = way.pieces.back().map_or(due, |(last, _)| due.max(*last));
        if way.closed.is_none() {
            way.pieces.push_back((due, bytes.to_vec()));
        }
        drop((pipes, state));
        clock_changed(&self.wire.world);
        if name != "bytes" {
            self.wire.world.step(&format!("sent {name}"));
        }
        // What has left may arrive, also where the sender is told that it failed.
        if lock(&self.pipes).cut {
            return Err(ErrorKind::BrokenPipe.into());
        }
        Ok(bytes.len())
    }

    fn readable(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let seen = self.look(&lock(&self.pipes));
            match seen {
                Ok(()) => return Ok(true),
                Err(_) if clock::now() >= deadline => return Ok(false),
                Err(next) => {
                    wait(&self.wire.world, Some(next.map_or(deadline, |next| next.min(deadline))))
                }
            }
        }
    }

    fn local_ip(&self) -> io::Result<Option<IpAddr>> {
        Ok(Wire::address().ip())
    }

    fn into_initiator(
        self: Box<Self>,
        rest: Vec<Box<dyn Connection>>,
    ) -> Result<Box<dyn Initiator>> {
        let inner = self.link(rest.len() + 1, |link| link.0.take())?;
        Ok(Box::new(Pushing { inner, lanes: Lanes::new(*self, rest) }))
    }

    fn into_target(self: Box<Self>, rest: Vec<Box<dyn Connection>>) -> Result<Box<dyn Target>> {
        let inner = self.link(rest.len() + 1, |link| link.1.take())?;
        Ok(Box::new(Taking { inner, lanes: Lanes::new(*self, rest) }))
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The connections of all lanes, as far as their link must know of them.
#[derive(Debug)]
struct Lanes {
    first: End,
    _rest: Vec<Box<dyn Connection>>,
}

impl Lanes {
    fn new(first: End, rest: Vec<Box<dyn Connection>>) -> Self {
        Self { first, _rest: rest }
    }

    /// Fails once they were cut, or the peer's process has ended.
    fn check(&self) -> pageferry_transport::Result<()> {
        let pipes = lock(&self.first.pipes);
        let ended = pipes.ways[self.first.side].closed.is_some_and(|due| due <= clock::now());
        if pipes.reset || ended {
            Err(pageferry_transport::Error::Closed { lane: 0 })
        } else {
            Ok(())
        }
    }

    /// Waits while the network is away. False if it still is at the deadline.
    fn wait(&self, deadline: Instant) -> bool {
        let until = lock(&self.first.wire.state).away_until;
        let now = clock::now();
        if until > now {
            clock::sleep(until.min(deadline).saturating_duration_since(now));
        }
        until <= clock::now()
    }
}

/// The source's end of the lanes: takes a little time for each look, and is paused while the
/// network is away.
struct Pushing {
    inner: LoopbackInitiator,
    lanes: Lanes,
}

/// The destination's.
struct Taking {
    inner: LoopbackTarget,
    lanes: Lanes,
}

impl Initiator for Pushing {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }
    fn lanes(&self) -> usize {
        self.inner.lanes()
    }
    fn register(&mut self, region: &Arc<MemoryRegion>) -> pageferry_transport::Result<()> {
        self.inner.register(region)
    }
    fn expect(
        &mut self,
        region: &Arc<MemoryRegion>,
        parts: &[Range<usize>],
    ) -> pageferry_transport::Result<()> {
        self.inner.expect(region, parts)
    }
    fn post(&mut self, batch: &[WorkRequest]) -> pageferry_transport::Result<usize> {
        self.lanes.check()?;
        self.inner.post(batch)
    }
    fn poll(
        &mut self,
        out: &mut Vec<Completion>,
        deadline: Instant,
    ) -> pageferry_transport::Result<usize> {
        if deadline > clock::now() {
            let time = lock(&self.lanes.first.wire.state)
                .chance
                .time(Duration::from_micros(5), Duration::from_millis(1));
            clock::sleep(time);
        }
        if !self.lanes.wait(deadline) {
            return Ok(0);
        }
        self.lanes.check()?;
        self.inner.poll(out, deadline)
    }
    fn fence(&mut self, tag: FenceTag) -> pageferry_transport::Result<()> {
        self.lanes.check()?;
        self.inner.fence(tag)
    }
    fn last_fence(&mut self, tag: FenceTag) -> pageferry_transport::Result<()> {
        self.lanes.check()?;
        self.inner.last_fence(tag)
    }
    fn bytes_on_wire(&self) -> u64 {
        self.inner.bytes_on_wire()
    }
}

impl Target for Taking {
    fn expose(&mut self, region: &Arc<MemoryRegion>) -> pageferry_transport::Result<RemoteRegion> {
        self.inner.expose(region)
    }
    fn wait_fence(&mut self, tag: FenceTag, deadline: Instant) -> pageferry_transport::Result<()> {
        if !self.lanes.wait(deadline) {
            return Err(pageferry_transport::Error::Timeout { what: "a fence on every lane" });
        }
        self.inner.wait_fence(tag, deadline)
    }
    fn bytes_placed(&mut self) -> pageferry_transport::Result<u64> {
        if self.lanes.wait(clock::now()) {
            self.lanes.check()?;
        }
        self.inner.bytes_placed()
    }
    fn revoke(&mut self) -> pageferry_transport::Result<()> {
        self.inner.revoke()
    }
}
