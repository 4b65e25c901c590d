//! Who may write guest memory, and whether the tracking sees it.
//!
//! The tracking sees what is written through QEMU's own page tables: by vCPUs, QEMU's threads, and
//! the kernel on behalf of them (vhost-net, `read(2)`). It is blind to everything else: hardware
//! that writes by DMA, other processes that map the memory, the kernel through addresses of its
//! own. So what a guest is made of is looked up in a list of what is known to write through the
//! page tables. What is not in it is refused by name, and the operator may vouch for it.
//!
//! ```text
//!   info qom-tree, qom-list-types      every device, also those that sit on no bus
//!   info network                       the network's back ends
//!   qom-list /objects                  objects
//!   query-named-block-nodes            block drivers
//!   /proc/PID/fdinfo                   memory registered with an io_uring (disks.rs)
//! ```
//!
//! The list is in `known.rs`.

use crate::qmp::Qmp;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::Vouched;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt;
use std::time::Instant;

mod known;

pub use known::{Family, Verdict, judge};

/// A part of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// What it is.
    pub family: Family,
    /// Its type, as `--allow-device` takes it.
    pub kind: String,
    /// Its id or path, as QEMU has it.
    pub name: String,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, kind, name } = self;
        match family {
            Family::Device | Family::Object if name.is_empty() => write!(f, "{kind}"),
            Family::Device | Family::Object => write!(f, "{kind} ({name})"),
            Family::Netdev => write!(f, "netdev {kind} ({name})"),
            Family::BlockDriver => write!(f, "{kind} (a disk)"),
        }
    }
}

/// Everything that a guest is made of and that could write its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    parts: Vec<Part>,
}

impl Inventory {
    /// Asks QEMU.
    pub fn read(qmp: &mut Qmp, nodes: &Value, deadline: Instant) -> Result<Self> {
        let types = json!({ "implements": "device", "abstract": false });
        let types = qmp.execute("qom-list-types", types, deadline)?;
        let types: HashSet<&str> =
            types.as_array().into_iter().flatten().filter_map(|t| t["name"].as_str()).collect();
        let mut parts = devices_in(&monitor(qmp, "info qom-tree", deadline)?, &types);
        parts.extend(netdevs_in(&monitor(qmp, "info network", deadline)?));
        for (name, kind) in objects(qmp, deadline)? {
            parts.push(Part { family: Family::Object, kind, name });
        }
        parts.extend(block_drivers_in(nodes));
        Ok(Self { parts })
    }

    /// Fails, naming each part that the tracking may not see, unless the operator has vouched for
    /// it.
    pub fn check(&self, vouched: &Vouched) -> Result<()> {
        check(&self.parts, vouched)
    }

    /// Fails if anything but a disk was plugged in or out since `before` was read. (Disks come and
    /// go by themselves, with a change of a medium or a snapshot; their drivers are looked at each
    /// time.)
    pub fn check_unchanged_since(&self, before: &Self) -> Result<()> {
        let hardware = |all: &Self| -> HashSet<Part> {
            all.parts.iter().filter(|part| part.family != Family::BlockDriver).cloned().collect()
        };
        let (now, then) = (hardware(self), hardware(before));
        let mut changes: Vec<String> =
            now.difference(&then).map(|part| format!("{part} came")).collect();
        changes.extend(then.difference(&now).map(|part| format!("{part} went")));
        changes.sort();
        if changes.is_empty() { Ok(()) } else { Err(changed(&changes.join(", "))) }
    }
}

/// Fails if a block driver of these nodes is one that the tracking may not see.
pub fn check_block_drivers(nodes: &Value, vouched: &Vouched) -> Result<()> {
    check(&block_drivers_in(nodes).collect::<Vec<_>>(), vouched)
}

/// Fails if a device was unplugged since that was asked last and before QEMU's last answer. Who
/// plugs a device in and out again between two looks at the list of devices leaves no other trace.
pub fn check_none_unplugged(qmp: &mut Qmp) -> Result<()> {
    match unplugged(qmp)? {
        Some(name) => Err(changed(&format!("{name} was unplugged"))),
        None => Ok(()),
    }
}

/// Forgets what was unplugged until now.
pub fn forget_unplugged(qmp: &mut Qmp) -> Result<()> {
    while unplugged(qmp)?.is_some() {}
    Ok(())
}

