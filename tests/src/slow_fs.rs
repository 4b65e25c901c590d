//! A file system in user space with one file on it, which answers each read after a while. Opened
//! with `FOPEN_DIRECT_IO` it has the kernel pin the memory of a plain read until the answer comes,
//! as sshfs, GlusterFS and others do; without, reads go through the page cache.

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// The name of its file.
const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
/// Nothing about the file ever changes.
const TTL: Duration = Duration::from_secs(3600);

/// A mount, taken away in the end.
#[derive(Debug)]
pub struct SlowFs {
    session: Option<BackgroundSession>,
    directory: tempfile::TempDir,
}

impl SlowFs {
    /// Shows `file` under another path, where each read takes `delay`, past the page cache if
    /// `direct`. Needs root and /dev/fuse.
    ///
    /// # Errors
    /// If this host cannot do that, with the reason.
    pub fn over(file: &Path, direct: bool, delay: Duration) -> Result<Self, String> {
        let directory = tempfile::tempdir().map_err(|e| format!("a directory to mount on: {e}"))?;
        let opened = File::options().read(true).write(true).open(file);
        let file = Arc::new(opened.map_err(|e| format!("{}: {e}", file.display()))?);
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("pageferry-slow".into())];
        let session = fuser::spawn_mount(Server { file, direct, delay }, directory.path(), &config)
            .map_err(|e| format!("mounting a FUSE file system: {e}"))?;
        Ok(Self { session: Some(session), directory })
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join(NAME)
    }
}

impl Drop for SlowFs {
    fn drop(&mut self) {
        // The directory is removed after it. Whoever still has the file open is answered with
        // errors.
        if let Some(session) = self.session.take() {
            let _ = Command::new("umount").arg("--lazy").arg(self.directory.path()).status();
            drop(session);
        }
    }
}

struct Server {
    file: Arc<File>,
    direct: bool,
    delay: Duration,
}

impl Server {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            FILE => (FileType::RegularFile, 0o600, self.file.metadata().ok()?.len()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(file) if parent == INodeNo::ROOT && name == NAME => {
                reply.entry(&TTL, &file, Generation(0))
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags =
            if self.direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (file, delay) = (Arc::clone(&self.file), self.delay);
        // Each on a thread of its own: they wait at the same time.
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let mut data = vec![0; size as usize];
            match file.read_at(&mut data, offset) {
                Ok(len) => reply.data(&data[..len]),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write_all_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
