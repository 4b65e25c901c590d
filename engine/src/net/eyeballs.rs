//! The connection to a name that has several addresses: whichever answers first, at the pace
//! of RFC 8305 ("happy eyeballs"). The order is that of [`Address::resolve_all`].

use super::Address;
use crate::error::{Error, Result};
use crossbeam_channel::{RecvTimeoutError, unbounded};
use std::time::{Duration, Instant};

/// Between the beginnings of two attempts while none has failed: the RFC's recommended Connection
/// Attempt Delay.
const ATTEMPT_EVERY: Duration = Duration::from_millis(250);

/// Connects to one of these addresses, within this time for all of them. Says to which.
pub(super) fn connect_first<C: Send + 'static>(
    to: &[Address],
    within: Duration,
    connect: impl Fn(&Address, Duration) -> Result<C> + Clone + Send + 'static,
) -> Result<(C, Address)> {
    if let [only] = to {
        return Ok((connect(only, within)?, only.clone()));
    }
    let deadline = Instant::now() + within;
    let (sender, ended) = unbounded();
    let (mut left, mut under_way, mut failed) = (to.iter(), 0, Vec::new());
    loop {
        if let Some(address) = left.next() {
            let (connect, sender, address) = (connect.clone(), sender.clone(), address.clone());
            let time = deadline.saturating_duration_since(Instant::now());
            std::thread::Builder::new()
                .name("connecting".into())
                .spawn(move || {
                    // One that comes too late is closed again.
                    let _ = sender.send((connect(&address, time), address));
                })
                .map_err(|e| Error::os("starting a thread to connect", e))?;
            under_way += 1;
        }
        if under_way == 0 {
            break;
        }
        let pause = if left.len() > 0 { Instant::now() + ATTEMPT_EVERY } else { deadline };
        match ended.recv_deadline(pause.min(deadline)) {
            Ok((Ok(connected), address)) => return Ok((connected, address)),
            Ok((Err(e), _)) => {
                under_way -= 1;
                failed.push(e.chain());
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => break,
        }
    }
    let unanswered = to.len() - failed.len();
    if unanswered > 0 {
        failed.push(format!("{unanswered} of {} addresses gave no answer in time", to.len()));
    }
    Err(Error::refused(failed.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn to(texts: &[&str]) -> Vec<Address> {
        texts.iter().map(|text| Address::Tcp(text.parse().unwrap())).collect()
    }

    #[test]
    fn an_address_that_fails_or_is_silent_costs_little_and_the_next_is_taken() {
        let tried = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&tried);
        let connect = move |to: &Address, within: Duration| {
            counting.fetch_add(1, Ordering::Relaxed);
            match to.tcp().unwrap().port() {
                1 => Err(Error::refused("refused")),
                2 => {
                    std::thread::sleep(within);
                    Err(Error::refused("silent"))
                }
                port => Ok(port),
            }
        };
        let begun = Instant::now();
        let all = to(&["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3", "10.0.0.1:4"]);
        let (port, address) = connect_first(&all, Duration::from_secs(20), connect).unwrap();
        assert_eq!((port, address), (3, all[2].clone()));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert_eq!(tried.load(Ordering::Relaxed), 3);
    }

    /// As of a name that has both, where the receiver listens at one of them.
    #[test]
    fn of_the_systems_addresses_the_one_that_is_listened_at_is_taken() {
        use crate::net::{Network, System};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let all = to(&[&format!("[::1]:{}", here.port()), &here.to_string()]);
        let (_, address) = System.connect_first(&all, Duration::from_secs(10)).unwrap();
        assert_eq!(address, all[1]);
    }

    #[test]
    fn all_attempts_together_end_at_the_deadline_and_say_what_each_met() {
        let connect = |to: &Address, within: Duration| -> Result<()> {
            if to.tcp().unwrap().port() > 1 {
                std::thread::sleep(within * 20);
            }
            Err(Error::refused(format!("{to} refuses")))
        };
        let all = to(&["10.0.0.1:1", "10.0.0.1:2"]);
        let begun = Instant::now();
        let error = connect_first(&all, Duration::from_millis(300), connect).unwrap_err().chain();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert!(
            error.contains("10.0.0.1:1 refuses") && error.contains("1 of 2 addresses"),
            "{error}"
        );
    }
}
