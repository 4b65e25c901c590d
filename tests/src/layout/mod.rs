//! What the sources import: enough of Rust's grammar to say which file names which other file of
//! its crate.

mod text;

pub use text::{Kept, bare, without_tests};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

/// Follows no more re-exports than this to the file that has an item.
const REEXPORTS_MAX: u32 = 8;

/// A module's place in its crate: `["source", "pump"]`.
type Name = Vec<String>;

/// One crate's files, and which names which.
#[derive(Debug, Default)]
pub struct Crate {
    modules: BTreeMap<Name, Module>,
}

/// One file.
#[derive(Debug, Default)]
struct Module {
    /// What its `use` items bring in, by the name that it has here.
    imports: BTreeMap<String, Name>,
    /// All paths that it names, those of `use` items too.
    paths: BTreeSet<Name>,
}

impl Crate {
    /// Reads the files that `root` (a `lib.rs` or `main.rs`) declares, without what is for tests.
    ///
    /// # Panics
    /// If one is missing.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let mut found = Self::default();
        let directory = root.parent().expect("a file is in a directory");
        found.add(Name::new(), root, directory);
        found
    }

    fn add(&mut self, name: Name, file: &Path, children: &Path) {
        let text = std::fs::read_to_string(file)
            .unwrap_or_else(|e| panic!("reading {}: {e}", file.display()));
        let text = text::without_tests(&text::bare(&text, Kept::Code));
        self.modules.insert(name.clone(), Module::read(&text));
        for child in text::declared(&text) {
            let folder = children.join(&child);
            let flat = children.join(format!("{child}.rs"));
            let file = if flat.is_file() { flat } else { folder.join("mod.rs") };
            self.add([name.clone(), vec![child]].concat(), &file, &folder);
        }
    }

    /// How many files it has.
    #[must_use]
    pub fn files(&self) -> usize {
        self.modules.len()
    }

    /// Which file names which. A file may name its parents: that they are above it says its place.
    #[must_use]
    pub fn edges(&self) -> BTreeSet<(String, String)> {
        let mut edges = BTreeSet::new();
        for (from, module) in &self.modules {
            for path in &module.paths {
                let Some(to) = self.home(from, path, REEXPORTS_MAX) else { continue };
                if !from.starts_with(&to) {
                    edges.insert((from.join("::"), to.join("::")));
                }
            }
        }
        edges
    }

    /// The file that has what `path` names in the file `from`; none if that is another crate's.
    fn home(&self, from: &Name, path: &[String], reexports: u32) -> Option<Name> {
        let mut at = match path.first()?.as_str() {
            "crate" => Name::new(),
            "self" => from.clone(),
            "super" => from.split_last()?.1.to_vec(),
            first => {
                let child = [from.as_slice(), &[first.to_owned()]].concat();
                self.modules.contains_key(&child).then_some(child)?
            }
        };
        for (index, word) in path.iter().enumerate().skip(1) {
            let child = [at.as_slice(), std::slice::from_ref(word)].concat();
            if word == "super" {
                at.pop();
            } else if self.modules.contains_key(&child) {
                at = child;
            } else {
                let import = self.modules[&at].imports.get(word);
                return match import.filter(|_| reexports > 0) {
                    Some(import) => {
                        let further = [import.as_slice(), &path[index + 1..]].concat();
                        self.home(&at, &further, reexports - 1).or(Some(at))
                    }
                    None => Some(at),
                };
            }
        }
        Some(at)
    }

    /// A shortest circle through each file that is in one, as `a -> b -> a`.
    #[must_use]
    pub fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut after: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (from, to) in &edges {
            after.entry(from).or_default().push(to);
        }
        let (mut circles, mut seen) = (Vec::new(), BTreeSet::new());
        for start in after.keys().copied() {
            let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
            let mut queue = VecDeque::from([start]);
            while let Some(file) = queue.pop_front() {
                for next in after.get(file).into_iter().flatten().copied() {
                    came_from.entry(next).or_insert_with(|| {
                        queue.push_back(next);
                        file
                    });
                }
            }
            if !came_from.contains_key(start) {
                continue;
            }
            let mut circle = vec![start, came_from[start]];
            while circle.last() != Some(&start) {
                circle.push(came_from[circle[circle.len() - 1]]);
            }
            circle.reverse();
            if seen.insert(circle.iter().copied().collect::<BTreeSet<_>>()) {
                circles.push(circle.join(" -> "));
            }
        }
        circles
    }
}

impl Module {
    fn read(text: &str) -> Self {
        let mut module = Self::default();
        let (imports, rest) = text::imports(text);
        for (here, path) in imports {
            module.imports.insert(here, path.clone());
            module.paths.insert(path);
        }
        module.paths.extend(text::paths(&rest));
        module
    }
}
