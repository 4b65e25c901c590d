//! Guests within the guest.
//!
//! While a nested guest runs under KVM, the processor and KVM write some pages of the outer guest by their
//! physical addresses in the host: on Intel the virtual APIC page and posted-interrupt descriptors, with
//! `hv-evmcs` the enlightened VMCS, on AMD the control block at an exit. KVM pins these pages when it maps
//! them, and tells its own dirty log alone. Write-protection of page tables reports the pinning and nothing
//! after it, so a page that was harvested in between goes stale at the destination.
//!
//! ```text
//!   query-kvm           no KVM: every write goes through QEMU's page tables, nested or not
//!   qom-get vmx, svm    what the vCPUs really have, after KVM has taken away what the host lacks
//!   info registers      whether the guest has switched it on: CR4.VMXE, EFER.SVME
//! ```
//!
//! A guest that has not switched virtualization on runs no nested guest. That is looked up at the preflight,
//! after each harvest and before the pause: whatever ran in between has ended. A nested guest that came and
//! went within the milliseconds between a harvest and the look behind it would not be seen. One that has it
//! switched on is refused, unless the operator says that no nested guest runs.
//!
//! Which pages are concerned cannot be found from outside: they stand in the nested state of a vCPU
//! (`KVM_GET_NESTED_STATE`), which KVM hands to QEMU's own process only, and QEMU shows neither that nor its
//! dirty log.

use super::devices::monitor;
use super::qmp::Qmp;
use crate::error::{Error, Result};
use crate::guest::Vouched;
use serde_json::json;
use std::time::Instant;

/// Virtual-machine extensions enabled (Intel SDM, volume 3, section 2.5).
const CR4_VMXE: u64 = 1 << 13;
/// Secure virtual machine enable (AMD APM, volume 2, section 3.1.7).
const EFER_SVME: u64 = 1 << 12;

/// What the vCPUs could run nested guests with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// Names as on QEMU's command line: `vmx`, `svm`, `hv-evmcs`.
    features: Vec<&'static str>,
}

impl Exposed {
    /// Asks QEMU; nothing if no write of a nested guest could be missed.
    pub fn find(qmp: &mut Qmp, deadline: Instant) -> Result<Option<Self>> {
        if qmp.execute("query-kvm", json!({}), deadline)?["enabled"] != true {
            return Ok(None);
        }
        let cpus = qmp.execute("query-cpus-fast", json!({}), deadline)?;
        let paths = cpus.as_array().into_iter().flatten().filter_map(|cpu| cpu["qom-path"].as_str());
        let mut features = Vec::new();
        for path in paths {
            for feature in ["vmx", "svm", "hv-evmcs"] {
                let question = json!({ "path": path, "property": feature });
                let has = match qmp.execute("qom-get", question, deadline) {
                    Ok(value) => value == true,
                    // Not of this architecture, or older than the feature.
                    Err(Error::Qmp { .. }) => false,
                    Err(e) => return Err(e),
                };
                if has && !features.contains(&feature) {
                    features.push(feature);
                }
            }
        }
        Ok((!features.is_empty()).then_some(Self { features }))
    }

    /// Fails if a nested guest may run, unless the operator says that none does.
    pub fn check(&self, qmp: &mut Qmp, vouched: &Vouched, deadline: Instant) -> Result<()> {
        if vouched.no_nested_guest {
            return Ok(());
        }
        match switched_on(&monitor(qmp, "info registers -a", deadline)?) {
            Some(false) => Ok(()),
            Some(true) => Err(self.refused("has switched virtualization on")),
            None => {
                Err(self.refused("may have switched virtualization on (QEMU shows no control registers)"))
            }
        }
    }

    fn refused(&self, what: &str) -> Error {
        Error::refused(format!(
            "the guest {what} and may run a guest of its own: its vCPUs have {}, and what the processor and KVM write for a \
             nested guest is not seen. Stop its hypervisor (in Linux: unload kvm_intel or kvm_amd), or, if you know that no \
             nested guest runs, say so with --no-nested-guest",
            self.words()
        ))
    }

    /// The features, as a text.
    #[must_use]
    pub fn words(&self) -> String {
        self.features.join(", ")
    }
}

/// Whether any vCPU has virtualization switched on, from the text of `info registers -a`; nothing if the text
/// does not tell. A nested guest's own registers have the bit set too: the processor demands it.
fn switched_on(registers: &str) -> Option<bool> {
    let values = |name: &str| -> Vec<Option<u64>> {
        let words = registers.split_whitespace().filter_map(|word| word.strip_prefix(name));
        words.map(|hex| u64::from_str_radix(hex, 16).ok()).collect()
    };
    let (cr4, efer) = (values("CR4="), values("EFER="));
    if cr4.is_empty() || cr4.len() != efer.len() {
        return None;
    }
    let mut on = false;
    for (cr4, efer) in cr4.into_iter().zip(efer) {
        on |= cr4? & CR4_VMXE != 0 || efer? & EFER_SVME != 0;
    }
    Some(on)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::testing::TestQemu;

    #[test]
    fn virtualization_that_is_switched_on_is_read_from_the_registers() {
        let cpu = |cr4: u64, efer: u64| {
            format!("\r\nCPU#0\r\nCR0=80050033 CR2=0 CR3=1 CR4={cr4:08x}\r\nDR6=0\r\nEFER={efer:016x}\r\n")
        };
        assert_eq!(switched_on(&cpu(0x6f0, 0xd01)), Some(false));
        assert_eq!(switched_on(&cpu(0x6f0 | CR4_VMXE, 0xd01)), Some(true));
        assert_eq!(switched_on(&cpu(0x6f0, 0xd01 | EFER_SVME)), Some(true));
        // Any vCPU counts.
        assert_eq!(switched_on(&(cpu(0, 0) + &cpu(0, EFER_SVME))), Some(true));
        assert_eq!(switched_on(&(cpu(0, EFER_SVME) + &cpu(0, 0))), Some(true));
        for unclear in ["", "CR4=0", "CR4=zz EFER=0", "CR4=0 CR4=0 EFER=0"] {
            assert_eq!(switched_on(unclear), None, "{unclear}");
        }
    }

    #[test]
    fn a_guest_that_has_it_on_is_refused_unless_the_operator_says_that_none_runs_nested() {
        let exposed = Exposed { features: vec!["vmx", "hv-evmcs"] };
        let text = exposed.refused("has switched virtualization on").to_string();
        assert!(text.contains("vmx, hv-evmcs") && text.contains("--no-nested-guest"), "{text}");
    }

    #[test]
    fn under_emulation_a_guest_with_svm_is_moved_as_it_is() {
        let mut qemu = TestQemu::start(&["-m", "16", "-cpu", "max"]);
        let deadline = TestQemu::soon();
        let path = json!({ "path": "/machine/unattached/device[0]", "property": "svm" });
        assert_eq!(qemu.qmp.execute("qom-get", path, deadline).unwrap(), true, "the premise");
        assert_eq!(Exposed::find(&mut qemu.qmp, deadline).unwrap(), None);
        // The question itself, on a real QEMU.
        let exposed = Exposed { features: vec!["svm"] };
        exposed.check(&mut qemu.qmp, &Vouched::default(), deadline).unwrap();
    }
}
