//! Asks a QEMU what its guest can see of the machine.

use super::{Platform, Properties, qtree};
use crate::memory::find;
use crate::qmp::Qmp;
use crate::stream::QMP_MAX;
use pageferry_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

/// Properties of a vCPU that say which one it is, how it came to be, or what the host lacks.
const NOT_OF_THE_MODEL: &[&str] = &[
    "type",
    "realized",
    "hotplugged",
    "hotpluggable",
    "start-powered-off",
    "apic-id",
    "socket-id",
    "core-id",
    "thread-id",
    "die-id",
    "module-id",
    "cluster-id",
    "node-id",
    "crash-information",
    "feature-words",
    "filtered-features",
    "unavailable-features",
    "check",
    "enforce",
    "migratable",
    "host-phys-bits",
    "host-phys-bits-limit",
    "host-cache-info",
    "x-force-features",
    "legacy-memory",
    "memory",
];

/// Properties of a machine that are the host's business, or asked for elsewhere.
const NOT_OF_THE_MACHINE: &[&str] = &[
    "type",
    "smp",
    "rtc-time",
    "dumpdtb",
    "dump-guest-core",
    "mem-merge",
    "suppress-vmdesc",
    "aux-ram-share",
    "pcspk-audiodev",
    // Names of block nodes, which change with a snapshot. Flash and its size are compared as
    // devices and blocks.
    "pflash0",
    "pflash1",
    "phandle-start",
    "confidential-guest-support",
    "memory-encryption",
];

/// Remembers what cannot change while a guest lives.
#[derive(Debug, Default)]
pub struct Gatherer {
    /// The vCPUs' properties: some hundred questions.
    cpu: Option<(String, Properties)>,
}

impl Gatherer {
    /// Asks for what takes longest and cannot change, so that a migration need not.
    pub fn ask_ahead(&mut self, qmp: &mut Qmp) -> Result<()> {
        if self.cpu.is_none() {
            self.cpu = Some(cpu(qmp)?);
        }
        Ok(())
    }

    /// What the guest has now.
    pub fn gather(&mut self, qmp: &mut Qmp, pid: u32) -> Result<Platform> {
        let (cpu_model, cpu) = match &self.cpu {
            Some(known) => known.clone(),
            None => self.cpu.insert(cpu(qmp)?).clone(),
        };
        let machine = properties(qmp, "/machine", |name| !NOT_OF_THE_MACHINE.contains(&name))?;
        let smp = ask(qmp, "qom-get", json!({ "path": "/machine", "property": "smp" }))
            .unwrap_or(Value::Null);
        let slots = ask(qmp, "query-hotpluggable-cpus", json!({})).unwrap_or(Value::Null);
        let plugged =
            slots.as_array().into_iter().flatten().filter(|slot| slot.get("qom-path").is_some());
        let mut vcpus: Vec<String> = plugged.map(|slot| words(&slot["props"])).collect();
        vcpus.sort_unstable();
        let kvm = ask(qmp, "query-kvm", json!({}))?;
        let uuid = ask(qmp, "query-uuid", json!({}))?;
        let devices = qtree::parse(&monitor(qmp, "info qtree")?);
        let grows = devices.values().any(|device| device.kind.starts_with("virtio-mem"));
        let numa = numa_in(&monitor(qmp, "info numa")?, grows);
        Ok(Platform {
            version: qmp.version().to_string(),
            accelerator: if kvm["enabled"] == true { "kvm" } else { "tcg" }.into(),
            cpu_model,
            cpu,
            smp: flat("", &smp),
            vcpus,
            machine,
            numa,
            uuid: uuid["UUID"].as_str().unwrap_or_default().to_owned(),
            tables: tables(pid)?,
            blocks: find::sizes(qmp, Instant::now() + QMP_MAX)?,
            devices,
        })
    }
}

/// The lines of `info numa`. Their sizes count what the guest has plugged in of a virtio-mem
/// device, of which a waiting QEMU has nothing yet: where there `grows` one, only the RAM blocks
/// tell sizes.
fn numa_in(text: &str, grows: bool) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let size = |line: &str| line.contains(" size: ") || line.contains(" plugged: ");
    lines.filter(|line| !(grows && size(line))).map(str::to_owned).collect()
}

