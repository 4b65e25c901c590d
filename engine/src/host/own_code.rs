//! Has the kernel map this program's own code ahead of the downtime.
//!
//! Much of what runs while a guest is paused runs for the first time then, and each page of code
//! that was not touched before is a fault; a read from a disk or a file server, if the page cache
//! has lost it.

use crate::host::maps::Mapping;
use rustix::mm::{Advice, madvise};
use std::collections::HashSet;

/// Maps all code and constants of this process. What fails is faulted in when it is used.
pub(crate) fn map_own_code() {
    for mapping in code_in(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default()) {
        let start = std::ptr::without_provenance_mut(mapping.start as usize);
        // SAFETY: populating a mapping for reading changes no content, and one that is gone
        // meanwhile is an error.
        let mapped = unsafe {
            madvise(start, (mapping.end - mapping.start) as usize, Advice::LinuxPopulateRead)
        };
        if let Err(e) = mapped {
            tracing::debug!(error = %e, start = mapping.start, "code is not mapped ahead");
        }
    }
}

/// Code, and the constants of files with code, as nobody can write them here. Neither guest memory
/// nor another file that is mapped to be read is among them.
fn code_in(maps: &str) -> Vec<Mapping> {
    let private = |mapping: &Mapping| {
        mapping.readable && !mapping.writable && !mapping.shared && mapping.inode != 0
    };
    let candidates: Vec<_> = maps.lines().filter_map(Mapping::parse).filter(private).collect();
    let file = |mapping: &Mapping| (mapping.device, mapping.inode);
    let with_code: HashSet<_> =
        candidates.iter().filter(|mapping| mapping.executable).map(file).collect();
    candidates.into_iter().filter(|mapping| with_code.contains(&file(mapping))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_its_constants_are_found_and_nothing_else() {
        let code = code_in(
            "55e0a0-55e0b0 r-xp 00001000 fe:01 4711                     /usr/bin/pageferry\n\
             55e0b0-55e0c0 r--p 00011000 fe:01 4711                     /usr/bin/pageferry\n\
             55e0c0-55e0d0 rw-p 00021000 fe:01 4711                     /usr/bin/pageferry\n\
             55e0d0-55e0e0 ---p 00021000 fe:01 4711                     /usr/bin/pageferry\n\
             6f0000-6f8000 r--p 00000000 fe:01 4712                     /var/lib/images/large.raw\n\
             7f0000-7f8000 r--s 00000000 00:01 12                       /memfd:pageferry-low (deleted)\n\
             7ffc00-7ffc20 r-xp 00000000 00:00 0                        [vdso]\n",
        );
        assert_eq!(
            code.iter().map(|mapping| mapping.start).collect::<Vec<_>>(),
            [0x55_e0a0, 0x55_e0b0]
        );
    }

    #[test]
    fn all_code_of_this_process_is_mapped_afterwards() {
        map_own_code();
        let all = code_in(&std::fs::read_to_string("/proc/self/maps").unwrap());
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut checked, mut code) = (0, None);
        for line in smaps.lines() {
            if let Some(mapping) = Mapping::parse(line) {
                code = Some(mapping).filter(|mapping| all.contains(mapping));
            } else if let (Some(mapping), Some(kib)) = (&code, line.strip_prefix("Rss:")) {
                let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap();
                // Of a file that is shorter than its mapping the rest is not there.
                assert!(
                    kib << 10 >= (mapping.end - mapping.start) / 2,
                    "{mapping:?} has {kib} KiB"
                );
                checked += 1;
            }
        }
        assert!(checked > 2, "{checked}");
    }
}
