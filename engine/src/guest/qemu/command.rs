//! Takes a user's QEMU command as it is, and adds what a move needs.
//!
//! ```text
//!   memory    a memfd that QEMU inherits, given to it as a named file:
//!             -object memory-backend-file,...,mem-path=/proc/self/fd/N,share=on
//!             in place of the machine's private memory, or of the user's own ram and memfd backends;
//!             a file that nobody can write (an image as NVDIMM) becomes a shared mapping of itself
//!   monitor   a listening socket that QEMU inherits: -chardev socket,fd=N -mon mode=control
//!             (it takes connections before QEMU even runs, so nobody has to wait for it to appear)
//!   -S -incoming defer                                                   for a destination only
//! ```
//!
//! Why a file and not a memfd backend: see [`super::blocks`]. What cannot work is refused here, with
//! the mend, before anything is started. [`rewrite`] is pure but for the files that it asks for.

use super::readconfig;
use crate::error::{Error, Result};
use crate::page::PAGE_BYTES;
use pageferry_transport::sealed_memfd;
use rustix::fs::MemfdFlags;
use serde_json::{Map, Value};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which end of a migration the QEMU is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It runs a guest that may be moved away later.
    Source,
    /// It waits to be filled.
    Destination,
}

/// A memory file that QEMU is to inherit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// The id of the backend, for `/proc/PID/maps`.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Huge pages, and their size in bytes; zero is the system's default size.
    pub huge_page_bytes: Option<u64>,
}

/// A command that is ready to be started, with the descriptors that it inherits.
#[derive(Debug)]
pub struct GuestCommand {
    /// The program and its arguments.
    pub words: Vec<OsString>,
    inherited: Vec<OwnedFd>,
}

impl GuestCommand {
    /// Rewrites `words` (the program first), makes its memory files, and binds the monitor's socket at
    /// `qmp_socket`, which must not exist. Close it (drop it) once QEMU runs: only then does a
    /// connection to the monitor of a QEMU that died fail instead of waiting.
    pub fn prepare(words: &[OsString], role: Role, qmp_socket: &Path) -> Result<Self> {
        let mut inherited = Vec::new();
        let rewritten = rewrite(words, role, &mut |file| {
            let fd = make_memory(file)?;
            let number = fd.as_raw_fd();
            inherited.push(fd);
            Ok(number)
        });
        let mut words = rewritten?;
        let listener = crate::private::listen(qmp_socket)
            .map_err(|e| Error::os(format!("making the monitor's socket {}", qmp_socket.display()), e))?;
        words.extend([
            "-chardev".into(),
            format!("socket,id={MONITOR_ID},fd={},server=on,wait=off", listener.as_raw_fd()).into(),
            "-mon".into(),
            format!("chardev={MONITOR_ID},mode=control").into(),
        ]);
        inherited.push(listener.into());
        Ok(Self { words, inherited })
    }

    /// The command for `std::process`. The descriptors become inheritable in the child alone, so
    /// processes that other threads start meanwhile get none of them.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        let fds: Vec<i32> = self.inherited.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec it makes fcntl calls alone, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                for fd in &fds {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }
}

/// Ids of what is added.
const MONITOR_ID: &str = "pageferry-qmp";
const MEMORY_ID: &str = "pageferry.ram";

/// QEMU's memory without `-m`, on PC machines.
const DEFAULT_MEMORY_BYTES: u64 = 128 << 20;

/// QEMU rounds the size given with `-m` up to this.
const MEMORY_ALIGN_BYTES: u64 = 8192;

/// The options of qemu-system-x86_64, old and new, that take no value. Every other option takes the
/// next word, whatever it looks like.
const WITHOUT_VALUE: &[&str] = &[
    "h",
    "help",
    "version",
    "S",
    "s",
    "snapshot",
    "usb",
    "nographic",
    "full-screen",
    "win2k-hack",
    "no-fd-bootchk",
    "no-acpi",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-quit",
    "no-frame",
    "alt-grab",
    "ctrl-grab",
    "sdl",
    "curses",
    "portrait",
    "mem-prealloc",
    "enable-kvm",
    "no-kvm",
    "xen-attach",
    "xen-domid-restrict",
    "daemonize",
    "singlestep",
    "only-migratable",
    "nodefaults",
    "no-user-config",
    "nouserconfig",
    "preconfig",
    "enable-sync-profile",
    "enable-fips",
    "async-teardown",
    "perfmap",
    "jitdump",
    "audio-help",
    "semihosting",
    "old-param",
    "spice-disable",
];

