//! A worker: writes and checks its plot at a given rate.

use crate::pacer::Pacer;
use crate::pages::PAGE_BYTES;
use crate::params::Pattern;
use crate::plot::Plot;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

/// Pages between two looks at the clock and at the commands.
const BATCH_PAGES: usize = 32;
/// How long a worker sleeps when nothing is due.
const REST: Duration = Duration::from_millis(4);

/// Counters of all workers together.
#[derive(Debug, Default)]
pub struct Stats {
    /// Pages written.
    pub writes: AtomicU64,
    /// Pages checked.
    pub checked: AtomicU64,
    /// Pages and ledgers found bad.
    pub errors: AtomicU64,
    /// Pages read from the disk.
    pub disk_read: AtomicU64,
    /// Pages written to the disk.
    pub disk_written: AtomicU64,
}

/// What a worker tells.
#[derive(Debug)]
pub enum News {
    /// Its plot is filled, or could not be mapped.
    Filled(std::io::Result<()>),
    /// Something is bad; the text says what.
    Corrupt(String),
    /// The sweep asked for is done; so many pages were checked.
    Swept(u64),
}

/// Asks a worker to check its whole plot at once, and the ledger with it.
pub struct SweepNow;

/// A share of the work.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Number of its first page.
    pub first: u32,
    /// Pages written again and again.
    pub written: u32,
    /// Pages only checked.
    pub still: u32,
    /// Pages of all workers.
    pub pages_of_all: u32,
    /// Bytes to write a second; infinite is as fast as possible.
    pub write_rate: f64,
    /// Bytes to check in the background a second.
    pub sweep_rate: f64,
    /// Order of writing.
    pub pattern: Pattern,
}

/// Fills the plot, then writes and checks until nobody holds the other end of `orders`.
pub fn run<T: From<News>>(
    share: Share,
    stats: &Arc<Stats>,
    orders: &Receiver<SweepNow>,
    news: &Sender<T>,
) {
    // A closed channel means that the program is ending.
    let tell = |item: News| drop(news.send(item.into()));
    let mut plot = match Plot::fill(share.first, share.written, share.still, share.pages_of_all) {
        Ok(plot) => plot,
        Err(e) => return tell(News::Filled(Err(e))),
    };
    tell(News::Filled(Ok(())));
    let bad = |what: String| {
        stats.errors.fetch_add(1, Relaxed);
        tell(News::Corrupt(what));
    };
    let mut order = Order::new(share.pattern, plot.written(), share.first);
    let mut writes = Pacer::new(share.write_rate / PAGE_BYTES as f64);
    let mut sweeps = Pacer::new(share.sweep_rate / PAGE_BYTES as f64);
    let mut swept = 0;
    let start = Instant::now();
    loop {
        let now = start.elapsed();
        let (write, sweep) = (writes.take(now, BATCH_PAGES), sweeps.take(now, BATCH_PAGES));
        for _ in 0..write {
            if let Err(page) = plot.rewrite(order.next()) {
                bad(page.to_string());
            }
        }
        for _ in 0..sweep {
            swept = (swept + 1) % plot.len();
            if let Err(page) = plot.check(swept) {
                bad(page.to_string());
            }
        }
        stats.writes.fetch_add(write as u64, Relaxed);
        stats.checked.fetch_add((write + sweep) as u64, Relaxed);
        let asked = if write + sweep > 0 {
            orders.try_recv().map_err(|e| e == TryRecvError::Disconnected)
        } else {
            orders.recv_timeout(REST).map_err(|e| e == RecvTimeoutError::Disconnected)
        };
        match asked {
            Ok(SweepNow) => {
                for index in 0..plot.len() {
                    if let Err(page) = plot.check(index) {
                        bad(page.to_string());
                    }
                }
                if let Err(ledger) = plot.audit() {
                    bad(ledger.to_string());
                }
                stats.checked.fetch_add(plot.len() as u64, Relaxed);
                tell(News::Swept(plot.len() as u64));
            }
            Err(true) => return,
            Err(false) => {}
        }
    }
}

/// Which page next.
struct Order {
    pattern: Pattern,
    pages: usize,
    state: u64,
}

impl Order {
    fn new(pattern: Pattern, pages: usize, seed: u32) -> Self {
        Self {
            pattern,
            pages,
            state: if pattern == Pattern::Sequential { 0 } else { u64::from(seed) },
        }
    }

    fn next(&mut self) -> usize {
        match self.pattern {
            Pattern::Sequential => {
                self.state += 1;
                (self.state as usize - 1) % self.pages
            }
            Pattern::Random => self.random(self.pages),
            Pattern::Hot(percent) => {
                let hot = (self.pages * usize::from(percent) / 100).max(1);
                let all = self.pages;
                if self.random(10) < 9 { self.random(hot) } else { self.random(all) }
            }
        }
    }

    /// splitmix64; the bias of the multiplication is far below one in a billion.
    fn random(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * below as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(pattern: Pattern, pages: usize, draws: usize) -> Vec<usize> {
        let (mut order, mut hits) = (Order::new(pattern, pages, 1), vec![0; pages]);
        for _ in 0..draws {
            hits[order.next()] += 1;
        }
        hits
    }

    #[test]
    fn patterns_reach_the_pages_they_should() {
        assert_eq!(hits(Pattern::Sequential, 7, 21), [3; 7]);
        assert!(hits(Pattern::Random, 100, 100_000).iter().all(|n| (800..1200).contains(n)));
        let hot = hits(Pattern::Hot(10), 100, 100_000);
        assert!((90_000..92_000).contains(&hot[..10].iter().sum::<usize>()));
        assert!(hot[10..].iter().all(|n| *n > 50));
    }

    #[test]
    fn a_worker_sweeps_its_whole_plot_when_asked() {
        let (orders, inbox) = std::sync::mpsc::channel();
        let (outbox, news) = std::sync::mpsc::channel::<News>();
        let stats = Arc::new(Stats::default());
        let share = Share {
            first: 0,
            written: 16,
            still: 4,
            pages_of_all: 20,
            write_rate: f64::INFINITY,
            sweep_rate: 1e6,
            pattern: Pattern::Random,
        };
        let counted = Arc::clone(&stats);
        let worker = std::thread::spawn(move || run(share, &counted, &inbox, &outbox));
        let deadline = Duration::from_secs(20);
        assert!(matches!(news.recv_timeout(deadline), Ok(News::Filled(Ok(())))));
        orders.send(SweepNow).unwrap();
        assert!(matches!(news.recv_timeout(deadline), Ok(News::Swept(20))));
        drop(orders);
        worker.join().unwrap();
        assert!(stats.writes.load(Relaxed) > 0 && stats.checked.load(Relaxed) >= 20);
        assert_eq!(stats.errors.load(Relaxed), 0);
    }
}
