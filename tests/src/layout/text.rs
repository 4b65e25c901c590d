//! Rust's text, as far as a look at imports needs it.

/// What [`bare`] keeps of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Code alone.
    Code,
    /// Code and the content of strings.
    CodeAndStrings,
}

/// The text with comments, and the content of strings unless they are kept, made blank. Lines stay
/// where they are, and as long as they are.
#[must_use]
pub fn bare(text: &str, kept: Kept) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let blank = |c: char| if c == '\n' { '\n' } else { ' ' };
    while at < characters.len() {
        let rest = &characters[at..];
        let (length, keep) = match rest {
            ['/', '/', ..] => (rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()), false),
            ['/', '*', ..] => (block_comment(rest), false),
            ['"', ..] => (string(rest, 0), kept == Kept::CodeAndStrings),
            ['r', '"' | '#', ..] if !is_in_word(&characters, at) && raw_marks(rest).is_some() => {
                (raw_string(rest), kept == Kept::CodeAndStrings)
            }
            ['\'', '\\', ..] => (string_end(rest, 1, '\''), false),
            ['\'', _, '\'', ..] => (3, false),
            _ => (1, true),
        };
        out.extend(rest[..length].iter().map(|c| if keep { *c } else { blank(*c) }));
        at += length;
    }
    out
}

/// `br"..."` begins a raw string as `r"..."` does, and `for"` cannot be written.
fn is_in_word(characters: &[char], at: usize) -> bool {
    let before = at.checked_sub(1).map(|i| characters[i]);
    before.is_some_and(|c| (c.is_alphanumeric() && c != 'b') || c == '_')
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

fn string(rest: &[char], from: usize) -> usize {
    string_end(rest, from + 1, '"')
}

/// Behind the mark that ends what is escaped by backslashes.
fn string_end(rest: &[char], mut at: usize, end: char) -> usize {
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            c if c == end => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// How many `#` a raw string here has; none if there is no raw string.
fn raw_marks(rest: &[char]) -> Option<usize> {
    let marks = rest[1..].iter().take_while(|c| **c == '#').count();
    (rest.get(1 + marks) == Some(&'"')).then_some(marks)
}

fn raw_string(rest: &[char]) -> usize {
    let marks = raw_marks(rest).unwrap_or(0);
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', marks)).collect();
    let begin = marks + 2;
    let found = rest[begin.min(rest.len())..].windows(end.len()).position(|w| w == end);
    found.map_or(rest.len(), |at| begin + at + end.len())
}

/// The text without the items that are for tests alone.
#[must_use]
pub fn without_tests(text: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(MARK) {
        out += &rest[..at];
        rest = &rest[at + MARK.len()..];
        let mut depth = 0;
        let end = rest.char_indices().find(|(_, c)| {
            depth += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            depth == 0 && matches!(c, ';' | '}')
        });
        rest = end.map_or("", |(at, _)| &rest[at + 1..]);
    }
    out + rest
}

/// Modules in files of their own. What a module between braces declares is not among them: its
/// files are its own affair (generated bindings).
#[must_use]
pub fn declared(text: &str) -> Vec<String> {
    let (mut found, mut depth, mut begun) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices().filter(|(_, c)| matches!(c, ';' | '{' | '}')) {
        let mut words = text[begun..at].split_whitespace().rev();
        if let (0, ';', Some(name), Some("mod")) = (depth, c, words.next(), words.next()) {
            found.push(name.to_owned());
        }
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        begun = at + 1;
    }
    found
}

/// What `use` items bring in, each with the name that it has here, and the text without them.
#[must_use]
pub fn imports(text: &str) -> (Vec<(String, Vec<String>)>, String) {
    let (mut found, mut rest) = (Vec::new(), String::new());
    let mut lines = text.split_inclusive('\n');
    while let Some(line) = lines.next() {
        let Some(begun) = use_item(line) else {
            rest += line;
            continue;
        };
        let mut item = begun.to_owned();
        while !item.contains(';') {
            let Some(line) = lines.next() else { break };
            item += line;
        }
        tree(&[], item.split(';').next().unwrap_or_default(), &mut found);
    }
    (found, rest)
}

/// What follows `use` on a line that begins with it, whoever may see what it brings in.
fn use_item(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = match line.strip_prefix("pub") {
        Some(public) if public.starts_with('(') => public.split_once(')')?.1,
        Some(public) => public,
        None => line,
    };
    line.trim_start().strip_prefix("use ")
}

/// `a::{b, c::d as e}` as its paths.
fn tree(before: &[String], text: &str, found: &mut Vec<(String, Vec<String>)>) {
    let text = text.trim();
    let words = |text: &str| -> Vec<String> {
        text.split("::").map(str::trim).filter(|w| !w.is_empty()).map(Into::into).collect()
    };
    let Some((head, body)) = text.split_once('{') else {
        let (path, here) = match text.split_once(" as ") {
            Some((path, here)) => (path, Some(here.trim().to_owned())),
            None => (text, None),
        };
        let mut path = [before, &words(path)].concat();
        if matches!(path.last().map(String::as_str), Some("self" | "*")) && path.len() > 1 {
            path.pop();
        }
        if let Some(last) = path.last().cloned() {
            found.push((here.unwrap_or(last), path));
        }
        return;
    };
    let before = [before, &words(head)].concat();
    let body = body.trim_end().strip_suffix('}').unwrap_or(body);
    let (mut depth, mut begun) = (0, 0);
    for (at, c) in body.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                tree(&before, &body[begun..at], found);
                begun = at + 1;
            }
            _ => {}
        }
    }
    if !body[begun..].trim().is_empty() {
        tree(&before, &body[begun..], found);
    }
}

