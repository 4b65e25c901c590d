//! A vCPU in the middle of one long instruction, which KVM's emulator takes apart into thousands of
//! exits.

use crate::config::{MachineConfig, TrackingChoice};
use crate::console::serial::Console;
use crate::machine::Machine;
use crate::tests::kvm_is_here;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use std::time::{Duration, Instant};

/// For the guest to get on; an emulator of KVM is slow.
const TEST_MAX: Duration = Duration::from_secs(60);

/// Above the guest's memory, where nothing is: each byte that is read there is an exit.
const HOLE: u32 = 16 << 20;
/// Where the bytes go.
const COPY: u32 = 0x1000;
/// So many are read by one instruction: several times the steps that KVM takes at once.
const BYTES: u32 = 8 << 10;
/// Counts the instructions that came to their end.
const COUNTER: u32 = 0x800;

/// 32-bit code, at address 0: reads the hole with one instruction, again and again.
fn code() -> Vec<u8> {
    [
        &[0xb9][..], //        mov ecx, BYTES
        &BYTES.to_le_bytes(),
        &[0xbe], //            mov esi, HOLE
        &HOLE.to_le_bytes(),
        &[0xbf], //            mov edi, COPY
        &COPY.to_le_bytes(),
        &[0xf3, 0xa4], //      rep movsb
        &[0xff, 0x05], //      inc dword [COUNTER]
        &COUNTER.to_le_bytes(),
        &[0xeb, 0xe7], //      jmp 0
    ]
    .concat()
}

/// Where `rep movsb` is.
const LONG_INSTRUCTION: u64 = 15;

/// Has the vCPU begin with the code, in protected mode with flat segments.
fn prepare(vcpu: &mut VcpuFd) {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = flat(8, 11);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(16, 3);
    }
    // Protected mode, and the bit that is always set.
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: 0, rflags: 2, ..Default::default() }).unwrap();
}

#[test]
fn a_guest_inside_one_long_instruction_is_parked_whole_and_goes_on() {
    if !kvm_is_here("a_guest_inside_one_long_instruction_is_parked_whole_and_goes_on") {
        return;
    }
    assert_eq!((code().len(), code()[LONG_INSTRUCTION as usize]), (25, 0xf3));
    let config = MachineConfig { tracking: TrackingChoice::Log, ..MachineConfig::new(8 << 20, 1) };
    let machine = Machine::new(&config, Console::none()).unwrap();
    let region = machine.memory().slots()[0].region();
    region.write(0, &code()).unwrap();
    let prepared = machine.vcpus().ask(0, |vcpu| {
        prepare(vcpu);
        Ok(())
    });
    prepared.unwrap();

    let (mut inside, deadline) = (0, Instant::now() + TEST_MAX);
    let mut passes = [0; 4];
    while inside < 5 || u32::from_le_bytes(passes) < 2 {
        assert!(Instant::now() < deadline, "{inside} times inside, {passes:?}");
        machine.run(true).unwrap();
        // Time for the guest to be in the middle of it.
        std::thread::sleep(Duration::from_millis(3));
        machine.park().unwrap();
        assert!(machine.vcpus().ending().is_empty(), "{:?}", machine.vcpus().ending().try_recv());
        let regs = machine.vcpus().ask(0, |vcpu| Ok(vcpu.get_regs().unwrap())).unwrap();
        if regs.rip == LONG_INSTRUCTION {
            // Whole steps: what is left and how far it came are of the same moment.
            let done = u64::from(BYTES) - regs.rcx;
            assert_eq!((regs.rsi, regs.rdi), (u64::from(HOLE) + done, u64::from(COPY) + done));
            inside += usize::from(regs.rcx > 0 && done > 0);
        }
        region.read(COUNTER as usize, &mut passes).unwrap();
    }
    let mut copy = vec![0; BYTES as usize];
    region.read(COPY as usize, &mut copy).unwrap();
    assert!(copy.iter().all(|byte| *byte == 0xff), "reads of a hole are all ones");
}
