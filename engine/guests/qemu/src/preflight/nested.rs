//! Guests within the guest.
//!
//! While a nested guest runs under KVM, the processor and KVM write some pages of the outer guest
//! by their physical addresses in the host: on Intel the virtual APIC page and posted-interrupt
//! descriptors, with `hv-evmcs` the enlightened VMCS, on AMD the control block at an exit. KVM pins
//! these pages when it maps them, and tells its own dirty log alone. Write-protection of page
//! tables reports the pinning and nothing after it, so a page that was synced in between goes stale
//! at the destination.
//!
//! ```text
//!   query-kvm           no KVM: every write goes through QEMU's page tables, nested or not
//!   qom-get vmx, svm    what the vCPUs really have, after KVM has taken away what the host lacks
//!   query-stats         what KVM counts for each vCPU: entries into nested guests since QEMU started
//!                       (`nested_run`), and whether it is in one now (`guest_mode`)
//!   info registers      whether the guest has switched it on: CR4.VMXE, EFER.SVME
//! ```
//!
//! That virtualization is switched on says little: Linux does that as soon as its KVM module is
//! loaded (since 6.12 even if nobody uses it). So KVM's count decides. A guest for which it is zero
//! has never run a nested guest. For another one the registers are asked: with virtualization
//! switched off none runs now. The rest is refused, unless the operator says that no nested guest
//! runs.
//!
//! Both are looked up at the preflight, after each sync and before the pause; the count alone once
//! more when the vCPUs are stopped. If it has grown by then, a nested guest has run in between, and
//! the move is aborted. Where QEMU tells no count (KVM has it since Linux 5.14), a nested guest
//! that came and went between two looks is not seen.
//!
//! KVM counts entries that succeed. One that fails its checks writes the outer guest's memory too:
//! on AMD within microseconds of the pinning, with `hv-evmcs` at any time later. So with `hv-evmcs`
//! a count of zero is not enough.
//!
//! Which pages are concerned cannot be found from outside: they stand in the nested state of a vCPU
//! (`KVM_GET_NESTED_STATE`), which KVM hands to QEMU's own process only, and QEMU shows neither
//! that nor its dirty log.

use super::devices::monitor;
use crate::qmp::Qmp;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::Vouched;
use serde_json::{Value, json};
use std::time::Instant;

/// Virtual-machine extensions enabled (Intel SDM, volume 3, section 2.5).
const CR4_VMXE: u64 = 1 << 13;
/// Secure virtual machine enable (AMD APM, volume 2, section 3.1.7).
const EFER_SVME: u64 = 1 << 12;

/// What KVM counts, over all vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    /// Entries into nested guests since QEMU started.
    entries: u64,
    /// Whether a vCPU is in a nested guest.
    inside: bool,
}

/// What the vCPUs could run nested guests with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// Names as on QEMU's command line: `vmx`, `svm`, `hv-evmcs`.
    features: Vec<&'static str>,
    /// Number of vCPUs.
    vcpus: usize,
    /// What KVM had counted when this was found, if QEMU tells.
    at_first: Option<Count>,
}

impl Exposed {
    /// Asks QEMU; nothing if no write of a nested guest could be missed.
    pub fn find(qmp: &mut Qmp, deadline: Instant) -> Result<Option<Self>> {
        if qmp.execute("query-kvm", json!({}), deadline)?["enabled"] != true {
            return Ok(None);
        }
        let cpus = qmp.execute("query-cpus-fast", json!({}), deadline)?;
        let paths =
            cpus.as_array().into_iter().flatten().filter_map(|cpu| cpu["qom-path"].as_str());
        let (mut features, mut vcpus) = (Vec::new(), 0);
        for path in paths {
            vcpus += 1;
            for feature in ["vmx", "svm", "hv-evmcs"] {
                let question = json!({ "path": path, "property": feature });
                let has = match qmp.execute("qom-get", question, deadline) {
                    Ok(value) => value == true,
                    // Not of this architecture, or older than the feature.
                    Err(Error::VmmRefused { .. }) => false,
                    Err(e) => return Err(e),
                };
                if has && !features.contains(&feature) {
                    features.push(feature);
                }
            }
        }
        if features.is_empty() {
            return Ok(None);
        }
        let at_first = count(qmp, vcpus, deadline)?;
        Ok(Some(Self { features, vcpus, at_first }))
    }

