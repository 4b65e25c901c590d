//! What the vCPUs of a machine share: interrupt controllers, the interval timer, the clock.
//!
//! The guest's clocks go on through the downtime: how long it lasted is known from the hosts' wall
//! clocks, and both kvmclock and the time-stamp counters are put forward by that. Hosts whose wall
//! clocks are apart make a leap of the same length; one that would be backwards is none, for time
//! must not go back in a guest.

use super::vcpu::{TscTarget, VcpuState, tsc, tsc_offset};
use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry_engine::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Master PIC, slave PIC, I/O APIC (Linux, arch/x86/include/uapi/asm/kvm.h).
const IRQCHIPS: usize = 3;

/// State of a machine beside its vCPUs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// The interrupt controllers, as KVM has them.
    pub irqchips: Vec<Vec<u8>>,
    /// The interval timer.
    pub pit: kvm_pit_state2,
}

/// The clocks at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// The time-stamp counter of vCPU 0.
    pub tsc: u64,
    /// The host's wall clock, in nanoseconds since 1970.
    pub wall_ns: u64,
}

impl VmState {
    /// Reads interrupt controllers and timer of a machine whose vCPUs are parked. To be called
    /// before the local APICs are read: an interrupt that passes from one to the other meanwhile is
    /// then in both, and not in neither.
    pub fn save(vm: &VmFd) -> Result<Self> {
        let mut irqchips = Vec::with_capacity(IRQCHIPS);
        for chip_id in 0..IRQCHIPS {
            let mut chip = kvm_irqchip { chip_id: chip_id as u32, ..Default::default() };
            vm.get_irqchip(&mut chip)
                .map_err(|e| Error::os("reading an interrupt controller", e))?;
            // SAFETY: every variant of the union is plain bytes, and the kernel has filled the
            // largest.
            irqchips.push(unsafe { chip.chip.dummy }.iter().map(|&byte| byte as u8).collect());
        }
        let pit = vm.get_pit2().map_err(|e| Error::os("reading the interval timer", e))?;
        Ok(Self { irqchips, pit })
    }

    /// Writes them to a new machine. To be called after the local APICs are set: an interrupt that
    /// waits in the I/O APIC is handed on at once.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        if self.irqchips.len() != IRQCHIPS {
            return Err(Error::Guest(format!(
                "{} interrupt controllers where a PC has {IRQCHIPS}",
                self.irqchips.len()
            )));
        }
        for (chip_id, state) in self.irqchips.iter().enumerate() {
            let mut chip = kvm_irqchip { chip_id: chip_id as u32, ..Default::default() };
            // SAFETY: every variant of the union is plain bytes.
            let bytes = unsafe { &mut chip.chip.dummy };
            if state.len() != bytes.len() {
                return Err(Error::Guest(format!(
                    "an interrupt controller of {} bytes",
                    state.len()
                )));
            }
            bytes.iter_mut().zip(state).for_each(|(to, from)| *to = *from as _);
            vm.set_irqchip(&chip).map_err(|e| Error::os("setting an interrupt controller", e))?;
        }
        vm.set_pit2(&self.pit).map_err(|e| Error::os("setting the interval timer", e))
    }
}

impl ClockState {
    /// Reads the clock of a machine whose vCPU 0 this is.
    pub fn read(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self> {
        let clock = vm.get_clock().map_err(|e| Error::os("reading the guest's clock", e))?;
        let tsc = tsc(vcpu)?;
        Ok(Self { kvmclock_ns: clock.clock, tsc, wall_ns: wall_ns() })
    }

    /// Sets the clock of a new machine, put forward by the time since it was read, and says what
    /// the vCPUs' time-stamp counters are to be set to. `vcpu` is vCPU 0.
    pub fn start(&self, vm: &VmFd, tsc_khz: u32, vcpu: &VcpuFd) -> Result<TscTarget> {
        let here = (tsc(vcpu)?, tsc_offset(vcpu));
        let gone = self.gone(wall_ns());
        let clock = kvm_clock_data {
            clock: self.kvmclock_ns.saturating_add(gone.as_nanos() as u64),
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(|e| Error::os("setting the guest's clock", e))?;
        Ok(self.tsc_target(gone, tsc_khz, here))
    }

    /// Time since the clock was read; none if the wall clocks say that it was less than none.
    fn gone(&self, wall_ns: u64) -> Duration {
        Duration::from_nanos(wall_ns.saturating_sub(self.wall_ns))
    }

    fn tsc_target(
        &self,
        gone: Duration,
        tsc_khz: u32,
        (tsc, offset): (u64, Option<u64>),
    ) -> TscTarget {
        let ticks = gone.as_nanos() * u128::from(tsc_khz) / 1_000_000;
        let value = self.tsc.wrapping_add(ticks as u64);
        // Where KVM knows offsets, it does not matter how long setting them takes.
        match offset {
            Some(offset) => TscTarget::Offset(offset.wrapping_add(value.wrapping_sub(tsc))),
            None => TscTarget::Value(value),
        }
    }
}

/// The same target for a vCPU whose counter was apart from vCPU 0's.
#[must_use]
pub fn target_of(target: TscTarget, vcpu: &VcpuState, first: &VcpuState) -> TscTarget {
    match (target, vcpu.tsc_offset, first.tsc_offset) {
        (TscTarget::Offset(offset), Some(own), Some(first)) => {
            TscTarget::Offset(offset.wrapping_add(own.wrapping_sub(first)))
        }
        _ => target,
    }
}

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: ClockState =
        ClockState { kvmclock_ns: 5_000, tsc: 1_000_000, wall_ns: 10_000_000 };

    #[test]
    fn the_clock_goes_on_by_what_the_wall_clock_says() {
        assert_eq!(SAVED.gone(12_000_000), Duration::from_millis(2));
        // 2 ms at 1 GHz; the counter here has 400 and an offset of 100 already.
        let target = SAVED.tsc_target(Duration::from_millis(2), 1_000_000, (400, Some(100)));
        assert_eq!(target, TscTarget::Offset(100 + 3_000_000 - 400));
        assert_eq!(
            SAVED.tsc_target(Duration::from_millis(2), 1_000_000, (400, None)),
            TscTarget::Value(3_000_000)
        );
    }

    #[test]
    fn a_wall_clock_that_is_behind_does_not_put_time_back() {
        assert_eq!(SAVED.gone(9_000_000), Duration::ZERO);
        assert_eq!(
            SAVED.tsc_target(Duration::ZERO, 1_000_000, (0, None)),
            TscTarget::Value(SAVED.tsc)
        );
    }

    #[test]
    fn counters_that_were_apart_stay_apart() {
        let vcpu = |offset| VcpuState { tsc_offset: Some(offset), ..Default::default() };
        let target = target_of(TscTarget::Offset(1_000), &vcpu(70), &vcpu(50));
        assert_eq!(target, TscTarget::Offset(1_020));
    }
}
