//! The loop of a supervisor that waits for a guest: a QEMU stands ready; a source fills it; what does
//! not work out is thrown away and a fresh QEMU stands ready again.

use super::api::{Order, State};
use super::hosting::Hosting;
use super::launch::launch;
use super::runtime::{Claim, Record};
use super::{Inbox, Shared, say, watch_end};
use crate::destination::{Received, Reception};
use crate::error::{Error, Result};
use crate::guest::qemu::command::Role;
use crate::guest::qemu::destination::QemuDestination;
use crate::session::Incoming;
use crossbeam_channel::select;
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
    claim: Claim,
    shared: Shared,
    inbox: Inbox,
    user: &[OsString],
    mut reception: Reception,
) -> Result<u8> {
    let address = reception.doorway().address;
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
        shared.update(|s| {
            (s.state, s.pid, s.listen) = (State::Waiting, Some(guest.qemu().pid()), Some(address.to_string()))
        });
        say(&format!("{} waits for a guest on {address}", claim.name()));
        let received: Result<Received> = loop {
            let heard = select! {
                recv(reception.doorway().incoming()) -> incoming => match incoming {
                    Ok(incoming) => Heard::Connection(incoming),
                    Err(_) => Heard::Signal,
                },
                recv(ended) -> _ => Heard::QemuEnded,
                recv(inbox.signals) -> _ => Heard::Signal,
                recv(inbox.orders) -> order => {
                    if let Ok(Order::Migrate { .. } | Order::Settle { .. }) = &order
                        && let Ok(order) = order
                    {
                        order.refuse("this is a receiver that has no guest yet");
                    }
                    continue;
                }
            };
            match heard {
                Heard::Connection(incoming) => {
                    shared.update(|s| s.state = State::Receiving);
                    let served = reception.serve(incoming, &mut guest);
                    shared.update(|s| s.state = State::Waiting);
                    if let Some(received) = served {
                        break received;
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
        match received {
            Ok(received) => {
                say(&format!(
                    "{} runs here: {:.1} MiB received in {:.2} s",
                    claim.name(),
                    received.bytes_placed as f64 / f64::from(1 << 20),
                    received.total_us as f64 / 1e6
                ));
                reception.answer_afterwards();
                return Hosting::new(claim, shared, inbox, guest.into_qemu(), Some(child))?.run();
            }
            Err(e) => {
                say(&format!(
                    "the guest was not taken in, and runs on at the source unless that says otherwise: {}",
                    e.chain()
                ));
                end(&mut child);
            }
        }
    }
}

/// No QEMU is left behind.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
