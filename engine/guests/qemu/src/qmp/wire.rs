//! What QEMU says over QMP, as it is read.

use pageferry_engine::text;
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;

/// What tells a line's kind.
#[derive(Deserialize)]
pub(crate) struct Head<'l> {
    #[serde(borrow, default)]
    pub(crate) event: Option<Cow<'l, str>>,
    #[serde(default)]
    pub(crate) id: Option<u64>,
}

/// An event's data.
#[derive(Deserialize)]
pub(crate) struct Data {
    #[serde(default)]
    pub(super) data: Value,
    #[serde(default)]
    pub(super) timestamp: Option<Stamp>,
}

#[derive(Deserialize)]
pub(super) struct Stamp {
    pub(crate) seconds: u64,
    pub(crate) microseconds: u64,
}

/// The answer to a command.
#[derive(Deserialize)]
pub(crate) struct Answer {
    #[serde(rename = "return", default)]
    pub(crate) value: Option<Value>,
    #[serde(default)]
    pub(crate) error: Option<Reason>,
}

/// Why QEMU refuses a command.
#[derive(Deserialize)]
pub(super) struct Reason {
    #[serde(default)]
    pub(crate) desc: String,
}

/// Only why a command was refused: what else stands in the line is not parsed.
#[derive(Deserialize)]
pub(super) struct Refusal {
    pub(super) error: Reason,
}

/// Something that QEMU has said.
pub(crate) enum Said {
    /// An event, which is kept.
    Event,
    /// An answer, or anything else, as it came.
    Answer { id: Option<u64>, line: Vec<u8> },
}

pub(crate) fn reason_in(line: &[u8]) -> Option<String> {
    serde_json::from_slice(line).ok().map(|refusal: Refusal| refusal.error.desc)
}

/// The beginning of a text, for messages.
pub(crate) fn excerpt(text: &str) -> String {
    const CHARS: usize = 200;
    text::foreign(text, CHARS)
}
