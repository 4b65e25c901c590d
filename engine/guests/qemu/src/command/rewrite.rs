//! The command line that is started, made from the one that the operator gave.

use crate::command::backend::{
    on, properties, properties_of, rewrite_object, rewrite_properties, string,
};
use crate::command::memory_file::MemoryFile;
use crate::command::options::{
    DEFAULT_MEMORY_BYTES, memory_option_bytes, option_name, pairs, parse_size, refused, text,
};
use crate::command::readconfig;
use crate::command::role::Role;
use pageferry_engine::error::{Error, Result};
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Ids of what is added.
pub(crate) const MONITOR_ID: &str = "pageferry-qmp";

const MEMORY_ID: &str = "pageferry.ram";

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

/// Rewrites a command for `role`; `memory` makes a file and says under which number QEMU inherits
/// it.
///
/// # Errors
/// [`Error::Refused`] with the fix for what cannot be moved.
pub fn rewrite(
    words: &[OsString],
    role: Role,
    memory: &mut dyn FnMut(&MemoryFile) -> Result<i32>,
) -> Result<Vec<OsString>> {
    let (program, rest) = words.split_first().ok_or_else(|| {
        Error::refused(
            "there is no QEMU command: write it after `--`, as in `-- qemu-system-x86_64 -m 2G`",
        )
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
            return Err(Error::refused(format!(
                "the QEMU option {} lacks its value",
                word.display()
            )));
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
                own_memory |=
                    pairs(text(word, value)?, "type").iter().any(|(key, _)| key == "memdev");
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
        let file =
            MemoryFile { name: MEMORY_ID.into(), bytes: memory_bytes, huge_page_bytes: None };
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

/// The files that a user's command names for memory that QEMU will write: those of shared, writable
/// `memory-backend-file`s.
pub fn memory_paths(words: &[OsString]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut rest = words.iter().skip(1);
    while let Some(word) = rest.next() {
        let Some(name) = option_name(word).filter(|name| !WITHOUT_VALUE.contains(name)) else {
            continue;
        };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::start::GuestCommand;
    use crate::memory::find;
    use crate::testing::TestQemu;
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
            assert_eq!(
                files,
                [MemoryFile { name: "pageferry.ram".into(), bytes, huge_page_bytes: None }]
            );
        }
    }

    #[test]
    fn a_size_that_is_none_is_refused() {
        for odd in [
            "x",
            "",
            "-5",
            "5Q",
            "0x20",
            "1e3",
            "1.",
            ".5",
            "99999999999999999999",
            "16000000000T",
            "5G5",
        ] {
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
        assert_eq!(
            files,
            [MemoryFile { name: "m".into(), bytes: 1 << 20, huge_page_bytes: Some(0) }]
        );
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
        let (out, files) =
            rewritten(&format!("{shared}[machine]\n memory-backend = \"m\"\n")).unwrap();
        assert!(files.is_empty() && !out.contains("pageferry.ram"), "{out}");
        let words = ["qemu", "-readconfig", path.to_str().unwrap()].map(OsString::from);
        assert_eq!(memory_paths(&words).unwrap(), [Path::new("/dev/shm/m")]);
        for kind in ["ram", "memfd", "file"] {
            let text =
                format!("[object \"m\"]\n qom-type = \"memory-backend-{kind}\"\n size = \"64M\"\n");
            let refusal = rewritten(&text).unwrap_err().to_string();
            assert!(
                refusal.contains("[object \"m\"]") && refusal.contains("share = "),
                "{refusal}"
            );
        }
        let iothread = "[object \"t\"]\n qom-type = \"iothread\"\n";
        assert_eq!(rewritten(iothread).unwrap().1.len(), 1);
    }

    #[test]
    fn a_file_that_nobody_writes_is_shared_and_one_that_is_written_in_private_is_refused() {
        let image = "memory-backend-file,id=i,size=1G,mem-path=/img,readonly=on";
        let (out, files) = source(&format!("qemu -m 64M -object {image}")).unwrap();
        assert!(
            out.contains(&format!(
                "-object {image},share=on -object memory-backend-file,id=pageferry.ram"
            )),
            "{out}"
        );
        assert_eq!(files.len(), 1);
        let (out, _) = source(&format!("qemu -m 64M -object {image},share=off,rom=auto")).unwrap();
        assert!(out.contains(&format!("{image},share=on,rom=auto")), "{out}");
        assert!(
            refusal(&format!("qemu -object {image},rom=off"), Role::Source)
                .contains("add share=on")
        );
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
                let line =
                    format!("qemu-system-x86_64 -nodefaults -display none -accel tcg {options}");
                let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
                let prepared = GuestCommand::prepare(&words, role, &socket).unwrap();
                let mut qemu = TestQemu::of(&mut prepared.command(), &socket, directory);
                drop(prepared);
                let pid = qemu.pid();
                let found =
                    find::find(&mut qemu.qmp, pid, Access::Write, TestQemu::soon()).unwrap();
                let blocks: Vec<_> =
                    found.shared.iter().map(|b| (b.name.as_str(), b.bytes)).collect();
                assert_eq!(blocks, blocks_wanted, "{options}");
                pageferry_engine::memory::GuestMemory::map(found.shared, Access::Write).unwrap();
                let status =
                    qemu.qmp.execute("query-status", Value::Null, TestQemu::soon()).unwrap();
                let expected = if role == Role::Source { "running" } else { "inmigrate" };
                assert_eq!(status["status"], expected);
            }
        }
    }
}
