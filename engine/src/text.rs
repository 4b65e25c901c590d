//! Words that others say: a peer, a guest, QEMU. They end in reports, in the log and on the
//! operator's terminal, so they are cut, and what a terminal would obey or a log would take for a
//! line of its own is escaped.

/// A name, a version, a device: longer ones are not for people.
pub const NAME_CHARS_MAX: usize = 128;
/// A reason: some sentences, with the names of things in them.
pub const REASON_CHARS_MAX: usize = 2048;

/// A reason, an error's description, a line of a guest.
#[must_use]
pub fn reason(theirs: &str) -> String {
    foreign(theirs, REASON_CHARS_MAX)
}

/// The name of something.
#[must_use]
pub fn name(theirs: &str) -> String {
    foreign(theirs, NAME_CHARS_MAX)
}

/// Their words, escaped and cut to this many characters.
#[must_use]
pub fn foreign(theirs: &str, chars_max: usize) -> String {
    match theirs.char_indices().nth(chars_max) {
        None => escape(theirs),
        Some((cut, _)) => format!("{}...", escape(&theirs[..cut])),
    }
}

/// One line of visible characters: line ends, tabs, control characters (also those of eight bits),
/// marks that turn the direction of writing, invisible and unassigned characters become escapes
/// such as `\n` and `\u{1b}`. A text that was escaped stays as it is.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\'' | '"' | '\\' => line.push(c),
            _ => line.extend(c.escape_debug()),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_terminal_obeys_is_shown_and_not_done() {
        for (theirs, shown) in [
            ("\x1b]0;title\x07\x1b[2J", r"\u{1b}]0;title\u{7}\u{1b}[2J"),
            ("\u{9b}2J\u{7f}", r"\u{9b}2J\u{7f}"),
            ("no\npageferry: vm runs here", r"no\npageferry: vm runs here"),
            ("a\rb\tc", r"a\rb\tc"),
            ("abc\u{202e}fed", r"abc\u{202e}fed"),
            ("\u{2028}\u{feff}", r"\u{2028}\u{feff}"),
            (r#"it's "C:\x", Größe 漢字"#, r#"it's "C:\x", Größe 漢字"#),
        ] {
            assert_eq!(escape(theirs), shown);
        }
    }

    #[test]
    fn a_long_word_is_cut_and_shows_it() {
        assert_eq!(name(&"ä".repeat(NAME_CHARS_MAX)), "ä".repeat(NAME_CHARS_MAX));
        assert_eq!(name(&"ä".repeat(8 << 20)), format!("{}...", "ä".repeat(NAME_CHARS_MAX)));
    }

    proptest! {
        #[test]
        fn nothing_that_is_not_visible_comes_through(theirs in any::<String>()) {
            let shown = reason(&theirs);
            prop_assert!(!shown.chars().any(char::is_control), "{shown:?}");
            prop_assert_eq!(escape(&shown), shown.clone());
            // Ten characters for one at most: `\u{10ffff}`.
            prop_assert!(shown.chars().count() <= 10 * REASON_CHARS_MAX + 3);
        }
    }
}
