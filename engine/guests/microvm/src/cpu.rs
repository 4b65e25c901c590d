//! The processor that a guest sees, and whether another host can give it the same.
//!
//! A guest gets what its host's KVM supports, but for what this monitor does not carry over (nested
//! virtualization). It keeps that for life: the destination sets the very same CPUID, so everything
//! in it must be supported there. That is compared before anything is touched, from the source's
//! Hello.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use pageferry_engine::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Leaves of CPUID (Intel SDM, volume 2, CPUID; AMD APM, volume 3, appendix E).
const FEATURES: u32 = 1;
const EXTENDED_FEATURES: u32 = 7;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const XSAVE: u32 = 0xd;
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SVM: u32 = 0x8000_000a;

/// Bits of leaf 1, register ecx.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
/// Bit of leaf 0x8000_0001, register ecx.
const SVM: u32 = 1 << 2;

/// What a guest needs of the host that it moves to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// CPUID of vCPU 0.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers that its state has.
    pub msrs: Vec<u32>,
    /// Frequency of its time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// Size of its XSAVE area, in bytes.
    pub xsave_bytes: u32,
}

/// What this host's KVM can give.
#[derive(Debug, Clone)]
pub struct HostCpu {
    supported: Vec<kvm_cpuid_entry2>,
    msrs: Vec<u32>,
    tsc_khz: u32,
    tsc_scaling: bool,
    xsave_bytes: u32,
}

/// How long XSAVE areas are. Made by [`HostCpu`] alone, as KVM reads and writes as many bytes as it
/// says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XsaveArea {
    host_bytes: u32,
    guest_bytes: u32,
}

impl XsaveArea {
    /// What this host's KVM reads and writes.
    #[must_use]
    pub fn host_bytes(self) -> usize {
        self.host_bytes as usize
    }

    /// What the guest has of it: what the host had that it was born on. It never grows, so that a
    /// guest can go back.
    #[must_use]
    pub fn guest_bytes(self) -> usize {
        self.guest_bytes as usize
    }
}

impl HostCpu {
    /// Asks KVM; `tsc_khz` is what a new vCPU has.
    pub fn read(kvm: &Kvm, tsc_khz: u32) -> Result<Self> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::os("asking KVM for the processor's features", e))?
            .as_slice()
            .to_vec();
        let msrs = kvm
            .get_msr_index_list()
            .map_err(|e| Error::os("asking KVM for the model-specific registers that it saves", e))?
            .as_slice()
            .to_vec();
        Ok(Self {
            supported: with_timer(kvm, supported),
            msrs,
            tsc_khz,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            xsave_bytes: xsave_bytes(kvm),
        })
    }

    /// Model-specific registers that KVM saves here.
    #[must_use]
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Size of a vCPU's XSAVE area.
    #[must_use]
    pub fn xsave_bytes(&self) -> u32 {
        self.xsave_bytes
    }

    /// The areas of a guest that has so many bytes ([`CpuProfile::xsave_bytes`]).
    #[must_use]
    pub fn xsave_area(&self, guest_bytes: u32) -> XsaveArea {
        XsaveArea { host_bytes: self.xsave_bytes, guest_bytes: guest_bytes.min(self.xsave_bytes) }
    }

    /// CPUID for a new guest's vCPU: what is supported, but for nested virtualization.
    #[must_use]
    pub fn guest_cpuid(&self, vcpu: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.supported.clone();
        entries.retain(|entry| entry.function != AMD_SVM);
        for entry in &mut entries {
            match entry.function {
                FEATURES => {
                    entry.ecx = entry.ecx & !VMX | HYPERVISOR;
                    // Initial APIC id, and how many there are in the package.
                    entry.ebx =
                        entry.ebx & 0x0000_ffff | vcpus.next_power_of_two() << 16 | vcpu << 24;
                }
                AMD_FEATURES => entry.ecx &= !SVM,
                function if TOPOLOGY.contains(&function) => {
                    // One thread a core, all cores in one package.
                    let (level, shift, count) = match entry.index {
                        0 => (1, 0, 1),
                        1 => (2, vcpus.next_power_of_two().trailing_zeros(), vcpus),
                        _ => (0, 0, 0),
                    };
                    (entry.eax, entry.ebx) = (shift, count);
                    entry.ecx = entry.index | level << 8;
                    entry.edx = vcpu;
                }
                _ => {}
            }
        }
        entries
    }

    /// Fails, naming the difference, if a guest of this profile cannot run here.
    pub fn admit(&self, guest: &CpuProfile) -> Result<()> {
        if let Some(missing) = missing_feature(&guest.cpuid, &self.supported) {
            return Err(Error::refused(format!(
                "this host's processor lacks {missing}, which the guest has: move it to a host that has it, or start the guest on the lesser host"
            )));
        }
        if let Some(msr) = guest.msrs.iter().find(|msr| !self.msrs.contains(msr)) {
            return Err(Error::refused(format!(
                "KVM here does not know the model-specific register {msr:#x}, which is part of the guest's state: use the same kernel on both hosts"
            )));
        }
        if guest.xsave_bytes > self.xsave_bytes {
            return Err(Error::refused(format!(
                "the guest's vector registers take {} bytes, this host's {}: its processor lacks an extension that the guest has",
                guest.xsave_bytes, self.xsave_bytes
            )));
        }
        // KVM takes a frequency within 250 parts in a million for the same (its module parameter
        // tsc_tolerance_ppm).
        let tolerance = u64::from(self.tsc_khz) * 250 / 1_000_000;
        if u64::from(guest.tsc_khz.abs_diff(self.tsc_khz)) > tolerance && !self.tsc_scaling {
            return Err(Error::refused(format!(
                "the guest's time-stamp counter runs at {} kHz, this host's at {} kHz, and its processor cannot scale it",
                guest.tsc_khz, self.tsc_khz
            )));
        }
        Ok(())
    }
}

