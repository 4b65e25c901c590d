//! Who may run the guest: the two sides as state machines, without I/O.
//!
//! ```text
//!   source                                      destination
//!   Copying --pause--> Paused                   Filling --loaded--> Loaded
//!      |                 |  --commit sent-->       |                  | --Commit--> Owner
//!      | abort, loss,    |  Committed              | abort, loss,     |   (crash: the guardian
//!      | crash           |   |  |  |               | crash, deadline  |    lets it run)
//!      v                 v   |  |  |               v                  v abort, deadline, crash
//!   Resumed <------------+   |  |  |            Discarded <-----------+
//!      ^    Abort received   |  |  +-- Running received --> Ended
//!      +---------------------+  +-- given up, crash ------> Unknown (stays paused)
//! ```
//!
//! Two rules carry everything. The source resumes only while Commit is unsent, or when the
//! destination itself has said that it discarded its copy. The destination runs the guest only
//! after Commit, and once it has said or decided `Discarded` it never does. A loss of the
//! connection alone therefore changes nothing after Commit: the source asks again on a new one.
//!
//! `crash` is the death of the supervisor; the guardian process (QEMU) then acts as the table says.
//! A crash of the whole host is worse than that on its own side only: a guest that is gone with its
//! host runs nowhere, and the other side does not guess.

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourcePhase {
    /// The guest runs here while its memory is copied.
    Copying,
    /// The guest is stopped here; Commit has not been sent.
    Paused,
    /// Commit may have reached the destination.
    Committed,
    /// The guest runs here again, and only here.
    Resumed,
    /// The guest runs at the destination.
    Ended,
    /// Nobody here knows; the guest stays stopped until the operator decides.
    Unknown,
}

/// What happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// The vCPUs were stopped.
    Pause,
    /// Commit is about to be sent.
    CommitSent,
    /// The destination says that it runs the guest.
    RunningReceived,
    /// The destination says that it discarded its copy.
    AbortReceived,
    /// The connection broke, a deadline passed, or this side cannot or will not go on.
    Failed,
    /// Asking again has been tried for long enough.
    GivenUp,
    /// The supervisor died.
    Crash,
}

impl SourcePhase {
    /// The phase after an event. Events that mean nothing in a phase leave it.
    #[must_use]
    pub fn on(self, event: SourceEvent) -> Self {
        use SourceEvent as E;
        match (self, event) {
            (Self::Copying, E::Pause) => Self::Paused,
            (Self::Paused, E::CommitSent) => Self::Committed,
            (
                Self::Copying | Self::Paused,
                E::Failed | E::AbortReceived | E::GivenUp | E::Crash,
            ) => Self::Resumed,
            (Self::Committed, E::RunningReceived) => Self::Ended,
            (Self::Committed, E::AbortReceived) => Self::Resumed,
            (Self::Committed, E::GivenUp | E::Crash) => Self::Unknown,
            (unchanged, _) => unchanged,
        }
    }

    /// Whether the vCPUs may run here.
    #[must_use]
    pub fn may_run(self) -> bool {
        matches!(self, Self::Copying | Self::Resumed)
    }
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationPhase {
    /// Memory arrives.
    Filling,
    /// The whole guest is here and waits for Commit.
    Loaded,
    /// The guest is this side's.
    Owner,
    /// The copy is thrown away and never runs.
    Discarded,
}

/// What happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The last fence came and the device state was loaded.
    Loaded,
    /// Commit was received.
    CommitReceived,
    /// The source says that it gives up.
    AbortReceived,
    /// The connection broke or something here failed.
    Failed,
    /// Nobody sent Commit for too long.
    Deadline,
    /// The guest could not be made to run here, and cannot run any more.
    RunFailed,
    /// The supervisor died.
    Crash,
}

impl DestinationPhase {
    /// The phase after an event. Events that mean nothing in a phase leave it.
    #[must_use]
    pub fn on(self, event: DestinationEvent) -> Self {
        use DestinationEvent as E;
        match (self, event) {
            (Self::Filling, E::Loaded) => Self::Loaded,
            (Self::Filling, E::AbortReceived | E::Failed | E::Deadline | E::Crash) => {
                Self::Discarded
            }
            // A lost connection is not a reason to discard: the source may have sent Commit into
            // it.
            (Self::Loaded, E::AbortReceived | E::Deadline | E::Crash) => Self::Discarded,
            (Self::Loaded, E::CommitReceived) => Self::Owner,
            (Self::Owner, E::RunFailed) => Self::Discarded,
            (unchanged, _) => unchanged,
        }
    }

