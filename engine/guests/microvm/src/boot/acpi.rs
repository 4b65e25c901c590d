//! The ACPI tables of a machine: how many processors it has, where its serial port is, how it is
//! switched off. Debian's kernels for virtual machines know no MP table, so this is how they learn
//! of a second vCPU.
//!
//! The machine is a "hardware-reduced" one (ACPI 6.5, 3.11.1): no power management timer, no legacy
//! interrupt controller, no legacy timer; a guest takes its time from its local APICs and from KVM.

use super::layout;
use crate::power;
use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

/// Who made the tables, in the words of ACPI.
const OEM: [u8; 6] = *b"FERRY ";
/// Which machine they are of.
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
/// Of these tables.
const OEM_REVISION: u32 = 1;
/// Revision of a DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// A table's header.
const HEADER_BYTES: u32 = 36;
/// Tables begin at multiples of this; the root pointer must.
const ALIGNMENT: usize = 16;
/// IAPC_BOOT_ARCH: there is no CMOS clock at ports 0x70 and 0x71. That the bit for a keyboard
/// controller is not set keeps a guest from a long search for one.
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Most vCPUs that the tables can name: APIC ids have eight bits, and the highest means all.
pub const VCPUS_MAX: u32 = 255;

/// The tables, to be laid at `address`; the root pointer is the first of them. Not more than
/// [`VCPUS_MAX`] vCPUs.
#[must_use]
pub fn tables(address: u64, vcpus: u32) -> Vec<u8> {
    let mut laid = Laid { address, bytes: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)] };
    let dsdt = laid.add(&dsdt());
    let fadt = laid.add(&fadt(dsdt));
    let madt = laid.add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = laid.add(&xsdt);
    let root = bytes_of(&Rsdp::new(OEM, xsdt));
    laid.bytes[..root.len()].copy_from_slice(&root);
    laid.bytes
}

/// Tables one after the other.
struct Laid {
    address: u64,
    bytes: Vec<u8>,
}

impl Laid {
    /// Lays one more; returns where it is.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let at = self.address + self.bytes.len() as u64;
        self.bytes.extend(bytes_of(table));
        at
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The machine's devices: its serial port; and the sleep state in which it is off.
fn dsdt() -> Sdt {
    let ports = IO::new(
        crate::console::serial::PORT,
        crate::console::serial::PORT,
        1,
        crate::console::serial::PORTS,
    );
    let interrupt = Interrupt::new(true, true, false, false, crate::console::serial::INTERRUPT);
    let mut body = bytes_of(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
            ],
        )],
    ));
    body.extend(bytes_of(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&power::SLEEP_TYPE_OFF]),
    )));
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// The fixed hardware: how to switch off and to reset, and what there is not.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    table.iapc_boot_arch = NO_CMOS_CLOCK.into();
    table.reset_reg = port(power::KEYBOARD_COMMAND);
    table.reset_value = power::KEYBOARD_RESET;
    table.sleep_control_reg = port(power::SLEEP_CONTROL);
    table.sleep_status_reg = port(power::SLEEP_STATUS);
    table.finalize()
}

/// The interrupt controllers: a local APIC a vCPU, numbered as KVM numbers them, and one I/O APIC.
fn madt(vcpus: u32) -> MADT {
    let controllers = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controllers);
    assert!(vcpus <= VCPUS_MAX);
    for id in (0..u8::MAX).take(vcpus as usize) {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0xe_0000;

    fn table<'a>(tables: &'a [u8], address: &[u8]) -> &'a [u8] {
        let at = (u64::from_le_bytes(address.try_into().unwrap()) - AT) as usize;
        let len = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap()) as usize;
        &tables[at..at + len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up_to_zero() {
        let tables = tables(AT, 2);
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let root = table(&tables, &tables[24..32]);
        assert_eq!((&root[..4], root.len()), (&b"XSDT"[..], 36 + 16));
        let (fadt, madt) = (table(&tables, &root[36..44]), table(&tables, &root[44..52]));
        let dsdt = table(&tables, &fadt[140..148]);
        assert_eq!(
            (&fadt[..4], &madt[..4], &dsdt[..4]),
            (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
        );
        for table in [root, fadt, madt, dsdt] {
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
        assert!(tables.len() as u64 <= layout::SECOND_RAM - AT);
    }

    #[test]
    fn there_is_a_local_apic_for_each_vcpu() {
        for vcpus in [1, 2, 8] {
            let bytes = bytes_of(&madt(vcpus));
            let mut at = 44;
            let mut ids = Vec::new();
            while at < bytes.len() {
                if bytes[at] == 0 {
                    ids.push(u32::from(bytes[at + 3]));
                }
                at += usize::from(bytes[at + 1]);
            }
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        }
    }
}