/// Bytes of a vCPU's XSAVE area here. KVM says how many, where it can be more than a page.
fn xsave_bytes(kvm: &Kvm) -> u32 {
    let plain = size_of::<kvm_bindings::kvm_xsave>() as u32;
    u32::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(plain)
}

/// KVM does not list the deadline timer, as it needs the in-kernel APIC; we always have that.
fn with_timer(kvm: &Kvm, mut entries: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in entries.iter_mut().filter(|entry| entry.function == FEATURES) {
            entry.ecx |= TSC_DEADLINE;
        }
    }
    entries
}

/// Entries as the ioctl takes them.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId> {
    CpuId::from_entries(entries).map_err(|_| {
        Error::Guest(format!("{} CPUID entries are more than KVM takes", entries.len()))
    })
}

/// The registers of a leaf whose bits are features, each of which a guest may rely on.
fn feature_registers(function: u32, index: u32) -> &'static [usize] {
    const EAX: usize = 0;
    const EBX: usize = 1;
    const ECX: usize = 2;
    const EDX: usize = 3;
    match (function, index) {
        (FEATURES, _) => &[ECX, EDX],
        (EXTENDED_FEATURES, 0) => &[EBX, ECX, EDX],
        (EXTENDED_FEATURES, _) => &[EAX, EBX, ECX, EDX],
        // The features of XSAVE, and the parts of state that it can have.
        (XSAVE, 0) => &[EAX, EDX],
        (XSAVE, 1) => &[EAX, ECX, EDX],
        (KVM_FEATURES, _) => &[EAX],
        (AMD_FEATURES, _) => &[ECX, EDX],
        (0x8000_0007, _) => &[EDX],
        (0x8000_0008, _) => &[EBX],
        (0x8000_0021, _) => &[EAX],
        _ => &[],
    }
}

/// The index of a leaf that has some; others hold whatever was asked for.
fn index(entry: &kvm_cpuid_entry2) -> u32 {
    if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 { entry.index } else { 0 }
}

