//! The state of one vCPU: read in one order, written in another.
//!
//! ```text
//!   read:    MP_STATE first: reading it makes KVM take in pending INIT and SIPI
//!   write:   CPUID                     decides what the rest may hold
//!            TSC frequency and offset  what timers are reckoned by
//!            MP_STATE, REGS, SREGS     SREGS has the base of the local APIC
//!            XSAVE, XCRS
//!            LAPIC                     after SREGS; before the deadline of its timer
//!            MSRs                      the deadline last
//!            DEBUGREGS
//!            VCPU_EVENTS               last: nothing after it may drop a pending event
//! ```
//!
//! Source: Linux, Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c.

use crate::cpu;
use crate::cpu::XsaveArea;
use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use pageferry_engine::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::AsRawFd;

/// IA32_TIME_STAMP_COUNTER (Intel SDM, volume 4).
pub const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: when it is written, the timer is set.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Entries that KVM takes in one call (MAX_IO_MSRS, arch/x86/kvm/x86.c).
const MSRS_MAX: usize = 256;
/// KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR (Linux, include/uapi/linux/kvm.h), which kvm-ioctls
/// has for other architectures' vCPUs only.
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_aee2;

/// Everything of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID tells the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// How far its time-stamp counter is from the host's, where KVM tells.
    pub tsc_offset: Option<u64>,
    /// Running, halted, waiting to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Floating point and vector registers: the XSAVE area, as long as this guest's is.
    pub xsave: Vec<u32>,
    /// Which of them are enabled.
    pub xcrs: kvm_xcrs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Exceptions, interrupts and NMIs under way.
    pub events: kvm_vcpu_events,
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::os(what, e)
}

impl VcpuState {
    /// Reads a parked vCPU. `cpuid` is what was set: KVM tells it with its own changes, which some
    /// hosts' KVM would not take back. `msrs` are the registers to read.
    pub fn save(
        vcpu: &VcpuFd,
        cpuid: Vec<kvm_cpuid_entry2>,
        msrs: &[u32],
        xsave: XsaveArea,
    ) -> Result<Self> {
        let mp_state = vcpu.get_mp_state().map_err(failed("reading whether a vCPU runs"))?;
        Ok(Self {
            cpuid,
            tsc_khz: vcpu
                .get_tsc_khz()
                .map_err(failed("reading the frequency of a vCPU's time-stamp counter"))?,
            tsc_offset: tsc_offset(vcpu),
            mp_state,
            regs: vcpu.get_regs().map_err(failed("reading a vCPU's registers"))?,
            sregs: vcpu
                .get_sregs()
                .map_err(failed("reading a vCPU's segments and control registers"))?,
            xsave: get_xsave(vcpu, xsave)?,
            xcrs: vcpu.get_xcrs().map_err(failed("reading a vCPU's extended control registers"))?,
            lapic: vcpu.get_lapic().map_err(failed("reading a local APIC"))?,
            msrs: get_msrs(vcpu, msrs)?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(failed("reading a vCPU's debug registers"))?,
            events: vcpu.get_vcpu_events().map_err(failed("reading a vCPU's pending events"))?,
        })
    }

    /// Writes a vCPU that has never run. `has_cpuid` is the CPUID that it was made with, if any:
    /// KVM takes as long for that as for all that follows, and it is left out where it is the same.
    /// The time-stamp counter is set to `tsc`.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        has_cpuid: &[kvm_cpuid_entry2],
        tsc: TscTarget,
        xsave: XsaveArea,
    ) -> Result<()> {
        if has_cpuid != self.cpuid {
            vcpu.set_cpuid2(&cpu::to_kvm(&self.cpuid)?)
                .map_err(failed("setting a vCPU's CPUID"))?;
        }
        self.restore_tsc(vcpu, tsc)?;
        vcpu.set_mp_state(self.mp_state).map_err(failed("setting whether a vCPU runs"))?;
        vcpu.set_regs(&self.regs).map_err(failed("setting a vCPU's registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("setting a vCPU's segments and control registers"))?;
        set_xsave(vcpu, &self.xsave, xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("setting a vCPU's extended control registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("setting a local APIC"))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed("setting a vCPU's debug registers"))?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("setting a vCPU's pending events"))
    }

    fn restore_tsc(&self, vcpu: &VcpuFd, tsc: TscTarget) -> Result<()> {
        let here = vcpu
            .get_tsc_khz()
            .map_err(failed("reading the frequency of a vCPU's time-stamp counter"))?;
        if here != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(failed("setting the frequency of a vCPU's time-stamp counter"))?;
        }
        match tsc {
            TscTarget::Offset(offset) => set_tsc_offset(vcpu, offset),
            TscTarget::Value(value) => set_msrs(vcpu, &[msr(MSR_TSC, value)]),
        }
    }
}

/// What to set a time-stamp counter to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TscTarget {
    /// So far from the host's: exact, however long it takes until it is set.
    Offset(u64),
    /// This value at this moment, where KVM knows no offsets.
    Value(u64),
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// The registers of `indices` that this vCPU has. KVM lists some that a guest with a lesser CPUID
/// cannot have.
pub fn readable_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u32>> {
    let mut readable = Vec::with_capacity(indices.len());
    for &index in indices {
        let mut one = to_msrs(&[msr(index, 0)])?;
        if matches!(vcpu.get_msrs(&mut one), Ok(1)) {
            readable.push(index);
        }
    }
    Ok(readable)
}

fn to_msrs(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| {
        Error::Guest(format!("{} model-specific registers are more than KVM takes", entries.len()))
    })
}

/// KVM stops at the first register that it refuses, and says how many it has read.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(indices.len());
    for some in indices.chunks(MSRS_MAX) {
        let wanted: Vec<_> = some.iter().map(|&index| msr(index, 0)).collect();
        let mut entries = to_msrs(&wanted)?;
        let read =
            vcpu.get_msrs(&mut entries).map_err(failed("reading model-specific registers"))?;
        if let Some(index) = some.get(read) {
            return Err(Error::Guest(format!(
                "the model-specific register {index:#x} cannot be read any more"
            )));
        }
        all.extend_from_slice(entries.as_slice());
    }
    Ok(all)
}