    /// Fails if a nested guest may run, or has run since this was found, unless the operator says
    /// that none does.
    pub fn check(&self, qmp: &mut Qmp, vouched: &Vouched, deadline: Instant) -> Result<()> {
        if vouched.no_nested_guest {
            return Ok(());
        }
        let counted = count(qmp, self.vcpus, deadline)?;
        self.check_count(counted)?;
        if self.never_ran_one(counted) {
            return Ok(());
        }
        let on = switched_on(&monitor(qmp, "info registers -a", deadline)?);
        on_or_unknown(counted, on).map_or(Ok(()), |what| Err(self.refused(&what)))
    }

    /// Fails if a nested guest has run since this was found, for vCPUs that are stopped: a short
    /// question.
    pub fn check_stopped(&self, qmp: &mut Qmp, vouched: &Vouched, deadline: Instant) -> Result<()> {
        if vouched.no_nested_guest || self.at_first.is_none() {
            return Ok(());
        }
        self.check_count(count(qmp, self.vcpus, deadline)?)
    }

    fn check_count(&self, counted: Option<Count>) -> Result<()> {
        match (self.at_first, counted) {
            (_, Some(Count { inside: true, .. })) => {
                Err(self.refused("runs a guest of its own at this moment"))
            }
            (Some(before), Some(now)) if now.entries != before.entries => {
                Err(self.refused("has run a guest of its own while it was moved"))
            }
            _ => Ok(()),
        }
    }

    fn never_ran_one(&self, counted: Option<Count>) -> bool {
        counted == Some(Count { entries: 0, inside: false }) && !self.features.contains(&"hv-evmcs")
    }

    fn refused(&self, what: &str) -> Error {
        let features = self.words();
        Error::refused(format!(
            "the guest {what}: its vCPUs have {features}, and what the processor and KVM write for a nested guest is not seen. \
             End its guests and stop its hypervisor (in Linux: `modprobe -r kvm_intel` or `kvm_amd`), or, if you know that no \
             nested guest runs until it has moved, say so with --no-nested-guest"
        ))
    }

    /// The features, as a text.
    #[must_use]
    pub fn words(&self) -> String {
        self.features.join(", ")
    }
}

