//! Lines of `/proc/PID/maps`.

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The address behind its last.
    pub end: u64,
    /// May be read.
    pub readable: bool,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// Writes reach the file and all other mappings of it.
    pub shared: bool,
    /// Of `start`, in its file.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u64, u64),
    /// Zero if there is no file.
    pub inode: u64,
}

impl Mapping {
    /// Reads a line, if it is one.
    pub fn parse(line: &str) -> Option<Self> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let permissions = words.next()?;
        let offset = hex(words.next()?)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let inode = words.next()?.parse().ok()?;
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            readable: permissions.starts_with('r'),
            writable: permissions.get(1..2) == Some("w"),
            executable: permissions.get(2..3) == Some("x"),
            shared: permissions.ends_with('s'),
            offset,
            device: (hex(major)?, hex(minor)?),
            inode,
        })
    }
}
