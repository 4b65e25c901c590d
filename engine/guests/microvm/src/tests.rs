//! A payload guest under this host's KVM, moved over real TCP within this process.

use super::destination::KvmDestination;
use super::machine::{MachineConfig, TrackingChoice, open_kvm};
use super::payload::{Pattern, PayloadOptions};
use super::source::{Boot, KvmSource};
use super::state::MachineState;
use crate::boot::layout::LOW_BYTES_MAX;
use crate::console::serial::Console;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::report::{MigrationReport, Outcome};
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_transport::MemoryRegion;
use std::time::{Duration, Instant};

/// For a guest to have written some pages, under an emulator too.
const WRITES_MAX: Duration = Duration::from_secs(60);

/// Whether there is a KVM to test with; says so loudly if not.
pub(super) fn kvm_is_here(test: &str) -> bool {
    match open_kvm() {
        Ok(_) => true,
        Err(e) => {
            let line = format!("NOT RUN: {test}: {}", e.chain());
            eprintln!("{line}");
            if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
                use std::io::Write;
                let file = std::fs::File::options().append(true).create(true).open(path);
                let _ = file.and_then(|mut file| writeln!(file, "{line}"));
            }
            false
        }
    }
}

fn config(vcpus: u32, tracking: TrackingChoice) -> MachineConfig {
    MachineConfig { tracking, ring_entries: Some(1), ..MachineConfig::new(8 << 20, vcpus) }
}

fn payload(pattern: Pattern) -> Boot {
    Boot::Payload(PayloadOptions {
        pattern,
        pages_per_second: None,
        working_set_pages: Some(256),
        seed: 7,
    })
}

fn start(config: &MachineConfig, pattern: Pattern) -> KvmSource {
    KvmSource::start(config, &payload(pattern), Console::none()).unwrap()
}

