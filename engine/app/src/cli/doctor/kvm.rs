//! What this host can do for a machine of our own. Nothing here is bad: a QEMU is moved without it.

use super::{Finding, good, note};
use pageferry_engine::dirty::kvm;
use pageferry_engine::dirty::probe;
use pageferry_engine::dirty::probe::Trust;

const KVM: &str = "KVM";
const RING: &str = "KVM dirty ring";

pub(super) fn findings() -> Vec<Finding> {
    if let Err(e) = kvm::open() {
        return vec![note(
            KVM,
            format!("{}; until then there are no machines of pageferry's own", e.chain()),
        )];
    }
    let ring = match probe::trust() {
        Ok(Trust::Ring { entries_max, .. }) => good(
            RING,
            format!("tells every page that is written; up to {entries_max} entries a vCPU"),
        ),
        Ok(Trust::Log { why }) => {
            note(RING, format!("not used: {why}. Writes are followed by KVM's log instead"))
        }
        Err(e) => {
            note(RING, format!("{}; a machine of pageferry's own cannot be moved", e.chain()))
        }
    };
    vec![good(KVM, "/dev/kvm can be used"), ring]
}
