//! Memory that nobody writes: a file mapped read-only, such as an image that is the guest's NVDIMM.
//!
//! It is not moved. Both hosts have it, and what both have is compared by its digest before
//! anything is touched.

use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::ImageDescription;
use pageferry_engine::host::maps::Mapping;
use pageferry_engine::memory::file::FileId;
use pageferry_transport::{Access, MemoryRegion};
use rustix::fs::fstat;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;

/// One such block.
#[derive(Debug)]
pub struct Image {
    name: String,
    file: File,
    /// Where the block begins in the file, and its length, in bytes.
    offset: u64,
    bytes: u64,
    /// What its digest was, and of which state of the file.
    digested: Option<(FileState, u128)>,
}

/// By which a changed file is told from one that has not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileState {
    id: FileId,
    bytes: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Image {
    /// The block of this name and length, which QEMU process `pid` has mapped so.
    pub(super) fn open(pid: u32, name: &str, bytes: u64, mapping: &Mapping) -> Result<Self> {
        let directory = format!("/proc/{pid}/fd");
        let entries =
            fs::read_dir(&directory).map_err(|e| Error::os(format!("reading {directory}"), e))?;
        for entry in entries.flatten() {
            if let Some(file) = opened(&entry.path())
                && is_mapped_as(&file, mapping)
            {
                return Ok(Self {
                    name: name.into(),
                    file,
                    offset: mapping.offset,
                    bytes,
                    digested: None,
                });
            }
        }
        Err(Error::refused(format!(
            "QEMU (process {pid}) holds no descriptor of the file behind memory block {name}, so pageferry cannot compare it"
        )))
    }

    /// Name of the block.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds now. It is read only where that may have changed.
    pub fn describe(&mut self) -> Result<ImageDescription> {
        let before = self.state()?;
        let digest = match self.digested {
            Some((state, digest)) if state == before => digest,
            _ => self.digest()?,
        };
        self.digested = Some((before, digest));
        Ok(ImageDescription { name: self.name.clone(), bytes: self.bytes, digest })
    }

    /// Fails if somebody has changed the file since it was described.
    pub fn check(&self) -> Result<()> {
        if self.digested.is_none_or(|(state, _)| self.state().is_ok_and(|now| now == state)) {
            return Ok(());
        }
        Err(Error::Guest(format!(
            "the file of the read-only memory block {} was changed since it was compared: nobody may write it while a guest \
             uses it",
            self.name
        )))
    }

    /// Whether it is the same part of the same file.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let of = |image: &Self| {
            (image.name.clone(), image.offset, image.bytes, FileId::of(&image.file).ok())
        };
        of(self) == of(other)
    }

    fn state(&self) -> Result<FileState> {
        let stat =
            fstat(&self.file).map_err(|e| Error::os(format!("looking at {}", self.name), e))?;
        Ok(FileState {
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            bytes: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
        })
    }

    /// The XXH3-128 of its bytes. Read and not mapped: a file that ends too early is then an error.
    fn digest(&self) -> Result<u128> {
        let mut hash = Xxh3::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut done = 0;
        while done < self.bytes {
            let len = (self.bytes - done).min(CHUNK_BYTES as u64) as usize;
            self.file.read_exact_at(&mut chunk[..len], self.offset + done).map_err(|e| {
                Error::os(format!("reading the file of memory block {}", self.name), e)
            })?;
            hash.update(&chunk[..len]);
            done += len as u64;
        }
        Ok(hash.digest128())
    }
}

/// A regular file behind one of QEMU's descriptors.
fn opened(path: &Path) -> Option<File> {
    // Looked at first: opening a pipe would wait for its other end.
    fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    File::open(path).ok()
}

/// Whether it is the file of this mapping. Where `/proc/PID/maps` names another device than stat(2)
/// does (btrfs, overlayfs), a mapping of our own shows what it is called there.
fn is_mapped_as(file: &File, mapping: &Mapping) -> bool {
    if FileId::of(file).is_ok_and(|id| id.is_mapped_as(mapping.device, mapping.inode)) {
        return true;
    }
    let Ok(region) = MemoryRegion::map_shared(file.as_fd(), 0, 1, Access::Read) else {
        return false;
    };
    let address = region.as_ptr() as u64;
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines()
        .filter_map(Mapping::parse)
        .find(|ours| ours.start <= address && address < ours.end)
        .is_some_and(|ours| (ours.device, ours.inode) == (mapping.device, mapping.inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_holds_is_described_anew_only_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, vec![7; 3 << 20]).unwrap();
        let image = |offset, bytes| Image {
            name: "i".into(),
            file: File::open(&path).unwrap(),
            offset,
            bytes,
            digested: None,
        };
        let mut whole = image(0, 3 << 20);
        let first = whole.describe().unwrap();
        assert_eq!(
            (first.bytes, first.digest),
            (3 << 20, image(0, 3 << 20).describe().unwrap().digest)
        );
        assert_eq!(whole.describe().unwrap(), first);
        whole.check().unwrap();
        assert_ne!(image(0, 2 << 20).describe().unwrap().digest, first.digest);
        let mut bytes = vec![7; 3 << 20];
        bytes[2 << 20] = 8;
        fs::write(&path, bytes).unwrap();
        assert!(whole.check().unwrap_err().to_string().contains("changed"));
        assert_ne!(whole.describe().unwrap().digest, first.digest);
        whole.check().unwrap();
        assert!(image(0, (3 << 20) + 1).describe().is_err(), "the file ends before the block does");
    }
}
