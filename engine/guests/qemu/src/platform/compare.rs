//! Compares what a guest sees of two machines. Pure.

use super::qtree::EXPERIMENTAL;
use super::{DIGEST, Device, Platform, Properties, in_short};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Devices' properties that follow the host: seen by the guest, but a guest lives with another
/// value. Of a vsock device, QEMU tells the guest behind a move to ask for its number again.
pub(super) const WARN_OF_DEVICE: &[&str] =
    &["min_io_size", "opt_io_size", "discard_granularity", "max-discard-sectors", "guest-cid"];
/// Of vCPUs: the destination's host decides them, and QEMU carries the guest's own value over.
const WARN_OF_CPU: &[&str] = &["tsc-frequency", "ucode-rev"];
/// Of the machine: what counts when the guest boots the next time.
const WARN_OF_MACHINE: &[&str] = &[
    "kernel",
    "initrd",
    "append",
    "dtb",
    "shim",
    "firmware",
    "graphics",
    "boot.order",
    "boot.menu",
    "boot.once",
    "boot.splash",
    "boot.splash-time",
    "boot.reboot-timeout",
    "boot.strict",
];

/// What is to be done about a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// The guest would be another one.
    Refuse,
    /// It lives with it.
    Warn,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name, by which it can be overruled: `cpu.smap`.
    pub name: String,
    /// What is to be done about it.
    pub weight: Weight,
    /// In words of the command line.
    text: String,
}

impl Difference {
    /// Whether one of these names overrules it: its own, or one that it begins with up to a dot.
    #[must_use]
    pub fn is_allowed(&self, names: &[String]) -> bool {
        names.iter().filter(|allowed| !allowed.is_empty()).any(|allowed| {
            self.name
                .strip_prefix(allowed.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.text)
    }
}

/// All differences between the source's and this machine.
#[must_use]
pub fn compare(theirs: &Platform, ours: &Platform) -> Vec<Difference> {
    let mut found = Found { differences: Vec::new(), same_version: theirs.version == ours.version };
    let one = |name: &str, theirs: &str, ours: &str| Difference {
        name: name.into(),
        weight: Weight::Refuse,
        text: differ(theirs, ours),
    };
    if theirs.accelerator != ours.accelerator {
        found.differences.push(one("accelerator", &theirs.accelerator, &ours.accelerator));
    }
    let before = found.differences.len();
    found.properties("cpu", "-cpu", &theirs.cpu, &ours.cpu, WARN_OF_CPU);
    if found.differences.len() > before && theirs.cpu_model != ours.cpu_model {
        let model =
            one("cpu", &format!("-cpu {}", theirs.cpu_model), &format!("-cpu {}", ours.cpu_model));
        found.differences.insert(before, model);
    }
    found.properties("smp", "-smp", &theirs.smp, &ours.smp, &[]);
    if theirs.vcpus != ours.vcpus && theirs.vcpus != in_short(&ours.vcpus) {
        let plugged = |vcpus: &[String]| {
            vcpus.iter().map(|vcpu| format!("({vcpu})")).collect::<Vec<_>>().join(" ")
        };
        found.differences.push(one("vcpus", &plugged(&theirs.vcpus), &plugged(&ours.vcpus)));
    }
    found.properties("machine", "-machine", &theirs.machine, &ours.machine, WARN_OF_MACHINE);
    if theirs.numa != ours.numa {
        found.differences.push(one("numa", &theirs.numa.join("; "), &ours.numa.join("; ")));
    }
    if theirs.uuid != ours.uuid {
        found.differences.push(one(
            "uuid",
            &format!("-uuid {}", theirs.uuid),
            &format!("-uuid {}", ours.uuid),
        ));
    }
    found.tables(&theirs.tables, &ours.tables);
    found.devices(&theirs.devices, &ours.devices);
    found.blocks(&theirs.blocks, &ours.blocks);
    found.differences
}

fn differ(theirs: &str, ours: &str) -> String {
    format!("{} at the source, {} here", shown(theirs), shown(ours))
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "nothing" } else { value }
}

struct Found {
    differences: Vec<Difference>,
    /// Another version has properties that the other does not know.
    same_version: bool,
}

impl Found {
    fn add(&mut self, name: String, weight: Weight, text: String) {
        self.differences.push(Difference { name, weight, text });
    }