fn ask(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Value> {
    qmp.execute(command, arguments, Instant::now() + QMP_MAX)
}

fn monitor(qmp: &mut Qmp, command: &str) -> Result<String> {
    let answer = ask(qmp, "human-monitor-command", json!({ "command-line": command }))?;
    let text = answer.as_str().map(str::to_owned);
    text.ok_or_else(|| {
        Error::Guest(format!("QEMU answered `{command}` with something else than a text"))
    })
}

/// Model and properties of the first vCPU; the others are of the same model.
fn cpu(qmp: &mut Qmp) -> Result<(String, Properties)> {
    let cpus = ask(qmp, "query-cpus-fast", json!({}))?;
    let path =
        cpus[0]["qom-path"].as_str().ok_or_else(|| Error::Guest("QEMU tells of no vCPU".into()))?;
    let kind = ask(qmp, "qom-get", json!({ "path": path, "property": "type" }))?;
    let kind = kind.as_str().unwrap_or_default();
    let model = kind
        .rsplit_once('-')
        .and_then(|(rest, _)| rest.rsplit_once('-'))
        .map_or(kind, |(model, _)| model);
    let is_on = |qmp: &mut Qmp, name: &str| {
        ask(qmp, "qom-get", json!({ "path": path, "property": name })).is_ok_and(|on| on == true)
    };
    // Whole families that say nothing without their head: a question less for each of some two
    // hundred.
    let (vmx, kvm) = (is_on(qmp, "vmx"), is_on(qmp, "kvm"));
    let wanted = |name: &str| {
        let family = (vmx || !name.starts_with("vmx-"))
            && (kvm || !(name.starts_with("hv-") || name.starts_with("kvm-")));
        // Names with an underscore are old spellings of others.
        family && !name.contains('_') && !NOT_OF_THE_MODEL.contains(&name)
    };
    Ok((model.to_owned(), properties(qmp, path, wanted)?))
}

/// The properties of an object that can be read and are no other objects.
pub(crate) fn properties(
    qmp: &mut Qmp,
    path: &str,
    wanted: impl Fn(&str) -> bool,
) -> Result<Properties> {
    let list = ask(qmp, "qom-list", json!({ "path": path }))?;
    let mut found = Properties::new();
    for property in list.as_array().into_iter().flatten() {
        let (Some(name), Some(kind)) = (property["name"].as_str(), property["type"].as_str())
        else {
            continue;
        };
        if kind.starts_with("child<") || kind.starts_with("link<") || !wanted(name) {
            continue;
        }
        match ask(qmp, "qom-get", json!({ "path": path, "property": name })) {
            Ok(value) => found.extend(flat(name, &value)),
            // One that can only be set.
            Err(Error::VmmRefused { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// A value as texts; the members of an object under names of their own.
fn flat(name: &str, value: &Value) -> Properties {
    let Value::Object(members) = value else { return [(name.to_owned(), words(value))].into() };
    let under =
        |member: &String| if name.is_empty() { member.clone() } else { format!("{name}.{member}") };
    members.iter().map(|(member, value)| (under(member), words(value))).collect()
}

/// As one writes it on a command line.
pub fn words(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        Value::String(text) => text.clone(),
        Value::Object(members) => {
            let members: Vec<_> =
                members.iter().map(|(name, value)| format!("{name}={}", words(value))).collect();
            members.join(",")
        }
        other => other.to_string(),
    }
}

/// What QEMU tells nobody: tables that the command line adds. Their texts may be secrets, so
/// digests go.
fn tables(pid: u32) -> Result<BTreeMap<String, u64>> {
    let path = format!("/proc/{pid}/cmdline");
    let line = std::fs::read(&path).map_err(|e| Error::os(format!("reading {path}"), e))?;
    let words: Vec<String> = line
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    Ok(tables_in(&words))
}

/// The same, of a command. Pure.
fn tables_in(command: &[String]) -> BTreeMap<String, u64> {
    let mut tables = BTreeMap::new();
    for pair in command.windows(2) {
        let option = pair[0].strip_prefix('-').map(|option| option.trim_start_matches('-'));
        let Some(option @ ("smbios" | "acpitable" | "fw_cfg")) = option else { continue };
        let mut parts: Vec<&str> = pair[1].split(',').collect();
        parts.sort_unstable();
        let which =
            parts.iter().find(|part| part.starts_with("type=") || part.starts_with("name="));
        // A file may lie elsewhere on the other host.
        let is_path = |part: &str| {
            part.starts_with("file=")
                || (option == "smbios" && part.starts_with("path="))
                || (option == "acpitable" && part.starts_with("data="))
        };
        let texts: Vec<_> = parts.iter().filter(|part| !is_path(part)).collect();
        let mut name = format!("{option} {}", which.unwrap_or(&""));
        while tables.contains_key(&name) {
            name.push('+');
        }
        tables.insert(name, xxh3_64(format!("{texts:?}").as_bytes()));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_command_line_are_told_apart_and_not_told() {
        let tables =
            |command: &str| tables_in(&command.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let one = tables("qemu -smbios type=1,serial=secret -fw_cfg name=opt/a,file=/x -m 64");
        assert_eq!(one.keys().collect::<Vec<_>>(), ["fw_cfg name=opt/a", "smbios type=1"]);
        assert!(!format!("{one:?}").contains("secret"));
        assert_eq!(one, tables("qemu --smbios serial=secret,type=1 -fw_cfg name=opt/a,file=/y"));
        assert_ne!(one, tables("qemu -smbios type=1,serial=other -fw_cfg name=opt/a,file=/x"));
        assert_eq!(tables("qemu -smbios type=11,value=a -smbios type=11,value=b").len(), 2);
        for option in ["-smbios type=11,path", "-acpitable sig=SLIC,data"] {
            assert_eq!(
                tables(&format!("qemu {option}=/a/x")),
                tables(&format!("qemu {option}=/b/x"))
            );
        }
    }

    #[test]
    fn what_a_guest_has_plugged_in_of_virtio_mem_is_no_difference() {
        let text = |size: u32| {
            format!(
                "1 nodes\r\nnode 0 cpus: 0 1\r\nnode 0 size: {} MB\r\nnode 0 plugged: {size} MB\r\n",
                256 + size
            )
        };
        assert_ne!(numa_in(&text(0), false), numa_in(&text(128), false));
        assert_eq!(numa_in(&text(0), true), numa_in(&text(128), true));
        assert_eq!(numa_in(&text(0), true), ["1 nodes", "node 0 cpus: 0 1"]);
    }

    #[test]
    fn values_are_told_as_one_writes_them() {
        assert_eq!(words(&json!(true)), "on");
        assert_eq!(words(&json!({ "socket-id": 1, "core-id": 0 })), "core-id=0,socket-id=1");
        let flat = flat("memory", &json!({ "size": 5, "slots": 2 }));
        assert_eq!(flat.keys().collect::<Vec<_>>(), ["memory.size", "memory.slots"]);
    }
}