/// Rewrites a command for `role`; `memory` makes a file and says under which number QEMU inherits it.
///
/// # Errors
/// [`Error::Refused`] with the mend for what cannot be moved.
pub fn rewrite(
    words: &[OsString],
    role: Role,
    memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>,
) -> Result<Vec<OsString>> {
    let (program, rest) = words.split_first().ok_or_else(|| {
        Error::refused("there is no QEMU command: write it after `--`, as in `-- qemu-system-x86_64 -m 2G`")
    })?;
    let mut out = vec![program.clone()];
    let mut own_memory = false;
    let mut paused = false;
    let mut memory_bytes = DEFAULT_MEMORY_BYTES;
    let mut rest = rest.iter();
    while let Some(word) = rest.next() {
        let Some(name) = option_name(word) else {
            out.push(word.clone());
            continue;
        };
        if let Some(reason) = refused(name, role) {
            return Err(Error::refused(reason));
        }
        if WITHOUT_VALUE.contains(&name) {
            paused |= name == "S";
            out.push(word.clone());
            continue;
        }
        let Some(value) = rest.next() else {
            return Err(Error::refused(format!("the QEMU option {} lacks its value", word.display())));
        };
        let value = match name {
            "m" => {
                if let Some(bytes) = memory_option_bytes(text(word, value)?)? {
                    memory_bytes = bytes;
                }
                value.clone()
            }
            "machine" | "M" => {
                for (key, value) in pairs(text(word, value)?, "type") {
                    own_memory |= key == "memory-backend";
                    if key == "memory.size" {
                        memory_bytes = parse_size(&value, 1)?;
                    }
                }
                value.clone()
            }
            "numa" => {
                own_memory |= pairs(text(word, value)?, "type").iter().any(|(key, _)| key == "memdev");
                value.clone()
            }
            "object" => rewrite_object(text(word, value)?, memory)?.into(),
            "readconfig" => {
                let found = memory_of_config(Path::new(value))?;
                own_memory |= found.own_memory;
                memory_bytes = found.memory_bytes.unwrap_or(memory_bytes);
                value.clone()
            }
            _ => value.clone(),
        };
        out.extend([word.clone(), value]);
    }
    if !own_memory {
        let file = MemoryFile { name: MEMORY_ID.into(), bytes: memory_bytes, huge_page_bytes: None };
        let fd = memory(&file)?;
        out.extend([
            "-object".into(),
            format!(
                "memory-backend-file,id={MEMORY_ID},size={memory_bytes},mem-path=/proc/self/fd/{fd},share=on"
            )
            .into(),
            "-machine".into(),
            format!("memory-backend={MEMORY_ID}").into(),
        ]);
    }
    if role == Role::Destination {
        if !paused {
            out.push("-S".into());
        }
        out.extend(["-incoming".into(), "defer".into()]);
    }
    Ok(out)
}

/// What a file of `-readconfig` says of memory.
#[derive(Debug, Default)]
struct ConfiguredMemory {
    /// Whether it names a backend for the machine's memory.
    own_memory: bool,
    /// The size that it gives.
    memory_bytes: Option<u64>,
}

