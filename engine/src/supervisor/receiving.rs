//! The loop of a supervisor that waits for a guest: a QEMU stands ready; a source fills it; what does
//! not work out is thrown away and a fresh QEMU stands ready again.

use super::api::State;
use super::hosting::Hosting;
use super::launch::launch;
use super::runtime::{Claim, Record};
use super::{Inbox, Shared, end, say, watch_end};
use crate::destination::{Reception, Served};
use crate::error::{Error, Result};
use crate::guest::qemu::command::Role;
use crate::guest::qemu::destination::QemuDestination;
use crate::session::Incoming;
use crossbeam_channel::{Receiver, select};
use std::ffi::OsString;
use std::process::Child;

/// Why a wait for a source ended.
enum Heard {
    Connection(Incoming),
    QemuEnded,
    Signal,
}

/// Waits for a guest with this QEMU command, then hosts it. Returns the exit status.
pub fn receive(
    mut claim: Claim,
    shared: Shared,
    inbox: Inbox,
    user: &[OsString],
    mut reception: Reception,
) -> Result<u8> {
    let address = reception.doorway().address;
    // Nothing here is anybody's guest before Commit.
    claim.forget_guest();
    loop {
        let (mut child, qemu) = launch(user, Role::Destination, &claim.path("qmp"))?;
        // From Commit on the guest may outlive this supervisor, and must be found then.
        let prepared = Record::of(qemu.pid(), qemu.qmp_path())
            .and_then(|record| claim.remember(&record))
            .and_then(|()| QemuDestination::new(qemu));
        let mut guest = match prepared {
            Ok(guest) => guest,
            Err(e) => {
                end(&mut child);
                return Err(e);
            }
        };
        let ended = watch_end(guest.qemu().pidfd())?;
        let pid = guest.qemu().pid();
        shared
            .update(|s| (s.state, s.pid, s.listen) = (State::Waiting, Some(pid), Some(address.to_string())));
        say(&format!("{} waits for a guest on {address}", claim.name()));
        let mut told_to_end = false;
        let served = loop {
            match hear(&reception, &ended, &inbox) {
                Heard::Connection(incoming) => {
                    shared.update(|s| s.state = State::Receiving);
                    let mut watch = || {
                        told_to_end |= inbox.signals.try_recv().is_ok();
                        if told_to_end { Err(Error::Cancelled) } else { Ok(()) }
                    };
                    let served = reception.serve(incoming, &mut guest, &mut watch);
                    shared.update(|s| s.state = State::Waiting);
                    if !matches!(served, Served::Nothing) {
                        break served;
                    }
                }
                Heard::QemuEnded => {
                    end(&mut child);
                    return Err(Error::refused(
                        "QEMU ended while it waited for a guest; its message is above",
                    ));
                }
                Heard::Signal => {
                    drop(guest);
                    end(&mut child);
                    return Ok(0);
                }
            }
        };
        match served {
            Served::Nothing => {}
            Served::Received(received) => {
                say(&format!(
                    "{} runs here: {:.1} MiB received in {:.2} s",
                    claim.name(),
                    received.bytes_placed as f64 / f64::from(1 << 20),
                    received.total_us as f64 / 1e6
                ));
                return host(claim, shared, inbox, guest, child, reception);
            }
            Served::Doubtful(e) => {
                say(&format!(
                    "{} is this host's, but whether it runs is not known: {}",
                    claim.name(),
                    e.chain()
                ));
                return host(claim, shared, inbox, guest, child, reception);
            }
            Served::Discarded(e) => {
                say(&format!("the guest was not taken in: {}", e.chain()));
                end(&mut child);
                if told_to_end {
                    return Ok(0);
                }
            }
        }
    }
}

/// Waits for something to happen.
fn hear(reception: &Reception, ended: &Receiver<()>, inbox: &Inbox) -> Heard {
    loop {
        select! {
            recv(reception.doorway().incoming()) -> incoming => match incoming {
                Ok(incoming) => return Heard::Connection(incoming),
                Err(_) => return Heard::Signal,
            },
            recv(ended) -> _ => return Heard::QemuEnded,
            recv(inbox.signals) -> _ => return Heard::Signal,
            recv(inbox.orders) -> order => {
                if let Ok(order) = order {
                    order.refuse("this is a receiver that has no guest yet");
                }
            }
        }
    }
}

/// The guest is ours: from here on this is its supervisor.
fn host(
    mut claim: Claim,
    shared: Shared,
    inbox: Inbox,
    guest: QemuDestination,
    child: Child,
    reception: Reception,
) -> Result<u8> {
    claim.keep_guest();
    reception.answer_afterwards();
    Hosting::new(claim, shared, inbox, guest.into_source(), Some(child))?.run()
}
