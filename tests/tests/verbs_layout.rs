//! The verbs bindings against the C headers that are installed: every size, offset and constant.
//!
//! ```text
//!   types.rs   says: size, offsets, constants   -- proved by the compiler (its own assertions)
//!   a C program asks sizeof, offsetof, values   -- compared with what types.rs says
//! ```
//!
//! So nothing is listed here by hand, and what scripts/rdma-bindings adds is compared as well.

use pageferry_tests::not_run;
use rdma_sys::{ibv_send_wr, ibv_wc, rdma_addr, verbs_context};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::mem::{offset_of, size_of};
use std::process::Command;

const TYPES: &str = include_str!("../../transport/rdma-sys/src/generated/types.rs");
const HEADERS: [&str; 2] = ["infiniband/verbs.h", "rdma/rdma_cma.h"];

/// What types.rs says, by the C expression that says it too.
fn stated() -> BTreeMap<String, i64> {
    let types = Types::parse(TYPES);
    let mut stated = types.constants.clone();
    for (name, size) in &types.sizes {
        // Types that C leaves unnamed are reached through the struct that they are in; one is never
        // defined.
        if name.contains("__bindgen_ty") || name == "_compat_ibv_port_attr" {
            continue;
        }
        let kind = types.kinds[name];
        stated.insert(format!("sizeof({kind} {name})"), *size);
        for (path, offset) in types.fields_of(name) {
            stated.insert(format!("offsetof({kind} {name}, {path})"), offset);
        }
    }
    stated
}

/// Sizes, offsets and constants as the generated text has them.
#[derive(Default)]
struct Types {
    kinds: BTreeMap<String, &'static str>,
    sizes: BTreeMap<String, i64>,
    constants: BTreeMap<String, i64>,
    /// Struct, then field with its type and offset.
    fields: BTreeMap<String, Vec<(String, String, i64)>>,
}

impl Types {
    fn parse(text: &str) -> Self {
        let mut types = Self::default();
        let mut offsets = BTreeMap::new();
        let mut declared: Vec<(String, String, String)> = Vec::new();
        let mut inside: Option<String> = None;
        // rustfmt breaks long lines: what belongs together is joined first.
        let joined = text.replace("]\n        [", "][");
        for line in joined.lines().map(str::trim) {
            let struct_or_union =
                [("pub struct ", "struct"), ("pub union ", "union")].iter().find_map(
                    |(start, kind)| Some((line.strip_prefix(start)?.strip_suffix(" {")?, *kind)),
                );
            if let Some((name, kind)) = struct_or_union {
                types.kinds.insert(name.to_owned(), kind);
                inside = Some(name.to_owned());
            } else if line == "}" {
                inside = None;
            } else if let Some(constant) = line.strip_prefix("pub const ") {
                let (name, rest) = constant.split_once(": ").expect("a type");
                let (_, value) = rest.split_once(" = ").expect("a value");
                let value = value.trim_end_matches(';').parse().expect("a number");
                types.constants.insert(name.to_owned(), value);
            } else if let Some(size) = line.strip_prefix("[\"Size of ") {
                let (name, _) = size.split_once('"').expect("a name");
                types.sizes.insert(name.to_owned(), assertion(line));
            } else if let Some(offset) = line.strip_prefix("[\"Offset of field: ") {
                let (field, _) = offset.split_once('"').expect("a field");
                offsets.insert(field.to_owned(), assertion(line));
            } else if let (Some(owner), Some(field)) = (&inside, line.strip_prefix("pub ")) {
                // The type of a function pointer goes on over several lines; of those nothing is
                // needed.
                let (name, kind) = field.split_once(':').expect("a type");
                declared.push((
                    owner.clone(),
                    name.to_owned(),
                    kind.trim().trim_end_matches(',').to_owned(),
                ));
            }
        }
        for (owner, name, kind) in declared {
            // Types that are only pointed to have no fields here.
            if name == "_bindgen_opaque_blob" || name == "_unused" {
                continue;
            }
            let field = format!("{owner}::{name}");
            let offset = offsets.remove(&field).unwrap_or_else(|| offset_of_unnamed(&field));
            types.fields.entry(owner).or_default().push((name, kind, offset));
        }
        types
    }

    /// Path (as C writes it) and offset of every field, those of unnamed types within included.
    fn fields_of(&self, name: &str) -> Vec<(String, i64)> {
        let mut found = Vec::new();
        for (field, kind, offset) in self.fields.get(name).into_iter().flatten() {
            let unnamed = field.starts_with("__bindgen_anon");
            // A Rust keyword, with what bindgen makes of it.
            let field = if field == "type_" { "type" } else { field };
            if !unnamed {
                found.push((field.to_owned(), *offset));
            }
            if kind.contains("__bindgen_ty") {
                for (inner, further) in self.fields_of(kind) {
                    let path = if unnamed { inner } else { format!("{field}.{inner}") };
                    found.push((path, offset + further));
                }
            }
        }
        found
    }
}