    /// Two lists of names and values. What one version does not know counts only where it says that
    /// something is there.
    fn properties(
        &mut self,
        group: &str,
        option: &str,
        theirs: &Properties,
        ours: &Properties,
        warn: &[&str],
    ) {
        for name in keys(theirs, ours) {
            let (theirs, ours) = (theirs.get(name), ours.get(name));
            // Another version has other experimental ones, so their digests differ always.
            let unknown =
                !self.same_version && (theirs.is_none() || ours.is_none() || name == EXPERIMENTAL);
            // `auto` is QEMU's word for on where it can be, and a device tells whether it is.
            let as_on =
                |value: Option<&String>| matches!(value.map(String::as_str), Some("auto" | "on"));
            if theirs == ours || unknown || (as_on(theirs) && as_on(ours)) {
                continue;
            }
            let weight = if warn.contains(&name.as_str()) { Weight::Warn } else { Weight::Refuse };
            let value = |value: Option<&String>| match value {
                Some(value) => {
                    format!("{option} {name}={}", if value.is_empty() { "\"\"" } else { value })
                }
                None => "nothing".to_owned(),
            };
            self.add(format!("{group}.{name}"), weight, differ(&value(theirs), &value(ours)));
        }
    }

    fn tables(&mut self, theirs: &BTreeMap<String, u64>, ours: &BTreeMap<String, u64>) {
        for name in keys(theirs, ours) {
            let text = match (theirs.get(name), ours.get(name)) {
                (Some(theirs), Some(ours)) if theirs == ours => continue,
                (Some(_), Some(_)) => "another one at the source than here",
                (Some(_), None) => "at the source and not here",
                _ => "here and not at the source",
            };
            self.add(
                format!("table.{}", name.replace(' ', ".")),
                Weight::Refuse,
                format!("-{name}: {text}"),
            );
        }
    }

    fn devices(&mut self, theirs: &BTreeMap<String, Device>, ours: &BTreeMap<String, Device>) {
        for place in keys(theirs, ours) {
            let name = format!("device.{place}");
            match (theirs.get(place), ours.get(place)) {
                (Some(theirs), Some(ours)) => self.device(&name, theirs, ours),
                (Some(theirs), None) => {
                    self.add(
                        name,
                        Weight::Refuse,
                        format!("{} at the source and not here", told(theirs)),
                    );
                }
                (None, Some(ours)) => {
                    self.add(
                        name,
                        Weight::Refuse,
                        format!("{} here and not at the source", told(ours)),
                    );
                }
                (None, None) => {}
            }
        }
    }

    /// Two devices in one place.
    fn device(&mut self, name: &str, theirs: &Device, ours: &Device) {
        if theirs.kind != ours.kind || theirs.id != ours.id {
            self.add(name.to_owned(), Weight::Refuse, differ(&told(theirs), &told(ours)));
            return;
        }
        let option = format!("-device {}", theirs.kind);
        if theirs.is_short() != ours.is_short() {
            let (mut theirs, mut ours) = (theirs.clone(), ours.clone());
            theirs.shorten();
            ours.shorten();
            // Between two versions the digests differ where one knows more than the other: that is
            // no difference.
            let warn: &[&str] = if self.same_version { &[] } else { &[DIGEST] };
            self.properties(name, &option, &theirs.properties, &ours.properties, warn);
        } else {
            self.properties(name, &option, &theirs.properties, &ours.properties, WARN_OF_DEVICE);
        }
    }

