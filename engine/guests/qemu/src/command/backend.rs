//! Memory backends of a QEMU command line, made such that another process can map them.

use crate::command::memory_file::MemoryFile;
use crate::command::options::{escape, pairs, parse_size};
use crate::command::readconfig;
use pageferry_engine::error::{Error, Result};
use serde_json::{Map, Value};

/// Turns the user's backend of nameless or private memory into a file that we make. Any other
/// object is handed back as it is.
pub(crate) fn rewrite_object(
    value: &str,
    memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>,
) -> Result<String> {
    let mut properties = properties(value)?;
    if value.trim_start().starts_with('{') {
        return match rewrite_properties(&mut properties, true.into(), memory)? {
            true => Ok(Value::Object(properties).to_string()),
            false => Ok(value.to_owned()),
        };
    }
    if !rewrite_properties(&mut properties, "on".into(), memory)? {
        return Ok(value.to_owned());
    }
    // Repeated keys make lists (host-nodes=0,host-nodes=1), so they are kept as pairs.
    let pairs = pairs(value, "qom-type");
    let mut words = Vec::new();
    for (key, _) in &pairs {
        let Some(changed) = properties.get(key).and_then(Value::as_str) else { continue };
        let repeated = pairs.iter().filter(|(k, _)| k == key).count() > 1;
        if repeated {
            // Written once, at its first place, with all its values.
            if !words.iter().any(|w: &String| w.starts_with(&format!("{key}="))) {
                words.extend(
                    pairs
                        .iter()
                        .filter(|(k, _)| k == key)
                        .map(|(_, v)| format!("{key}={}", escape(v))),
                );
            }
        } else if key == "qom-type" {
            words.insert(0, changed.to_owned());
        } else {
            words.push(format!("{key}={}", escape(changed)));
        }
    }
    for added in ["mem-path", "share"].iter().filter(|a| pairs.iter().all(|(key, _)| key != *a)) {
        if let Some(changed) = properties.get(*added).and_then(Value::as_str) {
            words.push(format!("{added}={}", escape(changed)));
        }
    }
    Ok(words.join(","))
}

/// Changes a backend's properties, in which values are strings, or JSON's own kinds (`yes` is how
/// the one or the other says so). False if it is to stay as it is.
pub(crate) fn rewrite_properties(
    properties: &mut Map<String, Value>,
    yes: Value,
    memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>,
) -> Result<bool> {
    let kind = string(properties, "qom-type").unwrap_or_default();
    let id = string(properties, "id").unwrap_or_default();
    match kind.as_str() {
        "memory-backend-file" if on(properties, "share") => return Ok(false),
        // Nobody can write it, so sharing it changes nothing but what QEMU takes it for: as private
        // memory it would send all of it, and fail to write it at the destination. With rom=off the
        // guest writes, into private memory.
        "memory-backend-file" if on(properties, "readonly") && !off(properties, "rom") => {
            properties.insert("share".into(), yes);
            return Ok(true);
        }
        "memory-backend-file" => {
            return Err(Error::refused(format!(
                "-object memory-backend-file,id={id}: its memory is private to QEMU, and its file's content would \
                 change if pageferry made it shared: add share=on if that is what you want, or use memory-backend-ram"
            )));
        }
        "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-shm" => {}
        _ => return Ok(false),
    }
    let size = string(properties, "size")
        .ok_or_else(|| Error::refused(format!("-object {kind},id={id}: it has no size")))?;
    let bytes = parse_size(&size, 1)?;
    let huge_page_bytes = match on(properties, "hugetlb") {
        true => Some(string(properties, "hugetlbsize").map_or(Ok(0), |s| parse_size(&s, 1))?),
        false => None,
    };
    let fd = memory(&MemoryFile { name: id, bytes, huge_page_bytes })?;
    for gone in ["hugetlb", "hugetlbsize", "seal"] {
        properties.remove(gone);
    }
    properties.insert("qom-type".into(), "memory-backend-file".into());
    properties.insert("mem-path".into(), format!("/proc/self/fd/{fd}").into());
    properties.insert("share".into(), yes);
    Ok(true)
}

pub(crate) fn properties_of(group: &readconfig::Group) -> Map<String, Value> {
    let mut properties: Map<String, Value> =
        group.pairs.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    if let Some(id) = &group.id {
        properties.insert("id".into(), id.clone().into());
    }
    properties
}

/// The properties of `-object`, in either of its two ways of writing. Of a repeated key the last
/// value counts.
pub(crate) fn properties(value: &str) -> Result<Map<String, Value>> {
    if value.trim_start().starts_with('{') {
        return match serde_json::from_str(value) {
            Ok(Value::Object(properties)) => Ok(properties),
            _ => Err(Error::refused(format!("-object {value}: not a JSON object"))),
        };
    }
    Ok(pairs(value, "qom-type").into_iter().map(|(key, value)| (key, value.into())).collect())
}

/// A property as the text that QEMU would take for it.
pub(crate) fn string(properties: &Map<String, Value>, key: &str) -> Option<String> {
    match properties.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(other) => Some(other.to_string()),
        None => None,
    }
}

pub(crate) fn on(properties: &Map<String, Value>, key: &str) -> bool {
    string(properties, key).is_some_and(|v| ["on", "yes", "true", "y"].contains(&v.as_str()))
}

fn off(properties: &Map<String, Value>, key: &str) -> bool {
    string(properties, key).is_some_and(|v| ["off", "no", "false", "n"].contains(&v.as_str()))
}