/// The number in `[...][... - 16usize];`.
fn assertion(line: &str) -> i64 {
    let (_, number) = line.rsplit_once(" - ").expect("an assertion");
    number.trim_end_matches("usize];").parse().expect("a number")
}

/// bindgen asserts nothing of members that have no name in C.
fn offset_of_unnamed(field: &str) -> i64 {
    let offset = match field {
        "ibv_wc::__bindgen_anon_1" => offset_of!(ibv_wc, __bindgen_anon_1),
        "ibv_send_wr::__bindgen_anon_1" => offset_of!(ibv_send_wr, __bindgen_anon_1),
        "ibv_send_wr::__bindgen_anon_2" => offset_of!(ibv_send_wr, __bindgen_anon_2),
        "rdma_addr::__bindgen_anon_1" => offset_of!(rdma_addr, __bindgen_anon_1),
        "rdma_addr::__bindgen_anon_2" => offset_of!(rdma_addr, __bindgen_anon_2),
        _ => panic!("{field} has no assertion in types.rs: add it here"),
    };
    i64::try_from(offset).expect("small")
}

/// The struct that is written by hand, in what counts of it: distances from the context at its end.
fn stated_by_hand() -> BTreeMap<String, i64> {
    let context = offset_of!(verbs_context, context);
    let mut stated = BTreeMap::new();
    let mut distance = |field: &str, offset: usize| {
        let c = format!(
            "(offsetof(struct verbs_context, context) - offsetof(struct verbs_context, {field}))"
        );
        stated.insert(c, i64::try_from(context - offset).expect("small"));
    };
    distance("query_port", offset_of!(verbs_context, query_port));
    distance("query_device_ex", offset_of!(verbs_context, query_device_ex));
    distance("sz", offset_of!(verbs_context, sz));
    let tail = i64::try_from(size_of::<verbs_context>() - context).expect("small");
    stated.insert(
        "(sizeof(struct verbs_context) - offsetof(struct verbs_context, context))".into(),
        tail,
    );
    // What marks a context as extended.
    stated.insert("((uintptr_t)__VERBS_ABI_IS_EXTENDED == UINTPTR_MAX)".into(), 1);
    stated
}

#[test]
fn the_verbs_bindings_have_the_layout_of_the_c_headers() {
    const NAME: &str = "the_verbs_bindings_have_the_layout_of_the_c_headers";
    let mut stated = stated();
    assert!(stated.len() > 600, "only {} facts were found in types.rs", stated.len());
    stated.extend(stated_by_hand());

    let directory = tempfile::tempdir().expect("a directory");
    let (source, program) = (directory.path().join("layout.c"), directory.path().join("layout"));
    let mut c = String::new();
    for header in HEADERS {
        writeln!(c, "#include <{header}>").expect("written");
    }
    fs::write(&source, &c).expect("written");
    match Command::new("cc").arg("-fsyntax-only").arg(&source).output() {
        Err(e) => return not_run(NAME, &format!("there is no C compiler, cc: {e}")),
        Ok(output) if !output.status.success() => {
            return not_run(
                NAME,
                &format!("{HEADERS:?} are missing: apt install libibverbs-dev librdmacm-dev"),
            );
        }
        Ok(_) => {}
    }
    c.push_str("#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\nint main(void) {\n");
    for expression in stated.keys() {
        writeln!(c, "    printf(\"%s = %lld\\n\", \"{expression}\", (long long){expression});")
            .expect("written");
    }
    c.push_str("    return 0;\n}\n");
    fs::write(&source, &c).expect("written");
    let compiled =
        Command::new("cc").arg("-o").arg(&program).arg(&source).output().expect("cc runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&program).output().expect("the program runs");
    let text = String::from_utf8(output.stdout).expect("text");

    let mut compared = 0;
    let mut wrong = Vec::new();
    for line in text.lines() {
        let (expression, value) = line.rsplit_once(" = ").expect("an answer");
        let (here, there) = (stated[expression], value.parse::<i64>().expect("a number"));
        compared += 1;
        if here != there {
            wrong.push(format!("{expression}: {there} in C, {here} here"));
        }
    }
    assert_eq!(compared, stated.len(), "the program did not answer everything");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{compared} sizes, offsets and constants are those of C");
}
