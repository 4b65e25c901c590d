//! Options of a QEMU command line, in pieces.

use crate::command::role::Role;
use pageferry_engine::error::{Error, Result};
use std::ffi::OsStr;

/// QEMU's memory without `-m`, on PC machines.
pub(crate) const DEFAULT_MEMORY_BYTES: u64 = 128 << 20;

/// QEMU rounds the size given with `-m` up to this.
const MEMORY_ALIGN_BYTES: u64 = 8192;

/// The name of an option without its dashes, or none for a word that is not an option (a disk
/// image).
pub(crate) fn option_name(word: &OsStr) -> Option<&str> {
    let name = word.to_str()?.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    (!name.is_empty()).then_some(name)
}

/// Splits `a,key=value,key=va,,lue`: a first word without `=` is the value of `implied`, and
/// doubled commas are one comma.
pub(crate) fn pairs(value: &str, implied: &str) -> Vec<(String, String)> {
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

pub(crate) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// QEMU's sizes: a decimal number, perhaps with a fraction, and a unit (`b` to `e`, either case);
/// without one, `unit` bytes.
pub(crate) fn parse_size(text: &str, unit: u64) -> Result<u64> {
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

/// The size in `-m 2G`, `-m size=2G,slots=2,maxmem=4G`, or none in `-m slots=2,maxmem=4G`.
pub(crate) fn memory_option_bytes(value: &str) -> Result<Option<u64>> {
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

pub(crate) fn text<'a>(option: &OsStr, value: &'a OsStr) -> Result<&'a str> {
    value.to_str().ok_or_else(|| {
        Error::refused(format!(
            "the value of the QEMU option {} is not UTF-8: {}",
            option.display(),
            value.display()
        ))
    })
}

/// Why an option cannot be used under pageferry, if it cannot.
pub(crate) fn refused(name: &str, role: Role) -> Option<String> {
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