/// Sets registers, the timer's deadline after all others. A register that KVM refuses is passed
/// over if it holds zero, as it does where it was never used.
fn set_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let (deadline, mut others): (Vec<kvm_msr_entry>, Vec<kvm_msr_entry>) =
        msrs.iter().partition(|entry| entry.index == MSR_TSC_DEADLINE);
    // The time-stamp counter was set by its offset; a value saved earlier would put it back.
    if msrs.len() > 1 {
        others.retain(|entry| entry.index != MSR_TSC);
    }
    others.extend(deadline);
    let mut rest: &[kvm_msr_entry] = &others;
    while !rest.is_empty() {
        let entries = to_msrs(&rest[..rest.len().min(MSRS_MAX)])?;
        let set = vcpu.set_msrs(&entries).map_err(failed("setting model-specific registers"))?;
        rest = &rest[set.min(rest.len())..];
        if set < entries.as_slice().len()
            && let Some((refused, later)) = rest.split_first()
        {
            if refused.data != 0 {
                return Err(Error::Guest(format!(
                    "KVM here refuses the value {:#x} of the model-specific register {:#x}",
                    refused.data, refused.index
                )));
            }
            rest = later;
        }
    }
    Ok(())
}

/// An area of zeros as long as this host's KVM reads and writes.
fn host_area(area: XsaveArea) -> Result<Xsave> {
    let extra = area.host_bytes().saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| {
        Error::Guest(format!("an XSAVE area of {} bytes is more than can be", area.host_bytes()))
    })
}

fn get_xsave(vcpu: &VcpuFd, area: XsaveArea) -> Result<Vec<u32>> {
    let mut read = host_area(area)?;
    // SAFETY: it is as long as KVM_CAP_XSAVE2 says that the kernel writes.
    unsafe { vcpu.get_xsave2(&mut read) }.map_err(failed("reading a vCPU's vector registers"))?;
    let mut words = read.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(read.as_slice());
    let beyond = words.split_off(words.len().min(area.guest_bytes().div_ceil(size_of::<u32>())));
    // What lies there belongs to extensions that the guest's CPUID does not have.
    if beyond.iter().any(|&word| word != 0) {
        return Err(Error::Guest(format!(
            "a vCPU has vector registers beyond the {} bytes that are the guest's",
            area.guest_bytes()
        )));
    }
    Ok(words)
}

/// A guest of another host may have a shorter area than this one's.
fn set_xsave(vcpu: &VcpuFd, words: &[u32], area: XsaveArea) -> Result<()> {
    let fixed = size_of::<kvm_xsave>() / size_of::<u32>();
    let wrong = || {
        Error::Guest(format!(
            "an XSAVE area of {} bytes, where this host has one of {}",
            size_of_val(words),
            area.host_bytes()
        ))
    };
    let (region, extra) = words.split_at_checked(fixed).ok_or_else(wrong)?;
    let mut written = host_area(area)?;
    written.as_mut_slice().get_mut(..extra.len()).ok_or_else(wrong)?.copy_from_slice(extra);
    // SAFETY: the length of the area, which lies outside of these fields, stays as it is.
    unsafe { written.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
    // SAFETY: it is as long as KVM_CAP_XSAVE2 says that the kernel reads.
    unsafe { vcpu.set_xsave2(&written) }.map_err(failed("setting a vCPU's vector registers"))
}

/// One attribute of a vCPU.
fn tsc_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// How far a vCPU's time-stamp counter is from the host's; `None` where KVM does not tell (before
/// Linux 5.16).
#[must_use]
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the attribute names eight bytes that live through the call and are the kernel's to
    // write.
    let result =
        unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) };
    (result == 0).then_some(offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the attribute names eight bytes that live through the call, which the kernel reads.
    let result =
        unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::os("setting a vCPU's time-stamp counter", std::io::Error::last_os_error()))
    }
}

/// A vCPU's time-stamp counter, now.
pub fn tsc(vcpu: &VcpuFd) -> Result<u64> {
    Ok(get_msrs(vcpu, &[MSR_TSC])?[0].data)
}
