//! One attempt at a migration: checks, the session, the crossing, and what its failure means.

use crate::clock;
use crate::error::{Error, Result};
use crate::guest::{Facts, SourceGuest};
use crate::limits::SETUP_MAX;
use crate::memory::holes::Witness;
use crate::memory::lost_page::{self, LostPage};
use crate::net::address::check_exposure;
use crate::net::{Address, Network};
use crate::protocol::refusal::{self, aborted};
use crate::protocol::{Control, Features, Hello, Message, SourceEvent, SourcePhase};
use crate::report::progress::Monitor;
use crate::report::stage::Stage;
use crate::report::{MigrationReport, Outcome};
use crate::source::lanes::Wish;
use crate::source::session::Session;
use crate::source::{MigrateOptions, session};
use pageferry_transport::TransportKind;
use std::time::Duration;

/// For a receiver to be ready again after an RDMA path broke: it ends one QEMU and starts another,
/// which may have to allocate its memory.
pub(crate) const SECOND_ATTEMPT_MAX: Duration = Duration::from_secs(30);

/// For a destination whose lanes have ended to say why: it ends its copy of the guest first.
const REASON_MAX: Duration = Duration::from_secs(5);

/// How an attempt ended, as far as another one may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest runs here, and it was an RDMA path that broke.
    PathBroke,
    /// Nothing was touched: the receiver serves another source.
    Busy,
    /// For good or ill.
    Final,
}

/// One attempt, and what all of its steps have at hand.
pub(super) struct Attempt<'m> {
    pub(super) network: &'m dyn Network,
    pub(super) options: &'m MigrateOptions,
    pub(super) monitor: &'m Monitor,
    /// Why a first attempt broke: this one goes by TCP.
    pub(super) broken: Option<&'m str>,
    pub(super) report: MigrationReport,
    pub(super) phase: SourcePhase,
}

/// One attempt; by TCP if a first one broke.
pub(super) fn attempt(
    network: &dyn Network,
    guest: &mut dyn SourceGuest,
    options: &MigrateOptions,
    monitor: &Monitor,
    broken: Option<&str>,
) -> (MigrationReport, End) {
    let report = MigrationReport::new(guest.memory().bytes());
    let phase = SourcePhase::Copying;
    let mut attempt = Attempt { network, options, monitor, broken, report, phase };
    let ready = attempt.ready(guest);
    // What stands against a move may be that the guest must not run here: then nothing lets it run.
    let untouched = ready.is_err();
    let result = ready.and_then(|addresses| attempt.run(guest, &addresses));
    let mut report = attempt.report;
    report.outcome = match &result {
        Ok(()) => Outcome::Completed,
        Err(Error::Unknown(_)) => Outcome::Unknown,
        Err(_) => Outcome::Aborted,
    };
    report.lost_pages = name_lost_pages(guest);
    let mut end = End::Final;
    if let Err(mut error) = result {
        if let Error::Poisoned(pages) = &mut error {
            pages.clone_from(&report.lost_pages);
        }
        report.reason = Some(error.chain());
        report.refused = matches!(error, Error::Refused(_) | Error::Busy(_));
        let lanes_broke = refusal::cause(&error) == crate::protocol::Cause::Lanes
            || matches!(error, Error::PeerAborted { lanes: true, .. });
        if matches!(error, Error::Busy(_)) {
            end = End::Busy;
        } else if lanes_broke && report.transport == TransportKind::Rdma.name() {
            end = End::PathBroke;
        }
    }
    if report.outcome == Outcome::Aborted
        && !untouched
        && let Err(e) = guest.resume()
    {
        // Also after a refusal by the peer: it costs nothing where nothing was touched.
        let reason = report.reason.take().unwrap_or_default();
        report.reason = Some(format!("{reason}; and the guest does not run here: {}", e.chain()));
        // A guest that is gone with its QEMU is not in doubt.
        if guest.liveness()().is_ok() {
            report.outcome = Outcome::Unknown;
        }
        end = End::Final;
    }
    (report, end)
}

/// The pages that the hardware lost, with the addresses by which the guest knows them.
fn name_lost_pages(guest: &mut dyn SourceGuest) -> Vec<LostPage> {
    let mut pages = guest.memory().lost_pages();
    if !pages.is_empty() {
        guest.name_guest_physical(&mut pages);
        tracing::warn!("the hardware lost pages of the guest: {}", lost_page::name(&pages));
    }
    pages
}

