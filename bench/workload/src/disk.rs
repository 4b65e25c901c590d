//! A disk worker: reads and writes a disk past the page cache, into pages of its own, and checks
//! them.
//!
//! ```text
//!   disk    | extents that are only read (7 of 8)         | written: each belongs to one worker |
//!   worker  | slot 0 | slot 1 | ... one after the other: check what it still holds, then
//!                               read any extent into it and check that, or write the next generation
//! ```
//!
//! A page that a disk transfer filled and no processor ever wrote is what tracking by page tables
//! can lose. It then shows when its slot is looked at again, before it is used anew: it holds what
//! the slot held before. Only one word of each sector is compared then, for the disk shall be busy
//! and not the processor; a sweep compares all.

use crate::content::{self, BadPage, Origin, word};
use crate::pages::{PAGE_BYTES, PAGE_WORDS, Page, PageMemory};
use crate::worker::{News, Stats, SweepNow};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Duration;

/// Pages of one transfer: large, so that it is under way for long.
pub const EXTENT_PAGES: usize = 64;
const EXTENT_BYTES: usize = EXTENT_PAGES * PAGE_BYTES;
/// Extents in a worker's memory. What a move loses must still be there after it.
const SLOTS: usize = 32;
/// One transfer of so many is a write, and one extent of so many is written.
const WRITE_ONE_OF: u32 = 8;
/// What the image holds to begin with. Far from the generations of pages that live in memory only,
/// so that a stale page tells where it is from.
const FIRST_GENERATION: u32 = 1 << 30;
/// The smallest unit that a transfer could be cut at.
const SECTOR_WORDS: usize = 64;
/// After a transfer that failed.
const REST: Duration = Duration::from_millis(100);

