//! Takes orders for a guest through a socket.

use crate::supervisor::Shared;
use crate::supervisor::api::words::CLIENT_MAX;
use crate::supervisor::api::words::{
    Answer, PROGRESS_EVERY, REQUEST_BYTES_MAX, Reply, Request, State,
};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use pageferry_engine::error::Result;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::MigrateOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Orders that may wait.
const ORDERS_MAX: usize = 16;

/// A request for the guest's loop.
#[derive(Debug)]
pub enum Order {
    /// Move the guest.
    Migrate {
        /// How.
        options: MigrateOptions,
        /// Made by the API so that it can watch and cancel.
        monitor: Monitor,
        /// Where the outcome goes.
        reply: Answer,
    },
    /// See [`Request::Settle`].
    Settle {
        /// Let it run here.
        run: bool,
        /// Where the outcome goes.
        reply: Answer,
    },
}

impl Order {
    /// Answers that it cannot be done now.
    pub fn refuse(self, why: &str) {
        let (Self::Migrate { reply, .. } | Self::Settle { reply, .. }) = self;
        reply.deliver(Reply::Refused { text: why.into() });
    }
}

/// Opens the socket and answers on threads of its own. Orders come out of the returned channel.
pub fn serve(path: &Path, shared: Shared) -> Result<Receiver<Order>> {
    // The name is ours by its lock, so a socket that is still there is a dead supervisor's.
    let _ = std::fs::remove_file(path);
    let listener = pageferry_engine::host::private::listen(path)
        .map_err(|e| crate::supervisor::record::cannot_write(path, &e))?;
    let (sender, orders) = bounded(ORDERS_MAX);
    // One migration at a time: its monitor, for Cancel.
    let current = std::sync::Arc::new(std::sync::Mutex::new(None::<Monitor>));
    crate::supervisor::spawn("api", move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                std::thread::sleep(PROGRESS_EVERY);
                continue;
            };
            let (shared, sender, current) = (shared.clone(), sender.clone(), current.clone());
            let answered = crate::supervisor::spawn("api-client", move || {
                if let Err(e) = answer(&client, &shared, &sender, &current) {
                    tracing::debug!(error = %e, "a client of the supervisor");
                }
            });
            if let Err(e) = answered {
                tracing::warn!(error = %e, "no thread for a client");
            }
        }
    })?;
    Ok(orders)
}

type Current = std::sync::Mutex<Option<Monitor>>;

fn answer(
    client: &UnixStream,
    shared: &Shared,
    orders: &Sender<Order>,
    current: &Current,
) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_MAX))?;
    client.set_write_timeout(Some(CLIENT_MAX))?;
    let mut line = String::new();
    BufReader::new(std::io::Read::take(client, REQUEST_BYTES_MAX)).read_line(&mut line)?;
    let lock = || current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(e) => return send(client, &Reply::Refused { text: format!("not a request: {e}") }),
    };
    let (reply, replies) = bounded(0);
    let reply = Answer(reply);
    let monitor = match request {
        Request::Status => {
            let mut status = shared.status();
            status.progress = (*lock())
                .as_ref()
                .filter(|_| status.state == State::Migrating)
                .map(Monitor::progress);
            return send(client, &Reply::Status(status));
        }
        Request::Cancel => {
            let under_way = matches!(shared.status().state, State::Migrating);
            let answer = match lock().as_ref().filter(|_| under_way) {
                Some(monitor) => {
                    monitor.cancel();
                    Reply::Done { text: "cancelling; `migrate` reports how it ended".into() }
                }
                None => Reply::Refused { text: "no migration is under way".into() },
            };
            return send(client, &answer);
        }
        Request::Settle { run } => {
            order(orders, Order::Settle { run, reply });
            None
        }
        Request::Migrate(options) => {
            // Looked at and taken in one step, so that of two requests one is refused.
            let mut state = State::Migrating;
            shared.update(|status| {
                state = status.state;
                if state == State::Hosting {
                    status.state = State::Migrating;
                }
            });
            if let Some(why) = state.against_migrating() {
                return send(client, &Reply::Refused { text: why.into() });
            }
            let monitor = Monitor::default();
            *lock() = Some(monitor.clone());
            order(orders, Order::Migrate { options, monitor: monitor.clone(), reply });
            Some(monitor)
        }
    };
    let mut watching = true;
    loop {
        match replies.recv_timeout(PROGRESS_EVERY) {
            Ok(reply) => return send(client, &reply),
            Err(RecvTimeoutError::Timeout) => {
                // A client that went away does not end the migration.
                if let Some(monitor) = monitor.as_ref().filter(|_| watching) {
                    watching = send(client, &Reply::Progress(monitor.progress())).is_ok();
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                return send(client, &Reply::Refused { text: "the supervisor is ending".into() });
            }
        }
    }
}

fn order(orders: &Sender<Order>, order: Order) {
    if let Err(e) = orders.try_send(order) {
        e.into_inner().refuse("the supervisor is busy; try again");
    }
}

fn send(mut client: &UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    client.write_all(&line)
}