/// The paths of two words and more: `crate::a::B`, `child::item`.
#[must_use]
pub fn paths(text: &str) -> Vec<Vec<String>> {
    let is_of_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    for text in text.split(|c: char| !is_of_path(c)) {
        let words: Vec<String> =
            text.split("::").map(str::to_owned).take_while(|w| !w.contains(':')).collect();
        if words.len() > 1 && words.iter().all(|word| !word.is_empty()) {
            found.push(words);
        } else if let Some(end) = words.iter().position(String::is_empty).filter(|end| *end > 0) {
            // `crate::a::{...}` in the middle of code, or a turbofish.
            found.push(words[..end].to_vec());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_blank_and_lines_stay() {
        let text = "a // crate::b\n/* crate::c /* d */ e */ f\n\"crate::g\\\" h\" i r#\"crate::\"j\"# k '\"' l";
        let code = bare(text, Kept::Code);
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "f", "i", "k", "l"]);
        assert_eq!(code.chars().count(), text.chars().count());
        let strings = bare(text, Kept::CodeAndStrings);
        assert!(strings.contains("crate::g\\\" h") && !strings.contains("crate::b"), "{strings}");
    }

    #[test]
    fn a_tree_is_all_its_paths_under_their_names_here() {
        let (found, rest) =
            imports("pub(crate) use a::{b, c::{self, d as e},\n f::*};\nlet x = 1;\n");
        let found: Vec<_> = found.iter().map(|(n, p)| format!("{n}={}", p.join("::"))).collect();
        assert_eq!(found, ["b=a::b", "c=a::c", "e=a::c::d", "f=a::f"]);
        assert_eq!(rest, "let x = 1;\n");
    }

    #[test]
    fn what_is_for_tests_is_left_out() {
        let text = "mod a;\n#[cfg(test)]\nmod tests { fn f() { g() } }\n#[cfg(test)]\nmod b;\nmod d { mod e; }\nmod c;";
        assert_eq!(declared(&without_tests(text)), ["a", "c"]);
    }

    #[test]
    fn paths_in_code_are_found() {
        let found = paths("let a = crate::b::C::new(); d::e(f: g, Vec::<h>::i)");
        let found: Vec<_> = found.iter().map(|path| path.join("::")).collect();
        assert_eq!(found, ["crate::b::C::new", "d::e", "Vec"]);
    }
}