/// Writes the image of a disk of so many MiB, as the workers expect it.
pub fn write_image(path: &Path, mib: u32) -> io::Result<()> {
    let mut out = io::BufWriter::new(File::create(path)?);
    for page in 0..mib * (1 << 20) / PAGE_BYTES as u32 {
        let seed = Origin { page, generation: FIRST_GENERATION }.seed();
        for index in 0..PAGE_WORDS {
            out.write_all(&word(seed, index).to_le_bytes())?;
        }
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// A disk, shared by its workers.
#[derive(Debug)]
pub struct Disk {
    file: File,
    extents: u32,
    workers: u32,
}

impl Disk {
    /// Opens it for direct I/O by so many workers.
    pub fn open(path: &Path, workers: u32) -> io::Result<Self> {
        Self::over(
            File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?,
            workers,
        )
    }

    fn over(mut file: File, workers: u32) -> io::Result<Self> {
        let extents = (file.seek(SeekFrom::End(0))? / EXTENT_BYTES as u64).min(1 << 24) as u32;
        // Two that it writes for each worker, so that one can be stale.
        if extents < 2 * workers * WRITE_ONE_OF {
            let least = ((2 * workers * WRITE_ONE_OF) as usize * EXTENT_BYTES) >> 20;
            return Err(io::Error::other(format!("it is smaller than {least} MiB")));
        }
        Ok(Self { file, extents, workers })
    }

    fn written(&self) -> u32 {
        self.extents / WRITE_ONE_OF / self.workers
    }

    /// The extents of this worker that are written.
    fn first_written(&self, worker: u32) -> u32 {
        self.extents - (worker + 1) * self.written()
    }

    /// The extents that are only read.
    fn still(&self) -> u32 {
        self.extents - self.workers * self.written()
    }

    fn transfer(&self, slot: &[Page], extent: u32, write: bool) -> io::Result<()> {
        let (fd, memory) = (self.file.as_raw_fd(), slot.as_ptr().cast_mut().cast::<libc::c_void>());
        let at = i64::from(extent) * EXTENT_BYTES as i64;
        // SAFETY: the descriptor is open; `slot` is live memory of `size_of_val(slot)` bytes, and
        // made of atomics, so that it may be written through a shared borrow. O_DIRECT is done with
        // it on return.
        let done = unsafe {
            if write {
                libc::pwrite(fd, memory, size_of_val(slot), at)
            } else {
                libc::pread(fd, memory, size_of_val(slot), at)
            }
        };
        match usize::try_from(done) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(bytes) if bytes < size_of_val(slot) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
        }
    }
}

/// What one worker knows: its slots, and the ledger of what it wrote.
pub struct Worker {
    disk: Arc<Disk>,
    memory: PageMemory,
    /// What each slot holds.
    holds: Vec<Option<Extent>>,
    first_written: u32,
    generations: Vec<u32>,
    random: u64,
    turn: usize,
}

#[derive(Debug, Clone, Copy)]
struct Extent {
    number: u32,
    generation: u32,
}

impl Extent {
    fn origin(self, page: usize) -> Origin {
        Origin {
            page: self.number * EXTENT_PAGES as u32 + page as u32,
            generation: self.generation,
        }
    }
}

impl Worker {
    /// Worker number `index` of the disk's.
    pub fn new(disk: Arc<Disk>, index: u32) -> io::Result<Self> {
        Ok(Self {
            memory: PageMemory::new(SLOTS * EXTENT_PAGES)?,
            holds: vec![None; SLOTS],
            first_written: disk.first_written(index),
            generations: vec![FIRST_GENERATION; disk.written() as usize],
            random: u64::from(index) + 1,
            turn: 0,
            disk,
        })
    }

    /// Reads, writes and checks until nobody holds the other end of `orders`.
    pub fn run<T: From<News>>(
        mut self,
        stats: &Arc<Stats>,
        orders: &Receiver<SweepNow>,
        news: &Sender<T>,
    ) {
        // A closed channel means that the program is ending.
        let tell = |item: News| drop(news.send(item.into()));
        let bad = |what: String| {
            stats.errors.fetch_add(1, Relaxed);
            tell(News::Corrupt(format!("disk {what}")));
        };
        loop {
            let slot = self.turn % SLOTS;
            self.check(slot, Some(self.turn / SLOTS), stats)
                .into_iter()
                .for_each(|page| bad(page.to_string()));
            if let Err(e) = self.transfer(slot, stats) {
                bad(e);
                std::thread::sleep(REST);
            }
            self.check(slot, Some(self.turn / SLOTS), stats)
                .into_iter()
                .for_each(|page| bad(page.to_string()));
            self.turn += 1;
            match orders.try_recv() {
                Ok(SweepNow) => {
                    for slot in 0..SLOTS {
                        self.check(slot, None, stats)
                            .into_iter()
                            .for_each(|page| bad(page.to_string()));
                    }
                    tell(News::Swept(self.memory.len() as u64));
                }
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {}
            }
        }
    }

    /// Reads some extent into a slot, or writes one out of it.
    fn transfer(&mut self, slot: usize, stats: &Stats) -> Result<(), String> {
        let own = self.random(self.generations.len() as u32) as usize;
        let write = self.random(WRITE_ONE_OF) == 0;
        // Its own, too, so that what was written is read back.
        let extent = if write || self.random(WRITE_ONE_OF) == 0 {
            self.generations[own] += u32::from(write);
            Extent { number: self.first_written + own as u32, generation: self.generations[own] }
        } else {
            Extent { number: self.random(self.disk.still()), generation: FIRST_GENERATION }
        };
        let pages = &self.memory[slot * EXTENT_PAGES..(slot + 1) * EXTENT_PAGES];
        if write {
            pages.iter().enumerate().for_each(|(i, page)| content::write(page, extent.origin(i)));
        }
        self.holds[slot] = None;
        self.disk.transfer(pages, extent.number, write).map_err(|e| {
            let what = if write { "writing" } else { "reading" };
            format!("{what} extent={} failed: {e}", extent.number)
        })?;
        self.holds[slot] = Some(extent);
        let counter = if write { &stats.disk_written } else { &stats.disk_read };
        counter.fetch_add(EXTENT_PAGES as u64, Relaxed);
        Ok(())
    }

    /// Compares what a slot holds: all of it, or a word of each sector. A bad page is put right, so
    /// that it is counted once.
    fn check(&self, slot: usize, glance: Option<usize>, stats: &Stats) -> Vec<BadPage> {
        let Some(extent) = self.holds[slot] else { return Vec::new() };
        let pages = &self.memory[slot * EXTENT_PAGES..(slot + 1) * EXTENT_PAGES];
        stats.checked.fetch_add(EXTENT_PAGES as u64, Relaxed);
        let check = |(i, page): (usize, &Page)| {
            let expected = extent.origin(i);
            if glance.is_some_and(|round| looks_right(page, expected, round)) {
                return None;
            }
            let bad = content::check(page, expected, self.disk.extents * EXTENT_PAGES as u32).err();
            bad.inspect(|_| content::write(page, expected))
        };
        pages.iter().enumerate().filter_map(check).collect()
    }

    /// splitmix64, as in the other workers.
    fn random(&mut self, below: u32) -> u32 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        ((u64::from((content::mix(content::mix(self.random)) >> 32) as u32) * u64::from(below))
            >> 32) as u32
    }
}