/// The first feature of the guest that is not supported.
fn missing_feature(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let registers = |entry: &kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
    for entry in guest {
        let here = host
            .iter()
            .find(|host| host.function == entry.function && index(host) == index(entry))
            .map_or([0; 4], registers);
        for &register in feature_registers(entry.function, index(entry)) {
            let mut wanted = registers(entry)[register];
            if entry.function == FEATURES && register == 2 {
                // These tell of the machine, or follow the guest's own CR4.
                wanted &= !(HYPERVISOR | OSXSAVE);
            }
            let missing = wanted & !here[register];
            if missing != 0 {
                return Some(name(
                    entry.function,
                    index(entry),
                    register,
                    missing.trailing_zeros(),
                ));
            }
        }
    }
    None
}

/// What a feature bit is called: by its name where it is one that software asks for, else by its
/// place.
fn name(function: u32, index: u32, register: usize, bit: u32) -> String {
    const NAMES: &[(u32, u32, usize, u32, &str)] = &[
        (1, 0, 2, 0, "SSE3"),
        (1, 0, 2, 1, "PCLMULQDQ"),
        (1, 0, 2, 9, "SSSE3"),
        (1, 0, 2, 12, "FMA"),
        (1, 0, 2, 13, "CMPXCHG16B"),
        (1, 0, 2, 17, "PCID"),
        (1, 0, 2, 19, "SSE4.1"),
        (1, 0, 2, 20, "SSE4.2"),
        (1, 0, 2, 21, "x2APIC"),
        (1, 0, 2, 22, "MOVBE"),
        (1, 0, 2, 23, "POPCNT"),
        (1, 0, 2, 24, "TSC-deadline timer"),
        (1, 0, 2, 25, "AES"),
        (1, 0, 2, 26, "XSAVE"),
        (1, 0, 2, 28, "AVX"),
        (1, 0, 2, 29, "F16C"),
        (1, 0, 2, 30, "RDRAND"),
        (7, 0, 1, 0, "FSGSBASE"),
        (7, 0, 1, 1, "TSC_ADJUST"),
        (7, 0, 1, 3, "BMI1"),
        (7, 0, 1, 5, "AVX2"),
        (7, 0, 1, 7, "SMEP"),
        (7, 0, 1, 8, "BMI2"),
        (7, 0, 1, 9, "ERMS"),
        (7, 0, 1, 10, "INVPCID"),
        (7, 0, 1, 16, "AVX512F"),
        (7, 0, 1, 17, "AVX512DQ"),
        (7, 0, 1, 18, "RDSEED"),
        (7, 0, 1, 19, "ADX"),
        (7, 0, 1, 20, "SMAP"),
        (7, 0, 1, 23, "CLFLUSHOPT"),
        (7, 0, 1, 24, "CLWB"),
        (7, 0, 1, 28, "AVX512CD"),
        (7, 0, 1, 29, "SHA"),
        (7, 0, 1, 30, "AVX512BW"),
        (7, 0, 1, 31, "AVX512VL"),
        (7, 0, 2, 1, "AVX512_VBMI"),
        (7, 0, 2, 2, "UMIP"),
        (7, 0, 2, 3, "PKU"),
        (7, 0, 2, 8, "GFNI"),
        (7, 0, 2, 9, "VAES"),
        (7, 0, 2, 11, "AVX512_VNNI"),
        (7, 0, 2, 16, "57-bit addresses (LA57)"),
        (7, 0, 2, 22, "RDPID"),
        (7, 0, 3, 22, "AMX-BF16"),
        (7, 0, 3, 23, "AVX512_FP16"),
        (7, 0, 3, 24, "AMX-TILE"),
        (7, 0, 3, 26, "speculation control (IBRS, IBPB)"),
        (7, 0, 3, 31, "SSBD"),
        (7, 1, 0, 4, "AVX-VNNI"),
        (0xd, 1, 0, 0, "XSAVEOPT"),
        (0xd, 1, 0, 1, "XSAVEC"),
        (0xd, 1, 0, 3, "XSAVES"),
        (KVM_FEATURES, 0, 0, 3, "kvmclock"),
        (AMD_FEATURES, 0, 3, 20, "NX"),
        (AMD_FEATURES, 0, 3, 26, "pages of 1 GiB"),
        (AMD_FEATURES, 0, 3, 27, "RDTSCP"),
        (AMD_FEATURES, 0, 2, 5, "LZCNT"),
    ];
    let place = format!(
        "CPUID {function:#x}.{index}, {} bit {bit}",
        ["eax", "ebx", "ecx", "edx"].get(register).unwrap_or(&"?")
    );
    let known =
        NAMES.iter().find(|(f, i, r, b, _)| (*f, *i, *r, *b) == (function, index, register, bit));
    match known {
        Some((.., name)) => format!("{name} ({place})"),
        None => format!("the feature {place}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, ecx: u32, ebx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            ebx,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        }
    }

    fn host(supported: Vec<kvm_cpuid_entry2>) -> HostCpu {
        HostCpu {
            supported,
            msrs: vec![0x10, 0x174],
            tsc_khz: 2_000_000,
            tsc_scaling: false,
            xsave_bytes: 4096,
        }
    }

    fn profile(cpuid: Vec<kvm_cpuid_entry2>) -> CpuProfile {
        CpuProfile { cpuid, msrs: vec![0x10], tsc_khz: 2_000_000, xsave_bytes: 4096 }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let lesser = host(vec![entry(1, 0, 1 << 19, 0), entry(7, 0, 0, 1 << 3)]);
        lesser.admit(&profile(vec![entry(1, 0, 1 << 19, 0), entry(7, 0, 0, 1 << 3)])).unwrap();
        let refusal = |cpuid| lesser.admit(&profile(cpuid)).unwrap_err().chain();
        assert!(refusal(vec![entry(7, 0, 0, 1 << 5)]).contains("AVX2 (CPUID 0x7.0, ebx bit 5)"));
        assert!(refusal(vec![entry(1, 0, 1 << 20, 0)]).contains("SSE4.2"));
        // A leaf that is not there at all lacks all of its features.
        assert!(
            refusal(vec![entry(7, 1, 1 << 7, 0)]).contains("the feature CPUID 0x7.1, ecx bit 7")
        );
    }

    #[test]
    fn what_tells_of_the_machine_is_no_feature() {
        let lesser = host(vec![entry(1, 0, 0, 0)]);
        lesser.admit(&profile(vec![entry(1, 0, HYPERVISOR | OSXSAVE, 3 << 24)])).unwrap();
    }

    #[test]
    fn registers_state_size_and_frequency_are_compared() {
        let here = host(vec![]);
        let good = profile(vec![]);
        here.admit(&good).unwrap();
        let refusal = |guest: CpuProfile| here.admit(&guest).unwrap_err().chain();
        assert!(
            refusal(CpuProfile { msrs: vec![0xc000_0080], ..good.clone() }).contains("0xc0000080")
        );
        assert!(refusal(CpuProfile { xsave_bytes: 8192, ..good.clone() }).contains("8192 bytes"));
        assert!(refusal(CpuProfile { tsc_khz: 2_100_000, ..good.clone() }).contains("2100000 kHz"));
        here.admit(&CpuProfile { tsc_khz: 2_000_400, ..good }).unwrap();
    }

    #[test]
    fn nested_virtualization_is_hidden_and_ids_are_set() {
        let here = host(vec![
            entry(1, 0, VMX, 0xff00_0800),
            entry(0xb, 0, 0, 0),
            entry(0xb, 1, 0, 0),
            entry(AMD_SVM, 0, 0, 0),
        ]);
        let cpuid = here.guest_cpuid(2, 3);
        assert_eq!(cpuid.len(), 3);
        assert_eq!((cpuid[0].ecx, cpuid[0].ebx), (HYPERVISOR, 2 << 24 | 4 << 16 | 0x0800));
        assert_eq!((cpuid[2].eax, cpuid[2].ebx, cpuid[2].ecx, cpuid[2].edx), (2, 3, 0x201, 2));
    }
}