    /// RAM blocks. Those of a device that is missing are told with it.
    fn blocks(&mut self, theirs: &BTreeMap<String, u64>, ours: &BTreeMap<String, u64>) {
        for block in keys(theirs, ours) {
            let (theirs, ours) = (theirs.get(block), ours.get(block));
            if theirs == ours {
                continue;
            }
            let size = |bytes: Option<&u64>| match bytes {
                Some(bytes) => format!("{} KiB", bytes >> 10),
                None => "nothing".to_owned(),
            };
            self.add(format!("block.{block}"), Weight::Refuse, differ(&size(theirs), &size(ours)));
        }
    }
}

fn told(device: &Device) -> String {
    if device.id.is_empty() {
        format!("-device {}", device.kind)
    } else {
        format!("-device {},id={}", device.kind, device.id)
    }
}

/// The names of both, each once.
fn keys<'k, V>(
    theirs: &'k BTreeMap<String, V>,
    ours: &'k BTreeMap<String, V>,
) -> BTreeSet<&'k String> {
    theirs.keys().chain(ours.keys()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(text: &str) -> Properties {
        text.split(' ')
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    fn platform(cpu: &str, machine: &str) -> Platform {
        let net = Device {
            kind: "virtio-net-pci".into(),
            id: "net0".into(),
            properties: properties("mac=a addr=2"),
        };
        Platform {
            version: "10.0.2".into(),
            accelerator: "tcg".into(),
            cpu_model: "max".into(),
            cpu: properties(cpu),
            smp: properties("cpus=2 maxcpus=4"),
            vcpus: vec!["core-id=0".into()],
            machine: properties(machine),
            numa: Vec::new(),
            uuid: "0".into(),
            tables: BTreeMap::new(),
            blocks: [("pc.bios".into(), 256 << 10)].into(),
            devices: [("pcie.0/02.0".into(), net)].into(),
        }
    }

    fn names(differences: &[Difference]) -> Vec<&str> {
        differences.iter().map(|d| d.name.as_str()).collect()
    }

    #[test]
    fn a_difference_is_allowed_by_its_name_or_what_it_begins_with() {
        let (theirs, ours) = (platform("smap=on smep=on", ""), platform("smap=off smep=on", ""));
        let found = compare(&theirs, &ours);
        assert_eq!(names(&found), ["cpu.smap"]);
        assert_eq!(
            found[0].to_string(),
            "cpu.smap: -cpu smap=on at the source, -cpu smap=off here"
        );
        for (allowed, is) in
            [("cpu.smap", true), ("cpu", true), ("cpu.sma", false), ("machine", false), ("", false)]
        {
            assert_eq!(found[0].is_allowed(&[allowed.to_owned()]), is, "{allowed:?}");
        }
    }

    #[test]
    fn what_another_version_does_not_know_is_no_difference() {
        let (theirs, mut ours) =
            (platform("smap=on", "hpet=on"), platform("smap=on new=on", "hpet=on fresh=off"));
        assert_eq!(names(&compare(&theirs, &ours)), ["cpu.new", "machine.fresh"]);
        ours.version = "10.1.0".into();
        assert!(compare(&theirs, &ours).is_empty());
        ours.machine.insert("hpet".into(), "off".into());
        assert_eq!(names(&compare(&theirs, &ours)), ["machine.hpet"]);
    }

    #[test]
    fn digests_of_what_two_versions_do_not_both_know_refuse_nobody() {
        let with = |properties: Properties| {
            let mut platform = platform("", "");
            platform.devices.get_mut("pcie.0/02.0").unwrap().properties.extend(properties);
            platform
        };
        let (theirs, mut ours) = (with(properties("x-*=1")), with(properties("x-*=2")));
        assert_eq!(names(&compare(&theirs, &ours)), ["device.pcie.0/02.0.x-*"]);
        ours.version = "10.1.0".into();
        assert!(compare(&theirs, &ours).is_empty());
        let mut short = theirs;
        short.devices.values_mut().for_each(Device::shorten);
        let found = compare(&short, &ours);
        assert_eq!(names(&found), ["device.pcie.0/02.0.properties"]);
        assert_eq!(found[0].weight, Weight::Warn);
    }

    #[test]
    fn a_vsock_device_may_have_another_number_here() {
        let with = |cid: &str| {
            let mut platform = platform("", "");
            platform.devices.get_mut("pcie.0/02.0").unwrap().properties.extend(properties(cid));
            platform
        };
        let found = compare(&with("guest-cid=3"), &with("guest-cid=4"));
        assert_eq!(found.iter().map(|d| d.weight).collect::<Vec<_>>(), [Weight::Warn]);
        let mut short = with("guest-cid=3");
        short.devices.values_mut().for_each(Device::shorten);
        assert!(compare(&short, &with("guest-cid=4")).is_empty());
    }

    #[test]
    fn auto_is_on_and_not_off() {
        let of = |smm: &str| platform("", &format!("smm={smm}"));
        assert!(compare(&of("auto"), &of("on")).is_empty());
        assert_eq!(names(&compare(&of("auto"), &of("off"))), ["machine.smm"]);
    }

    #[test]
    fn a_description_that_is_too_long_is_compared_by_digests() {
        let mut theirs = platform("", "");
        for n in 0..400 {
            let value = "v".repeat(200);
            let properties = properties(&format!("serial=s{n}{value}"));
            theirs.devices.insert(
                format!("b/{n}"),
                Device { kind: "k".into(), id: String::new(), properties },
            );
        }
        let mut ours = theirs.clone();
        let short = Platform::unpack(&theirs.pack()).unwrap();
        assert!(short.devices["b/7"].is_short() && short.vcpus != ours.vcpus);
        assert!(compare(&short, &ours).is_empty());
        ours.devices.get_mut("b/7").unwrap().properties.insert("serial".into(), "other".into());
        assert_eq!(names(&compare(&short, &ours)), ["device.b/7.properties"]);
        ours.vcpus.push("core-id=1".into());
        assert_eq!(names(&compare(&short, &ours)), ["vcpus", "device.b/7.properties"]);
        // What is only another form, or cut, is refused.
        let mut other = theirs.pack();
        other.pop();
        assert!(Platform::unpack(&other).is_err());
        assert!(Platform::unpack(&[]).is_err());
        assert!(Platform::unpack(&[9, 9, 9]).is_err());
    }
}
