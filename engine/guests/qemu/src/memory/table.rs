//! The RAM blocks of a QEMU, as `info ramblock` prints them.

use pageferry_engine::error::{Error, Result};
use serde_json::Value;

pub(crate) fn human_text(answer: &Value) -> Result<String> {
    answer
        .get("human-readable-text")
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| Error::Guest("QEMU's x-query-ramblock answered without a text".into()))
}

/// A line of `x-query-ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RamBlock {
    pub(crate) name: String,
    pub(crate) page_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) address: u64,
    /// Whether the guest cannot write it.
    pub(crate) read_only: bool,
}

impl RamBlock {
    /// The id of its backend, if it has one. Machines up to 4.0 name the block by the object's
    /// path, and a device on a bus puts its own path before the id.
    pub(crate) fn backend_id(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }
}

/// Reads the table by its header, since columns were added over time.
pub(crate) fn parse_ramblocks(text: &str) -> Result<Vec<RamBlock>> {
    let odd =
        |what: &str| Error::Guest(format!("QEMU's x-query-ramblock is not understood: {what}"));
    let mut lines = text.lines().filter(|l| !l.trim().is_empty());
    let header = lines.next().ok_or_else(|| odd("it is empty"))?;
    let columns: Vec<&str> = header
        .trim()
        .strip_prefix("Block Name")
        .ok_or_else(|| odd(header))?
        .split_whitespace()
        .collect();
    let column = |name: &str| columns.iter().position(|c| *c == name).ok_or_else(|| odd(header));
    let (page, used, address, access) =
        (column("PSize")?, column("Used")?, column("HVA")?, column("RO")?);
    if page != 0 {
        return Err(odd(header));
    }
    let mut blocks = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        // A page size is two words ("4 KiB"), and a block may have no name.
        let rest = words.len().checked_sub(columns.len() + 1).ok_or_else(|| odd(line))?;
        let hex = |column: usize| -> Option<u64> {
            u64::from_str_radix(words.get(rest + 1 + column)?.strip_prefix("0x")?, 16).ok()
        };
        let unit = match words[rest + 1] {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(odd(line)),
        };
        blocks.push(RamBlock {
            name: words[..rest].join(" "),
            page_bytes: words[rest]
                .parse::<u64>()
                .ok()
                .and_then(|n| n.checked_mul(unit))
                .ok_or_else(|| odd(line))?,
            used_bytes: hex(used).ok_or_else(|| odd(line))?,
            address: hex(address).ok_or_else(|| odd(line))?,
            read_only: words.get(rest + 1 + access) == Some(&"ro"),
        });
    }
    Ok(blocks)
}