/// One word of each sector, another one each time.
fn looks_right(page: &Page, expected: Origin, round: usize) -> bool {
    let seed = expected.seed();
    (round % SECTOR_WORDS..PAGE_WORDS)
        .step_by(SECTOR_WORDS)
        .all(|i| page.0[i].load(Relaxed) == word(seed, i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    const MIB: u32 = 16;

    /// An image; not read past the page cache, which not every file system can.
    fn image(name: &str) -> File {
        let path =
            std::env::temp_dir().join(format!("pageferry-disk-{name}-{}", std::process::id()));
        write_image(&path, MIB).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    fn worker(name: &str) -> (Worker, Stats) {
        let disk = Disk::over(image(name), 2).unwrap();
        (Worker::new(Arc::new(disk), 1).unwrap(), Stats::default())
    }

    #[test]
    fn what_is_read_and_written_is_intact() {
        let (mut worker, stats) = worker("intact");
        for turn in 0..400 {
            let slot = turn % SLOTS;
            assert_eq!(worker.check(slot, Some(turn), &stats), []);
            worker.transfer(slot, &stats).unwrap();
            assert_eq!(worker.check(slot, None, &stats), []);
        }
        assert!(stats.disk_read.load(Relaxed) > 300 * EXTENT_PAGES as u64);
        assert!(stats.disk_written.load(Relaxed) > 20 * EXTENT_PAGES as u64);
        assert!(worker.generations.iter().any(|g| *g > FIRST_GENERATION));
    }

    #[test]
    fn a_page_that_kept_what_its_slot_held_before_is_found_at_a_glance_and_once() {
        let (mut worker, stats) = worker("stale");
        worker.transfer(0, &stats).unwrap();
        let before = worker.holds[0].unwrap().origin(7);
        while worker.holds[0].unwrap().origin(7) == before {
            worker.transfer(0, &stats).unwrap();
        }
        content::write(&worker.memory[7], before);
        let found = worker.check(0, Some(3), &stats);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].expected, worker.holds[0].unwrap().origin(7));
        assert_eq!(worker.check(0, None, &stats), []);
    }

    #[test]
    fn a_sector_of_a_page_is_enough() {
        let (mut worker, stats) = worker("sector");
        worker.transfer(0, &stats).unwrap();
        for word in 0..SECTOR_WORDS {
            worker.memory[9].0[5 * SECTOR_WORDS + word].fetch_xor(1, Relaxed);
        }
        assert_eq!(worker.check(0, Some(1234), &stats)[0].bad_words, SECTOR_WORDS);
    }

    #[test]
    fn a_write_that_never_reached_the_disk_is_found() {
        let (mut worker, stats) = worker("lost-write");
        worker.generations.iter_mut().for_each(|generation| *generation += 1);
        let mut found = 0;
        for _ in 0..200 {
            worker.transfer(0, &stats).unwrap();
            found += worker.check(0, Some(0), &stats).len();
        }
        assert!(found >= EXTENT_PAGES);
    }

    #[test]
    fn a_worker_sweeps_when_asked_and_says_what_is_bad() {
        let (mut worker, stats) = worker("sweep");
        let file = worker.disk.file.try_clone().unwrap();
        let (stats, (orders, inbox), (outbox, news)) =
            (Arc::new(stats), channel(), channel::<News>());
        worker.transfer(0, &stats).unwrap();
        let counted = Arc::clone(&stats);
        let thread = std::thread::spawn(move || worker.run(&counted, &inbox, &outbox));
        orders.send(SweepNow).unwrap();
        let wait = Duration::from_secs(20);
        assert!(
            matches!(news.recv_timeout(wait), Ok(News::Swept(pages)) if pages == (SLOTS * EXTENT_PAGES) as u64)
        );
        // A disk that ends too soon.
        file.set_len(EXTENT_BYTES as u64).unwrap();
        let deadline = Instant::now() + wait;
        while !matches!(news.recv_timeout(wait).unwrap(), News::Corrupt(what) if what.contains("failed"))
        {
            assert!(Instant::now() < deadline);
        }
        drop(orders);
        thread.join().unwrap();
        assert!(stats.errors.load(Relaxed) > 0);
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused() {
        assert!(Disk::over(image("small"), 64).unwrap_err().to_string().contains("256 MiB"));
    }
}