/// Reads a file of `-readconfig` as the same options on the command line.
fn memory_of_config(path: &Path) -> Result<ConfiguredMemory> {
    let mut found = ConfiguredMemory::default();
    for group in readconfig::read(path)? {
        match group.name.as_str() {
            "memory" => {
                if let Some(size) = group.get("size") {
                    found.memory_bytes = memory_option_bytes(&format!("size={size}"))?;
                }
            }
            "machine" => {
                found.own_memory |= group.get("memory-backend").is_some();
                if let Some(size) = group.get("memory.size") {
                    found.memory_bytes = Some(parse_size(size, 1)?);
                }
            }
            "numa" => found.own_memory |= group.get("memdev").is_some(),
            "object" => {
                let place = format!("-readconfig {}, {}", path.display(), group.heading());
                let refuse = || {
                    Error::refused(format!(
                        "{place}: this memory would have to be changed, and pageferry changes no file of yours: write it on \
                         the command line with -object, or make it a memory-backend-file with share = \"on\""
                    ))
                };
                let mut properties = properties_of(&group);
                if !matches!(
                    rewrite_properties(&mut properties, "on".into(), &mut |_| Err(refuse())),
                    Ok(false)
                ) {
                    return Err(refuse());
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn properties_of(group: &readconfig::Group) -> Map<String, Value> {
    let mut properties: Map<String, Value> =
        group.pairs.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    if let Some(id) = &group.id {
        properties.insert("id".into(), id.clone().into());
    }
    properties
}

/// The files that a user's command names for memory that QEMU will write: those of shared, writable
/// `memory-backend-file`s.
pub fn memory_paths(words: &[OsString]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut rest = words.iter().skip(1);
    while let Some(word) = rest.next() {
        let Some(name) = option_name(word).filter(|name| !WITHOUT_VALUE.contains(name)) else { continue };
        let Some(value) = rest.next() else { break };
        match name {
            "object" => paths.extend(memory_path(&properties(text(word, value)?)?)),
            "readconfig" => {
                let groups = readconfig::read(Path::new(value))?;
                let objects = groups.iter().filter(|group| group.name == "object");
                paths.extend(objects.filter_map(|group| memory_path(&properties_of(group))));
            }
            _ => {}
        }
    }
    Ok(paths)
}

/// The file of a shared, writable `memory-backend-file`.
fn memory_path(properties: &Map<String, Value>) -> Option<PathBuf> {
    let path = string(properties, "mem-path")?;
    let file = string(properties, "qom-type").is_some_and(|kind| kind == "memory-backend-file");
    (file && on(properties, "share") && !on(properties, "readonly")).then(|| path.into())
}

/// The properties of `-object`, in either of its two ways of writing. Of a repeated key the last value counts.
fn properties(value: &str) -> Result<Map<String, Value>> {
    if value.trim_start().starts_with('{') {
        return match serde_json::from_str(value) {
            Ok(Value::Object(properties)) => Ok(properties),
            _ => Err(Error::refused(format!("-object {value}: not a JSON object"))),
        };
    }
    Ok(pairs(value, "qom-type").into_iter().map(|(key, value)| (key, value.into())).collect())
}

/// A property as the text that QEMU would take for it.
fn string(properties: &Map<String, Value>, key: &str) -> Option<String> {
    match properties.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(other) => Some(other.to_string()),
        None => None,
    }
}

fn on(properties: &Map<String, Value>, key: &str) -> bool {
    string(properties, key).is_some_and(|v| ["on", "yes", "true", "y"].contains(&v.as_str()))
}

fn off(properties: &Map<String, Value>, key: &str) -> bool {
    string(properties, key).is_some_and(|v| ["off", "no", "false", "n"].contains(&v.as_str()))
}

/// The name of an option without its dashes, or none for a word that is not an option (a disk image).
fn option_name(word: &OsStr) -> Option<&str> {
    let name = word.to_str()?.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    (!name.is_empty()).then_some(name)
}

/// Why an option cannot be used under pageferry, if it cannot.
fn refused(name: &str, role: Role) -> Option<String> {
    let reason = match name {
        "incoming" => "-incoming is what `pageferry receive` does itself: leave it out",
        "daemonize" => {
            "-daemonize cannot be used: pageferry stays in front of its QEMU; leave it out and put pageferry itself into the background"
        }
        "snapshot" => {
            "-snapshot cannot be used: it writes to a temporary file that only this host has, so the guest would \
             lose its disk when it moves; use an image that both hosts see"
        }
        "preconfig" => {
            "-preconfig cannot be used: QEMU would wait for a command that pageferry does not send; leave it out"
        }
        "mem-path" => {
            "-mem-path makes private memory, which cannot be moved: use -object \
             memory-backend-file,id=ram0,size=SIZE,mem-path=DIR,share=on -machine memory-backend=ram0 instead (or \
             -object memory-backend-memfd,id=ram0,size=SIZE,hugetlb=on for huge pages)"
        }
        "loadvm" if role == Role::Destination => {
            "-loadvm cannot be used by a guest that waits to be filled: leave it out"
        }
        "xen-attach" | "xen-domid" => "a Xen guest cannot be moved",
        _ => return None,
    };
    Some(reason.into())
}

fn text<'a>(option: &OsStr, value: &'a OsStr) -> Result<&'a str> {
    value.to_str().ok_or_else(|| {
        Error::refused(format!(
            "the value of the QEMU option {} is not UTF-8: {}",
            option.display(),
            value.display()
        ))
    })
}

/// The size in `-m 2G`, `-m size=2G,slots=2,maxmem=4G`, or none in `-m slots=2,maxmem=4G`.
fn memory_option_bytes(value: &str) -> Result<Option<u64>> {
    let pairs = pairs(value, "size");
    let Some((_, size)) = pairs.iter().rev().find(|(key, _)| key == "size") else {
        return Ok(None);
    };
    match parse_size(size, 1 << 20)? {
        0 => Ok(Some(DEFAULT_MEMORY_BYTES)),
        bytes => bytes
            .checked_next_multiple_of(MEMORY_ALIGN_BYTES)
            .map(Some)
            .ok_or_else(|| Error::refused(format!("-m {value}: too much memory"))),
    }
}

/// Turns the user's backend of nameless or private memory into a file that we make. Any other object
/// is handed back as it is.
fn rewrite_object(value: &str, memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>) -> Result<String> {
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
                    pairs.iter().filter(|(k, _)| k == key).map(|(_, v)| format!("{key}={}", escape(v))),
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

/// Changes a backend's properties, in which values are strings, or JSON's own kinds (`yes` is how the
/// one or the other says so). False if it is to stay as it is.
fn rewrite_properties(
    properties: &mut Map<String, Value>,
    yes: Value,
    memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>,
) -> Result<bool> {
    let kind = string(properties, "qom-type").unwrap_or_default();
    let id = string(properties, "id").unwrap_or_default();
    match kind.as_str() {
        "memory-backend-file" if on(properties, "share") => return Ok(false),
        // Nobody can write it, so sharing it changes nothing but what QEMU takes it for: as private memory it would send
        // all of it, and fail to write it at the destination. With rom=off the guest writes, into private memory.
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

/// Splits `a,key=value,key=va,,lue`: a first word without `=` is the value of `implied`, and doubled
/// commas are one comma.
fn pairs(value: &str, implied: &str) -> Vec<(String, String)> {
    let mut words = vec![String::new()];
    let mut characters = value.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, words.last_mut()) {
            (',', Some(last)) if characters.peek() == Some(&',') => {
                characters.next();
                last.push(',');
            }
            (',', _) => words.push(String::new()),
            (other, Some(last)) => last.push(other),
            (_, None) => {}
        }
    }
    let pair = |(index, word): (usize, String)| match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None if index == 0 => (implied.to_owned(), word),
        None => (word, "on".to_owned()),
    };
    words.into_iter().enumerate().filter(|(_, w)| !w.is_empty()).map(pair).collect()
}

fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// QEMU's sizes: a decimal number, perhaps with a fraction, and a unit (`b` to `e`, either case);
/// without one, `unit` bytes.
fn parse_size(text: &str, unit: u64) -> Result<u64> {
    let odd = || Error::refused(format!("`{text}` is not a size: write it like 512M or 2G"));
    let (number, unit) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let shift = "bkmgtpe".find(suffix.to_ascii_lowercase()).ok_or_else(odd)? * 10;
            (&text[..at], 1 << shift)
        }
        _ => (text, unit),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 18 {
        return Err(odd());
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let (whole, fraction): (u64, u64) =
        (whole.parse().map_err(|_| odd())?, fraction.parse().map_err(|_| odd())?);
    let part = u128::from(fraction) * u128::from(unit) / scale;
    whole.checked_mul(unit).and_then(|b| b.checked_add(u64::try_from(part).ok()?)).ok_or_else(odd)
}

fn make_memory(file: &MemoryFile) -> Result<OwnedFd> {
    let mut flags = MemfdFlags::empty();
    let mut page = PAGE_BYTES;
    if let Some(bytes) = file.huge_page_bytes {
        flags |= MemfdFlags::HUGETLB;
        if bytes != 0 {
            if !bytes.is_power_of_two() {
                return Err(Error::refused(format!("memory {}: no huge page has {bytes} bytes", file.name)));
            }
            // MFD_HUGE_SHIFT: the size travels as its logarithm.
            flags |= MemfdFlags::from_bits_retain(bytes.trailing_zeros() << 26);
            page = bytes;
        }
    }
    let bytes =
        file.bytes.checked_next_multiple_of(page).filter(|b| *b > 0).ok_or_else(|| {
            Error::refused(format!("memory {}: {} bytes is no size", file.name, file.bytes))
        })?;
    sealed_memfd(&format!("pageferry-{}", file.name), flags, bytes).map_err(|e| match file.huge_page_bytes {
        Some(huge) => Error::os(
            format!(
                "making memory {} of {bytes} bytes in huge pages ({huge} bytes each): does this kernel have that size?",
                file.name
            ),
            e,
        ),
        None => Error::os(format!("making memory {} of {bytes} bytes", file.name), e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::blocks;
    use crate::guest::qemu::testing::TestQemu;
    use pageferry_transport::Access;

    /// Rewrites a command line that is split at spaces; memory files get the numbers 100, 101...
    fn source(line: &str) -> Result<(String, Vec<MemoryFile>)> {
        rewritten(line, Role::Source)
    }

    fn rewritten(line: &str, role: Role) -> Result<(String, Vec<MemoryFile>)> {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let mut files = Vec::new();
        let out = rewrite(&words, role, &mut |file| {
            files.push(file.clone());
            Ok(99 + files.len() as i32)
        })?;
        let out: Vec<_> = out.iter().map(|w| w.to_str().unwrap()).collect();
        Ok((out.join(" "), files))
    }

    fn refusal(line: &str, role: Role) -> String {
        rewritten(line, role).unwrap_err().to_string()
    }

    #[test]
    fn memory_of_every_way_of_writing_it_gets_a_file() {
        const M: u64 = 1 << 20;
        for (options, bytes) in [
            ("", 128 * M),
            (" -m 0", 128 * M),
            (" -m 512", 512 * M),
            (" --m 2G", 2048 * M),
            (" -m 2g", 2048 * M),
            (" -m 1.5G", 1536 * M),
            (" -m 100.3M", 105_177_088),
            (" -m 63k", 65536),
            (" -m 5000001b", 5_005_312),
            (" -m size=2G,slots=2,maxmem=4G", 2048 * M),
            (" -m slots=2,maxmem=4G", 128 * M),
            (" -m 256 -m 512", 512 * M),
            (" -m 512 -m slots=2,maxmem=4G", 512 * M),
            (" -machine q35,memory.size=100663296", 96 * M),
        ] {
            let line = format!("qemu{options}");
            let (out, files) = source(&line).unwrap();
            assert_eq!(
                out,
                format!(
                    "{line} -object memory-backend-file,id=pageferry.ram,size={bytes},mem-path=/proc/self/fd/100,share=on -machine memory-backend=pageferry.ram"
                )
            );
            assert_eq!(files, [MemoryFile { name: "pageferry.ram".into(), bytes, huge_page_bytes: None }]);
        }
    }

    #[test]
    fn a_size_that_is_none_is_refused() {
        for odd in
            ["x", "", "-5", "5Q", "0x20", "1e3", "1.", ".5", "99999999999999999999", "16000000000T", "5G5"]
        {
            assert!(parse_size(odd, 1).is_err(), "{odd}");
        }
        assert!(source("qemu -m bad").is_err());
    }

    #[test]
    fn the_users_own_backends_become_files_with_their_other_properties() {
        let (out, files) = source(
            "qemu -m 2G -object memory-backend-memfd,id=a,size=1G,share=off,hugetlb=on,hugetlbsize=2M,prealloc=on,\
             host-nodes=0,host-nodes=2-3,policy=bind -object memory-backend-ram,id=b,,c,size=1G -numa node,memdev=a -numa node,memdev=b",
        )
        .unwrap();
        assert_eq!(
            out,
            "qemu -m 2G -object memory-backend-file,id=a,size=1G,share=on,prealloc=on,\
             host-nodes=0,host-nodes=2-3,policy=bind,mem-path=/proc/self/fd/100 -object memory-backend-file,id=b,,c,size=1G,\
             mem-path=/proc/self/fd/101,share=on -numa node,memdev=a -numa node,memdev=b"
        );
        assert_eq!(
            files,
            [
                MemoryFile { name: "a".into(), bytes: 1 << 30, huge_page_bytes: Some(2 << 20) },
                MemoryFile { name: "b,c".into(), bytes: 1 << 30, huge_page_bytes: None },
            ]
        );
    }

    #[test]
    fn json_objects_are_understood() {
        let (out, files) = source(
            r#"qemu -machine memory-backend=m -object {"qom-type":"memory-backend-memfd","id":"m","size":1048576,"hugetlb":true,"host-nodes":[0,1]}"#,
        )
        .unwrap();
        let object: Value = serde_json::from_str(out.split(' ').next_back().unwrap()).unwrap();
        assert_eq!(
            object,
            serde_json::json!({"qom-type": "memory-backend-file", "id": "m", "size": 1_048_576, "host-nodes": [0, 1],
                "mem-path": "/proc/self/fd/100", "share": true})
        );
        assert_eq!(files, [MemoryFile { name: "m".into(), bytes: 1 << 20, huge_page_bytes: Some(0) }]);
        assert!(source(r#"qemu -object {"qom-type"#).is_err());
        assert!(
            refusal(
                r#"qemu -object {"qom-type":"memory-backend-file","id":"m","share":false}"#,
                Role::Source
            )
            .contains("share=on")
        );
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for line in [
            // A value that looks like an option, and a disk image at the end.
            "qemu -m 64M -name -m -append -incoming -drive file=-snapshot -S --nographic disk.img",
            "qemu -m 64M -object rng-random,id=r,filename=/dev/urandom -only-migratable -mem-prealloc -enable-kvm",
            "qemu -m 64M -object iothread,id=t -accel tcg,thread=multi -cpu max,+x -sandbox on",
        ] {
            let (out, files) = source(line).unwrap();
            assert!(
                out.starts_with(&format!("{line} -object memory-backend-file,id=pageferry.ram")),
                "{out}"
            );
            assert_eq!(files.len(), 1);
        }
        let own = "qemu -m 64M -object memory-backend-file,id=x,size=64M,mem-path=/dev/shm/x,share=on -M q35,memory-backend=x";
        assert_eq!(source(own).unwrap(), (own.to_owned(), vec![]));
    }

    #[test]
    fn memory_in_a_file_of_readconfig_is_read_as_that_of_the_command_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let rewritten = |text: &str| {
            std::fs::write(&path, text).unwrap();
            source(&format!("qemu -readconfig {}", path.display()))
        };
        let (_, files) = rewritten("[memory]\n  size = \"256\"\n").unwrap();
        assert_eq!(files.iter().map(|f| f.bytes).collect::<Vec<_>>(), [256 << 20]);
        let shared = "[object \"m\"]\n qom-type = \"memory-backend-file\"\n share = \"on\"\n mem-path = \"/dev/shm/m\"\n";
        let (out, files) = rewritten(&format!("{shared}[machine]\n memory-backend = \"m\"\n")).unwrap();
        assert!(files.is_empty() && !out.contains("pageferry.ram"), "{out}");
        let words = ["qemu", "-readconfig", path.to_str().unwrap()].map(OsString::from);
        assert_eq!(memory_paths(&words).unwrap(), [Path::new("/dev/shm/m")]);
        for kind in ["ram", "memfd", "file"] {
            let text = format!("[object \"m\"]\n qom-type = \"memory-backend-{kind}\"\n size = \"64M\"\n");
            let refusal = rewritten(&text).unwrap_err().to_string();
            assert!(refusal.contains("[object \"m\"]") && refusal.contains("share = "), "{refusal}");
        }
        let iothread = "[object \"t\"]\n qom-type = \"iothread\"\n";
        assert_eq!(rewritten(iothread).unwrap().1.len(), 1);
    }

    #[test]
    fn a_file_that_nobody_writes_is_shared_and_one_that_is_written_in_private_is_refused() {
        let image = "memory-backend-file,id=i,size=1G,mem-path=/img,readonly=on";
        let (out, files) = source(&format!("qemu -m 64M -object {image}")).unwrap();
        assert!(
            out.contains(&format!("-object {image},share=on -object memory-backend-file,id=pageferry.ram")),
            "{out}"
        );
        assert_eq!(files.len(), 1);
        let (out, _) = source(&format!("qemu -m 64M -object {image},share=off,rom=auto")).unwrap();
        assert!(out.contains(&format!("{image},share=on,rom=auto")), "{out}");
        assert!(refusal(&format!("qemu -object {image},rom=off"), Role::Source).contains("add share=on"));
        let json = r#"qemu -object {"qom-type":"memory-backend-file","id":"i","readonly":true,"size":1048576,"mem-path":"/img"}"#;
        assert!(source(json).unwrap().0.contains(r#""share":true"#));
    }

    #[test]
    fn the_files_of_memory_that_will_be_written_are_named() {
        let file = "memory-backend-file,size=64M,mem-path";
        let line = format!(
            "qemu -name -object -object {file}=/a,,b,id=m,share=on -object {file}=/image,id=i,share=on,readonly=on \
             -object {file}=/private,id=p -object memory-backend-ram,id=r,size=1M -object \
             {{\"qom-type\":\"memory-backend-file\",\"id\":\"j\",\"mem-path\":\"/json\",\"share\":true}} -nodefaults"
        );
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        assert_eq!(memory_paths(&words).unwrap(), [Path::new("/a,b"), Path::new("/json")]);
    }

    #[test]
    fn a_destination_waits_to_be_filled() {
        let (out, _) = rewritten("qemu -m 64M", Role::Destination).unwrap();
        assert!(out.ends_with(" -S -incoming defer"), "{out}");
        let (out, _) = rewritten("qemu -S", Role::Destination).unwrap();
        assert_eq!(out.matches("-S").count(), 1, "{out}");
    }

    #[test]
    fn what_cannot_be_moved_is_refused_with_the_mend() {
        for (options, word) in [
            ("-incoming tcp:0:1", "pageferry receive"),
            ("--incoming defer", "pageferry receive"),
            ("-daemonize", "background"),
            ("-snapshot", "both hosts"),
            ("-preconfig", "leave it out"),
            ("-mem-path /dev/hugepages", "share=on"),
            ("-object memory-backend-file,id=x,size=1G,mem-path=/data/x", "add share=on"),
            ("-object memory-backend-file,id=x,size=1G,mem-path=/data/x,share=off", "add share=on"),
            ("-object memory-backend-ram,id=x", "no size"),
            ("-m", "lacks its value"),
        ] {
            let text = refusal(&format!("qemu {options}"), Role::Source);
            assert!(text.contains(word), "{options}: {text}");
        }
        assert!(refusal("qemu -loadvm x", Role::Destination).contains("-loadvm"));
        assert!(source("qemu -loadvm x").is_ok());
        assert!(rewrite(&[], Role::Source, &mut |_| Ok(0)).is_err());
    }

    #[test]
    fn a_real_qemu_takes_the_rewritten_command_and_its_memory_can_be_mapped() {
        for (options, blocks_wanted) in [
            ("-m 256", vec![("pageferry.ram", 256 << 20)]),
            (
                "-m size=100.3M,slots=2,maxmem=1G -machine pc -mem-prealloc",
                vec![("pageferry.ram", 105_177_088)],
            ),
            ("-machine q35 -smp 2", vec![("pageferry.ram", 128 << 20)]),
            (
                "-m 96M -machine q35 -object memory-backend-ram,id=n0,size=32M -object \
                 {\"qom-type\":\"memory-backend-memfd\",\"id\":\"n1\",\"size\":67108864} -numa node,memdev=n0 -numa node,memdev=n1",
                vec![("n0", 32 << 20), ("n1", 64 << 20)],
            ),
        ] {
            for role in [Role::Source, Role::Destination] {
                let directory = tempfile::tempdir().unwrap();
                let socket = directory.path().join("qmp");
                let line = format!("qemu-system-x86_64 -nodefaults -display none -accel tcg {options}");
                let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
                let prepared = GuestCommand::prepare(&words, role, &socket).unwrap();
                let mut qemu = TestQemu::of(&mut prepared.command(), &socket, directory);
                drop(prepared);
                let pid = qemu.pid();
                let found = blocks::find(&mut qemu.qmp, pid, Access::Write, TestQemu::soon()).unwrap();
                let blocks: Vec<_> = found.shared.iter().map(|b| (b.name.as_str(), b.bytes)).collect();
                assert_eq!(blocks, blocks_wanted, "{options}");
                crate::memory::GuestMemory::map(found.shared, Access::Write).unwrap();
                let status = qemu.qmp.execute("query-status", Value::Null, TestQemu::soon()).unwrap();
                let expected = if role == Role::Source { "running" } else { "inmigrate" };
                assert_eq!(status["status"], expected);
            }
        }
    }
}