/// The name of a device that was unplugged, and has not been asked for yet.
fn unplugged(qmp: &mut Qmp) -> Result<Option<String>> {
    match qmp.wait_event(Instant::now(), |event| event.name == "DEVICE_DELETED") {
        Ok(event) => {
            let name = event.data["device"].as_str().or(event.data["path"].as_str());
            Ok(Some(name.unwrap_or("a device").to_owned()))
        }
        Err(Error::Timeout { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

fn changed(what: &str) -> Error {
    Error::Guest(format!(
        "the guest's devices changed while it was moved ({what}), and what was there in between may have written its \
         memory unseen: move it again, and plug nothing meanwhile"
    ))
}

fn check(parts: &[Part], vouched: &Vouched) -> Result<()> {
    let mut unseen = Vec::new();
    let mut unknown = Vec::new();
    let mut switches: Vec<String> = Vec::new();
    for part in parts {
        let (list, text) = match judge(part.family, &part.kind) {
            Verdict::Seen => continue,
            Verdict::Unseen(why) => (&mut unseen, format!("{part}: {why}")),
            Verdict::Unknown => (&mut unknown, part.to_string()),
        };
        if vouched.devices.contains(&part.kind) {
            tracing::warn!(
                "moved on the operator's word although its writes may not be seen: {text}"
            );
            continue;
        }
        list.push(text);
        let switch = format!("--allow-device {}", part.kind);
        if !switches.contains(&switch) {
            switches.push(switch);
        }
    }
    let mut words = Vec::new();
    if !unseen.is_empty() {
        words.push(format!(
            "the guest has devices that write its memory from outside QEMU's process, or past its page tables, where no \
             tracking sees it: {}",
            unseen.join("; ")
        ));
    }
    if !unknown.is_empty() {
        words.push(format!(
            "{} not known to pageferry, which cannot tell whether all writes of guest memory would be seen",
            match unknown.as_slice() {
                [one] => format!("{one} is"),
                several => format!("{} are", several.join(", ")),
            }
        ));
    }
    if words.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!(
        "{}. Unplug what is named, or, if you know that it writes no guest memory unseen, say so with {}",
        words.join(". And "),
        switches.join(" ")
    )))
}

/// What the human monitor answers to a command.
pub(super) fn monitor(qmp: &mut Qmp, command: &str, deadline: Instant) -> Result<String> {
    let arguments = json!({ "command-line": command });
    let answer = qmp.execute("human-monitor-command", arguments, deadline)?;
    answer.as_str().map(str::to_owned).ok_or_else(|| {
        Error::Guest(format!("QEMU answered `{command}` with something else than a text"))
    })
}

/// The user-created objects: id and type.
pub(crate) fn objects(qmp: &mut Qmp, deadline: Instant) -> Result<Vec<(String, String)>> {
    let list = qmp.execute("qom-list", json!({ "path": "/objects" }), deadline)?;
    let of = |object: &Value| {
        let kind = object.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((object.get("name")?.as_str()?.to_owned(), kind.to_owned()))
    };
    Ok(list.as_array().into_iter().flatten().filter_map(of).collect())
}

/// The block nodes.
pub fn block_nodes(qmp: &mut Qmp, deadline: Instant) -> Result<Value> {
    qmp.execute("query-named-block-nodes", json!({ "flat": true }), deadline)
}

/// Lines of `info qom-tree` look like `    /gpu (vfio-pci)`, indented by their depth. Whatever is of one of
/// the `types` of devices is a part; what lies within a part that is not seen belongs to it.
fn devices_in(tree: &str, types: &HashSet<&str>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut hidden_below = None;
    // Names of the levels above, to tell a device that has an id.
    let mut parent: Vec<(usize, &str)> = Vec::new();
    for line in tree.lines() {
        let depth = line.len() - line.trim_start().len();
        let Some((name, kind)) = line.trim().rsplit_once(" (") else { continue };
        let (name, kind) = (name.trim_start_matches('/'), kind.trim_end_matches(')'));
        parent.retain(|(at, _)| *at < depth);
        let above = parent.last().map_or("", |(_, name)| name);
        parent.push((depth, name));
        if hidden_below.is_some_and(|hidden| depth > hidden) {
            continue;
        }
        hidden_below = None;
        if !types.contains(kind) {
            continue;
        }
        if judge(Family::Device, kind) != Verdict::Seen {
            hidden_below = Some(depth);
        }
        // Only in /machine/peripheral is the name an id of the user's.
        let name = if above == "peripheral" { name } else { "" };
        parts.push(Part { family: Family::Device, kind: kind.to_owned(), name: name.to_owned() });
    }
    parts
}

/// Lines of `info network` look like ` \ net0: index=0,type=tap,ifname=...`. Headings, filters
/// (which are objects) and ports without a peer have no type.
fn netdevs_in(text: &str) -> Vec<Part> {
    let netdev = |line: &str| {
        let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": index=")?;
        let mut words = rest.split(',').skip_while(|word| !word.starts_with("type="));
        let kind = words.next()?.strip_prefix("type=")?;
        // Whether passt speaks vhost-user is in its description alone.
        let kind = match (kind, words.next()) {
            ("passt", Some(way @ ("vhost-user" | "stream"))) => format!("passt+{way}"),
            _ => kind.to_owned(),
        };
        Some(Part { family: Family::Netdev, kind, name: name.to_owned() })
    };
    text.lines().filter_map(netdev).collect()
}

fn block_drivers_in(nodes: &Value) -> impl Iterator<Item = Part> {
    nodes.as_array().into_iter().flatten().map(|node| Part {
        family: Family::BlockDriver,
        kind: node["drv"].as_str().unwrap_or("of no name").to_owned(),
        name: node["node-name"].as_str().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests;