/// Lets every vCPU write so many more pages, and checks all of memory.
fn write_and_check(guest: &mut KvmSource, pages: u64) {
    let before = guest.check().unwrap().pages_written;
    let deadline = Instant::now() + WRITES_MAX;
    loop {
        let now = guest.check().unwrap().pages_written;
        if now.iter().zip(&before).all(|(now, before)| *now >= before + pages) {
            return;
        }
        assert!(Instant::now() < deadline, "the guest does not write: {now:?} after {before:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Moves a guest to a machine of this configuration. Also how often a ring was full on the way.
fn moved_counting(
    mut source: KvmSource,
    config: &MachineConfig,
    change: impl Fn(&mut MigrateOptions),
) -> (KvmSource, MigrationReport, u64) {
    let receiver = Receiver::new(
        SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap(),
        LinkChoice::default(),
    );
    let mut options = MigrateOptions::to(receiver.listener().address.to_string());
    (options.downtime_us_max, options.when_stuck) = (500_000, WhenStuck::Switchover);
    (options.lanes, options.verify, options.rounds_max) = (2, true, 5);
    change(&mut options);
    let mut guest = KvmDestination::new(config, Console::none()).unwrap();
    let receiver = std::thread::spawn(move || {
        let mut receiver = receiver;
        let incoming = receiver.listener().next(Instant::now() + Duration::from_secs(10)).unwrap();
        let served = receiver.serve(incoming, &mut guest, &mut || Ok(()));
        assert!(matches!(served, Served::Received(_)), "{served:?}");
        guest.into_source().unwrap()
    });
    let report = migrate(&mut source, &options, &Monitor::default());
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    let full_exits = source.machine().ring_full_exits();
    source.end().unwrap();
    (receiver.join().unwrap(), report, full_exits)
}

fn moved(
    source: KvmSource,
    config: &MachineConfig,
    change: impl Fn(&mut MigrateOptions),
) -> (KvmSource, MigrationReport) {
    let (guest, report, _) = moved_counting(source, config, change);
    (guest, report)
}

fn goes_back_and_forth(vcpus: u32, tracking: TrackingChoice, times: usize) {
    let config = config(vcpus, tracking);
    for (pattern, times) in
        [(Pattern::Random, times), (Pattern::Sequential, 1), (Pattern::HotCold, 1)]
    {
        let mut guest = start(&config, pattern);
        write_and_check(&mut guest, 20);
        for _ in 0..times {
            let before: u64 = guest.check().unwrap().pages_written.iter().sum();
            let report;
            (guest, report) = moved(guest, &config, |_| {});
            assert_eq!((report.control_messages, report.verified), (8, Some(true)));
            assert!(guest.check().unwrap().pages_written.iter().sum::<u64>() >= before);
            write_and_check(&mut guest, 20);
        }
    }
}

#[test]
fn every_vcpu_runs_after_each_order_whether_it_was_parked_or_not() {
    if !kvm_is_here("vCPUs that are let run while they run") {
        return;
    }
    let mut guest = start(&config(4, TrackingChoice::Log), Pattern::Random);
    for _ in 0..10 {
        // Again, as after a pause that did not come to its end.
        guest.machine().run(true).unwrap();
        let asked = Instant::now();
        // Parks all of them, and lets them run.
        write_and_check(&mut guest, 5);
        let deadline = Instant::now() + WRITES_MAX;
        let since = loop {
            match guest.machine().vcpus().running_since() {
                Some(since) => break since,
                None => assert!(Instant::now() < deadline, "a vCPU does not run"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(since >= asked);
    }
    guest.pause().unwrap();
    guest.resume().unwrap();
    write_and_check(&mut guest, 5);
}

#[test]
fn a_payload_guest_moves_by_the_log_and_loses_no_page() {
    if kvm_is_here("a_payload_guest_moves_by_the_log_and_loses_no_page") {
        goes_back_and_forth(1, TrackingChoice::Log, 5);
        goes_back_and_forth(2, TrackingChoice::Log, 2);
    }
}

#[test]
fn a_guest_with_memory_above_4_gib_moves_with_pages_on_both_sides_of_the_hole() {
    if !kvm_is_here("a_guest_with_memory_above_4_gib_moves_with_pages_on_both_sides_of_the_hole") {
        return;
    }
    // Half of the working set, which is at the end, lies above the hole.
    const WORKING_PAGES: u64 = 64;
    let memory_bytes = LOW_BYTES_MAX + WORKING_PAGES / 2 * PAGE_BYTES;
    let config = MachineConfig { memory_bytes, ..config(1, TrackingChoice::Log) };
    let boot = Boot::Payload(PayloadOptions {
        working_set_pages: Some(WORKING_PAGES),
        seed: 11,
        ..Default::default()
    });
    let mut guest = KvmSource::start(&config, &boot, Console::none()).unwrap();
    write_and_check(&mut guest, 4 * WORKING_PAGES);
    let touched = |slot: usize| {
        let region = guest.machine().memory().slots()[slot].region();
        let mut word = [0; 8];
        let at = if slot == 0 { region.len() as u64 - PAGE_BYTES } else { 0 };
        region.read(at as usize, &mut word).unwrap();
        word != [0; 8]
    };
    assert!(touched(0) && touched(1), "the guest writes on both sides of the hole");
    for _ in 0..2 {
        (guest, _) = moved(guest, &config, |options| options.verify = false);
        write_and_check(&mut guest, WORKING_PAGES);
    }
}

#[test]
#[ignore = "sets huge pages aside: the lab machine's"]
fn lab_a_guest_on_huge_pages_moves_and_loses_no_page() {
    const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
    // Two guests of 8 MiB.
    std::fs::write(HUGE_PAGES, "8").unwrap();
    for tracking in [TrackingChoice::Ring, TrackingChoice::Log] {
        let config = MachineConfig { huge_pages: true, ..config(2, tracking) };
        let mut guest = start(&config, Pattern::Random);
        for _ in 0..3 {
            write_and_check(&mut guest, 50);
            (guest, _) = moved(guest, &config, |_| {});
        }
        write_and_check(&mut guest, 50);
        assert_eq!(guest.machine().memory().slots()[0].backing_page_bytes, 2 << 20);
    }
    std::fs::write(HUGE_PAGES, "0").unwrap();
}

#[test]
#[ignore = "needs second-level page tables and Linux 6.11: the lab machine's"]
fn lab_pages_are_mapped_before_the_guest_comes() {
    let config = config(2, TrackingChoice::Ring);
    let destination = KvmDestination::new(&config, Console::none()).unwrap();
    let map = destination.map_ahead().expect("this KVM maps ahead");
    map(PageRun::between(0, 64)).unwrap();
    map(PageRun::between(1984, 2048)).unwrap();
    let beyond = map(PageRun::between(2048, 2049)).unwrap_err().chain();
    assert!(beyond.contains("in no slot"), "{beyond}");
    // It was done before for every page of the moves in the other tests; here to see that it is.
    let mut guest = start(&config, Pattern::Random);
    write_and_check(&mut guest, 20);
    (guest, _) = moved(guest, &config, |_| {});
    write_and_check(&mut guest, 20);
}

#[test]
fn a_machine_that_has_all_its_memory_takes_in_a_guest_like_any_other() {
    if !kvm_is_here("a_machine_that_has_all_its_memory_takes_in_a_guest_like_any_other") {
        return;
    }
    let config = MachineConfig { preallocate: true, ..config(1, TrackingChoice::Log) };
    let destination = KvmDestination::new(&config, Console::none()).unwrap();
    let all = PageRun::between(0, destination.memory().pages());
    assert_eq!(destination.memory().touched().unwrap(), [all]);
    assert_eq!(destination.memory().unmapped(&[all]), []);
    let mut guest = start(&config, Pattern::Random);
    for _ in 0..2 {
        write_and_check(&mut guest, 20);
        (guest, _) = moved(guest, &config, |_| {});
    }
    write_and_check(&mut guest, 20);
}

/// What goes on by itself in a machine that is paused, or is about the host.
fn without_time(mut state: MachineState) -> MachineState {
    const TIMER_COUNT: std::ops::Range<usize> = 0x390..0x394;
    const MSR_TSC: u32 = 0x10;
    state.clock = Default::default();
    state.vm.pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    for vcpu in &mut state.vcpus {
        vcpu.tsc_offset = None;
        vcpu.lapic.regs[TIMER_COUNT].fill(0);
        vcpu.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC).for_each(|msr| msr.data = 0);
    }
    state
}

fn saved(guest: &mut KvmSource) -> (MachineState, Vec<u8>) {
    guest.pause().unwrap();
    guest.begin_save().unwrap();
    let mut blob = Vec::new();
    guest
        .save(&mut |piece| {
            blob.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
    (MachineState::decode(&blob).unwrap(), blob)
}

/// A guest in a new machine, loaded with this state and sealed, not running.
fn restored(config: &MachineConfig, blob: &[u8]) -> KvmSource {
    let mut destination = KvmDestination::new(config, Console::none()).unwrap();
    let region = MemoryRegion::anonymous(blob.len().next_multiple_of(4096)).unwrap();
    region.write(0, blob).unwrap();
    destination.load(&region, blob.len()).unwrap();
    destination.seal(false).unwrap();
    destination.run(false).unwrap();
    destination.into_source().unwrap()
}

#[test]
fn vector_registers_stay_as_long_as_the_guests_first_host_had_them() {
    if !kvm_is_here("vector_registers_stay_as_long_as_the_guests_first_host_had_them") {
        return;
    }
    // A page, as on a processor without AVX-512.
    const LESSER_WORDS: usize = 1024;
    let config = config(1, TrackingChoice::Log);
    let (mut state, _) = saved(&mut start(&config, Pattern::Random));
    state.vcpus[0].xsave.truncate(LESSER_WORDS);
    let mut guest = restored(&config, &state.encode().unwrap());
    assert_eq!(saved(&mut guest).0.vcpus[0].xsave, state.vcpus[0].xsave);
}

#[test]
fn a_restored_state_equals_the_saved_one_field_by_field() {
    if !kvm_is_here("a_restored_state_equals_the_saved_one_field_by_field") {
        return;
    }
    let config = config(3, TrackingChoice::Log);
    let mut guest = start(&config, Pattern::Random);
    write_and_check(&mut guest, 10);
    let (state, blob) = saved(&mut guest);
    let (again, _) = saved(&mut restored(&config, &blob));
    assert_ne!(state.vcpus[0].regs, Default::default());
    let (state, again) = (without_time(state), without_time(again));
    for (first, second) in state.vcpus.iter().zip(&again.vcpus) {
        assert_eq!(first.regs, second.regs);
        assert_eq!(first.sregs, second.sregs);
        assert_eq!(first.lapic, second.lapic);
        assert_eq!(first.msrs, second.msrs);
        assert_eq!(first.xsave, second.xsave);
        assert_eq!(first.events, second.events);
        assert_eq!(first, second);
    }
    assert_eq!(state, again);
}

#[test]
fn a_guests_clock_goes_on_and_not_back() {
    if !kvm_is_here("a_guests_clock_goes_on_and_not_back") {
        return;
    }
    let config = config(1, TrackingChoice::Log);
    let mut guest = start(&config, Pattern::Sequential);
    let (before, _) = saved(&mut guest);
    guest.resume().unwrap();
    let begun = Instant::now();
    let (mut guest, _) = moved(guest, &config, |_| {});
    let (after, _) = saved(&mut guest);
    let gone = begun.elapsed().as_nanos() as u64;
    let clock = after.clock.kvmclock_ns - before.clock.kvmclock_ns;
    // The first reading is a little older than `begun`, the last a little newer than `gone`.
    let tolerance = 200_000_000;
    assert!(clock.abs_diff(gone) < tolerance, "kvmclock went on by {clock} ns in {gone} ns");
    let ticks =
        (after.clock.tsc - before.clock.tsc) * 1_000_000 / u64::from(after.vcpus[0].tsc_khz);
    assert!(
        ticks.abs_diff(gone) < tolerance,
        "the time-stamp counter went on by {ticks} ns in {gone} ns"
    );
}

#[test]
fn a_lesser_processor_is_refused_before_anything_is_touched() {
    if !kvm_is_here("a_lesser_processor_is_refused_before_anything_is_touched") {
        return;
    }
    let config = config(1, TrackingChoice::Log);
    let mut guest = start(&config, Pattern::Sequential);
    let mut destination = KvmDestination::new(&config, Console::none()).unwrap();
    let mut description = guest.facts().unwrap().description;
    destination.admit(&description).unwrap();
    description.platform.truncate(10);
    let error = destination.admit(&description).unwrap_err().chain();
    assert!(error.contains("cannot be read"), "{error}");
}

/// Begins a migration that fails in the downtime: the state does not arrive as it was sent.
fn aborted(guest: &mut KvmSource, config: &MachineConfig) -> MigrationReport {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut options = MigrateOptions::to(listener.address.to_string());
    (options.downtime_us_max, options.when_stuck, options.rounds_max) =
        (500_000, WhenStuck::Switchover, 3);
    let mut refuses = KvmDestination::new(config, Console::none()).unwrap();
    let receiver = std::thread::spawn(move || {
        let mut receiver = Receiver::new(listener, LinkChoice::default());
        let incoming = receiver.listener().next(Instant::now() + Duration::from_secs(10)).unwrap();
        let served = receiver.serve(incoming, &mut Refusing(&mut refuses), &mut || Ok(()));
        assert!(
            matches!(&served, Served::Discarded(e) if e.chain().contains("altered")),
            "{served:?}"
        );
    });
    let report = migrate(guest, &options, &Monitor::default());
    receiver.join().unwrap();
    report
}

/// A destination whose machine cannot take in the state that arrives: the last moment at which a
/// guest is taken back.
struct Refusing<'d>(&'d mut KvmDestination);

impl DestinationGuest for Refusing<'_> {
    fn describe(&self) -> pageferry_engine::guest::GuestDescription {
        self.0.describe()
    }
    fn memory(&self) -> &std::sync::Arc<pageferry_engine::memory::GuestMemory> {
        self.0.memory()
    }
    fn load(&mut self, state: &MemoryRegion, len: usize) -> pageferry_engine::Result<()> {
        let mut blob = vec![0; len];
        state.read(0, &mut blob)?;
        blob[len / 2] ^= 1;
        MachineState::decode(&blob).map(drop)
    }
    fn seal(&mut self, _: bool) -> pageferry_engine::Result<()> {
        unreachable!("it never comes so far")
    }
    fn run(&mut self, _: bool) -> pageferry_engine::Result<()> {
        unreachable!("it never comes so far")
    }
    fn discard(&mut self) -> pageferry_engine::Result<()> {
        self.0.discard()
    }
}

#[test]
fn an_aborted_migration_leaves_the_guest_running_and_loses_nothing() {
    if !kvm_is_here("an_aborted_migration_leaves_the_guest_running_and_loses_nothing") {
        return;
    }
    let config = config(2, TrackingChoice::Log);
    let mut guest = start(&config, Pattern::Random);
    for _ in 0..3 {
        let report = aborted(&mut guest, &config);
        assert_eq!(report.outcome, Outcome::Aborted, "{report:?}");
        write_and_check(&mut guest, 10);
    }
    let (mut guest, _) = moved(guest, &config, |_| {});
    write_and_check(&mut guest, 10);
}

/// Moves, and failures in between, with rings that are full all the time: more pages are written
/// than a ring holds.
fn goes_fifty_times(vcpus: u32) {
    let config = config(vcpus, TrackingChoice::Ring);
    let options = PayloadOptions {
        pattern: Pattern::Random,
        pages_per_second: None,
        working_set_pages: Some(1536),
        seed: 3,
    };
    let mut guest = KvmSource::start(&config, &Boot::Payload(options), Console::none()).unwrap();
    assert_eq!(guest.machine().tracking(), "ring");
    let mut full_exits = 0;
    for turn in 0..50 {
        guest.check().unwrap();
        if turn % 10 == 5 {
            let report = aborted(&mut guest, &config);
            assert_eq!(report.outcome, Outcome::Aborted, "{report:?}");
            guest.check().unwrap();
        }
        let (arrived, _, full) =
            moved_counting(guest, &config, |options| options.verify = turn % 5 == 0);
        (guest, full_exits) = (arrived, full_exits + full);
    }
    write_and_check(&mut guest, 10);
    let written = guest.check().unwrap().pages_written;
    eprintln!("{vcpus} vCPUs: {written:?} pages written, rings were full {full_exits} times");
    assert!(full_exits > 50, "the rings were hardly ever full: {full_exits} times");
}

#[test]
#[ignore = "needs a KVM whose rings can be trusted: the lab machine's"]
fn lab_a_payload_guest_of_1_vcpu_moves_fifty_times_by_tiny_rings() {
    goes_fifty_times(1);
}

#[test]
#[ignore = "needs a KVM whose rings can be trusted: the lab machine's"]
fn lab_a_payload_guest_of_2_vcpus_moves_fifty_times_by_tiny_rings() {
    goes_fifty_times(2);
}

#[test]
#[ignore = "needs a KVM whose rings can be trusted: the lab machine's"]
fn lab_a_payload_guest_of_4_vcpus_moves_fifty_times_by_tiny_rings() {
    goes_fifty_times(4);
}