/// Asks for what KVM counts; nothing if QEMU does not tell of all vCPUs.
fn count(qmp: &mut Qmp, vcpus: usize, deadline: Instant) -> Result<Option<Count>> {
    let names = json!([{ "provider": "kvm", "names": ["nested_run", "guest_mode"] }]);
    match qmp.execute("query-stats", json!({ "target": "vcpu", "providers": names }), deadline) {
        Ok(answer) => Ok(counted(&answer, vcpus)),
        Err(Error::VmmRefused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The same from QEMU's answer.
fn counted(answer: &Value, vcpus: usize) -> Option<Count> {
    let answers = answer.as_array().filter(|answers| answers.len() == vcpus)?;
    let mut all = Count { entries: 0, inside: false };
    for vcpu in answers {
        let stats = vcpu["stats"].as_array()?;
        let value =
            |name: &str| stats.iter().find(|stat| stat["name"] == name).map(|stat| &stat["value"]);
        all.entries = all.entries.checked_add(value("nested_run")?.as_u64()?)?;
        all.inside |= value("guest_mode")?.as_bool()?;
    }
    Some(all)
}

/// What is said of a guest that may run a nested guest, from the count and from whether
/// virtualization is switched on.
fn on_or_unknown(counted: Option<Count>, switched_on: Option<bool>) -> Option<String> {
    let on = match switched_on {
        Some(false) => return None,
        Some(true) => "has virtualization switched on",
        None => "may have virtualization switched on (QEMU shows no control registers)",
    };
    let ran = match counted {
        Some(Count { entries: 0, .. }) => String::new(),
        Some(Count { entries, .. }) => {
            format!(", as it has done since QEMU started ({entries} entries)")
        }
        None => " (QEMU does not tell whether it ever has)".into(),
    };
    Some(format!("{on} and may run a guest of its own{ran}"))
}

/// Whether any vCPU has virtualization switched on, from the text of `info registers -a`; nothing
/// if the text does not tell. A nested guest's own registers have the bit set too: the processor
/// demands it.
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
    use crate::testing::TestQemu;

    #[test]
    fn virtualization_that_is_switched_on_is_read_from_the_registers() {
        let cpu = |cr4: u64, efer: u64| {
            format!(
                "\r\nCPU#0\r\nCR0=80050033 CR2=0 CR3=1 CR4={cr4:08x}\r\nDR6=0\r\nEFER={efer:016x}\r\n"
            )
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

    fn exposed(features: &[&'static str], at_first: Option<Count>) -> Exposed {
        Exposed { features: features.to_vec(), vcpus: 1, at_first }
    }

    const NONE: Count = Count { entries: 0, inside: false };

    #[test]
    fn entries_into_nested_guests_are_read_of_all_vcpus_or_not_at_all() {
        let vcpu = |entries: Value, inside: Value| {
            let stats = [("guest_mode", inside), ("exits", json!(7)), ("nested_run", entries)];
            let stats = stats.map(|(name, value)| json!({ "name": name, "value": value }));
            json!({ "provider": "kvm", "qom-path": "/machine/unattached/device[0]", "stats": stats })
        };
        let idle = || vcpu(json!(0), json!(false));
        assert_eq!(counted(&json!([idle()]), 1), Some(NONE));
        // Any vCPU counts.
        let two = json!([vcpu(json!(3), json!(true)), vcpu(json!(4), json!(false))]);
        assert_eq!(counted(&two, 2), Some(Count { entries: 7, inside: true }));
        assert_eq!(counted(&two, 3), None, "one is missing");
        let unclear = [
            json!({}),
            json!([]),
            json!([{}]),
            json!([vcpu(json!(-1), json!(false))]),
            json!([vcpu(json!(0), json!(0))]),
        ];
        for answer in unclear {
            assert_eq!(counted(&answer, 1), None, "{answer}");
        }
    }

    #[test]
    fn a_guest_for_which_kvm_counts_none_has_run_none_but_for_what_hv_evmcs_leaves_behind() {
        assert!(exposed(&["svm"], None).never_ran_one(Some(NONE)));
        for counted in
            [None, Some(Count { entries: 1, ..NONE }), Some(Count { inside: true, ..NONE })]
        {
            assert!(!exposed(&["svm"], None).never_ran_one(counted), "{counted:?}");
        }
        assert!(!exposed(&["vmx", "hv-evmcs"], None).never_ran_one(Some(NONE)));
    }

    #[test]
    fn a_nested_guest_that_runs_or_has_run_since_the_first_look_is_found() {
        let before = Some(Count { entries: 4, ..NONE });
        let svm = exposed(&["svm"], before);
        svm.check_count(before).unwrap();
        svm.check_count(None).unwrap();
        let inside =
            svm.check_count(Some(Count { entries: 4, inside: true })).unwrap_err().to_string();
        assert!(inside.contains("at this moment"), "{inside}");
        let since =
            svm.check_count(Some(Count { entries: 5, inside: false })).unwrap_err().to_string();
        assert!(since.contains("while it was moved"), "{since}");
    }

    #[test]
    fn a_guest_that_has_it_on_is_refused_unless_the_operator_says_that_none_runs_nested() {
        assert_eq!(on_or_unknown(None, Some(false)), None);
        assert_eq!(on_or_unknown(Some(Count { entries: 9, ..NONE }), Some(false)), None);
        let what = on_or_unknown(Some(Count { entries: 9, ..NONE }), Some(true)).unwrap();
        assert!(what.contains("(9 entries)"), "{what}");
        assert!(on_or_unknown(None, None).unwrap().contains("no control registers"));
        let text = exposed(&["vmx", "hv-evmcs"], None).refused(&what).to_string();
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
        exposed(&["svm"], None).check(&mut qemu.qmp, &Vouched::default(), deadline).unwrap();
    }
}