    /// Whether the vCPUs may run here.
    #[must_use]
    pub fn may_run(self) -> bool {
        self == Self::Owner
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What may travel, reduced to what the phases look at.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Wire {
        Ready,
        Commit,
        Running,
        Abort,
    }

    /// One step of the world, drawn by proptest.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        SourcePauses,
        /// The source does what its phase lets it do next: sends Commit once Ready came, asks again
        /// after a loss, gives up.
        SourceSendsCommit,
        SourceFails,
        SourceGivesUp,
        SourceCrashes,
        DestinationLoads,
        DestinationFails,
        DestinationDeadline,
        DestinationRunFails,
        DestinationCrashes,
        DeliverToSource,
        DeliverToDestination,
        /// The connection breaks: what was on its way is gone, and both sides notice.
        Break,
        /// A new connection, as the source makes one to ask again.
        Reconnect,
    }

    fn step() -> impl Strategy<Value = Step> {
        use Step::*;
        prop_oneof![
            3 => Just(SourcePauses), 4 => Just(SourceSendsCommit), 1 => Just(SourceFails), 1 => Just(SourceGivesUp),
            1 => Just(SourceCrashes), 3 => Just(DestinationLoads), 1 => Just(DestinationFails),
            1 => Just(DestinationDeadline), 1 => Just(DestinationRunFails), 1 => Just(DestinationCrashes),
            6 => Just(DeliverToSource), 6 => Just(DeliverToDestination), 2 => Just(Break), 2 => Just(Reconnect),
        ]
    }

    struct World {
        source: SourcePhase,
        destination: DestinationPhase,
        source_alive: bool,
        destination_alive: bool,
        ready_received: bool,
        to_source: Vec<Wire>,
        to_destination: Vec<Wire>,
        connected: bool,
    }

    impl World {
        fn new() -> Self {
            Self {
                source: SourcePhase::Copying,
                destination: DestinationPhase::Filling,
                source_alive: true,
                destination_alive: true,
                ready_received: false,
                to_source: Vec::new(),
                to_destination: Vec::new(),
                connected: true,
            }
        }

        fn source_on(&mut self, event: SourceEvent) {
            let before = self.source;
            self.source = self.source.on(event);
            if self.source == SourcePhase::Resumed
                && before != SourcePhase::Resumed
                && self.source_alive
                && self.connected
            {
                self.to_destination.push(Wire::Abort);
            }
        }

        fn destination_on(&mut self, event: DestinationEvent) {
            self.destination = self.destination.on(event);
            if self.destination == DestinationPhase::Discarded
                && self.destination_alive
                && self.connected
            {
                self.to_source.push(Wire::Abort);
            }
        }

        fn take(&mut self, step: Step) {
            match step {
                Step::SourcePauses if self.source_alive => self.source_on(SourceEvent::Pause),
                Step::SourceSendsCommit if self.source_alive && self.connected => {
                    let first = self.source == SourcePhase::Paused && self.ready_received;
                    if first || self.source == SourcePhase::Committed {
                        self.source_on(SourceEvent::CommitSent);
                        self.to_destination.push(Wire::Commit);
                    }
                }
                Step::SourceFails if self.source_alive => self.source_on(SourceEvent::Failed),
                Step::SourceGivesUp if self.source_alive => self.source_on(SourceEvent::GivenUp),
                Step::SourceCrashes if self.source_alive => {
                    self.source_alive = false;
                    self.source_on(SourceEvent::Crash);
                    self.take(Step::Break);
                }
                Step::DestinationLoads
                    if self.destination_alive
                        && self.source != SourcePhase::Copying
                        && self.destination == DestinationPhase::Filling =>
                {
                    self.destination_on(DestinationEvent::Loaded);
                    if self.connected {
                        self.to_source.push(Wire::Ready);
                    }
                }
                Step::DestinationFails if self.destination_alive => {
                    self.destination_on(DestinationEvent::Failed)
                }
                Step::DestinationDeadline if self.destination_alive => {
                    self.destination_on(DestinationEvent::Deadline)
                }
                Step::DestinationRunFails if self.destination_alive => {
                    self.destination_on(DestinationEvent::RunFailed)
                }
                Step::DestinationCrashes if self.destination_alive => {
                    self.destination_alive = false;
                    self.destination_on(DestinationEvent::Crash);
                    self.take(Step::Break);
                }
                Step::DeliverToSource if self.source_alive && !self.to_source.is_empty() => {
                    match self.to_source.remove(0) {
                        Wire::Ready => self.ready_received = true,
                        Wire::Running => self.source_on(SourceEvent::RunningReceived),
                        Wire::Abort => self.source_on(SourceEvent::AbortReceived),
                        Wire::Commit => unreachable!("the destination never sends Commit"),
                    }
                }
                Step::DeliverToDestination
                    if self.destination_alive && !self.to_destination.is_empty() =>
                {
                    match self.to_destination.remove(0) {
                        Wire::Commit => {
                            self.destination_on(DestinationEvent::CommitReceived);
                            if self.destination == DestinationPhase::Owner {
                                self.to_source.push(Wire::Running);
                            }
                        }
                        Wire::Abort => self.destination_on(DestinationEvent::AbortReceived),
                        Wire::Ready | Wire::Running => unreachable!("the source sends neither"),
                    }
                }
                Step::Break => {
                    self.connected = false;
                    self.to_source.clear();
                    self.to_destination.clear();
                    if self.source_alive {
                        self.source_on(SourceEvent::Failed);
                    }
                    if self.destination_alive {
                        self.destination_on(DestinationEvent::Failed);
                    }
                }
                Step::Reconnect if self.source_alive && self.destination_alive => {
                    self.connected = true;
                }
                _ => {}
            }
        }