impl Attempt<'_> {
    /// What must hold before anything is touched. Returns the destination's addresses.
    fn ready(&self, guest: &mut dyn SourceGuest) -> Result<Vec<Address>> {
        let (options, monitor) = (self.options, self.monitor);
        monitor.enter(Stage::Setup);
        let addresses = Address::resolve_all(&options.to)?;
        addresses.iter().try_for_each(|address| check_exposure(address, options.insecure))?;
        guest.vouch(&options.vouched);
        guest.preflight()?;
        // The guest may run here, so an earlier question is settled; found after this attempt's
        // death it would be wrong.
        monitor.keeper().map_or(Ok(()), |keeper| keeper.forget()).map_err(refuse_unreachable)?;
        Ok(addresses)
    }

    /// What the lanes to this address may be. `discards` says that memory may be taken away from
    /// the guest.
    fn wish(&self, to: &Address, discards: bool) -> Result<Wish> {
        let wish = Wish::new(&self.options.link, to, discards)?;
        Ok(match self.broken {
            Some(why) => wish.by_tcp(&format!("RDMA broke: {why}")),
            None => wish,
        })
    }

    /// The session, and the crossing over it.
    fn run(&mut self, guest: &mut dyn SourceGuest, addresses: &[Address]) -> Result<()> {
        self.report.memory_bytes = guest.memory().bytes();
        crate::host::own_code::map_own_code();
        let facts = guest.facts()?;
        let discards = facts.may_discard;
        // What is refused wherever it goes, is refused before anybody is troubled.
        addresses.iter().try_for_each(|to| self.wish(to, discards).map(drop))?;
        let witness = discards.then(|| Witness::new(guest.memory())).transpose()?;
        let (mut session, to) = self.open(addresses, &facts)?;
        let result = self.cross(guest, &facts, &mut session, &to, witness);
        // After Commit the connection is the inquiry's, which counts for itself.
        let Some(control) = &mut session.control else { return result };
        let (phase, monitor) = (self.phase, self.monitor);
        let result = result.map_err(|error| with_the_peers_reason(error, phase, control, monitor));
        self.report.control_messages += control.messages();
        if let Err(error) = &result
            && phase.on(SourceEvent::Failed) == SourcePhase::Resumed
        {
            control.abort(&error.chain(), refusal::cause(error), clock::now() + SETUP_MAX);
        }
        result
    }

    /// A session with the first of these addresses that can be reached, and which it is.
    fn open(&mut self, addresses: &[Address], facts: &Facts) -> Result<(Session, Address)> {
        let reached = session::reach(self.network, addresses).map_err(refuse_unreachable)?;
        let to = reached.address.clone();
        let wish = self.wish(&to, facts.may_discard)?;
        let hello = Hello {
            software: crate::VERSION.into(),
            lanes: self.options.lanes,
            guest: facts.description.clone(),
            state_bytes_max: facts.state_region_bytes(),
            rdma: wish.rdma(),
            features: Features::ours(),
        };
        let patience = if self.broken.is_some() { SECOND_ATTEMPT_MAX } else { SETUP_MAX };
        let session =
            session::open(self.network, reached, hello, &self.options.needs(), &wish, patience)
                .map_err(refuse_unreachable)?;
        self.report.transport = session.opened.link.kind().name().into();
        self.report.lanes = session.opened.link.lanes() as u32;
        self.report.link.clone_from(&session.opened.taken);
        self.monitor.take(&session.opened.taken);
        Ok((session, to))
    }
}

/// A destination that fails ends its lanes at once, and says why when its copy is dead: that reason
/// is the one to be told, not that the lanes were closed. The guest runs here meanwhile.
fn with_the_peers_reason(
    error: Error,
    phase: SourcePhase,
    control: &mut Control,
    monitor: &Monitor,
) -> Error {
    let ended_there = matches!(&error, Error::Transport(e) if e.is_the_peers_end());
    if !ended_there || phase.on(SourceEvent::Failed) != SourcePhase::Resumed {
        return error;
    }
    match control.receive_watched("Abort", clock::now() + REASON_MAX, &mut || monitor.check()) {
        Ok(Message::Abort(abort)) => aborted(abort),
        _ => error,
    }
}

/// Nothing was touched while no session is open: not reaching the peer is a refusal.
fn refuse_unreachable(error: Error) -> Error {
    match error {
        Error::Refused(_) | Error::Busy(_) => error,
        other => Error::Refused(other.chain()),
    }
}
