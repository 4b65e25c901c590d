//! The loop of a supervisor that waits for a guest: a place stands ready; a source fills it; what
//! does not work out is thrown away and a fresh place stands ready again.

use super::api::{Order, State};
use super::hosting::Hosting;
use super::{Inbox, Shared, say};
use crate::supervisor::claim::Claim;
use crate::supervisor::place::{IncomingVm, VmFactory};
use crossbeam_channel::{TryRecvError, select};
use pageferry_engine::destination::listener::Incoming;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::error::{Error, Result};
use std::time::Instant;

/// Why a wait for a source ended.
enum Heard {
    Connection(Box<Incoming>),
    PlaceEnded,
    Signal,
}

/// Waits for a guest in places of this kind, then hosts it. Returns the exit status.
pub fn receive(
    mut claim: Claim,
    shared: Shared,
    inbox: Inbox,
    factory: &mut impl VmFactory,
    mut receiver: Receiver,
) -> Result<u8> {
    let address = receiver.listener().address.clone();
    // Nothing here is anybody's guest before Commit.
    claim.forget_guest();
    loop {
        let mut place = factory.prepare(&claim)?;
        let ended = match place.ended() {
            Ok(ended) => ended,
            Err(e) => {
                place.end();
                return Err(e);
            }
        };
        shared.update(|s| {
            (s.state, s.vmm, s.pid) = (State::Waiting, place.vmm(), Some(place.pid()));
            s.listen = Some(address.to_string());
        });
        say(&format!("{} waits for a guest on {address}", claim.name()));
        let mut told_to_end = false;
        let served = loop {
            match hear(&receiver, &ended, &inbox) {
                Heard::Connection(incoming) => {
                    shared.update(|s| s.state = State::Receiving);
                    let mut watch = || {
                        told_to_end |= inbox.signals.try_recv().is_ok();
                        if told_to_end { Err(Error::Cancelled) } else { Ok(()) }
                    };
                    let served = receiver.serve(*incoming, place.guest(), &mut watch);
                    shared.update(|s| s.state = State::Waiting);
                    if !matches!(served, Served::Nothing) {
                        break served;
                    }
                }
                Heard::PlaceEnded => {
                    let why = place.why_ended();
                    place.end();
                    return Err(why);
                }
                Heard::Signal => {
                    place.end();
                    return Ok(0);
                }
            }
        };
        match served {
            Served::Nothing => {}
            // The guest's record before any word about it.
            Served::Received(received) => {
                claim.keep_guest();
                say(&format!(
                    "{} runs here: {:.1} MiB received in {:.2} s",
                    claim.name(),
                    received.bytes_placed as f64 / f64::from(1 << 20),
                    received.total_us as f64 / 1e6
                ));
                return host(claim, shared, inbox, place, receiver);
            }
            Served::Doubtful(e) => {
                claim.keep_guest();
                say(&format!(
                    "{} is this host's, but whether it runs is not known: {}",
                    claim.name(),
                    e.chain()
                ));
                return host(claim, shared, inbox, place, receiver);
            }
            Served::Discarded(e) => {
                say(&format!("the guest was not taken in: {}", e.chain()));
                place.end();
                if told_to_end {
                    return Ok(0);
                }
            }
        }
    }
}

/// Waits for something to happen. However many connections come, a signal and the place's end are
/// heard.
fn hear(receiver: &Receiver, ended: &crossbeam_channel::Receiver<()>, inbox: &Inbox) -> Heard {
    let refuse = |order: Order| order.refuse("this is a receiver that has no guest yet");
    loop {
        if !matches!(inbox.signals.try_recv(), Err(TryRecvError::Empty)) {
            return Heard::Signal;
        }
        if !matches!(ended.try_recv(), Err(TryRecvError::Empty)) {
            return Heard::PlaceEnded;
        }
        inbox.orders.try_recv().into_iter().for_each(refuse);
        if let Some(incoming) = receiver.listener().next(Instant::now()) {
            return Heard::Connection(Box::new(incoming));
        }
        select! {
            recv(receiver.listener().bell()) -> rung => if rung.is_err() { return Heard::Signal },
            recv(ended) -> _ => return Heard::PlaceEnded,
            recv(inbox.signals) -> _ => return Heard::Signal,
            recv(inbox.orders) -> order => order.into_iter().for_each(refuse),
        }
    }
}

/// The guest is ours: from here on this is its supervisor.
fn host(
    claim: Claim,
    shared: Shared,
    inbox: Inbox,
    place: impl IncomingVm,
    receiver: Receiver,
) -> Result<u8> {
    receiver.answer_afterwards();
    Hosting::new(claim, shared, inbox, place.into_hosted()?)?.run()
}