        /// Never two; and never none, unless the source says that it does not know.
        fn check(&self, trace: &[Step]) {
            let running =
                usize::from(self.source.may_run()) + usize::from(self.destination.may_run());
            assert!(
                running <= 1,
                "two guests run: {:?} and {:?} after {trace:?}",
                self.source,
                self.destination
            );
            if self.source == SourcePhase::Ended {
                assert!(self.destination.may_run(), "nobody runs the guest after {trace:?}");
            }
        }

        /// Lets everything that is under way come to its end, without further faults.
        fn settle(&mut self) {
            for _ in 0..8 {
                for step in [
                    Step::Reconnect,
                    Step::DestinationLoads,
                    Step::DeliverToSource,
                    Step::SourceSendsCommit,
                    Step::DeliverToDestination,
                    Step::DeliverToSource,
                ] {
                    self.take(step);
                }
            }
            self.take(Step::SourceGivesUp);
            self.take(Step::DestinationDeadline);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn no_interleaving_of_faults_runs_two_guests_or_loses_the_only_one(steps in prop::collection::vec(step(), 0..60)) {
            let mut world = World::new();
            // A guest that has run cannot be declared never to have run: RunFailed comes only in
            // place of Running, which the test below is about.
            let steps: Vec<_> = steps.into_iter().filter(|s| !matches!(s, Step::DestinationRunFails)).collect();
            for (i, step) in steps.iter().enumerate() {
                world.take(*step);
                world.check(&steps[..=i]);
            }
            world.settle();
            world.check(&steps);
            prop_assert!(
                world.source.may_run() || world.destination.may_run() || world.source == SourcePhase::Unknown,
                "nobody runs the guest and nobody says so: {:?}, {:?}", world.source, world.destination
            );
        }

        #[test]
        fn a_destination_that_cannot_run_it_gives_it_back(steps in prop::collection::vec(step(), 0..30)) {
            // Here every Commit that arrives fails to run: Abort is answered in place of Running.
            let mut world = World::new();
            for (i, step) in steps.iter().enumerate() {
                world.take(*step);
                if world.destination == DestinationPhase::Owner {
                    world.to_source.retain(|w| *w != Wire::Running);
                    world.take(Step::DestinationRunFails);
                }
                world.check(&steps[..=i]);
            }
            world.settle_without_running();
            prop_assert!(world.source.may_run() || world.source == SourcePhase::Unknown, "{:?}", world.source);
        }
    }

    impl World {
        fn settle_without_running(&mut self) {
            self.take(Step::DestinationDeadline);
            for _ in 0..8 {
                for step in [
                    Step::Reconnect,
                    Step::SourceSendsCommit,
                    Step::DeliverToDestination,
                    Step::DeliverToSource,
                ] {
                    self.take(step);
                    if self.destination == DestinationPhase::Discarded
                        && self.destination_alive
                        && self.connected
                    {
                        self.to_source.push(Wire::Abort);
                    }
                }
            }
            self.take(Step::SourceGivesUp);
        }
    }
}
