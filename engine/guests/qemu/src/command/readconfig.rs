//! What a file of `-readconfig` says of memory (QEMU, docs/config, util/qemu-config.c).
//!
//! ```text
//!   [memory]                    [object "ram0"]                         [machine]
//!     size = "2G"                 qom-type = "memory-backend-file"        memory-backend = "ram0"
//! ```
//!
//! It is read as the command line is, because memory is what a command gets added. It is not
//! rewritten: what would have to be changed in it is refused by its name.

use pageferry_engine::error::{Error, Result};
use rustix::fs::FileType;
use std::path::Path;

/// Larger than any file that people write; QEMU's own examples have some 10 KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// One group of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name: `memory`, `object`.
    pub name: String,
    /// What stands behind the name in quotes.
    pub id: Option<String>,
    /// Keys and values, in order.
    pub pairs: Vec<(String, String)>,
}

impl Group {
    /// The last value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// Its heading.
    #[must_use]
    pub fn heading(&self) -> String {
        match &self.id {
            Some(id) => format!("[{} \"{id}\"]", self.name),
            None => format!("[{}]", self.name),
        }
    }
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<Group>> {
    let refuse = |why: &str| Error::refused(format!("-readconfig {}: {why}", path.display()));
    let stat = rustix::fs::stat(path).map_err(|e| refuse(&std::io::Error::from(e).to_string()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        // It can be read once, and QEMU is to read it.
        return Err(refuse("only a regular file can be read for memory in it: use one"));
    }
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > FILE_BYTES_MAX {
        return Err(refuse("it is too long to be a file of QEMU's"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| refuse(&e.to_string()))?;
    parse(&text).map_err(|line| refuse(&format!("line {line} is not understood")))
}

/// Reads a file's text; on failure names the line, counted from one.
fn parse(text: &str) -> std::result::Result<Vec<Group>, usize> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let understood = match line.strip_prefix('[') {
            Some(heading) => group(heading).map(|group| groups.push(group)),
            None => pair(line).zip(groups.last_mut()).map(|(pair, group)| group.pairs.push(pair)),
        };
        understood.ok_or(index + 1)?;
    }
    Ok(groups)
}

/// `memory]` or `object "ram0"]`.
fn group(heading: &str) -> Option<Group> {
    let inner = heading.strip_suffix(']')?.trim();
    let (name, id) = match inner.split_once(char::is_whitespace) {
        Some((name, id)) => {
            (name, Some(id.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned()))
        }
        None => (inner, None),
    };
    (!name.is_empty()).then(|| Group { name: name.into(), id, pairs: Vec::new() })
}

/// `size = "2G"`.
fn pair(line: &str) -> Option<(String, String)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim().strip_prefix('"')?.split_once('"')?.0;
    Some((key.trim().to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_their_values_are_read_and_anything_else_is_refused_by_its_line() {
        let text = "# QEMU 10\n[memory]\n  size = \"2G\"\n\n[object \"ram0\"]\nqom-type=\"memory-backend-file\"\n  share = \"\"\n";
        let groups = parse(text).unwrap();
        assert_eq!(groups.len(), 2);
        assert_eq!((groups[0].heading().as_str(), groups[0].get("size")), ("[memory]", Some("2G")));
        assert_eq!(groups[1].heading(), "[object \"ram0\"]");
        assert_eq!(
            (groups[1].get("qom-type"), groups[1].get("share")),
            (Some("memory-backend-file"), Some(""))
        );
        for (text, line) in [
            ("size = \"1\"", 1),
            ("[memory]\nsize = 1", 2),
            ("\n[memory", 2),
            ("[object ram0]", 1),
            ("[a]\nb", 2),
        ] {
            assert_eq!(parse(text), Err(line), "{text}");
        }
    }

    #[test]
    fn a_pipe_is_left_to_qemu() {
        let text = read(Path::new("/dev/null")).unwrap_err().to_string();
        assert!(text.contains("regular file"), "{text}");
        assert!(read(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }
}
